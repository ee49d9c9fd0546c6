//! Debian's own libvirt on the lab's hosts: a daemon each, with directories, a
//! hostname and an identity of its own, in the host's network namespace and in a
//! mount namespace of its own. Nothing of the machine's is seen or written: the
//! daemon and its VMMs end with the host's namespace, and the mounts with them.

use crate::cache;
use crate::guest::{self, LINUX_RAM_KIB};
use crate::limit;
use crate::qemu::Guest;
use crate::serial::Serial;
use crate::topology::Host;
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const START: Duration = Duration::from_secs(30);
const BOOT: Duration = Duration::from_secs(90);
const RESIDES: Duration = Duration::from_secs(30);

/// Becomes the daemon, in namespaces of its own. The machine may have no
/// directories of libvirt's, nor the users that it looks up: both are made where
/// nobody else sees them.
const BECOME_LIBVIRTD: &str = r#"
set -e
dir=$1; name=$2; shared=$3
mount --make-rprivate /
for tree in /var/lib /var/cache /var/log; do
    mount -t tmpfs tmpfs $tree
    mkdir $tree/libvirt
done
mkdir -p $dir/run/libvirt $dir/run/drover-lab $dir/log
mount --bind $dir/log /var/log/libvirt
mount --bind $dir/etc /etc/libvirt
for file in passwd group hosts; do
    mount --bind $dir/$file /etc/$file
done
mount --rbind /run/drover-lab $dir/run/drover-lab
mount --rbind $dir/run /run
mount --bind $dir/../transport $shared/transport
mount --bind $dir/guests $shared/guests
hostname $name
exec libvirtd -f /etc/libvirt/libvirtd.conf -p $dir/libvirtd.pid
"#;

/// Reads like a host that any libvirt would meet, but for the users.
const QEMU_CONF: &str = "\
user = \"root\"
group = \"root\"
security_driver = \"none\"
cgroup_controllers = []
namespaces = []
stdio_handler = \"file\"
remember_owner = 0
";

/// A daemon. Dropping it ends it, not its VMs: those end with the lab.
#[derive(Debug)]
pub struct Libvirtd {
    /// The host's name.
    pub host: String,
    dir: PathBuf,
    shared: PathBuf,
    daemon: Child,
}

/// Where libvirts of all hosts have their migrations' sockets: the same path,
/// and on each host a directory of its own.
pub fn transport(lab_dir: &Path) -> PathBuf {
    lab_dir.join("transport")
}

impl Libvirtd {
    /// Starts the daemon of `host`, whose agent has its `transport_dir` in the
    /// host's folder.
    ///
    /// # Errors
    /// When it does not answer; the message holds its log.
    pub fn start(host: &Host, lab_dir: &Path) -> Result<Libvirtd> {
        let dir = host.run_dir.join("libvirt");
        for folder in ["etc", "guests"] {
            fs::create_dir_all(dir.join(folder))?;
        }

        for folder in ["transport", "guests"] {
            fs::create_dir_all(lab_dir.join(folder))?;
        }
        for (file, line) in [
            (
                "passwd",
                "libvirt-qemu:x:64055:64055::/:/usr/sbin/nologin\n",
            ),
            ("group", "libvirt-qemu:x:64055:\nkvm:x:64056:\n"),
        ] {
            let own = fs::read_to_string(Path::new("/etc").join(file))?;
            let known = |line: &&str| {
                let name = line.split(':').next().unwrap_or_default();
                !own.lines().any(|has| has.split(':').next() == Some(name))
            };
            let missing: Vec<&str> = line.lines().filter(known).collect();
            fs::write(dir.join(file), format!("{own}{}\n", missing.join("\n")))?;
        }
        // Else it asks a name server for itself, and waits.
        let hosts = format!("127.0.0.1 localhost {}\n", host.name);
        fs::write(dir.join("hosts"), hosts)?;
        let uuid = format!(
            "00000000-0000-4000-8000-0000000{:02}{:03}",
            host.rack, host.index
        );
        let conf = format!(
            "host_uuid = {uuid:?}\nauth_unix_rw = \"none\"\nlog_outputs = \"3:file:{}\"\n",
            dir.join("libvirtd.log").display()
        );
        fs::write(dir.join("etc/libvirtd.conf"), conf)?;
        fs::write(dir.join("etc/qemu.conf"), QEMU_CONF)?;
        let log = File::create(dir.join("start.log"))?;
        let daemon = host
            .ns
            .command("unshare")
            .args(["--mount", "--uts", "sh", "-c", BECOME_LIBVIRTD, "libvirtd"])
            .args([&dir, Path::new(&host.name), lab_dir])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot run unshare")?;
        let mut libvirtd = Libvirtd {
            host: host.name.clone(),
            dir,
            shared: lab_dir.to_owned(),
            daemon,
        };
        libvirtd.ready()?;
        Ok(libvirtd)
    }

