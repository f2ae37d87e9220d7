//! Operators without parameters.

use std::{net::SocketAddr, sync::LazyLock};

use super::{
    Value, View,
    fields::{map_bytes, request_bytes},
    operator::underscored,
    span::{Moment, Unit, between, milliseconds},
};
use crate::{Exchange, Protocol, Upstream};

macro_rules! facts {
    ($($variant:ident $($name:literal)|+;)*) => {
        /// An operator without parameters.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum Fact { $($variant,)* }

        impl Fact {
            pub(super) fn named(name: &str) -> Option<Self> {
                match name {
                    $($($name)|+ => Some(Self::$variant),)*
                    _ => None,
                }
            }
        }
    };
}

facts! {
    AccessLogType "ACCESS_LOG_TYPE";
    BytesReceived "BYTES_RECEIVED";
    BytesSent "BYTES_SENT";
    Chain "FILTER_CHAIN_NAME";
    Cluster "UPSTREAM_CLUSTER";
    ClusterRaw "UPSTREAM_CLUSTER_RAW";
    ConnectionId "CONNECTION_ID";
    DownstreamHeaderBytesReceived "DOWNSTREAM_HEADER_BYTES_RECEIVED";
    DownstreamHeaderBytesSent "DOWNSTREAM_HEADER_BYTES_SENT";
    DownstreamWireBytesReceived "DOWNSTREAM_WIRE_BYTES_RECEIVED";
    DownstreamWireBytesSent "DOWNSTREAM_WIRE_BYTES_SENT";
    Duration "DURATION";
    Hostname "HOSTNAME";
    LocalAddress "DOWNSTREAM_LOCAL_ADDRESS" | "DOWNSTREAM_DIRECT_LOCAL_ADDRESS";
    LocalIp "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" | "DOWNSTREAM_DIRECT_LOCAL_ADDRESS_WITHOUT_PORT";
    LocalPort "DOWNSTREAM_LOCAL_PORT" | "DOWNSTREAM_DIRECT_LOCAL_PORT";
    LocalUriSan "DOWNSTREAM_LOCAL_URI_SAN";
    PeerUriSan "DOWNSTREAM_PEER_URI_SAN";
    Protocol "PROTOCOL";
    RemoteAddress "DOWNSTREAM_REMOTE_ADDRESS";
    RemoteIp "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT";
    RemotePort "DOWNSTREAM_REMOTE_PORT";
    DirectRemoteAddress "DOWNSTREAM_DIRECT_REMOTE_ADDRESS";
    DirectRemoteIp "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT";
    DirectRemotePort "DOWNSTREAM_DIRECT_REMOTE_PORT";
    RequestDuration "REQUEST_DURATION";
    RequestTxDuration "REQUEST_TX_DURATION";
    RequestHeadersBytes "REQUEST_HEADERS_BYTES";
    RequestedServerName "REQUESTED_SERVER_NAME";
    ResponseCode "RESPONSE_CODE";
    ResponseDuration "RESPONSE_DURATION";
    ResponseTxDuration "RESPONSE_TX_DURATION";
    ResponseFlags "RESPONSE_FLAGS";
    ResponseFlagsLong "RESPONSE_FLAGS_LONG";
    ResponseHeadersBytes "RESPONSE_HEADERS_BYTES";
    ResponseTrailersBytes "RESPONSE_TRAILERS_BYTES";
    Route "ROUTE_NAME";
    SpanId "SPAN_ID";
    StreamId "STREAM_ID";
    TraceId "TRACE_ID";
    TerminationDetails "CONNECTION_TERMINATION_DETAILS";
    TransportFailure "UPSTREAM_TRANSPORT_FAILURE_REASON";
    UniqueId "UNIQUE_ID";
    UpstreamAttempts "UPSTREAM_REQUEST_ATTEMPT_COUNT";
    UpstreamHost "UPSTREAM_HOST" | "UPSTREAM_HOST_NAME" | "UPSTREAM_REMOTE_ADDRESS";
    UpstreamHostWithoutPort "UPSTREAM_HOST_NAME_WITHOUT_PORT";
    UpstreamIp "UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT";
    UpstreamPort "UPSTREAM_REMOTE_PORT";
    UpstreamLocalAddress "UPSTREAM_LOCAL_ADDRESS";
    UpstreamLocalIp "UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT";
    UpstreamLocalPort "UPSTREAM_LOCAL_PORT";
    UpstreamProtocol "UPSTREAM_PROTOCOL";
}

