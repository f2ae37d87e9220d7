//! `cairn show`: the compiled form of a configuration, as a person wants to read it.

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use arc_swap::ArcSwap;
use clap::Args;

use crate::{
    config::{Compiler, load, report::Consequence, show},
    snapshot::Snapshot,
    workloads::Workloads,
};

/// Prints services, ports, chains, filters, routes, clusters, endpoints, and what is unsupported.
#[derive(Args, Debug)]
pub struct Show {
    /// A folder with a capture (cds.pb, eds.pb, lds.pb, …), or a file with Envoy's /config_dump JSON.
    #[arg(long, value_name = "PATH")]
    config: PathBuf,
}

/// Prints it; fails when something in the configuration is malformed.
pub fn main(args: &Show) -> ExitCode {
    let answers = match load::load(&args.config) {
        Ok(answers) => answers,
        Err(error) => {
            eprintln!("cairn show: {error}");
            return ExitCode::FAILURE;
        }
    };
    let workloads = Arc::new(Workloads::new(""));
    let snapshot = Arc::new(ArcSwap::from_pointee(Snapshot::empty(workloads.clone())));
    let mut compiler = Compiler::new(workloads, snapshot.clone(), None);
    let mut malformed = false;
    for answer in answers {
        let applied = compiler.apply(&answer.type_url, answer.resources, answer.removed);
        for error in applied.errors {
            malformed |= error.consequence == Consequence::LastGoodStays;
            eprintln!("cairn show: {error}");
        }
    }
    print!("{}", show::show(&snapshot.load(), &compiler.unsupported()));
    if malformed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