    fn ready(&mut self) -> Result<()> {
        let until = Instant::now() + START;
        while !self.virsh(&["list"])?.status.success() {
            if let Some(status) = self.daemon.try_wait()? {
                bail!("libvirtd of {} ended ({status}): {}", self.host, self.log());
            }
            if Instant::now() > until {
                bail!("libvirtd of {} does not answer: {}", self.host, self.log());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// What went wrong, as far as it says.
    pub fn log(&self) -> String {
        let read = |file: &str| fs::read_to_string(self.dir.join(file)).unwrap_or_default();
        let text = read("start.log") + &read("libvirtd.log");
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(12)..].join("\n")
    }

    /// The daemon's address for other hosts' commands.
    pub fn uri(&self) -> String {
        let socket = self.dir.join("run/libvirt/libvirt-sock");
        format!("qemu+unix:///system?socket={}", socket.display())
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("virsh");
        command
            .args(["--connect", &self.uri()])
            .args(args)
            .env("LC_ALL", "C")
            .stdin(Stdio::null());
        command
    }

    /// Runs `virsh` here, be it a failure.
    ///
    /// # Errors
    /// When it does not end.
    pub fn virsh(&self, args: &[&str]) -> Result<Output> {
        cache::output(&mut self.command(args))
    }

    /// Names and states of all VMs here, `g1 running` for one.
    ///
    /// # Errors
    /// When the daemon does not answer.
    pub fn vms(&self) -> Result<Vec<String>> {
        let listed = cache::run(&mut self.command(&["list", "--all"]))?;
        let text = String::from_utf8_lossy(&listed.stdout).into_owned();
        let row = |line: &str| {
            let mut words = line.split_whitespace().skip(1);
            let name = words.next()?.to_owned();
            let state: Vec<&str> = words.collect();
            Some(format!("{name} {}", state.join(" ")))
        };
        Ok(text.lines().skip(2).filter_map(row).collect())
    }

    /// Waits until these are the VMs here.
    ///
    /// # Errors
    /// With those that are.
    pub fn has(&self, vms: &[&str]) -> Result<()> {
        let until = Instant::now() + RESIDES;
        loop {
            let found = self.vms()?;
            if found == vms {
                return Ok(());
            }
            if Instant::now() > until {
                bail!("{} has {found:?}, not {vms:?}: {}", self.host, self.log());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Has it learn what its QEMU can: that takes seconds, and the first
    /// migration to it would wait for them.
    ///
    /// # Errors
    /// When there is no QEMU.
    pub fn learn(&self) -> Result<()> {
        cache::run(&mut self.command(&["domcapabilities", "--virttype", "qemu"])).map(drop)
    }

    /// Starts a transient VM: the lab's Linux guest under TCG, with private RAM.
    ///
    /// # Errors
    /// When libvirt refuses it.
    pub fn create(&self, name: &str, seed: u32) -> Result<()> {
        let files = guest::linux_files()?;
        let boot = format!(
            "<kernel>{}</kernel><initrd>{}</initrd>\
             <cmdline>console=ttyS0 loglevel=3 lab.seed={seed} lab.workload=idle</cmdline>",
            files.kernel.display(),
            files.initrd.display()
        );
        let disk = format!(
            "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/>\
             <target dev='vda' bus='virtio'/><readonly/><shareable/></disk>",
            files.common.display()
        );
        self.start_vm(
            name,
            &self.domain(name, "qemu", LINUX_RAM_KIB, &boot, &disk),
        )
    }

    /// The same with the lab's freestanding guest under KVM.
    ///
    /// # Errors
    /// When it is not one, or libvirt refuses it.
    pub fn create_kvm(&self, name: &str, guest: &Guest) -> Result<()> {
        let Guest::Kvm { elf, ram_mib, work } = guest else {
            bail!("it is to run under KVM: {guest:?}");
        };
        let boot = format!(
            "<kernel>{}</kernel><cmdline>{}</cmdline>",
            elf.display(),
            work.cmdline()
        );
        let kib = u64::from(*ram_mib) << 10;
        self.start_vm(name, &self.domain(name, "kvm", kib, &boot, ""))
    }

    fn start_vm(&self, name: &str, domain: &str) -> Result<()> {
        let xml = self.dir.join(format!("{name}.xml"));
        fs::write(&xml, domain)?;
        let file = xml.display().to_string();
        cache::run(&mut self.command(&["create", &file]))
            .with_context(|| self.log())
            .map(drop)
    }

    /// Without kvmclock: the firmware uses it, and loading the vCPU's state makes
    /// the target's KVM write its time page, so that RAM would not be equal.
    fn domain(&self, name: &str, accel: &str, kib: u64, boot: &str, devices: &str) -> String {
        let guests = self.shared.join("guests");
        format!(
            "<domain type='{accel}'><name>{name}</name><memory unit='KiB'>{kib}</memory>\
             <vcpu>1</vcpu><os><type arch='x86_64' machine='pc'>hvm</type>{boot}</os>\
             <features><acpi/></features>\
             <clock offset='utc'><timer name='kvmclock' present='no'/></clock><on_poweroff>destroy</on_poweroff>\
             <on_crash>destroy</on_crash><devices>\
             <emulator>/usr/bin/qemu-system-x86_64</emulator>{devices}\
             <controller type='usb' model='none'/><memballoon model='none'/>\
             <serial type='file'><source path='{guests}/{name}.serial' append='on'/></serial>\
             <serial type='unix'><source mode='bind' path='{guests}/{name}.ctl'/></serial>\
             </devices></domain>",
            guests = guests.display(),
        )
    }

    /// What the guest of a VM says while it runs here.
    pub fn serial(&self, vm: &str) -> Serial {
        Serial::new(self.dir.join("guests").join(format!("{vm}.serial")))
    }

    /// Waits until a guest that was started here works.
    ///
    /// # Errors
    /// When it does not.
    pub fn booted(&self, vm: &str) -> Result<()> {
        let ticks = |text: &str| text.contains("TICK ");
        self.serial(vm).wait("tick", BOOT, ticks)
    }

    /// Starts `virsh migrate --live` of a VM to `target`, through the sockets
    /// that the agents offer.
    ///
    /// # Errors
    /// When `virsh` cannot be run.
    pub fn migrate(&self, vm: &str, target: &Libvirtd) -> Result<VirshMigrate> {
        let socket = transport(&self.shared).join(format!("{vm}.sock"));
        let uri = format!("unix://{}", socket.display());
        let mut command = self.command(&["migrate", "--live", vm, &target.uri()]);
        let child = command
            .args(["--migrateuri", &uri])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run virsh")?;
        Ok(VirshMigrate(Some(child)))
    }
}

impl Drop for Libvirtd {
    fn drop(&mut self) {
        let _gone = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// A `virsh migrate` that runs. Dropping it ends the command.
#[derive(Debug)]
pub struct VirshMigrate(Option<Child>);

impl VirshMigrate {
    /// Waits for its end: whether it has succeeded, and what it said.
    ///
    /// # Errors
    /// When it does not end.
    pub fn end(mut self) -> Result<(bool, String)> {
        let child = self.0.take().context("waited for already")?;
        let output = limit::output(child, limit::COMMAND).context("virsh migrate")?;
        let said = [output.stdout, output.stderr].concat();
        Ok((
            output.status.success(),
            String::from_utf8_lossy(&said).into_owned(),
        ))
    }
}

impl Drop for VirshMigrate {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _gone = child.kill();
            let _ = child.wait();
        }
    }
}