/// How Envoy calls our end of a connection into a tunnel (contract runtime §7.5).
const INTERNAL_CLIENT: &str = "envoy://internal_client_address/";
/// What [`Upstream::display`] of an endpoint behind a tunnel starts with.
const INTERNAL_SCHEME: &str = "envoy://";

// === impl Fact ===

impl Fact {
    pub(super) fn value<'a>(self, view: &View<'a>) -> Value<'a> {
        let exchange = view.exchange;
        let connection = &*exchange.connection;
        let counts = &exchange.counts;
        match self {
            Self::AccessLogType => Value::text(match exchange.protocol {
                Protocol::Tcp => "TcpConnectionEnd",
                Protocol::Http10 | Protocol::Http11 | Protocol::Http2 => "DownstreamEnd",
            }),
            Self::BytesReceived => Value::Number(counts.received),
            Self::BytesSent => Value::Number(counts.sent),
            Self::Chain => Value::optional(Some(&exchange.chain)),
            Self::Cluster => Value::optional(
                exchange
                    .cluster
                    .as_ref()
                    .map(|cluster| cluster.alt_stat_name.as_deref().unwrap_or(&cluster.name)),
            ),
            Self::ClusterRaw => Value::optional(exchange.cluster.as_ref().map(|cluster| &*cluster.name)),
            Self::ConnectionId => Value::Number(connection.id),
            Self::DownstreamHeaderBytesReceived => Value::Number(counts.received_head),
            Self::DownstreamHeaderBytesSent => Value::Number(counts.sent_head),
            Self::DownstreamWireBytesReceived => Value::Number(counts.received_head.saturating_add(counts.received)),
            Self::DownstreamWireBytesSent => Value::Number(counts.sent_head.saturating_add(counts.sent)),
            Self::Duration => milliseconds(Some(exchange.duration())),
            Self::Hostname => Value::optional(HOSTNAME.as_deref()),
            Self::LocalAddress => address(connection.local_address),
            Self::LocalIp => ip(connection.local_address),
            Self::LocalPort => port(connection.local_address),
            Self::LocalUriSan => Value::optional(connection.local.as_ref().map(|id| id.as_str())),
            Self::PeerUriSan => Value::optional(connection.peer.as_ref().map(|id| id.as_str())),
            Self::Protocol => protocol(Some(exchange.protocol)),
            Self::RemoteAddress => Value::Address(remote(exchange)),
            Self::RemoteIp => Value::Ip(remote(exchange).ip()),
            Self::RemotePort => Value::Number(remote(exchange).port().into()),
            Self::DirectRemoteAddress => Value::Address(connection.remote_address),
            Self::DirectRemoteIp => Value::Ip(connection.remote_address.ip()),
            Self::DirectRemotePort => Value::Number(connection.remote_address.port().into()),
            Self::RequestDuration => milliseconds(exchange.moments.request_received),
            Self::RequestTxDuration => milliseconds(exchange.moments.last_upstream_sent),
            Self::RequestHeadersBytes => Value::Number(view.request().map_or(0, request_bytes)),
            Self::RequestedServerName => match connection.requested_server_name.as_deref() {
                Some(name) if !name.is_empty() => underscored(name, |c: char| !c.is_ascii_alphanumeric() && c != '.' && c != '-'),
                _ => Value::Absent,
            },
            // Envoy writes 0, not a dash, for TCP and when there was no answer.
            Self::ResponseCode => Value::Number(exchange.status.map_or(0, |status| status.as_u16().into())),
            Self::ResponseDuration => milliseconds(exchange.moments.first_upstream_received),
            Self::ResponseTxDuration => between(exchange, Moment::FirstUpstreamReceived, Moment::LastSent, Unit::Milliseconds),
            Self::ResponseFlags => Value::Flags(exchange.flags),
            Self::ResponseFlagsLong => long_flags(exchange),
            Self::ResponseHeadersBytes => Value::Number(view.response.map_or(counts.sent_head, map_bytes)),
            Self::ResponseTrailersBytes => Value::Number(view.trailers.map_or(0, map_bytes)),
            Self::Route => Value::optional(exchange.route.as_deref()),
            Self::SpanId => exchange.trace.map_or(Value::Absent, |ids| hex(ids.span.into(), 16)),
            Self::TraceId => exchange.trace.map_or(Value::Absent, |ids| hex(ids.trace, 32)),
            Self::StreamId => view
                .request()
                .and_then(|head| head.headers.get("x-request-id"))
                .map_or(Value::Absent, |id| Value::Text(id.as_bytes().into())),
            Self::TerminationDetails => Value::optional(exchange.termination_details.as_deref()),
            Self::TransportFailure => exchange
                .transport_failure
                .as_deref()
                .map_or(Value::Absent, |reason| underscored(reason, |c| c == ' ')),
            Self::UniqueId => Value::Text(uuid::Uuid::new_v4().to_string().into_bytes().into()),
            Self::UpstreamAttempts => Value::Number(exchange.attempts.into()),
            Self::UpstreamHost => Value::optional(exchange.upstream.as_ref().map(|upstream| &*upstream.display)),
            Self::UpstreamHostWithoutPort => {
                let display = exchange.upstream.as_ref().map(|upstream| &*upstream.display);
                Value::optional(display.map(|display| display.rsplit_once(':').map_or(display, |(host, _)| host)))
            }
            Self::UpstreamIp => ip(exchange.upstream.as_ref().map(|upstream| upstream.address)),
            Self::UpstreamPort => port(exchange.upstream.as_ref().map(|upstream| upstream.address)),
            Self::UpstreamLocalAddress => upstream_local(exchange, address),
            Self::UpstreamLocalIp => upstream_local(exchange, ip),
            Self::UpstreamLocalPort => match exchange.upstream.as_ref() {
                Some(upstream) if is_tunnelled(upstream) => Value::Absent,
                upstream => port(upstream.and_then(|upstream| upstream.local_address)),
            },
            Self::UpstreamProtocol => protocol(exchange.upstream_protocol),
        }
    }
}

