//! The attributes that expressions name, as Envoy has them (its page "Attributes"), read off the record.
//!
//! One table per root: the name, and where its value stands. What Envoy knows and the record does not hold is listed beside it, so that
//! whoever compiles a configuration can say so; inside a tunnel there is no TLS of ours, hence what is asked of its certificates is
//! missing as it is in Envoy.

use std::{borrow::Cow, net::SocketAddr, time::Duration};

use http::{HeaderMap, HeaderName};

use super::value::{Map, Value};
use crate::{
    Protocol, RequestHead, Scheme,
    format::{
        Value as Formatted, View,
        fields::{map_bytes, request_bytes},
        state::filter_state,
    },
};

/// A variable of an expression.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Root {
    /// `request`
    Request,
    /// `response`
    Response,
    /// `connection`
    Connection,
    /// `upstream`
    Upstream,
    /// `source`
    Source,
    /// `destination`
    Destination,
    /// `metadata`
    Metadata,
    /// `filter_state`
    FilterState,
    /// `upstream_filter_state`
    UpstreamFilterState,
    /// `xds`
    Xds,
}

/// Which fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Headers {
    /// Of the request.
    Request,
    /// Of the answer.
    Response,
    /// Behind the answer.
    Trailers,
}

const ROOTS: [(&str, Root); 10] = [
    ("request", Root::Request),
    ("response", Root::Response),
    ("connection", Root::Connection),
    ("upstream", Root::Upstream),
    ("source", Root::Source),
    ("destination", Root::Destination),
    ("metadata", Root::Metadata),
    ("filter_state", Root::FilterState),
    ("upstream_filter_state", Root::UpstreamFilterState),
    ("xds", Root::Xds),
];

/// What Envoy may have a value for and the record has none.
const UNRECORDED: [(Root, &[&str]); 4] = [
    (Root::Connection, &["transport_failure_reason"]),
    (
        Root::Upstream,
        &[
            "locality",
            "cx_pool_ready_duration",
            "num_endpoints",
            "tls_version",
            "subject_local_certificate",
            "subject_peer_certificate",
            "uri_san_local_certificate",
            "uri_san_peer_certificate",
            "dns_san_local_certificate",
            "dns_san_peer_certificate",
            "sha256_peer_certificate_digest",
            "peer_certificate",
        ],
    ),
    (Root::Metadata, &["typed_filter_metadata"]),
    (
        Root::Xds,
        &[
            "node",
            "cluster_metadata",
            "route_metadata",
            "virtual_host_name",
            "virtual_host_metadata",
            "upstream_host_metadata",
            "upstream_host_locality_metadata",
            "listener_metadata",
            "listener_direction",
        ],
    ),
];

/// How Envoy calls our end of a connection into a tunnel (contract runtime §7.5).
const INTERNAL_CLIENT: &str = "envoy://internal_client_address/";
const INTERNAL_SCHEME: &str = "envoy://";

// === impl Root ===

impl Root {
    /// By its name.
    pub(super) fn named(name: &str) -> Option<Self> {
        Some(ROOTS.iter().find(|(known, _)| *known == name)?.1)
    }

    /// Whether Envoy may have a value where the record has none.
    pub(super) fn lacks(self, name: &str) -> bool {
        UNRECORDED.iter().any(|(root, names)| *root == self && names.contains(&name))
    }

    /// Its attribute, if it is there.
    pub(super) fn get<'a>(self, name: &[u8], view: &View<'a>) -> Option<Value<'a>> {
        let name = std::str::from_utf8(name).ok()?;
        match self {
            Self::Request => request(name, view),
            Self::Response => response(name, view),
            Self::Connection => connection(name, view),
            Self::Upstream => upstream(name, view),
            Self::Source => address(
                name,
                Some(
                    view.exchange
                        .client_address
                        .unwrap_or(view.exchange.connection.remote_address),
                ),
            ),
            Self::Destination => match (name, view.exchange.connection.local_address) {
                ("port", None) => Some(Value::Int(view.exchange.connection.service_port.into())),
                (name, local) => address(name, local),
            },
            Self::Metadata => (name == "filter_metadata").then_some(Value::Map(Map::Namespaces)),
            Self::FilterState | Self::UpstreamFilterState => object(name, view),
            Self::Xds => match name {
                "cluster_name" => Some(Value::text(&view.exchange.cluster.as_ref()?.name)),
                "route_name" => Some(Value::text(view.exchange.route.as_deref()?)),
                "filter_chain_name" => Some(Value::text(&view.exchange.chain)),
                _ => None,
            },
        }
    }
}

