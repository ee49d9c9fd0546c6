//! `drover migrate` and `drover cancel`.

use super::args::Migrate;
use super::render;
use super::vms::print_json;
use super::{CliError, ExitCode};
use crate::api::types::*;
use crate::api::{ApiClient, ClientError};
use crate::gang::plan::Plan;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::MissedTickBehavior;

/// How often the agent is asked.
const POLL: Duration = Duration::from_millis(250);
/// How often a plain line is written where there is no terminal.
const PLAIN: Duration = Duration::from_secs(5);
/// How long an agent may not answer while a migration runs.
const PATIENCE: Duration = Duration::from_secs(10);

/// `drover migrate`
pub(super) async fn run(socket: &Path, args: Migrate) -> Result<ExitCode, CliError> {
    let text = std::fs::read_to_string(&args.plan).map_err(|e| {
        CliError::usage(
            format!("cannot read {}: {e}", args.plan.display()),
            "name an existing plan; configs/plans has an example",
        )
    })?;
    // Mistakes that need no agent to be seen.
    Plan::parse(&args.plan, &text, None)?;
    let request = MigrationRequest {
        plan_file: args.plan.display().to_string(),
        plan: text,
        options: args.how.options(args.dry_run),
    };
    let client = ApiClient::new(socket);
    // From here on Ctrl-C no longer simply ends the command.
    let mut interrupts = interrupts()?;
    move_gang(&client, &mut interrupts, &request, args.how.json).await
}

/// Hears Ctrl-C from now on.
pub(super) fn interrupts() -> Result<Signal, CliError> {
    signal(SignalKind::interrupt())
        .map_err(|e| CliError::failed(format!("cannot wait for Ctrl-C: {e}"), ""))
}

/// Starts a migration, follows it to its end and tells how that was.
pub(super) async fn move_gang(
    client: &ApiClient,
    interrupts: &mut Signal,
    request: &MigrationRequest,
    json: bool,
) -> Result<ExitCode, CliError> {
    let mut interrupted = false;
    let starting = client.migrate(request);
    tokio::pin!(starting);
    let started = loop {
        tokio::select! {
            started = &mut starting => break started?,
            _ = interrupts.recv() => {}
        }
        // Of a gang that is not known to have begun nothing can be cancelled
        // yet; a dry run moves nothing.
        if interrupted || request.options.dry_run {
            return Err(CliError {
                error: "left before the agent answered".to_owned(),
                remedy: "it may have started the migration: see `drover status`".to_owned(),
                code: ExitCode::Interrupted,
            });
        }
        interrupted = true;
        eprintln!("cancelled as soon as the agent answers; press Ctrl-C again to leave");
    };
    let Some(id) = started.id.clone() else {
        return dry_run(&started, json);
    };
    if interrupted {
        client.cancel(&id, None).await?;
    }
    let report = follow(client, interrupts, &id, &started.gang, interrupted).await?;
    tell(&report, json)
}

fn tell(report: &GangReport, json: bool) -> Result<ExitCode, CliError> {
    if json {
        print_json(report)?;
    } else {
        print!("{}", render::report(report));
    }
    Ok(exit_code(report.outcome))
}

/// `drover gang resume`
pub(super) async fn resume(socket: &Path, gang: &str, json: bool) -> Result<ExitCode, CliError> {
    let client = ApiClient::new(socket);
    let mut interrupts = interrupts()?;
    let started = client.resume_gang(gang).await?;
    let id = started.id.as_deref().unwrap_or(gang);
    let report = follow(&client, &mut interrupts, id, &started.gang, false).await?;
    tell(&report, json)
}

/// `drover gang resolve`
pub(super) async fn resolve(
    socket: &Path,
    vm: String,
    runs_on: String,
) -> Result<ExitCode, CliError> {
    let decided = ApiClient::new(socket)
        .resolve(&Resolve { vm, runs_on })
        .await?;
    println!("{}: {}", decided.vm, decided.why);
    Ok(ExitCode::Ok)
}

fn exit_code(outcome: Outcome) -> ExitCode {
    match outcome {
        Outcome::Arrived => ExitCode::Ok,
        Outcome::Cancelled => ExitCode::Interrupted,
        Outcome::Partial | Outcome::Failed => ExitCode::Failed,
    }
}

fn dry_run(started: &MigrationStarted, json: bool) -> Result<ExitCode, CliError> {
    if json {
        print_json(started)?;
    } else {
        print!("{}", render::checks(started));
    }
    match started.checks.iter().all(|check| check.ok) {
        true => Ok(ExitCode::Ok),
        false => Ok(ExitCode::Failed),
    }
}

