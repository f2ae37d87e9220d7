//! `cairn-ztunnel`: the node's L4 proxy.

use std::process::ExitCode;

use cairn_ztunnel::{
    cli::{policies, proxy},
    settings::ISTIO_VERSION,
};
use clap::{Parser, Subcommand};

/// It gives memory back after a burst or a large mesh, which glibc's keeps.
#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[derive(Parser)]
#[command(name = "cairn-ztunnel", version, about = "The node's L4 proxy for Istio ambient mesh")]
struct Ztunnel {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Prints policies that enforce the way through waypoints.
    Policies(policies::Policies),
    /// Runs the proxy: `proxy ztunnel`.
    Proxy(proxy::Proxy),
    /// Prints the versions of cairn-ztunnel and of the Istio that it stands for.
    Version,
}

fn main() -> ExitCode {
    match Ztunnel::parse().command {
        Command::Policies(args) => policies::main(&args),
        Command::Proxy(args) => proxy::main(&args),
        Command::Version => {
            println!("cairn-ztunnel {} (for Istio {ISTIO_VERSION})", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
    }
}