fn int<'a>(number: u64) -> Value<'a> {
    Value::Int(i64::try_from(number).unwrap_or(i64::MAX))
}

fn span<'a>(span: Duration) -> Value<'a> {
    Value::Duration(i128::try_from(span.as_nanos()).unwrap_or(i128::MAX))
}

fn printed<'a>(address: SocketAddr) -> Value<'a> {
    Value::Text(address.to_string().into_bytes().into())
}

fn address<'a>(name: &str, address: Option<SocketAddr>) -> Option<Value<'a>> {
    match name {
        "address" => address.map(printed),
        "port" => Some(Value::Int(address?.port().into())),
        _ => None,
    }
}

fn field<'a>(head: &'a RequestHead, name: &str) -> Option<Value<'a>> {
    Some(Value::Text(joined(&head.headers, &HeaderName::try_from(name).ok()?)?))
}

fn request<'a>(name: &str, view: &View<'a>) -> Option<Value<'a>> {
    let exchange = view.exchange;
    let head = view.request();
    match name {
        "headers" => Some(Value::Map(Map::Headers(Headers::Request))),
        "headers_bytes" => Some(int(head.map_or(0, request_bytes))),
        "time" => {
            let since = exchange.wall.duration_since(std::time::UNIX_EPOCH).ok()?;
            Some(Value::Time(i128::try_from(since.as_nanos()).ok()?))
        }
        "size" => match head.and_then(|head| head.headers.get(http::header::CONTENT_LENGTH)) {
            Some(length) => Some(Value::Int(length.to_str().ok()?.trim().parse().ok()?)),
            None => Some(int(exchange.counts.received)),
        },
        "total_size" => Some(int(exchange.counts.received.saturating_add(head.map_or(0, request_bytes)))),
        "duration" => exchange.moments.request_received.map(span),
        "protocol" => Some(Value::text(match exchange.protocol {
            Protocol::Tcp => return None,
            Protocol::Http10 => "HTTP/1.0",
            Protocol::Http11 => "HTTP/1.1",
            Protocol::Http2 => "HTTP/2",
        })),
        "path" => Some(Value::text(head?.path.as_str())),
        "url_path" => Some(Value::text(head?.path.path())),
        "query" => Some(Value::text(head?.path.query().unwrap_or_default())),
        "host" => Headers::Request.get(":authority", view),
        "scheme" => Headers::Request.get(":scheme", view),
        "method" => Some(Value::text(head?.method.as_str())),
        "referer" => field(head?, "referer"),
        "id" => field(head?, "x-request-id"),
        "useragent" => field(head?, "user-agent"),
        _ => None,
    }
}

fn response<'a>(name: &str, view: &View<'a>) -> Option<Value<'a>> {
    let exchange = view.exchange;
    let head = || view.response.map_or(exchange.counts.sent_head, map_bytes);
    let trailers = || view.trailers.map_or(0, map_bytes);
    match name {
        "code" => Some(Value::Int(exchange.status?.as_u16().into())),
        "code_details" => Some(Value::text(exchange.details.as_deref()?)),
        "flags" => Some(int(exchange.flags.bits())),
        "grpc_status" => Some(Value::Int(view.answered_grpc_code()?.into())),
        "headers" => Some(Value::Map(Map::Headers(Headers::Response))),
        "headers_bytes" => Some(int(head())),
        "trailers" => Some(Value::Map(Map::Headers(Headers::Trailers))),
        "size" => Some(int(exchange.counts.sent)),
        "total_size" => Some(int(exchange.counts.sent.saturating_add(head()).saturating_add(trailers()))),
        "backend_latency" => {
            let moments = &exchange.moments;
            Some(span(
                moments.last_upstream_received?.checked_sub(moments.first_upstream_sent?)?,
            ))
        }
        _ => None,
    }
}

fn connection<'a>(name: &str, view: &View<'a>) -> Option<Value<'a>> {
    let exchange = view.exchange;
    match name {
        "id" => Some(Value::Uint(exchange.connection.id)),
        // The certificate was shown to the tunnel; inside of it there is no TLS (contract xds §6.4).
        "mtls" => Some(Value::Bool(false)),
        "requested_server_name" => Some(Value::text(
            exchange.connection.requested_server_name.as_deref().unwrap_or_default(),
        )),
        "termination_details" => Some(Value::text(exchange.termination_details.as_deref()?)),
        _ => None,
    }
}

