//! The load rig: the waypoint, Envoy and a bare TCP relay, side by side.
//!
//! It generates a mesh's certificates and configuration, starts each proxy with
//! one worker on one core, sends the same requests through each from another
//! core, and reports what they cost as ratios within the same run. It knows the
//! proxies from the outside only: their command lines, ports and processes.
//! `bench/run` builds what it needs and starts it.

mod certs;
mod client;
mod delivered;
mod destination;
mod envoy;
mod load;
mod memory;
mod mesh;
mod proxy;
mod relay;
mod report;
mod rig;
mod sets;
mod tally;
mod tunnel;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::report::Report;
use crate::rig::{Kind, Programs, Rig};
use crate::sets::{Plan, SetKind};

/// Idle things of each sort: as the promises are given, and fewer when time is short.
const IDLE_COUNT: usize = 10_000;
const SHORT_IDLE_COUNT: usize = 1_500;

/// Measures the waypoint, Envoy and a bare TCP relay side by side.
#[derive(Parser)]
#[command(name = "bench/run", args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// Sets to run, with commas between them; all without it.
    #[arg(long, value_delimiter = ',')]
    sets: Vec<String>,
    /// Fewer and shorter runs: under three minutes for all sets.
    #[arg(long)]
    short: bool,
    /// Print tables as Markdown.
    #[arg(long)]
    markdown: bool,
    /// End with an error when a target is missed.
    #[arg(long)]
    enforce: bool,
    /// Put one ALLOW rule (principal, method, path) in front of the HTTP service.
    #[arg(long)]
    policy: bool,
    /// Proxies to leave out.
    #[arg(long, value_delimiter = ',')]
    without: Vec<Kind>,
    /// Runs of each proxy and set.
    #[arg(long)]
    rounds: Option<usize>,
    /// Seconds of a run that are measured.
    #[arg(long)]
    seconds: Option<f64>,
    /// The waypoint's program.
    #[arg(long, default_value = "target/release/cairn")]
    cairn: PathBuf,
    /// A further argument for the waypoint's program; may be repeated.
    #[arg(long, allow_hyphen_values = true)]
    cairn_argument: Vec<String>,
    /// Where the waypoint's admin port is, for its allocator's statistics.
    #[arg(long, default_value = "127.0.0.1:15000")]
    cairn_admin: SocketAddr,
    /// Envoy's program.
    #[arg(long, default_value = "target/envoy-1.40.0/envoy/_bin/envoy")]
    envoy: PathBuf,
    /// The core of the proxies.
    #[arg(long, default_value_t = 0)]
    proxy_core: usize,
    /// The core of load and destination.
    #[arg(long, default_value_t = 1)]
    load_core: usize,
    /// Where configurations, certificates and logs of the run are left.
    #[arg(long, default_value = "target/bench")]
    folder: PathBuf,
}

#[derive(Subcommand)]
enum Command {
    /// The bare relay, which the rig starts by itself.
    #[command(hide = true)]
    Relay {
        #[arg(long)]
        listen: SocketAddr,
        #[arg(long)]
        to: SocketAddr,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    run(Arguments::parse()).await.unwrap_or_else(|error| {
        report::progress(&format!("{error:#}"));
        ExitCode::FAILURE
    })
}

async fn run(arguments: Arguments) -> Result<ExitCode> {
    if let Some(Command::Relay { listen, to }) = arguments.command {
        return relay::run(listen, to).await.map(|()| ExitCode::SUCCESS);
    }
    tokio::select! {
        result = Box::pin(measure(arguments)) => result,
        // The proxies end with the values that are dropped here.
        interrupted = tokio::signal::ctrl_c() => {
            interrupted?;
            report::progress("interrupted");
            Ok(ExitCode::FAILURE)
        }
    }
}

async fn measure(arguments: Arguments) -> Result<ExitCode> {
    let sets = sets::choose(&arguments.sets)?;
    let plan = plan(&arguments);
    pin(arguments.load_core, arguments.proxy_core)?;
    raise_file_limit()?;
    let (markdown, enforce) = (arguments.markdown, arguments.enforce);
    let idle_count = if arguments.short { SHORT_IDLE_COUNT } else { IDLE_COUNT };
    let rig = Rig::build(
        &arguments.folder,
        Programs {
            cairn: arguments.cairn,
            cairn_arguments: arguments.cairn_argument,
            cairn_admin: arguments.cairn_admin,
            envoy: arguments.envoy,
            core: arguments.proxy_core,
            policy: arguments.policy,
            without: arguments.without,
        },
    )
    .await?;

    let mut report = Report::default();
    let mut proxies = Vec::new();
    for set in &sets {
        let SetKind::Load(work) = set.kind else {
            continue;
        };
        if proxies.is_empty() {
            for kind in rig.kinds() {
                proxies.push(rig.launch(kind).await?);
            }
        }
        let samples = sets::measure(set.name, work, &proxies, &rig.destination.sunk, plan).await?;
        report.add_load(set.name, work, samples);
    }
    for proxy in proxies {
        proxy.process.stop().await?;
    }
    if sets.iter().any(|set| set.kind == SetKind::Memory) {
        for (idle, slopes) in memory::measure(&rig, idle_count).await? {
            report.add_memory(idle, slopes);
        }
    }
    print(&report.render(markdown));
    let missed = report.targets().iter().any(|target| !target.is_met());
    Ok(if enforce && missed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

#[expect(clippy::print_stdout, reason = "the report of a command-line tool")]
fn print(report: &str) {
    print!("{report}");
}

fn plan(arguments: &Arguments) -> Plan {
    let (rounds, seconds, warm_up) = if arguments.short { (2, 2.0, 0.4) } else { (5, 4.0, 1.0) };
    Plan {
        warm_up: Duration::from_secs_f64(warm_up),
        window: Duration::from_secs_f64(arguments.seconds.unwrap_or(seconds).clamp(0.1, 600.0)),
        rounds: arguments.rounds.unwrap_or(rounds).max(1),
    }
}

/// Puts load and destination on their core.
fn pin(load: usize, proxy: usize) -> Result<()> {
    ensure!(
        load != proxy && load < CpuSet::MAX_CPU,
        "load and proxies need different cores: --load-core {load} --proxy-core {proxy}"
    );
    let mut cores = CpuSet::new();
    cores.set(load);
    sched_setaffinity(None, &cores)
        .with_context(|| format!("cannot run on core {load}: the rig needs two cores, see --load-core"))
}

/// The memory set holds 10,000 connections.
fn raise_file_limit() -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        },
    )
    .context("cannot raise the limit of open files to its hard limit")
}
