//! The open connections of a pod: to list them, and to close those that policy has come to deny.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use cairn_exchange::SpiffeId;
use foldhash::fast::RandomState;
use papaya::HashMap;
use tokio::sync::watch;

use crate::policies::{Asked, Denied};

/// The open connections of one pod.
#[derive(Debug, Default)]
pub struct Open {
    next: AtomicU64,
    all: HashMap<u64, Arc<Connection>, RandomState>,
}

/// One of them.
#[derive(Debug)]
pub struct Connection {
    /// Whether it came to the pod.
    pub inbound: bool,
    /// Where it comes from.
    pub source: SocketAddr,
    /// Who opened it.
    pub peer: Option<SpiffeId>,
    /// Where it wanted to go.
    pub original: String,
    /// Where it goes.
    pub actual: SocketAddr,
    denied: watch::Sender<Option<Denied>>,
}

/// A connection's place in the list, until it is dropped.
#[derive(Debug)]
pub struct Ticket {
    open: Arc<Open>,
    number: u64,
    connection: Arc<Connection>,
}

// === impl Open ===

impl Open {
    /// Puts a connection into the list.
    pub fn enter(
        self: &Arc<Self>,
        inbound: bool,
        source: SocketAddr,
        peer: Option<SpiffeId>,
        original: String,
        actual: SocketAddr,
    ) -> Ticket {
        let connection = Arc::new(Connection {
            inbound,
            source,
            peer,
            original,
            actual,
            denied: watch::Sender::new(None),
        });
        let number = self.next.fetch_add(1, Relaxed);
        self.all.pin().insert(number, connection.clone());
        Ticket {
            open: self.clone(),
            number,
            connection,
        }
    }

    /// Closes inbound connections that `decide` denies; how many.
    pub fn close_denied(&self, decide: impl Fn(Asked<'_>) -> Result<(), Denied>) -> usize {
        let mut closed = 0;
        for connection in self.all.pin().values().filter(|connection| connection.inbound) {
            if let Err(denied) = decide(connection.asked()) {
                connection.denied.send_replace(Some(denied));
                closed += 1;
            }
        }
        closed
    }

    /// All of them.
    pub fn all(&self) -> Vec<Arc<Connection>> {
        self.all.pin().values().cloned().collect()
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.all.pin().len()
    }
}

// === impl Connection ===

impl Connection {
    /// As policies see it.
    pub fn asked(&self) -> Asked<'_> {
        Asked {
            peer: self.peer.as_ref(),
            source: self.source.ip(),
            destination: self.actual,
        }
    }
}

// === impl Ticket ===

impl Ticket {
    /// The connection.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Waits until policy denies it.
    pub async fn denied(&self) -> Denied {
        let mut denied = self.connection.denied.subscribe();
        match denied.wait_for(Option::is_some).await.map(|denied| denied.clone()) {
            Ok(Some(denied)) => denied,
            // The sender lives in `self`.
            _ => std::future::pending().await,
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.open.all.pin().remove(&self.number);
    }
}
