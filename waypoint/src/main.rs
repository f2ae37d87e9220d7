//! `cairn`: the waypoint proxy and what belongs to it.

use std::process::ExitCode;

use cairn_waypoint::cli::{check, demo, diff, explain, proxy, run, show};
use clap::{Parser, Subcommand};

/// It gives memory back after a burst or a large configuration, which glibc's keeps.
#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[derive(Parser)]
#[command(name = "cairn", version, about = "An L7 waypoint proxy for Istio ambient mesh")]
struct Cairn {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Holds a table of expected decisions against a configuration.
    Check(check::Check),
    /// Runs a small mesh on this machine.
    Demo(demo::Demo),
    /// Lists the requests that another configuration decides otherwise.
    Diff(diff::Diff),
    /// Tells why a request is decided so.
    Explain(explain::Explain),
    /// Runs in the pod that istiod makes for a waypoint: `proxy waypoint …`.
    Proxy(proxy::Proxy),
    /// Serves captured configuration.
    Run(run::Run),
    /// Prints the compiled form of a configuration.
    Show(show::Show),
    /// Prints the versions of cairn and of the Istio that it stands for.
    Version,
}

fn main() -> ExitCode {
    match Cairn::parse().command {
        Command::Check(args) => check::main(&args),
        Command::Demo(args) => demo::main(&args),
        Command::Diff(args) => diff::main(&args),
        Command::Explain(args) => explain::main(&args),
        Command::Proxy(args) => proxy::main(&args),
        Command::Run(args) => run::main(&args),
        Command::Show(args) => show::main(&args),
        Command::Version => cairn_waypoint::cli::version(),
    }
}