fn remote(exchange: &Exchange) -> SocketAddr {
    exchange.client_address.unwrap_or(exchange.connection.remote_address)
}

fn address<'a>(address: Option<SocketAddr>) -> Value<'a> {
    address.map_or(Value::Absent, Value::Address)
}

fn ip<'a>(address: Option<SocketAddr>) -> Value<'a> {
    address.map_or(Value::Absent, |address| Value::Ip(address.ip()))
}

fn port<'a>(address: Option<SocketAddr>) -> Value<'a> {
    address.map_or(Value::Absent, |address| Value::Number(address.port().into()))
}

fn is_tunnelled(upstream: &Upstream) -> bool {
    upstream.display.starts_with(INTERNAL_SCHEME)
}

/// Our end of the connection to the endpoint; known only once there was a connection.
fn upstream_local<'a>(exchange: &Exchange, print: fn(Option<SocketAddr>) -> Value<'a>) -> Value<'a> {
    let Some(upstream) = &exchange.upstream else {
        return Value::Absent;
    };
    if !is_tunnelled(upstream) {
        return print(upstream.local_address);
    }
    if upstream.local_address.is_some() || exchange.moments.first_upstream_sent.is_some() {
        Value::text(INTERNAL_CLIENT)
    } else {
        Value::Absent
    }
}

fn protocol<'a>(protocol: Option<Protocol>) -> Value<'a> {
    match protocol {
        Some(Protocol::Http10) => Value::text("HTTP/1.0"),
        Some(Protocol::Http11) => Value::text("HTTP/1.1"),
        Some(Protocol::Http2) => Value::text("HTTP/2"),
        Some(Protocol::Tcp) | None => Value::Absent,
    }
}

fn long_flags<'a>(exchange: &Exchange) -> Value<'a> {
    if exchange.flags.is_empty() {
        return Value::text("-");
    }
    let names: Vec<_> = exchange.flags.long_names().collect();
    Value::Text(names.join(",").into_bytes().into())
}

/// The name of this machine, which in a pod is the pod's.
static HOSTNAME: LazyLock<Option<String>> = LazyLock::new(|| {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    Some(name.trim_end().to_owned())
});

/// A number of so many digits.
fn hex<'a>(number: u128, digits: usize) -> Value<'a> {
    Value::Text(format!("{number:0digits$x}").into_bytes().into())
}
