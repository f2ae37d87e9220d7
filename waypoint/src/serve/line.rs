//! What an HTTP/1 connection and the exchange on it tell each other.
//!
//! hyper stands between them and passes on requests, answers and bytes; the rest goes this way: how long the client may take nothing
//! of an answer, and whether the connection was switched to another protocol.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    task::{Context, Poll},
};

use futures_util::{FutureExt as _, task::AtomicWaker};
use hyper::upgrade::OnUpgrade;
use parking_lot::Mutex;

use super::{
    inner_io::{Early, InnerIo},
    limits::Limits,
};

/// What is told.
#[derive(Debug, Default)]
pub struct Line {
    /// The limits of the exchange whose answer is being written.
    limits: Mutex<Option<Arc<Limits>>>,
    /// The client took nothing for too long.
    stalled: AtomicBool,
    /// What was answered without a request.
    early: Mutex<Option<Early>>,
    decision: AtomicU8,
    undecided: AtomicWaker,
    /// The switch that the client asked for last and did not get.
    refused: Mutex<Option<OnUpgrade>>,
}

const UNDECIDED: u8 = 0;
const SWITCHED: u8 = 1;
const NOT_SWITCHED: u8 = 2;

// === impl Line ===

impl Line {
    /// An answer begins: its limits are those of the connection's writing.
    pub fn answering(&self, limits: Option<Arc<Limits>>) {
        *self.limits.lock() = limits;
    }

    /// The limits of what is being written.
    pub fn limits(&self) -> Option<Arc<Limits>> {
        self.limits.lock().clone()
    }

    /// The client took nothing for too long: the connection is given up.
    pub fn stall(&self) {
        self.stalled.store(true, Ordering::Release);
    }

    /// Whether the connection was given up because its client took nothing.
    pub fn is_stalled(&self) -> bool {
        self.stalled.load(Ordering::Acquire)
    }

    /// The connection was answered before there was a request.
    pub fn answered_early(&self, early: Early) {
        *self.early.lock() = Some(early);
    }

    /// What was answered without a request.
    pub fn early(&self) -> Option<Early> {
        *self.early.lock()
    }

    /// Tells what became of the switch to another protocol that a request asked for.
    pub fn decide(&self, upgrade: OnUpgrade, switched: bool) {
        if !switched {
            *self.refused.lock() = Some(upgrade);
        }
        self.decision
            .store(if switched { SWITCHED } else { NOT_SWITCHED }, Ordering::Release);
        self.undecided.wake();
    }

    /// Takes what was decided; each is asked for once.
    pub fn take_decision(&self) -> Option<bool> {
        match self.decision.swap(UNDECIDED, Ordering::AcqRel) {
            UNDECIDED => None,
            decided => Some(decided == SWITCHED),
        }
    }

    /// Waits for what is decided.
    pub fn poll_decision(&self, cx: &mut Context<'_>) -> Poll<bool> {
        self.undecided.register(cx.waker());
        self.take_decision().map_or(Poll::Pending, Poll::Ready)
    }

    /// Ends a connection behind its last answer: hyper hands one that was asked to switch over to whoever waits for it, whatever the
    /// answer was, and does not end it itself.
    pub async fn end(&self) {
        let refused = self.refused.lock().take();
        let Some(refused) = refused else { return };
        if let Some(Ok(connection)) = refused.now_or_never()
            && let Ok(parts) = connection.downcast::<InnerIo>()
        {
            parts.io.end().await;
        }
    }
}
