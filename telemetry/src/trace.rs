//! Traces: which trace a request belongs to, and what its span tells a collector (contract runtime §7.6).
//!
//! * [`Context`]: what a request brings and takes along, in W3C's form ([`w3c`]) or Zipkin's ([`b3`]).
//! * [`Tracer`]: the settings of a chain; it begins a [`Trace`] for each request, and ends it with a span.
//! * [`Span`], written for OTLP ([`otlp`]) or Zipkin ([`zipkin`]) and handed to an [`Exporter`](crate::export::Exporter).
//!
//! Names of spans and tags are Envoy's. A request that is not sampled costs the ids that it takes along, and nothing else.

pub mod b3;
mod context;
pub mod otlp;
mod span;
#[cfg(test)]
mod tests;
mod tracer;
pub mod w3c;
pub mod zipkin;

pub use context::{Context, Parent, Unreadable};
pub use span::{Event, Span, SpanKind};
pub use tracer::{CustomTag, NodeFacts, Propagation, Provider, TagValue, Trace, Tracer};
