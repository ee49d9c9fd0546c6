//! A VM of 1 MiB that writes the pages it is told, and an agent to ask for them.

use drover_vmm::wire::{Answer, Bits, LogKind, RegionInfo, Request, Status};
use drover_vmm::{
    CallError, Connection, DirtyRings, EXIT_RING_FULL, Link, Region, Role, Server, Vmm,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub(crate) const RAM: usize = 1 << 20;
pub(crate) const PAGES: u64 = (RAM / 4096) as u64;
const LIMIT: Duration = Duration::from_secs(20);

/// in ax, 0x10; mov ds, ax; inc byte [0]; out 0x11, al; jmp
const CODE: [u8; 12] = [
    0xe5, 0x10, 0x8e, 0xd8, 0xfe, 0x06, 0, 0, 0xe6, 0x11, 0xeb, 0xf4,
];

/// What the link's calls came to, and what they are to answer.
#[derive(Debug, Default)]
pub(crate) struct Told {
    pub(crate) running: bool,
    pub(crate) ended: bool,
    pub(crate) loaded: Vec<u8>,
    pub(crate) fail_load: bool,
}

struct Machine(Arc<Mutex<Told>>);

impl Machine {
    fn set(&self, running: bool) -> bool {
        std::mem::replace(&mut self.0.lock().unwrap().running, running)
    }
}

/// Longer than a chunk, and no multiple of one.
pub(crate) fn state() -> Vec<u8> {
    (0..200_001u32).map(|i| (i % 251) as u8).collect()
}

impl Vmm for Machine {
    fn is_running(&mut self) -> bool {
        self.0.lock().unwrap().running
    }
    fn pause(&mut self) -> Result<bool, CallError> {
        Ok(self.set(false))
    }
    fn resume(&mut self) -> Result<(), CallError> {
        self.set(true);
        Ok(())
    }
    fn save_state(&mut self, out: &mut dyn Write) -> Result<(), CallError> {
        Ok(out.write_all(&state())?)
    }
    fn load_state(&mut self, state: &mut dyn Read) -> Result<(), CallError> {
        if self.0.lock().unwrap().fail_load {
            return Err("made of cheese".into());
        }
        state.read_to_end(&mut self.0.lock().unwrap().loaded)?;
        Ok(())
    }
    fn end(&mut self) {
        self.0.lock().unwrap().ended = true;
    }
    // The vCPU leaves the guest after each page by itself.
    fn kick(&mut self) {}
}

/// A VM with its link served.
pub(crate) struct Vm {
    pub(crate) told: Arc<Mutex<Told>>,
    pub(crate) marks: drover_vmm::Marks,
    pub(crate) server: Option<Server>,
    pub(crate) socket: PathBuf,
    pages: Sender<u16>,
    written: Receiver<()>,
    _dir: tempfile::TempDir,
}

impl Vm {
    /// `ring`: entries of a dirty ring, instead of bitmaps.
    pub(crate) fn new(ring: Option<usize>, role: Role) -> Vm {
        let kvm = Kvm::new().expect("/dev/kvm, as root");
        let vm = kvm.create_vm().unwrap();
        let rings = ring.map(|entries| DirtyRings::enable(&vm, entries).unwrap());
        let dir = tempfile::tempdir().unwrap();
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(dir.path().join("ram"))
            .unwrap();
        file.set_len(RAM as u64).unwrap();
        let host = map(&file);
        let region = kvm_bindings::kvm_userspace_memory_region {
            slot: 3,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: RAM as u64,
            userspace_addr: host as u64,
        };
        // SAFETY: the mapping is never unmapped.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &CODE, 0).unwrap();
        // SAFETY: set up just so, for good.
        let region = unsafe { Region::new(3, 0, RAM as u64, host, Arc::new(file), 0) };
        let vcpu = vm.create_vcpu(0).unwrap();
        if let Some(rings) = &rings {
            rings.add_vcpu(&vcpu).unwrap();
        }
        let (pages, wanted) = channel();
        let (done, written) = channel();
        let thread_rings = rings.clone();
        std::thread::spawn(move || run(vcpu, thread_rings, &wanted, &done));
        let link = Link::new(&vm, vec![region], rings).unwrap();
        let told = Arc::new(Mutex::new(Told {
            running: role == Role::Run,
            ..Told::default()
        }));
        let socket = dir.path().join("link.sock");
        let marks = link.marks();
        let server = link.serve(&socket, role, Machine(told.clone())).unwrap();
        Vm {
            told,
            marks,
            server: Some(server),
            socket,
            pages,
            written,
            _dir: dir,
        }
    }

    /// Has the guest write these pages.
    pub(crate) fn write(&self, pages: impl IntoIterator<Item = u64>) {
        for page in pages {
            self.pages.send(page as u16).unwrap();
            self.written.recv_timeout(LIMIT).expect("the guest writes");
        }
    }

    pub(crate) fn agent(&self) -> Agent {
        Agent::connect(self)
    }
}

#[allow(unsafe_code)]
fn map(file: &File) -> *mut u8 {
    let flags = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let len = NonZeroUsize::new(RAM).unwrap();
    // SAFETY: a new mapping, which stays.
    let at = unsafe { mmap(None, len, flags, MapFlags::MAP_SHARED, file, 0) };
    at.unwrap().as_ptr().cast()
}

fn run(mut vcpu: VcpuFd, rings: Option<DirtyRings>, wanted: &Receiver<u16>, done: &Sender<()>) {
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rip, regs.rflags) = (0, 2);
    vcpu.set_regs(&regs).unwrap();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoIn(0x10, data)) => match wanted.recv() {
                Ok(page) => data.copy_from_slice(&(page << 8).to_le_bytes()),
                Err(_) => return,
            },
            Ok(VcpuExit::IoOut(0x11, _)) => done.send(()).unwrap(),
            Ok(VcpuExit::Unsupported(EXIT_RING_FULL)) => {
                rings.as_ref().expect("a ring").drain().unwrap();
            }
            Err(error) if error.errno() == libc::EINTR => {}
            other => panic!("{other:?}"),
        }
    }
}

