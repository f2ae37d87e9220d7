//! The metrics of an `istio.stats` filter: names, labels and their order as the stock waypoint's (contract runtime §7.2).
//!
//! A request costs one lookup by the parties' addresses and a few atomic additions. The handle that it finds belongs to a series,
//! whose labels are rendered once. Handles keep the objects alive that they are found by, so that an address never stands for
//! another object; series are equal when their labels are. Both are bounded: [`MAX_SERIES`], [`MAX_HANDLES`]. What would need a
//! series beyond the bound is not counted, but that is.
//!
//! Message counters have the labels of the parties only: the filter reports them while there is no status yet.

mod labels;
mod series;
#[cfg(test)]
mod tests;

use std::{hash::BuildHasher, sync::Arc, time::Duration};

use cairn_exchange::{Exchange, format::View};
use parking_lot::Mutex;

use self::{
    labels::{Parties, What},
    series::{Numbers, Series, SeriesSet},
};
use crate::{Counter, Registry, prometheus::Writer};

/// Most series (sets of labels) over all metrics; one of HTTP is shown as 67 lines.
pub const MAX_SERIES: usize = 20_000;
/// Most handles; when there are more all are forgotten, and found again by their labels.
pub const MAX_HANDLES: usize = 4 * MAX_SERIES;
/// How often streams and connections that go on are reported, unless the filter says otherwise.
pub const REPORTING_INTERVAL: Duration = Duration::from_secs(5);
/// Envoy's bounds of histogram buckets.
pub const BUCKETS: [f64; 19] = [
    0.5,
    1.0,
    5.0,
    10.0,
    25.0,
    50.0,
    100.0,
    250.0,
    500.0,
    1_000.0,
    2_500.0,
    5_000.0,
    10_000.0,
    30_000.0,
    60_000.0,
    300_000.0,
    600_000.0,
    1_800_000.0,
    3_600_000.0,
];

/// Istio's metrics of this process.
#[derive(Debug)]
pub struct IstioStats {
    handles: papaya::HashMap<u64, Arc<Handle>, foldhash::fast::RandomState>,
    hasher: foldhash::fast::RandomState,
    series: Mutex<SeriesSet>,
    version: Box<str>,
    bounds: Arc<[f64]>,
    dropped: Counter,
}

/// How [`IstioStats`] counts.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The version of Istio that we stand for; label `tag` of `istio_build`.
    pub version: String,
    /// Bounds of histogram buckets, growing.
    pub buckets: Vec<f64>,
    /// At most so many series.
    pub max_series: usize,
}

/// What has been told of a gRPC exchange's messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MessageReport {
    request: u64,
    response: u64,
}

/// What has been told of a TCP connection.
#[derive(Debug)]
pub struct TcpReport {
    series: Option<Arc<Series>>,
    sent: u64,
    received: u64,
}

/// A series, and the objects that it was found by.
#[derive(Debug)]
struct Handle {
    parties: Parties,
    series: Arc<Series>,
}

// === impl Settings ===

impl Settings {
    /// Envoy's buckets and [`MAX_SERIES`].
    pub fn new(version: impl Into<String>) -> Self {
        Self {
            version: version.into(),
            buckets: BUCKETS.to_vec(),
            max_series: MAX_SERIES,
        }
    }
}

// === impl IstioStats ===

impl IstioStats {
    /// Metrics that `registry` shows.
    pub fn new(registry: &Registry, settings: Settings) -> Arc<Self> {
        let stats = Arc::new(Self {
            handles: papaya::HashMap::default(),
            hasher: foldhash::fast::RandomState::default(),
            series: Mutex::new(SeriesSet::new(settings.max_series)),
            version: settings.version.into(),
            bounds: settings.buckets.into(),
            dropped: registry.counter(
                "cairn_istio_stats_dropped_total",
                "Reports of istio.stats that would have needed a series beyond the limit.",
                &[],
            ),
        });
        let shown = Arc::clone(&stats);
        registry.source(move |writer| shown.write(writer));
        stats
    }

