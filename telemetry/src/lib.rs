//! Metrics and access logs: reads the finished records of exchanges and writes the formats that Istio's tools expect.
//!
//! * [`istio`]: the `istio_*` metrics of an `istio.stats` filter.
//! * [`registry`]: our own counters and gauges, and the place that a scrape renders.
//! * [`prometheus`]: the text formats of a scrape.
//! * [`access_log`]: lines of text or JSON to files, never in a request's way.
//! * [`trace`]: contexts of traces, and spans.
//! * [`export`]: records on their way to collectors.

pub mod access_log;
pub mod export;
pub mod istio;
mod process;
pub mod prometheus;
pub mod registry;
#[cfg(test)]
mod testing;
pub mod trace;

pub use access_log::{AccessLog, LogFiles};
pub use istio::IstioStats;
pub use registry::{Counter, Gauge, Registry};
