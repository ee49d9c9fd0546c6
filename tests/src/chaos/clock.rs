//! A wall clock that jumps, for one process alone.
//!
//! The machine's clock is everybody's, and a time namespace has none of its
//! own for `CLOCK_REALTIME`. So the process is given other code to read it
//! with: programs ask for the time through the kernel's vDSO, a page of code
//! in their address space, and that page is private once it is written to, as
//! debuggers do for breakpoints. `clock_gettime`, `gettimeofday` and `time` are
//! led to code in the unused end of that page, which asks the kernel and adds
//! the jump. Monotonic clocks stay as they are, as in a real jump.

use crate::registry;
use anyhow::{Context, Result, bail, ensure};
use object::{Object, ObjectSymbol};
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// How long a process may take to stand still.
const PATIENCE: Duration = Duration::from_secs(5);
/// A jump over 32 bits: what is overwritten of a function.
const JUMP: usize = 5;

/// A process whose wall clock is wrong until this is dropped.
#[derive(Debug)]
pub struct ClockJump {
    pid: i32,
    pidfd: OwnedFd,
    /// Where functions begin, and what was there.
    entries: Vec<(u64, [u8; JUMP])>,
}

impl ClockJump {
    /// Makes the wall clock of a process jump.
    ///
    /// # Errors
    /// When the process is gone or its vDSO is not as expected.
    pub fn new(pid: i32, seconds: i64) -> Result<ClockJump> {
        let pidfd = registry::pidfd(pid)?;
        let memory = memory(pid)?;
        let (start, image) = vdso(pid, &memory)?;
        let file = object::File::parse(&*image).context("the vDSO is no ELF file")?;
        let code = [
            ("__vdso_clock_gettime", clock_gettime(seconds)),
            ("__vdso_gettimeofday", gettimeofday(seconds)),
            ("__vdso_time", time(seconds)),
        ];
        let unused = image.iter().rev().take_while(|byte| **byte == 0).count();
        // Away from the last byte that is used, and aligned.
        let mut free = (image.len() - unused + 64).next_multiple_of(16);
        let mut entries = Vec::new();
        let mut detours = Vec::new();
        for (name, code) in code {
            let symbol = file.dynamic_symbols().find(|s| s.name() == Ok(name));
            let at = symbol
                .with_context(|| format!("the vDSO has no {name}"))?
                .address();
            let entry = image.get(at as usize..).and_then(|from| from.first_chunk());
            let entry: &[u8; JUMP] =
                entry.with_context(|| format!("{name} is outside the vDSO"))?;
            ensure!(
                free + code.len() <= image.len(),
                "the vDSO has no room for {name}"
            );
            memory.write_all_at(&code, start + free as u64)?;
            let away = free as i64 - (at as i64 + JUMP as i64);
            let mut jump = [0xe9, 0, 0, 0, 0];
            jump[1..].copy_from_slice(&i32::try_from(away)?.to_le_bytes());
            entries.push((start + at, *entry));
            detours.push((start + at, jump));
            free = (free + code.len()).next_multiple_of(16);
        }
        let jump = ClockJump {
            pid,
            pidfd,
            entries,
        };
        jump.replace(&detours)?;
        Ok(jump)
    }

