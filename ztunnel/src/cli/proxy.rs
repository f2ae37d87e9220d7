//! `cairn-ztunnel proxy ztunnel`: the proxy in the DaemonSet's pod, or beside one workload.

use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use cairn_agent::environment::Environment;
use clap::Args;

use crate::{
    engine::{self, Runtimes},
    logging,
    settings::Settings,
    telemetry::LogFormat,
};

/// Runs the proxy; everything else is said by the environment.
#[derive(Args, Debug)]
pub struct Proxy {
    /// `ztunnel`.
    #[arg(value_name = "ztunnel")]
    role: Option<String>,
}

/// Runs until a signal ends it.
pub fn main(args: &Proxy) -> ExitCode {
    match start(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cairn-ztunnel proxy: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(args: &Proxy) -> Result<()> {
    if let Some(other) = args.role.as_deref().filter(|role| *role != "ztunnel") {
        bail!("`proxy {other}` is not what this image does: it is the node's proxy (`proxy ztunnel`)");
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let settings = Settings::new(&Environment::of_process(), cores)?;
    let logging = logging::Handle::start(&settings.log_filter, settings.log_format == LogFormat::Json)?;
    let runtimes = Runtimes::new(settings.workers).context("threads cannot be made")?;
    let data = runtimes.data.handle().clone();
    let result = runtimes.control.block_on(engine::run(settings, logging, data));
    runtimes.data.shutdown_background();
    runtimes.control.shutdown_background();
    result
}
