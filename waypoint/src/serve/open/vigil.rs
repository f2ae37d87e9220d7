//! Asking, while something is open, whether it may stay.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use super::{Asked, Inner, changes::Place, decide};
use crate::snapshot::Chain;

/// What one request, or connection of bytes, knows of changes. Asking costs an atomic load until there is one.
pub struct Vigil {
    /// The version of the configuration that it was decided by last.
    decided: AtomicU64,
    place: Place,
}

/// A connection of bytes that a chain has let in.
pub struct Standing {
    /// The connection.
    pub inner: Arc<Inner>,
    /// The chain.
    pub chain: Arc<Chain>,
    /// What was asked.
    pub asked: Asked,
    /// What it knows of changes.
    pub vigil: Vigil,
}

/// Why something open is to be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// Policy denies it now.
    Denied,
    /// Its service is gone.
    Gone,
}

// === impl Vigil ===

impl Vigil {
    /// Of something that this version of the configuration has let in.
    pub fn new(version: u64) -> Self {
        Self {
            decided: AtomicU64::new(version),
            place: Place::default(),
        }
    }

    /// Ready when it is denied now; that has been logged. With `waits` the task is woken when that may have changed.
    pub fn poll_denied(
        &self,
        cx: &Context<'_>,
        inner: &Arc<Inner>,
        chain: Option<&Arc<Chain>>,
        asked: impl FnOnce() -> Asked,
        waits: bool,
    ) -> Poll<()> {
        // All of HTTP/1 is one task, and bytes are, which waits with its connection.
        if waits && inner.has_tasks() {
            inner.changes.wait(&self.place, cx);
        }
        if !inner.changes.concern(self.decided.load(Ordering::Relaxed)) {
            return Poll::Pending;
        }
        let (snapshot, now) = inner.chain_now();
        self.decided.store(snapshot.version, Ordering::Relaxed);
        let Some(now) = now.filter(|now| !chain.is_some_and(|chain| Arc::ptr_eq(chain, now))) else {
            return Poll::Pending;
        };
        let Some(why) = decide::denied(inner, &now, &snapshot, asked()) else {
            return Poll::Pending;
        };
        tracing::info!(
            authority = %inner.connection.authority,
            client = %inner.connection.remote_address,
            %why,
            "what was open is closed: policy denies it now"
        );
        Poll::Ready(())
    }

    /// It is over.
    pub fn end(&self, inner: &Inner) {
        inner.changes.leave(&self.place);
    }
}

// === impl Standing ===

impl Standing {
    /// Ready when it is to be closed.
    pub fn poll_over(&self, cx: &mut Context<'_>) -> Poll<Over> {
        if self.inner.changes.poll_ended(cx).is_ready() {
            return Poll::Ready(Over::Gone);
        }
        self.vigil
            .poll_denied(cx, &self.inner, Some(&self.chain), || self.asked.clone(), true)
            .map(|()| Over::Denied)
    }
}
