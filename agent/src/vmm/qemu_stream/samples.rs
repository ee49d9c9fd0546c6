//! Streams as QEMU makes them, put together byte by byte for the tests and for
//! the seeds of the fuzz targets: no code of the parser or the writer.

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;

/// A RAM block: name, bytes.
pub(crate) type Ram<'a> = (&'a [u8], u64);

/// A record of a section of RAM.
#[derive(Debug, Clone)]
pub(crate) enum Record {
    /// Block, page, fill byte; whether the block is named.
    Page(Vec<u8>, u64, u8, bool),
    /// As [`Record::Page`], with one byte.
    Zero(Vec<u8>, u64, u8, bool),
    Flush,
}

/// A stream in the making.
#[derive(Debug, Default)]
pub(crate) struct Stream(pub(crate) Vec<u8>);

impl Stream {
    pub(crate) fn new() -> Stream {
        Stream::default().add(b"QEVM\0\0\0\x03")
    }

    pub(crate) fn add(mut self, bytes: &[u8]) -> Stream {
        self.0.extend_from_slice(bytes);
        self
    }

    fn word(self, word: u32) -> Stream {
        self.add(&word.to_be_bytes())
    }

    fn long(self, word: u64) -> Stream {
        self.add(&word.to_be_bytes())
    }

    fn counted(self, name: &[u8]) -> Stream {
        self.add(&[name.len() as u8]).add(name)
    }

    pub(crate) fn configuration(self, machine: &[u8]) -> Stream {
        self.add(&[7]).word(machine.len() as u32).add(machine)
    }

    pub(crate) fn subsection(self, name: &[u8]) -> Stream {
        self.add(&[5]).counted(name).word(1)
    }

    pub(crate) fn capabilities(self, names: &[&[u8]]) -> Stream {
        let this = self
            .subsection(b"configuration/capabilities")
            .word(names.len() as u32);
        names.iter().fold(this, |this, name| this.counted(name))
    }

    pub(crate) fn uuid(self) -> Stream {
        self.subsection(b"configuration/uuid").add(&[9; 16])
    }

    pub(crate) fn command(self, number: u16, data: &[u8]) -> Stream {
        self.add(&[8])
            .add(&number.to_be_bytes())
            .add(&(data.len() as u16).to_be_bytes())
            .add(data)
    }

    /// OPEN_RETURN_PATH and a first PING.
    pub(crate) fn return_path(self) -> Stream {
        self.command(1, &[]).command(2, &[0, 0, 0, 1])
    }

    /// The beginning of a section with a name: of START (1) or FULL (4).
    pub(crate) fn start(self, kind: u8, id: u32, name: &[u8], version: u32) -> Stream {
        self.add(&[kind])
            .word(id)
            .counted(name)
            .word(0)
            .word(version)
    }

