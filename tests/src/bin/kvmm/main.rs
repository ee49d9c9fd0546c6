//! `kvmm`: a small VMM that embeds `drover-vmm`. It runs the lab's freestanding
//! guests under KVM with one vCPU: RAM in a shared file or a memfd, KVM's interrupt
//! controllers and timer, a serial port that writes a file, and one that takes
//! commands. It can wait for a VM instead, and take it in.

mod boot;
mod serial;
mod state;
mod vcpu;

use anyhow::{Context, Result};
use clap::Parser;
use drover_vmm::{CallError, DirtyRings, Link, Region, Role, Vmm};
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VmFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serial::Serial;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use vcpu::Vcpu;

#[derive(Parser)]
#[command(version)]
struct Cli {
    /// Name of the VM, for `ps` and messages.
    #[arg(long)]
    name: String,
    /// File that is guest RAM, made if it is not there; without it RAM is a memfd.
    #[arg(long)]
    ram: Option<PathBuf>,
    /// MiB of RAM, up to 3072: all of it below the hole for devices.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=3072))]
    ram_mib: u64,
    /// ELF file with a PVH entry, unless a VM is waited for.
    #[arg(long, required_unless_present = "incoming")]
    kernel: Option<PathBuf>,
    /// The guest's command line.
    #[arg(long, default_value = "")]
    cmdline: String,
    /// File that the guest's first serial port is appended to.
    #[arg(long)]
    serial: PathBuf,
    /// Socket of the guest's second serial port.
    #[arg(long)]
    commands: PathBuf,
    /// Socket for Drover's agent.
    #[arg(long)]
    link: PathBuf,
    /// Entries of a dirty ring to log into, instead of KVM's bitmap.
    #[arg(long)]
    ring: Option<usize>,
    /// End when the thread that started this one ends: for tests.
    #[arg(long)]
    end_with_parent: bool,
    /// Wait for a VM instead of starting one.
    #[arg(long)]
    incoming: bool,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    if cli.end_with_parent {
        nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
    }
    let kvm = Kvm::new().context("/dev/kvm")?;
    let vm = kvm.create_vm().context("making the VM")?;
    // Where nobody looks: Intel's KVM wants four pages of its own.
    vm.set_identity_map_address(0xfffb_c000)?;
    vm.set_tss_address(0xfffb_d000)?;
    let rings = match cli.ring {
        Some(entries) => Some(DirtyRings::enable(&vm, entries).context("dirty rings")?),
        None => None,
    };
    vm.create_irq_chip()?;
    vm.create_pit2(kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    })?;

    let file = match &cli.ram {
        Some(path) => File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .with_context(|| path.display().to_string())?,
        None => memfd_create("guest-ram", MFdFlags::MFD_CLOEXEC)?.into(),
    };
    let bytes = cli.ram_mib << 20;
    file.set_len(bytes)?;
    let host = map(&file, bytes)?;
    let region = set_up(&vm, host, bytes, Arc::new(file.try_clone()?))?;

    let fd = vm.create_vcpu(0)?;
    fd.set_cpuid2(&kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)?)?;
    if let Some(rings) = &rings {
        rings.add_vcpu(&fd)?;
    }
    if let Some(kernel) = cli.kernel.as_ref().filter(|_| !cli.incoming) {
        boot::load(kernel, &cli.cmdline, &file, &fd)
            .with_context(|| kernel.display().to_string())?;
    }
    let serial = Serial::start(&cli.serial, &cli.commands)?;
    let vcpu = Vcpu::start(fd, serial.clone(), rings.clone(), !cli.incoming)?;

    let link = Link::new(&vm, vec![region], rings)?;
    let role = match cli.incoming {
        true => Role::Incoming,
        false => Role::Run,
    };
    let msrs = kvm.get_msr_index_list()?.as_slice().to_vec();
    let machine = Machine {
        name: cli.name,
        vm,
        vcpu,
        serial,
        msrs,
    };
    link.serve(&cli.link, role, machine)?.wait();
    let _gone = std::fs::remove_file(&cli.commands);
    Ok(())
}

#[allow(unsafe_code)]
fn map(file: &File, bytes: u64) -> Result<*mut u8> {
    use nix::sys::mman::{MapFlags, ProtFlags, mmap};
    let flags = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let len = std::num::NonZeroUsize::new(bytes as usize).context("RAM of 0 bytes")?;
    // SAFETY: a new mapping, which stays until the process ends.
    let at = unsafe { mmap(None, len, flags, MapFlags::MAP_SHARED, file.as_fd(), 0) }?;
    Ok(at.as_ptr().cast())
}

/// The one memory slot, for KVM and for the link.
#[allow(unsafe_code)]
fn set_up(vm: &VmFd, host: *mut u8, bytes: u64, file: Arc<File>) -> Result<Region> {
    let slot = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: bytes,
        userspace_addr: host as u64,
    };
    // SAFETY: `host` is a mapping of so many bytes that stays.
    unsafe { vm.set_user_memory_region(slot) }?;
    // SAFETY: the slot was set up with just this, and is not touched again.
    Ok(unsafe { Region::new(0, 0, bytes, host, file, 0) })
}

/// What the link drives.
struct Machine {
    name: String,
    vm: VmFd,
    vcpu: Vcpu,
    serial: Serial,
    msrs: Vec<u32>,
}

impl Vmm for Machine {
    fn is_running(&mut self) -> bool {
        self.vcpu.runs()
    }

    // No device writes guest RAM: when the vCPU stands, all does.
    fn pause(&mut self) -> Result<bool, CallError> {
        Ok(self.vcpu.pause()?)
    }

    fn resume(&mut self) -> Result<(), CallError> {
        Ok(self.vcpu.resume()?)
    }

    fn save_state(&mut self, out: &mut dyn Write) -> Result<(), CallError> {
        let state = state::save(&self.vm, &self.vcpu.fd(), &self.serial, &self.msrs)?;
        Ok(out.write_all(&postcard::to_stdvec(&state)?)?)
    }

    fn load_state(&mut self, from: &mut dyn Read) -> Result<(), CallError> {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes)?;
        let state = postcard::from_bytes(&bytes)?;
        Ok(state::load(
            &state,
            &self.vm,
            &self.vcpu.fd(),
            &self.serial,
        )?)
    }

    // The main thread waits for the link's, and ends the process.
    fn end(&mut self) {}

    fn kick(&mut self) {
        self.vcpu.kick();
    }

    fn note(&mut self, error: &(dyn std::error::Error + 'static)) {
        eprintln!("kvmm {}: link: {error}", self.name);
    }
}