fn upstream<'a>(name: &str, view: &View<'a>) -> Option<Value<'a>> {
    let exchange = view.exchange;
    if name == "request_attempt_count" {
        return Some(Value::Uint(exchange.attempts.into()));
    }
    let upstream = exchange.upstream.as_ref()?;
    let tunnelled = upstream.display.starts_with(INTERNAL_SCHEME);
    match name {
        "address" => Some(Value::text(&upstream.display)),
        "port" => (!tunnelled).then(|| Value::Int(upstream.address.port().into())),
        "local_address" if tunnelled => {
            let connected = upstream.local_address.is_some() || exchange.moments.first_upstream_sent.is_some();
            connected.then_some(Value::text(INTERNAL_CLIENT))
        }
        "local_address" => upstream.local_address.map(printed),
        "transport_failure_reason" => Some(Value::text(exchange.transport_failure.as_deref().unwrap_or_default())),
        _ => None,
    }
}

/// An object of filter state: peers have fields, all others are bytes.
fn object<'a>(key: &str, view: &View<'a>) -> Option<Value<'a>> {
    let there = match key {
        "downstream_peer" | "downstream_peer_obj" => view.exchange.connection.source.is_some(),
        "upstream_peer" | "upstream_peer_obj" => {
            let upstream = view.exchange.upstream.as_ref();
            upstream.is_some_and(|upstream| upstream.workload.is_some())
        }
        _ => return view.filter_state(key).map(|bytes| Value::Bytes(bytes.into())),
    };
    there.then(|| Value::Map(Map::Object(Cow::Owned(key.to_owned()))))
}

/// A field of an object.
pub(super) fn field_of<'a>(object: &str, field: &str, view: &View<'a>) -> Option<Value<'a>> {
    if field == "labels" {
        // istiod's workload discovery tells none.
        return Some(Value::Map(Map::Empty));
    }
    match filter_state(view, object, Some(field), "") {
        Formatted::Text(text) => Some(Value::Text(text)),
        _ => None,
    }
}

// === impl Headers ===

impl Headers {
    /// A header's value, pseudo-headers included; several fields joined with `,`.
    pub(super) fn get<'a>(self, name: &str, view: &View<'a>) -> Option<Value<'a>> {
        let lower = name.to_ascii_lowercase();
        match self {
            Self::Request => {
                let head = view.request()?;
                match &*lower {
                    ":method" => Some(Value::text(head.method.as_str())),
                    ":path" => Some(Value::text(head.path.as_str())),
                    ":scheme" => Some(Value::text(match head.scheme {
                        Scheme::Http => "http",
                        Scheme::Https => "https",
                    })),
                    ":authority" | "host" => {
                        let authority = head.authority.as_bytes();
                        (!authority.is_empty()).then_some(Value::Text(authority.into()))
                    }
                    name => field(head, name),
                }
            }
            Self::Response if lower == ":status" => {
                let status = view.exchange.status?;
                Some(Value::Text(status.as_str().as_bytes().to_vec().into()))
            }
            Self::Response => {
                let name = HeaderName::try_from(lower).ok()?;
                if let Some(fields) = view.response {
                    return joined(fields, &name).map(Value::Text);
                }
                let kept = &view.exchange.response_headers;
                let values = kept
                    .iter()
                    .filter(|(kept, _)| *kept == name)
                    .map(|(_, value)| value.as_bytes());
                join(values).map(Value::Text)
            }
            Self::Trailers => joined(view.trailers?, &HeaderName::try_from(lower).ok()?).map(Value::Text),
        }
    }

    /// All of them.
    pub(super) fn entries<'a>(self, view: &View<'a>) -> Vec<(Value<'a>, Value<'a>)> {
        let (fields, pseudo): (_, &[&'static str]) = match self {
            Self::Request => (
                view.request().map(|head| &head.headers),
                &[":method", ":path", ":scheme", ":authority"],
            ),
            Self::Response => (view.response, &[":status"]),
            Self::Trailers => (view.trailers, &[]),
        };
        let named = fields.into_iter().flat_map(HeaderMap::keys).map(HeaderName::as_str);
        let entry = |name: &'a str| Some((Value::text(name), self.get(name, view)?));
        pseudo.iter().copied().chain(named).filter_map(entry).collect()
    }
}

fn joined<'a>(fields: &'a HeaderMap, name: &HeaderName) -> Option<Cow<'a, [u8]>> {
    join(fields.get_all(name).iter().map(|value| value.as_bytes()))
}

fn join<'a>(mut values: impl Iterator<Item = &'a [u8]>) -> Option<Cow<'a, [u8]>> {
    let mut joined = Cow::Borrowed(values.next()?);
    for next in values {
        let all = joined.to_mut();
        all.push(b',');
        all.extend_from_slice(next);
    }
    Some(joined)
}