    /// A request has ended. `reported`: what [`IstioStats::report_messages`] has told of it before.
    pub fn report_http(&self, view: &View<'_>, mut reported: MessageReport) {
        let exchange = view.exchange;
        let grpc = view.is_grpc();
        if grpc {
            self.report_messages(view, &mut reported);
        }
        let what = What::Http {
            grpc,
            status: exchange.status.map_or(0, |status| status.as_u16()),
            code: view.grpc_code(),
        };
        let Some(series) = self.find(exchange, what) else {
            return;
        };
        if let Numbers::Http {
            requests,
            duration,
            request_bytes,
            response_bytes,
        } = &series.numbers
        {
            let counts = &exchange.counts;
            let millis = u64::try_from(exchange.duration().as_millis()).unwrap_or(u64::MAX);
            requests.inc();
            duration.record(&self.bounds, millis);
            request_bytes.record(&self.bounds, counts.received_head.saturating_add(counts.received));
            response_bytes.record(&self.bounds, counts.sent_head.saturating_add(counts.sent));
        }
    }

    /// Tells the messages of a gRPC exchange since the last report: every [`REPORTING_INTERVAL`] of a stream that goes on.
    pub fn report_messages(&self, view: &View<'_>, reported: &mut MessageReport) {
        let counts = &view.exchange.counts;
        let Some(series) = self.find(view.exchange, What::Messages) else {
            return;
        };
        if let Numbers::Messages { request, response } = &series.numbers {
            request.add(counts.request_messages.saturating_sub(reported.request));
            response.add(counts.response_messages.saturating_sub(reported.response));
            *reported = MessageReport {
                request: counts.request_messages,
                response: counts.response_messages,
            };
        }
    }

    /// The first report of a TCP connection: after [`REPORTING_INTERVAL`], or when it ends before. Its labels are those of all later
    /// reports.
    pub fn report_open(&self, exchange: &Exchange) -> TcpReport {
        let series = self.find(exchange, What::Tcp);
        if let Some(Numbers::Tcp { opened, .. }) = series.as_ref().map(|series| &series.numbers) {
            opened.inc();
        }
        let mut report = TcpReport {
            series,
            sent: 0,
            received: 0,
        };
        report.progress(exchange);
        report
    }

    /// Shows all metrics.
    fn write(&self, writer: &mut Writer) {
        let shown = self.series.lock().shown();
        series::write(&shown, &self.version, &self.bounds, writer);
    }

    /// The series that an exchange belongs to; `None` beyond the limit.
    fn find(&self, exchange: &Exchange, what: What) -> Option<Arc<Series>> {
        let parties = labels::parties(exchange, what);
        let hash = self.hasher.hash_one(&parties);
        let handles = self.handles.pin();
        if let Some(handle) = handles.get(&hash)
            && handle.parties.are(&parties)
        {
            return Some(Arc::clone(&handle.series));
        }
        let found = self
            .series
            .lock()
            .get_or_add(what, labels::render(&parties), self.bounds.len());
        let Some(series) = found else {
            self.dropped.inc();
            return None;
        };
        if handles.len() >= MAX_HANDLES {
            handles.clear();
        }
        let handle = Handle {
            parties: parties.keep(),
            series: Arc::clone(&series),
        };
        handles.insert(hash, Arc::new(handle));
        Some(series)
    }
}

// === impl TcpReport ===

impl TcpReport {
    /// Tells the bytes since the last report.
    pub fn progress(&mut self, exchange: &Exchange) {
        let counts = &exchange.counts;
        if let Some(Numbers::Tcp { sent, received, .. }) = self.series.as_ref().map(|series| &series.numbers) {
            sent.add(counts.sent.saturating_sub(self.sent));
            received.add(counts.received.saturating_sub(self.received));
        }
        self.sent = counts.sent;
        self.received = counts.received;
    }

    /// The last report: the connection has ended.
    pub fn close(mut self, exchange: &Exchange) {
        self.progress(exchange);
        if let Some(Numbers::Tcp { closed, .. }) = self.series.as_ref().map(|series| &series.numbers) {
            closed.inc();
        }
    }
}
