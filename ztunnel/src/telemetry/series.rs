//! The four metrics of connections, a series for each set of labels.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use cairn_telemetry::{
    Registry,
    prometheus::{Kind, Writer},
    registry::Counter,
};
use foldhash::fast::RandomState;
use papaya::HashMap;

use super::{Flag, Parties, labels};

/// Series that are kept; connections that would need one more are counted as such only.
const MAX_SERIES: usize = 20_000;

/// The metrics of this process.
#[derive(Debug)]
pub struct Metrics {
    series: HashMap<Box<str>, Arc<Series>, RandomState>,
    overflow: Arc<Series>,
    not_counted: Counter,
    denied: Counter,
    not_connected: Counter,
    /// Connections to a service's pods that did not come through its waypoint.
    pub bypassed: Counter,
    /// Times that a workload named a policy that had not arrived.
    pub unknown_policies: Counter,
}

/// One of the numbers of a series.
type Value = fn(&Series) -> &AtomicU64;

/// One set of labels.
#[derive(Debug, Default)]
pub(super) struct Series {
    opened: AtomicU64,
    closed: AtomicU64,
    received: AtomicU64,
    sent: AtomicU64,
}

// === impl Metrics ===

impl Metrics {
    /// Metrics that `registry` shows.
    pub fn new(registry: &Registry) -> Arc<Self> {
        let failed = |reason| {
            registry.counter(
                "istio_tcp_connections_failed_total",
                "The total number of TCP connections that failed to be established",
                &[("reason", reason)],
            )
        };
        let metrics = Arc::new(Self {
            series: HashMap::default(),
            overflow: Arc::default(),
            not_counted: registry.counter(
                "cairn_connections_not_counted_total",
                "Connections without metrics of their own, since there are too many series",
                &[],
            ),
            denied: failed("DENY"),
            not_connected: failed("CONNECT"),
            bypassed: registry.counter(
                "cairn_waypoint_bypassed_total",
                "Inbound connections to a workload behind a waypoint that did not come from it",
                &[],
            ),
            unknown_policies: registry.counter(
                "cairn_unknown_policies_total",
                "Connections that met a policy that was named and had not arrived",
                &[],
            ),
        });
        let shown = Arc::downgrade(&metrics);
        registry.source(move |writer| {
            if let Some(metrics) = shown.upgrade() {
                metrics.write(writer);
            }
        });
        metrics
    }

    pub(super) fn series(&self, parties: &Parties, flag: Flag) -> Arc<Series> {
        let labels = labels::render(parties, flag);
        let series = self.series.pin();
        if let Some(found) = series.get(&labels) {
            return found.clone();
        }
        if series.len() >= MAX_SERIES {
            self.not_counted.inc();
            return self.overflow.clone();
        }
        series.get_or_insert_with(labels, Arc::default).clone()
    }

    pub(super) fn failed(&self, flag: Flag) {
        match flag {
            Flag::None => {}
            Flag::Denied => self.denied.inc(),
            Flag::Connect => self.not_connected.inc(),
        }
    }

    fn write(&self, writer: &mut Writer) {
        let mut all: Vec<_> = self
            .series
            .pin()
            .iter()
            .map(|(labels, series)| (labels.clone(), series.clone()))
            .collect();
        all.sort_by(|(a, _), (b, _)| a.cmp(b));
        let families: [(&str, &str, Value); 4] = [
            (
                "istio_tcp_connections_opened_total",
                "The total number of TCP connections opened",
                |series| &series.opened,
            ),
            (
                "istio_tcp_connections_closed_total",
                "The total number of TCP connections closed",
                |series| &series.closed,
            ),
            (
                "istio_tcp_received_bytes_total",
                "The size of total bytes received during request in case of a TCP connection",
                |series| &series.received,
            ),
            (
                "istio_tcp_sent_bytes_total",
                "The size of total bytes sent during response in case of a TCP connection",
                |series| &series.sent,
            ),
        ];
        for (name, help, value) in families {
            writer.family(name, Kind::Counter, help);
            for (labels, series) in &all {
                writer.count(labels, value(series).load(Relaxed));
            }
        }
    }
}

// === impl Series ===

impl Series {
    pub(super) fn opened(&self) {
        self.opened.fetch_add(1, Relaxed);
    }

    pub(super) fn closed(&self) {
        self.closed.fetch_add(1, Relaxed);
    }

    pub(super) fn received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Relaxed);
    }

    pub(super) fn sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Relaxed);
    }
}
