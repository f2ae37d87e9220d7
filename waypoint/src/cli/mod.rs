//! The commands of `cairn`.

pub mod arguments;
mod ask;
pub mod check;
pub mod demo;
pub mod diff;
pub mod explain;
pub mod proxy;
pub mod run;
pub mod show;

use std::{process::ExitCode, time::Duration};

use cairn_telemetry::LogFiles;

/// The newest version of Istio that we are tested with, which the proxy claims.
pub const ISTIO_VERSION: &str = "1.31.0";

/// How long the last log lines may take to be written.
pub const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// Waits for SIGTERM or SIGINT.
pub async fn signalled() {
    use tokio::signal::unix::{SignalKind, signal};
    match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
        (Ok(mut terminate), Ok(mut interrupt)) => {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        }
        // Without handlers the signals end the process by themselves.
        _ => std::future::pending().await,
    }
}

/// Opens log files anew whenever SIGUSR1 comes, for whoever has moved them away.
pub fn reopen_logs_on_signal(logs: LogFiles) -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut moved = signal(SignalKind::user_defined1())?;
    tokio::spawn(async move {
        while moved.recv().await.is_some() {
            logs.reopen();
        }
    });
    Ok(())
}

/// Prints the versions of cairn and of the Istio that it stands for.
pub fn version() -> ExitCode {
    println!("cairn {} (for Istio {ISTIO_VERSION})", env!("CARGO_PKG_VERSION"));
    ExitCode::SUCCESS
}