    /// Writes the first bytes of functions while no thread is in them.
    fn replace(&self, entries: &[(u64, [u8; JUMP])]) -> Result<()> {
        let memory = memory(self.pid)?;
        let until = Instant::now() + PATIENCE;
        loop {
            registry::send_signal(&self.pidfd, libc::SIGSTOP);
            let inside = |at: u64| {
                entries
                    .iter()
                    .any(|(from, _)| (from + 1..from + JUMP as u64).contains(&at))
            };
            let still =
                stopped_at(self.pid).map(|at| at.is_some_and(|at| !at.into_iter().any(inside)));
            let done = match &still {
                Ok(true) => entries
                    .iter()
                    .try_for_each(|(at, bytes)| memory.write_all_at(bytes, *at)),
                _ => Ok(()),
            };
            registry::send_signal(&self.pidfd, libc::SIGCONT);
            done?;
            if still? {
                return Ok(());
            }
            if Instant::now() > until {
                bail!("process {} does not stand still", self.pid);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for ClockJump {
    fn drop(&mut self) {
        // A process that has ended has no clock to put right.
        let alive = fs::metadata(format!("/proc/{}", self.pid)).is_ok();
        if alive && let Err(error) = self.replace(&self.entries) {
            eprintln!("the clock of process {} stays wrong: {error:#}", self.pid);
        }
    }
}

fn memory(pid: i32) -> Result<File> {
    let path = format!("/proc/{pid}/mem");
    File::options()
        .read(true)
        .write(true)
        .open(&path)
        .context(path)
}

/// Where the vDSO is, and what is in it.
fn vdso(pid: i32, memory: &File) -> Result<(u64, Vec<u8>)> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let line = maps.lines().find(|line| line.ends_with("[vdso]"));
    let range = line.and_then(|line| line.split(' ').next()?.split_once('-'));
    let (from, to) = range.with_context(|| format!("process {pid} has no vDSO"))?;
    let (from, to) = (u64::from_str_radix(from, 16)?, u64::from_str_radix(to, 16)?);
    let mut image = vec![0; (to - from) as usize];
    memory.read_exact_at(&mut image, from)?;
    Ok((from, image))
}

/// Where the threads of a stopped process stand, `None` if some still run.
fn stopped_at(pid: i32) -> Result<Option<Vec<u64>>> {
    let mut at = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?.path();
        let stat = fs::read_to_string(task.join("stat"))?;
        let state = stat.rsplit_once(") ").map(|(_, rest)| rest.as_bytes()[0]);
        if state != Some(b'T') {
            return Ok(None);
        }
        let syscall = fs::read_to_string(task.join("syscall"))?;
        let last = syscall.split_whitespace().last().unwrap_or_default();
        let Some(Ok(pc)) = last
            .strip_prefix("0x")
            .map(|hex| u64::from_str_radix(hex, 16))
        else {
            return Ok(None);
        };
        at.push(pc);
    }
    Ok(Some(at))
}

/// `clock_gettime(edi, rsi)`, `CLOCK_REALTIME` and `CLOCK_REALTIME_COARSE` off.
fn clock_gettime(seconds: i64) -> Vec<u8> {
    let mut code = vec![
        0xb8, 228, 0, 0, 0, // mov eax, 228
        0x0f, 0x05, // syscall
        0x85, 0xc0, // test eax, eax
        0x75, 0x16, // jnz out
        0x85, 0xff, // test edi, edi
        0x74, 0x05, // jz add
        0x83, 0xff, 5, // cmp edi, 5
        0x75, 0x0d, // jne out
        0x48, 0xba, // add: mov rdx, seconds
    ];
    code.extend(seconds.to_le_bytes());
    code.extend([0x48, 0x01, 0x16]); // add [rsi], rdx
    code.push(0xc3); // out: ret
    code
}

/// `gettimeofday(rdi, rsi)`.
fn gettimeofday(seconds: i64) -> Vec<u8> {
    let mut code = vec![
        0xb8, 96, 0, 0, 0, // mov eax, 96
        0x0f, 0x05, // syscall
        0x48, 0x85, 0xff, // test rdi, rdi
        0x74, 0x0d, // jz out
        0x48, 0xba, // mov rdx, seconds
    ];
    code.extend(seconds.to_le_bytes());
    code.extend([0x48, 0x01, 0x17]); // add [rdi], rdx
    code.push(0xc3); // out: ret
    code
}

/// `time(rdi)`.
fn time(seconds: i64) -> Vec<u8> {
    let mut code = vec![
        0x31, 0xd2, // xor edx, edx
        0x57, // push rdi
        0x48, 0x89, 0xd7, // mov rdi, rdx
        0xb8, 201, 0, 0, 0, // mov eax, 201
        0x0f, 0x05, // syscall
        0x5f, // pop rdi
        0x48, 0xba, // mov rdx, seconds
    ];
    code.extend(seconds.to_le_bytes());
    code.extend([
        0x48, 0x01, 0xd0, // add rax, rdx
        0x48, 0x85, 0xff, // test rdi, rdi
        0x74, 0x03, // jz out
        0x48, 0x89, 0x07, // mov [rdi], rax
        0xc3, // out: ret
    ]);
    code
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};
    use std::time::{SystemTime, UNIX_EPOCH};

    #[test]
    fn one_process_sees_the_jump_and_sees_it_end() -> Result<()> {
        // Bash asks for the time itself, without starting a program for it.
        let mut child = Command::new("bash")
            .args(["-c", r#"while printf "%(%s)T\n" -1; do read -t 0.02; done"#])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = child.stdout.take().context("its output is a pipe")?;
        let mut lines = BufReader::new(stdout).lines();
        let mut ahead = || -> Result<i64> {
            // What is in the pipe already was said before.
            for _ in 0..20 {
                lines.next().context("no more lines")??;
            }
            let says: i64 = lines.next().context("no more lines")??.parse()?;
            Ok(says - SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs() as i64)
        };
        let checked = (|| {
            ensure!(ahead()?.abs() < 60);
            for jump in [3600, -3600] {
                let clock = ClockJump::new(child.id() as i32, jump)?;
                let is = ahead()?;
                ensure!((is - jump).abs() < 60, "{is} instead of {jump}");
                drop(clock);
                ensure!(ahead()?.abs() < 60, "not put right");
            }
            Ok(())
        })();
        child.kill()?;
        child.wait()?;
        checked
    }
}