/// An agent, as far as these tests need one.
pub(crate) struct Agent {
    pub(crate) connection: Connection,
    pub(crate) log: LogKind,
    pub(crate) regions: Vec<RegionInfo>,
    pub(crate) fds: Vec<OwnedFd>,
    pub(crate) status: Status,
}

impl Agent {
    fn connect(vm: &Vm) -> Agent {
        let mut connection = Connection::new(UnixStream::connect(&vm.socket).unwrap()).unwrap();
        connection.set_limit(LIMIT).unwrap();
        connection.send(|out| Request::Hello.encode(out)).unwrap();
        let (kind, body, fds) = connection.receive_with_fds().unwrap();
        match Answer::decode(kind, body).unwrap() {
            Answer::Welcome {
                log,
                status,
                regions,
                ..
            } => Agent {
                connection,
                log,
                regions,
                fds,
                status,
            },
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn ask<T>(&mut self, request: &Request, f: impl FnOnce(Answer) -> T) -> T {
        self.connection.send(|out| request.encode(out)).unwrap();
        self.hear(f)
    }

    pub(crate) fn hear<T>(&mut self, f: impl FnOnce(Answer) -> T) -> T {
        let (kind, body) = self.connection.receive().unwrap();
        f(Answer::decode(kind, body).unwrap())
    }

    pub(crate) fn done(&mut self, request: &Request) {
        self.ask(request, |answer| assert_eq!(answer, Answer::Done));
    }

    /// What it is refused with.
    pub(crate) fn refused(&mut self, request: &Request) -> String {
        self.ask(request, |answer| match answer {
            Answer::Refused { text, .. } => text,
            other => panic!("{other:?}"),
        })
    }

    pub(crate) fn round(&mut self) -> BTreeSet<u64> {
        let mut found = BTreeSet::new();
        self.connection
            .send(|out| Request::Round.encode(out))
            .unwrap();
        loop {
            let over = self.hear(|answer| match answer {
                Answer::Bits(bits) => {
                    collect(&bits, &mut found);
                    None
                }
                Answer::RoundEnd(pages) => Some(pages),
                other => panic!("{other:?}"),
            });
            if let Some(pages) = over {
                assert_eq!(pages, found.len() as u64);
                return found;
            }
        }
    }
}

fn collect(bits: &Bits, found: &mut BTreeSet<u64>) {
    for (first, word) in bits.words() {
        found.extend(
            (0..64)
                .filter(|bit| word >> bit & 1 == 1)
                .map(|bit| first + bit),
        );
    }
}
