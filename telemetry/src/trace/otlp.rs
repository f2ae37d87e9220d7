//! Spans for OpenTelemetry collectors.

use std::time::SystemTime;

use bytes::Bytes;
use opentelemetry_proto::tonic::{
    common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value::Value},
    resource::v1::Resource,
    trace::v1::{ResourceSpans, ScopeSpans, Span as Written, Status, span, status::StatusCode},
};
use prost::Message;

use super::{Span, SpanKind, span::since_epoch};
use crate::export::{Envelope, Layer};

/// The method of collectors.
pub const METHOD: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";

/// The flags tell whether the parent is another process's.
const HAS_REMOTE: u32 = 0x100;
const REMOTE: u32 = 0x200;

/// `ExportTraceServiceRequest.resource_spans`, `ResourceSpans.scope_spans`, `ScopeSpans.spans`.
const FIELDS: [u32; 3] = [1, 2, 2];

/// A text fact.
pub(crate) fn fact(key: &str, value: &str) -> KeyValue {
    KeyValue {
        key: key.into(),
        value: Some(AnyValue {
            value: Some(Value::StringValue(value.into())),
        }),
        ..KeyValue::default()
    }
}

/// What all of our messages say of us.
pub(crate) fn scope() -> InstrumentationScope {
    InstrumentationScope {
        name: "cairn".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        ..InstrumentationScope::default()
    }
}

/// Facts as a resource.
pub(crate) fn resource<'a>(facts: impl IntoIterator<Item = (&'a str, &'a str)>) -> Resource {
    Resource {
        attributes: facts.into_iter().map(|(key, value)| fact(key, value)).collect(),
        ..Resource::default()
    }
}

/// What spans are sent in, told of this resource.
pub fn envelope<'a>(facts: impl IntoIterator<Item = (&'a str, &'a str)>) -> Envelope {
    let resource = ResourceSpans {
        resource: Some(resource(facts)),
        ..ResourceSpans::default()
    };
    let scope = ScopeSpans {
        scope: Some(scope()),
        ..ScopeSpans::default()
    };
    layers(FIELDS, resource.encode_to_vec(), scope.encode_to_vec())
}

pub(crate) fn layers([outer, middle, inner]: [u32; 3], resource: Vec<u8>, scope: Vec<u8>) -> Envelope {
    let layer = |before, field| Layer { before, field };
    let layers = [
        layer(Bytes::new(), outer),
        layer(resource.into(), middle),
        layer(scope.into(), inner),
    ];
    Envelope::Protobuf(layers.into())
}

/// Time since 1970 in nanoseconds.
pub(crate) fn nanoseconds(time: SystemTime) -> u64 {
    u64::try_from(since_epoch(time).as_nanos()).unwrap_or(u64::MAX)
}

/// Writes a span.
pub fn write(span: &Span) -> Vec<u8> {
    let context = &span.context;
    let remote = if span.remote_parent { REMOTE } else { 0 };
    let code = if span.failed { StatusCode::Error } else { StatusCode::Unset };
    Written {
        trace_id: context.trace.to_be_bytes().into(),
        span_id: context.span.to_be_bytes().into(),
        trace_state: span.state.as_deref().unwrap_or_default().into(),
        parent_span_id: context.parent.map(|parent| parent.to_be_bytes().into()).unwrap_or_default(),
        flags: HAS_REMOTE | remote | u32::from(context.sampled),
        name: span.name.to_string(),
        kind: match span.kind {
            SpanKind::Server => span::SpanKind::Server,
            SpanKind::Client => span::SpanKind::Client,
        }
        .into(),
        start_time_unix_nano: nanoseconds(span.start),
        end_time_unix_nano: nanoseconds(span.end()),
        attributes: span.tags.iter().map(|(name, value)| fact(name, value)).collect(),
        events: span.events.iter().map(event).collect(),
        status: span.failed.then(|| Status {
            code: code.into(),
            ..Status::default()
        }),
        ..Written::default()
    }
    .encode_to_vec()
}

fn event(event: &super::Event) -> span::Event {
    span::Event {
        time_unix_nano: nanoseconds(event.at),
        name: event.name.into(),
        ..span::Event::default()
    }
}
