//! `lab`: brings the lab up and down, runs it, shows it, measures on it.

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use tests::bench::{self, Variant, output};
use tests::chaos::args::ChaosArgs;
use tests::demo::{self, Guests, Setup};
use tests::qemu::Workload;
use tests::topology::Shape;
use tests::{guest, registry, save};

/// Racks as network namespaces with real VMs, to migrate between.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Download the guests' kernel and build their files.
    GuestKernel,
    /// Boot the guests that the lab starts from, and save them.
    Guests {
        #[command(flatten)]
        gang: Gang,
    },
    /// Bring a lab up with agents and running VMs, and leave it standing.
    Up {
        #[command(flatten)]
        gang: Gang,
    },
    /// Bring a lab up, migrate its gang, check everything, take it down.
    Run(Run),
    /// The same, told step by step.
    Demo(Run),
    /// Take down the labs that stand on this machine.
    Down {
        /// Also those that a running process (a test, a benchmark) made.
        #[arg(long)]
        all: bool,
    },
    /// Break things at every moment of a handover, and look at what becomes of it.
    Chaos(ChaosArgs),
    /// Measure.
    Bench {
        #[command(subcommand)]
        what: Bench,
    },
}

#[derive(Subcommand)]
enum Bench {
    /// One gang, moved by Drover and by QEMU itself.
    Gang(BenchGang),
    /// The dirty logs of one VM: KVM's bitmap and ring, and userfaultfd.
    DirtyLog(BenchDirtyLog),
}

#[derive(Args)]
struct BenchDirtyLog {
    /// MiB of RAM.
    #[arg(long, default_value_t = 1024)]
    ram_mib: u32,
    /// Rounds; figures are medians.
    #[arg(long, default_value_t = 11)]
    reps: u32,
}

#[derive(Args)]
struct Gang {
    /// Racks.
    #[arg(long, default_value_t = 2)]
    racks: u8,
    /// Hosts a rack.
    #[arg(long, default_value_t = 2)]
    hosts: u8,
    /// VMs of the gang.
    #[arg(long, default_value_t = 4)]
    vms: u32,
    /// VMs of it, from the first, whose RAM is private to their VMM.
    #[arg(long, default_value_t = 0, value_name = "N")]
    private_ram: u32,
    /// Rate of the core link, Mbit/s each way.
    #[arg(long, default_value_t = 400)]
    rate: u32,
    /// TCP congestion control of the hosts.
    #[arg(long, default_value = "cubic")]
    congestion: String,
    /// What the guests do.
    #[arg(long, value_enum, default_value_t = Work::Idle)]
    workload: Work,
    /// What a busy guest dirties, KB (1000 bytes) a second.
    #[arg(long, default_value_t = 4000)]
    dirty_kb: u32,
}

#[derive(Args)]
struct Run {
    #[command(flatten)]
    gang: Gang,
    /// Further arguments of `drover migrate`, after `--`.
    #[arg(last = true)]
    migrate_args: Vec<String>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Work {
    /// Linux that ticks only.
    Idle,
    /// Linux with a writer.
    Busy,
    /// Linux that reads disks with O_DIRECT.
    Dma,
    /// The freestanding guest under KVM.
    Kvm,
}

impl Gang {
    fn shape(&self) -> Shape {
        Shape {
            racks: self.racks,
            hosts: self.hosts,
            rate_mbit: self.rate,
            congestion: self.congestion.clone(),
            ..Shape::default()
        }
    }

    /// What the Linux guests do.
    fn workload(&self) -> Result<Workload> {
        match self.guests() {
            Guests::Linux(workload) => Ok(workload),
            Guests::Kvm => bail!("this wants Linux guests: --workload idle, busy or dma"),
        }
    }

    fn guests(&self) -> Guests {
        match self.workload {
            Work::Idle => Guests::Linux(Workload::Idle),
            Work::Busy => Guests::Linux(Workload::Busy(self.dirty_kb)),
            Work::Dma => Guests::Linux(Workload::Dma),
            Work::Kvm => Guests::Kvm,
        }
    }

    fn setup(&self, migrate_args: &[String]) -> Setup {
        Setup {
            shape: self.shape(),
            vms: self.vms,
            private_ram: self.private_ram,
            guests: self.guests(),
            migrate_args: migrate_args.to_vec(),
        }
    }
}

#[derive(Args)]
struct BenchGang {
    #[command(flatten)]
    gang: Gang,
    /// Repetitions without tenants; figures are medians.
    #[arg(long, default_value_t = 3)]
    reps: u32,
    /// Variants to run, all by default.
    #[arg(long, value_delimiter = ',')]
    variants: Vec<Variant>,
    /// Leave out the repetitions with tenants.
    #[arg(long)]
    no_tenants: bool,
    /// Write the figures as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a chart.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::GuestKernel => {
            println!("{:#?}", guest::linux_files()?);
            println!("{}", guest::kvm::ensure()?.display());
            Ok(())
        }
        Command::Guests { gang } => {
            for saved in save::linux(gang.vms, gang.workload()?)?
                .into_iter()
                .chain(save::kvm(2)?)
            {
                println!("{}", saved.dir.display());
            }
            Ok(())
        }
        Command::Up { gang } => demo::up(&gang.setup(&[])),
        Command::Run(run) => demo::run(&run.gang.setup(&run.migrate_args), false),
        Command::Demo(run) => demo::run(&run.gang.setup(&run.migrate_args), true),
        Command::Down { all } => {
            for id in registry::standing() {
                if registry::in_use(&id) && !all {
                    println!("lab {id} is in use (`lab down --all` takes it down as well)");
                    continue;
                }
                println!("taking down lab {id}");
                registry::take_down(&id)?;
            }
            Ok(())
        }
        Command::Chaos(args) => args.run(),
        Command::Bench {
            what: Bench::Gang(args),
        } => bench_gang(&args),
        Command::Bench {
            what: Bench::DirtyLog(args),
        } => {
            print!("{}", bench::dirty_log::run(args.ram_mib, args.reps)?);
            Ok(())
        }
    }
}

fn bench_gang(args: &BenchGang) -> Result<()> {
    let options = bench::Options {
        shape: args.gang.shape(),
        vms: args.gang.vms,
        workload: args.gang.workload()?,
        reps: args.reps,
        variants: if args.variants.is_empty() {
            Variant::ALL.to_vec()
        } else {
            args.variants.clone()
        },
        tenants: !args.no_tenants,
    };
    let report = bench::run(&options, &|line| eprintln!("{line}"))?;
    println!("{}", output::table(&report));
    let write = |file: &Option<PathBuf>, text: String| match file {
        Some(path) => std::fs::write(path, text).with_context(|| path.display().to_string()),
        None => Ok(()),
    };
    write(&args.json, format!("{:#}\n", output::json(&report)))?;
    write(&args.svg, output::svg(&report))
}
