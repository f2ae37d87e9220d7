//! What is told of connections: metrics and log lines, with the names and labels of the proxy that this one can stand in for.
//!
//! A [`Record`] accompanies one connection from its opening to its end: it counts bytes while they move and writes its line when it is
//! closed. One that is dropped half-way, by a drain, says so.

mod labels;
mod log;
mod series;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use cairn_exchange::{
    SpiffeId,
    clock::{self, Instant},
};
pub use log::{AccessLog, LogFormat};
pub use series::Metrics;

use crate::{
    mesh::{Service, Workload},
    relay::Count,
};

/// On which side of a connection it is told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reporter {
    /// The client's.
    Source,
    /// The server's.
    Destination,
}

/// How a connection ended, in the word of a label.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Flag {
    /// In order, or after it was made.
    #[default]
    None,
    /// Policy.
    Denied,
    /// It was never made.
    Connect,
}

/// The parties of a connection.
#[derive(Clone, Debug)]
pub struct Parties {
    /// Where it is told of.
    pub reporter: Reporter,
    /// Where it comes from.
    pub source_address: SocketAddr,
    /// Who is there.
    pub source: Option<Arc<Workload>>,
    /// What the peer said of itself, where nobody else knows it.
    pub claimed: Option<Box<crate::baggage::Claimed>>,
    /// Who the source proved to be.
    pub source_identity: Option<SpiffeId>,
    /// Where TCP goes.
    pub destination_address: SocketAddr,
    /// What was asked for in a tunnel.
    pub hbone: Option<Box<str>>,
    /// Who is there.
    pub destination: Option<Arc<Workload>>,
    /// Who the destination proved to be.
    pub destination_identity: Option<SpiffeId>,
    /// The service that was meant.
    pub service: Option<Arc<Service>>,
    /// Whether both sides proved who they are.
    pub mutual_tls: bool,
}

/// One connection.
#[derive(Debug)]
pub struct Record {
    parties: Parties,
    begin: Instant,
    received: AtomicU64,
    sent: AtomicU64,
    metrics: Arc<Metrics>,
    series: Arc<series::Series>,
    log: AccessLog,
    told: bool,
}

// === impl Record ===

impl Record {
    /// A connection that begins.
    pub fn open(parties: Parties, begin: Instant, metrics: &Arc<Metrics>, log: &AccessLog) -> Self {
        let series = metrics.series(&parties, Flag::None);
        series.opened();
        log.opened(&parties);
        Self {
            parties,
            begin,
            received: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            metrics: metrics.clone(),
            series,
            log: log.clone(),
            told: false,
        }
    }

    /// It has ended.
    pub fn close(mut self, error: Option<&dyn std::fmt::Display>, flag: Flag) {
        self.tell(error, flag);
    }

    fn tell(&mut self, error: Option<&dyn std::fmt::Display>, flag: Flag) {
        if std::mem::replace(&mut self.told, true) {
            return;
        }
        if flag == Flag::None {
            self.series.closed();
        } else {
            self.metrics.series(&self.parties, flag).closed();
            self.metrics.failed(flag);
        }
        let bytes = (self.received.load(Relaxed), self.sent.load(Relaxed));
        let duration = clock::now().duration_since(self.begin);
        self.log.closed(&self.parties, bytes, duration, error);
    }
}

impl Count for Record {
    fn received(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Relaxed);
        self.series.received(bytes as u64);
    }

    fn sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Relaxed);
        self.series.sent(bytes as u64);
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        self.tell(Some(&"connection closed due to connection drain"), Flag::None);
    }
}
