//! `chplay`: plays a Cloud Hypervisor for tests of its migration protocol, after
//! the protocol's description and not after Drover's code. It has no vCPU: its
//! "guest" is a thread that writes pages and counts, and its dirty log is what
//! that thread says it wrote.
//!
//! Each connection to the control socket brings one line and gets one:
//!
//! | line | answer |
//! |---|---|
//! | `send PATH [local]` | `ok`; how it went is in the status |
//! | `receive PATH` | `ok` once it listens there |
//! | `status` | `running N`, `paused N` or `none`, N being what it has counted to; then the last error |

mod guest;
mod receive;
mod send;
mod wire;

use anyhow::{Context, Result, bail};
use clap::Parser;
use guest::Guest;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

#[derive(Parser)]
struct Cli {
    /// Name of the VM, for `ps`.
    #[arg(long)]
    name: String,
    /// Control socket.
    #[arg(long)]
    control: PathBuf,
    /// MiB of RAM of a guest to start; without it, one is waited for.
    #[arg(long)]
    ram_mib: Option<u64>,
    /// Decides the content that is not common.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// What the control socket tells of.
#[derive(Debug, Default)]
struct Vmm {
    guest: Mutex<Option<Arc<Guest>>>,
    error: Mutex<String>,
}

impl Vmm {
    fn guest(&self) -> Option<Arc<Guest>> {
        self.guest.lock().expect("no thread panics").clone()
    }

    fn has(&self, guest: Option<Arc<Guest>>) {
        *self.guest.lock().expect("no thread panics") = guest;
    }

    fn failed(&self, error: &anyhow::Error) {
        let mut said = self.error.lock().expect("no thread panics");
        *said = format!("{error:#}").replace('\n', " ");
    }
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
    let vmm = Arc::new(Vmm::default());
    if let Some(mib) = cli.ram_mib {
        let guest = Guest::new(mib << 20, cli.seed)?;
        guest.fill()?;
        guest.run(true);
        vmm.has(Some(guest));
    }
    let listener = UnixListener::bind(&cli.control)?;
    for connection in listener.incoming() {
        let connection = connection?;
        let mut line = String::new();
        BufReader::new(&connection).read_line(&mut line)?;
        let answer = obey(&vmm, line.trim()).unwrap_or_else(|error| format!("error: {error:#}"));
        // Whoever asked may have gone.
        let _ = (&connection).write_all(format!("{answer}\n").as_bytes());
    }
    bail!("{}: the control socket has closed", cli.name)
}

fn obey(vmm: &Arc<Vmm>, line: &str) -> Result<String> {
    let words: Vec<&str> = line.split(' ').collect();
    match words[..] {
        ["status"] => {
            let mut said = vmm
                .guest()
                .map_or("none".to_owned(), |guest| guest.to_string());
            write!(said, " {}", vmm.error.lock().expect("no thread panics"))?;
            Ok(said)
        }
        ["send", path, ref how @ ..] => {
            let guest = vmm.guest().context("there is no VM")?;
            let stream = UnixStream::connect(path).context("connecting")?;
            let (vmm, local) = (vmm.clone(), *how == ["local"]);
            std::thread::spawn(move || match send::send(&guest, &stream, local) {
                // It lives at the other end now.
                Ok(()) => std::process::exit(0),
                Err(error) => {
                    guest.run(true);
                    vmm.failed(&error);
                }
            });
            Ok("ok".to_owned())
        }
        ["receive", path] => {
            let listener = UnixListener::bind(Path::new(path)).context("listening")?;
            let vmm = vmm.clone();
            std::thread::spawn(move || {
                if let Err(error) = receive::receive(&listener, &vmm) {
                    vmm.has(None);
                    vmm.failed(&error);
                }
            });
            Ok("ok".to_owned())
        }
        _ => bail!("what is `{line}`?"),
    }
}