    /// The section of RAM begins: the list of blocks.
    pub(crate) fn ram(self, id: u32, blocks: &[Ram<'_>], addresses: bool) -> Stream {
        let total: u64 = blocks.iter().map(|(_, bytes)| bytes).sum();
        let mut this = self.start(1, id, b"ram", 4).long(total | 0x04);
        for (name, bytes) in blocks {
            this = this.counted(name).long(*bytes);
            if addresses {
                this = this.long(0x1_0000_0000);
            }
        }
        this.long(0x10)
    }

    /// A further section of RAM: PART (2) or END (3).
    pub(crate) fn part(self, kind: u8, id: u32, records: &[Record]) -> Stream {
        let mut this = self.add(&[kind]).word(id);
        for record in records {
            let (block, page, flag, named) = match record {
                Record::Page(block, page, _, named) => (block, page, 0x08, *named),
                Record::Zero(block, page, _, named) => (block, page, 0x02, *named),
                Record::Flush => {
                    this = this.long(0x200);
                    continue;
                }
            };
            let cont = if named { 0 } else { 0x20 };
            this = this.long((page * PAGE as u64) | flag | cont);
            if named {
                this = this.counted(block);
            }
            this = match record {
                Record::Page(_, page, fill, _) => this.add(&[*page as u8]).add(&[*fill; PAGE - 1]),
                Record::Zero(_, _, fill, _) => this.add(&[*fill]),
                Record::Flush => this,
            };
        }
        this.long(0x10)
    }

    pub(crate) fn footer(self, id: u32) -> Stream {
        self.add(&[0x7e]).word(id)
    }

    /// A device, the end and the description of the state.
    pub(crate) fn devices(self) -> Stream {
        self.start(4, 77, b"timer", 2)
            .add(&[1; 40])
            .footer(77)
            .add(&[0, 6])
            .word(2)
            .add(b"{}")
    }
}

/// The section of RAM has this id.
pub(crate) const ID: u32 = 2;
/// Blocks of the samples.
pub(crate) const BLOCKS: [Ram<'_>; 2] =
    [(b"pc.ram", 64 << 20), (b"/rom@etc/acpi/tables", 0x2_0000)];

fn record(page: u64, named: bool) -> Record {
    Record::Page(b"pc.ram".to_vec(), page, 5, named)
}

fn zero(page: u64, named: bool) -> Record {
    Record::Zero(b"/rom@etc/acpi/tables".to_vec(), page, 0, named)
}

/// Whole streams of main connections, with their names.
pub(crate) fn streams() -> Vec<(&'static str, Vec<u8>)> {
    let begun = || Stream::new().configuration(b"pc-q35-7.2").return_path();
    let plain = Stream::new()
        .configuration(b"pc-q35-7.2")
        .uuid()
        .return_path()
        .ram(ID, &BLOCKS, false)
        .footer(ID)
        .part(2, ID, &[record(0, true), zero(3, true), zero(4, false)])
        .footer(ID)
        .command(2, &[0, 0, 0, 3])
        .part(2, ID, &[zero(5, false), Record::Flush])
        .footer(ID)
        .part(3, ID, &[record(0x3fff, true)])
        .footer(ID)
        .devices();
    let shared = Stream::new()
        .configuration(b"pc-i440fx-7.2")
        .capabilities(&[b"x-ignore-shared"])
        .return_path()
        .ram(ID, &BLOCKS, true)
        .footer(ID)
        .part(3, ID, &[])
        .footer(ID)
        .devices();
    let old = Stream::new()
        .return_path()
        .ram(ID, &BLOCKS, false)
        .part(2, ID, &[zero(0, true)])
        .part(3, ID, &[])
        .devices();
    let newer = begun()
        .command(11, &[])
        .command(300, &[7; 300])
        .ram(ID, &BLOCKS, false)
        .part(3, ID, &[Record::Flush])
        .devices();
    let unknown = begun()
        .ram(ID, &BLOCKS, false)
        .footer(ID)
        .start(1, 3, b"dirty-bitmap", 1)
        .add(&[3; 90]);
    vec![
        ("plain", plain.0),
        ("ignore-shared", shared.0),
        ("no-footers", old.0),
        ("newer-commands", newer.0),
        ("dirty-bitmap", unknown.0),
    ]
}

/// The packet that a multifd connection begins with.
pub(crate) fn init(id: u8) -> Vec<u8> {
    let mut bytes = Stream::default().word(0x1122_3344).word(1).0;
    bytes.extend([9; 16]);
    bytes.push(id);
    bytes.resize(64, 0);
    bytes
}

/// A multifd packet with its pages: of these, then of zero pages (9.1).
pub(crate) fn packet(flags: u32, pages: &[u64], zeros: &[u64]) -> Vec<u8> {
    let next = match pages.len() as u32 {
        0 => 77, // stale
        pages => pages * PAGE as u32,
    };
    let mut this = Stream::default().word(0x1122_3344).word(1).word(flags);
    this = this.word(128).word(pages.len() as u32).word(next);
    this = this.long(5).word(zeros.len() as u32).add(&[0; 28]);
    let mut name = b"pc.ram\0old.block".to_vec();
    name.resize(256, 0);
    this = this.add(&name);
    for page in pages.iter().chain(zeros) {
        this = this.long(page * PAGE as u64);
    }
    // Places of an earlier packet.
    for _ in pages.len() + zeros.len()..128 {
        this = this.long(0x7001);
    }
    for page in pages {
        this = this.add(&[*page as u8; PAGE]);
    }
    this.0
}

/// Whole streams of multifd connections.
pub(crate) fn multifd() -> Vec<(&'static str, Vec<u8>)> {
    let plain = [packet(0, &[1, 9], &[]), packet(1, &[], &[])];
    let newer = [packet(0, &[], &[4, 5]), packet(1, &[6], &[7])];
    vec![
        ("plain", [init(0), plain.concat()].concat()),
        ("zero-pages", [init(1), newer.concat()].concat()),
        ("nothing", init(2)),
    ]
}

/// A message of the return path.
pub(crate) fn message(kind: u16, data: &[u8]) -> Vec<u8> {
    let len = (data.len() as u16).to_be_bytes();
    [&kind.to_be_bytes(), &len, data].concat()
}

/// Whole return paths.
pub(crate) fn replies() -> Vec<(&'static str, Vec<u8>)> {
    let (pong, shut) = (message(2, &[0, 0, 0, 1]), message(1, &[0; 4]));
    let ack = [message(7, &[]), message(90, &[5; 90])].concat();
    vec![
        ("pong-shut", [pong.clone(), shut.clone()].concat()),
        ("newer", [pong, ack, shut].concat()),
        ("failed", message(1, &[0, 0, 0, 1])),
    ]
}