/// `drover cancel`
pub(super) async fn cancel(
    socket: &Path,
    gang: &str,
    vm: Option<&str>,
) -> Result<ExitCode, CliError> {
    ApiClient::new(socket).cancel(gang, vm).await?;
    match vm {
        Some(vm) => println!("{vm} of {gang} is being cancelled"),
        None => println!("{gang} is being cancelled"),
    }
    Ok(ExitCode::Ok)
}

/// Shows the progress of a migration until it is over. The first Ctrl-C asks
/// the agent to cancel, unless that was done before; the next leaves the agent
/// to it.
async fn follow(
    client: &ApiClient,
    interrupts: &mut Signal,
    id: &str,
    gang: &str,
    mut cancelled: bool,
) -> Result<GangReport, CliError> {
    let mut display = Display::new();
    let mut answered = Instant::now();
    let mut poll = tokio::time::interval(POLL);
    poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let asked = async {
            poll.tick().await;
            client.migration(id).await
        };
        let answer = tokio::select! {
            answer = asked => answer,
            _ = interrupts.recv() => {
                if cancelled {
                    display.clear();
                    return Err(CliError {
                        error: format!("left while {gang} is being cancelled"),
                        remedy: "the agent goes on with it: see `drover status`".to_owned(),
                        code: ExitCode::Interrupted,
                    });
                }
                cancelled = true;
                display.note("cancelling; press Ctrl-C again to leave the agent to it");
                if let Err(error) = client.cancel(id, None).await {
                    display.note(&format!("cannot cancel: {error}"));
                }
                continue;
            }
        };
        match answer {
            Ok(info) => {
                answered = Instant::now();
                display.update(&info.progress);
                if let Some(report) = info.report {
                    display.clear();
                    return Ok(report);
                }
            }
            Err(error) if keep_trying(&error) && answered.elapsed() < PATIENCE => {}
            Err(error) => {
                display.clear();
                let mut error = CliError::from(error);
                error.error = format!("lost sight of {gang} (run {id}): {}", error.error);
                return Err(error);
            }
        }
    }
}

/// A busy agent may be slow to answer; a migration goes on meanwhile.
fn keep_trying(error: &ClientError) -> bool {
    match error {
        ClientError::Refused { status, .. } => matches!(status, 503 | 504),
        other => other.is_unreachable(),
    }
}

/// Progress on standard error: lines that change in place on a terminal, plain
/// lines now and then elsewhere.
enum Display {
    Terminal {
        all: MultiProgress,
        lines: Vec<ProgressBar>,
    },
    Plain {
        last: Option<Instant>,
        phases: Vec<VmPhase>,
        lost: Vec<LostAgent>,
    },
}

impl Display {
    fn new() -> Self {
        if std::io::stderr().is_terminal() {
            Display::Terminal {
                all: MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(8)),
                lines: Vec::new(),
            }
        } else {
            Display::Plain {
                last: None,
                phases: Vec::new(),
                lost: Vec::new(),
            }
        }
    }

    fn update(&mut self, progress: &GangProgress) {
        match self {
            Display::Terminal { all, lines } => {
                let mut texts = vec![render::progress_head()];
                texts.extend(progress.vms.iter().map(render::vm_line));
                texts.push(render::core_line(&progress.core));
                texts.extend(progress.lost.iter().map(render::lost_line));
                while lines.len() < texts.len() {
                    let line = all.add(ProgressBar::new_spinner());
                    line.set_style(
                        ProgressStyle::with_template("{msg}")
                            .unwrap_or_else(|_| ProgressStyle::default_spinner()),
                    );
                    lines.push(line);
                }
                // Of an agent that has come back nothing is said any more.
                texts.resize(lines.len(), String::new());
                for (line, text) in lines.iter().zip(texts) {
                    line.set_message(text);
                }
            }
            Display::Plain { last, phases, lost } => {
                if last.is_none_or(|at| at.elapsed() >= PLAIN) {
                    *last = Some(Instant::now());
                    eprintln!("{}", render::gang_line(progress));
                }
                phases.resize(progress.vms.len(), VmPhase::Waiting);
                for (seen, vm) in phases.iter_mut().zip(&progress.vms) {
                    if *seen != vm.phase {
                        *seen = vm.phase;
                        eprintln!("{}", render::vm_line(vm));
                    }
                }
                for news in progress.lost.iter().filter(|agent| !lost.contains(agent)) {
                    eprintln!("{}", render::lost_line(news));
                }
                lost.clone_from(&progress.lost);
            }
        }
    }

    fn note(&self, text: &str) {
        match self {
            // Fails only if standard error is gone, and then nobody reads it.
            Display::Terminal { all, .. } => drop(all.println(text)),
            Display::Plain { .. } => eprintln!("{text}"),
        }
    }

    fn clear(&self) {
        if let Display::Terminal { all, lines } = self {
            for line in lines {
                line.finish();
            }
            drop(all.clear());
        }
    }
}
