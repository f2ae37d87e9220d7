//! A configuration from files, compiled without serving it.

use std::{path::Path, sync::Arc};

use arc_swap::ArcSwap;

use crate::{
    config::{
        Compiler,
        load::{self, LoadError},
    },
    snapshot::Snapshot,
    workloads::Workloads,
};

/// A configuration that was read.
#[derive(Debug)]
pub struct Offline {
    /// What it means.
    pub snapshot: Arc<Snapshot>,
    /// What was wrong with it.
    pub complaints: Vec<String>,
}

/// Reads and compiles a capture or an Envoy's `config_dump`.
pub fn read(path: &Path) -> Result<Offline, LoadError> {
    let answers = load::load(path)?;
    let workloads = Arc::new(Workloads::new(""));
    let published = Arc::new(ArcSwap::from_pointee(Snapshot::empty(workloads.clone())));
    let mut compiler = Compiler::new(workloads, published.clone(), None);
    let mut complaints = Vec::new();
    for answer in answers {
        let applied = compiler.apply(&answer.type_url, answer.resources, answer.removed);
        complaints.extend(applied.errors.iter().map(ToString::to_string));
    }
    Ok(Offline {
        snapshot: published.load_full(),
        complaints,
    })
}
