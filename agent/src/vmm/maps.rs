//! Text of `/proc/PID/maps`, as far as direct mode needs it.

use thiserror::Error;

/// One mapping of a process: a line of `/proc/PID/maps`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MapsRow {
    /// First address.
    pub start: u64,
    /// Address after the last byte.
    pub end: u64,
    /// Readable, writable, executable.
    pub perms: [bool; 3],
    /// `MAP_SHARED` (`s`) rather than private (`p`).
    pub shared: bool,
    /// Bytes into the file at `start`.
    pub offset: u64,
    /// Major and minor number of the file's device; 0:0 for anonymous memory.
    pub dev: (u32, u32),
    /// Inode of the file; 0 for anonymous memory.
    pub inode: u64,
    /// The path as the kernel writes it (newlines as `\012`, ` (deleted)` kept).
    pub path: String,
}

impl MapsRow {
    /// Bytes mapped.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }
    /// A row always maps something; here for clippy's and readers' sake.
    pub fn is_empty(&self) -> bool {
        self.end == self.start
    }
    /// Whether the row maps the file of this device number (`st_dev`) and inode.
    pub fn is_file(&self, st_dev: u64, inode: u64) -> bool {
        inode != 0
            && self.inode == inode
            && (self.dev.0, self.dev.1) == (libc::major(st_dev), libc::minor(st_dev))
    }
}

/// A line that is not what Linux writes.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("line {line} of a maps file: {what}")]
pub struct MapsError {
    /// Counted from 1.
    pub line: usize,
    /// What is wrong with it.
    pub what: &'static str,
}

/// Parses the whole text of a maps file. Pure: any text gives rows or an error.
pub fn parse_maps(text: &str) -> Result<Vec<MapsRow>, MapsError> {
    text.lines()
        .enumerate()
        .map(|(i, line)| parse_row(line).map_err(|what| MapsError { line: i + 1, what }))
        .collect()
}

fn parse_row(line: &str) -> Result<MapsRow, &'static str> {
    let hex = |s: &str, what| u64::from_str_radix(s, 16).map_err(|_| what);
    // The path may hold spaces: only the five fields before it are split off.
    let mut rest = line;
    let mut field = || {
        let s = rest.trim_start_matches(' ');
        let (head, tail) = s.split_once(' ').unwrap_or((s, ""));
        rest = tail;
        head
    };
    let (range, perms, offset, dev, inode) = (field(), field(), field(), field(), field());
    let (start, end) = range.split_once('-').ok_or("no address range")?;
    let (start, end) = (hex(start, "bad start")?, hex(end, "bad end")?);
    if end < start {
        return Err("range ends before it starts");
    }
    let perms: &[u8; 4] = perms.as_bytes().try_into().map_err(|_| "bad permissions")?;
    let (major, minor) = dev.split_once(':').ok_or("bad device")?;
    let small = |s| u32::from_str_radix(s, 16).map_err(|_| "bad device");
    Ok(MapsRow {
        start,
        end,
        perms: [perms[0] == b'r', perms[1] == b'w', perms[2] == b'x'],
        shared: perms[3] == b's',
        offset: hex(offset, "bad offset")?,
        dev: (small(major)?, small(minor)?),
        inode: inode.parse().map_err(|_| "bad inode")?,
        path: rest.trim_start_matches(' ').to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_what_linux_writes() {
        let text = "\
7f5e40000000-7f5e50000000 rw-s 00010000 00:1a 4711                       /dev/shm/vm one.ram (deleted)
7fff12345000-7fff12347000 r-xp 00000000 00:00 0                          [vdso]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
55d0c0000000-55d0c0021000 rw-p 00000000 fe:01 99 ";
        let rows = parse_maps(text).unwrap();
        assert_eq!(rows.len(), 4);
        assert_eq!(rows[0].path, "/dev/shm/vm one.ram (deleted)");
        assert_eq!((rows[0].len(), rows[0].offset), (0x1000_0000, 0x1_0000));
        assert!(rows[0].shared && rows[0].perms == [true, true, false]);
        assert!(rows[0].is_file(libc::makedev(0, 0x1a), 4711));
        assert!(!rows[0].is_file(libc::makedev(0, 0x1b), 4711));
        assert_eq!(rows[1].path, "[vdso]");
        assert!(!rows[1].is_file(0, 0), "anonymous memory is no file");
        assert_eq!(rows[3].path, "");
    }

    #[test]
    fn own_maps_parse() {
        let text = std::fs::read_to_string("/proc/self/maps").unwrap();
        let rows = parse_maps(&text).unwrap();
        assert!(rows.iter().any(|r| r.path == "[stack]"));
    }

    #[test]
    fn says_which_line() {
        assert_eq!(
            parse_maps("1-2 rw-p 0 0:0 0\nnonsense").unwrap_err().line,
            2
        );
        assert_eq!(
            parse_maps("2-1 rw-p 0 0:0 0").unwrap_err().what,
            "range ends before it starts"
        );
    }

    proptest! {
        #[test]
        fn never_panics(text in ".{0,400}") {
            let _ = parse_maps(&text);
        }

        #[test]
        fn roundtrip(start in 0u64..1 << 47, pages in 1u64..1 << 20, offset in 0u64..1 << 40,
                     major in 0u32..4096, minor in 0u32..1 << 20, inode: u64, shared: bool,
                     path in "(/[a-z ]{0,20}[a-z])?") {
            let row = MapsRow { start, end: start + pages * 4096, perms: [true, shared, false], shared,
                                offset, dev: (major, minor), inode, path };
            let line = format!("{:x}-{:x} r{}-{} {:08x} {:02x}:{:02x} {}   {}", row.start, row.end,
                if shared {'w'} else {'-'}, if shared {'s'} else {'p'}, offset, major, minor, inode, row.path);
            prop_assert_eq!(parse_maps(&line).unwrap(), vec![row]);
        }
    }
}
