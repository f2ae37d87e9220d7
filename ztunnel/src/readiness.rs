//! Whether the proxy is ready, and what it waits for.

use std::{collections::BTreeSet, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::watch;

/// What has to be done before the proxy is ready; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    open: Mutex<BTreeSet<String>>,
    changed: watch::Sender<()>,
}

impl Default for Inner {
    fn default() -> Self {
        Self {
            open: Mutex::default(),
            changed: watch::Sender::new(()),
        }
    }
}

/// One thing that has to be done; it is when this is dropped.
#[derive(Debug)]
pub struct Task(Readiness, String);

// === impl Readiness ===

impl Readiness {
    /// Something has to be done first.
    pub fn task(&self, name: impl Into<String>) -> Task {
        let name = name.into();
        self.0.open.lock().insert(name.clone());
        Task(self.clone(), name)
    }

    /// What is still to be done.
    pub fn waiting(&self) -> Vec<String> {
        self.0.open.lock().iter().cloned().collect()
    }

    /// Waits until nothing is.
    pub async fn ready(&self) {
        let mut changed = self.0.changed.subscribe();
        while !self.0.open.lock().is_empty() {
            // The sender is in `self`.
            let _ = changed.changed().await;
        }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.0.open.lock().remove(&self.1);
        self.0.0.changed.send_replace(());
    }
}
