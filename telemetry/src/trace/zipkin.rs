//! Spans for Zipkin, in the JSON of its second version.

use std::{net::IpAddr, time::SystemTime};

use serde_json::{Map, Value, json};

use super::{NodeFacts, Span, SpanKind, b3::trace_digits, span::since_epoch};

fn microseconds(time: SystemTime) -> u64 {
    u64::try_from(since_epoch(time).as_micros()).unwrap_or(u64::MAX)
}

/// Writes a span. `shared` says that it has the id of its caller's span.
pub fn write(span: &Span, node: &NodeFacts, shared: bool) -> Vec<u8> {
    let context = &span.context;
    // "Server send" and "client receive" end a span.
    let (kind, end) = match span.kind {
        SpanKind::Server => ("SERVER", "ss"),
        SpanKind::Client => ("CLIENT", "cr"),
    };
    let mut events: Vec<Value> = span
        .events
        .iter()
        .map(|event| json!({"timestamp": microseconds(event.at), "value": event.name}))
        .collect();
    events.push(json!({"timestamp": microseconds(span.end()), "value": end}));
    let mut endpoint = Map::new();
    endpoint.insert("serviceName".into(), (*node.cluster).into());
    if let Some(address) = node.address {
        let family = match address {
            IpAddr::V4(_) => "ipv4",
            IpAddr::V6(_) => "ipv6",
        };
        endpoint.insert(family.into(), address.to_string().into());
        endpoint.insert("port".into(), 0.into());
    }
    let tags: Map<String, Value> = span
        .tags
        .iter()
        .map(|(name, value)| (name.to_string(), Value::from(value.as_str())))
        .collect();
    let mut written = json!({
        "traceId": trace_digits(context.trace),
        "id": format!("{:016x}", context.span),
        "name": &*span.name,
        "kind": kind,
        "timestamp": microseconds(span.start),
        // Zipkin takes zero for unknown.
        "duration": u64::try_from(span.took.as_micros()).unwrap_or(u64::MAX).max(1),
        "localEndpoint": endpoint,
        "annotations": events,
        "tags": tags,
    });
    if let Some(parent) = context.parent {
        written["parentId"] = format!("{parent:016x}").into();
    }
    if shared {
        written["shared"] = true.into();
    }
    written.to_string().into_bytes()
}
