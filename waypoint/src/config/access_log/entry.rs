//! Entries of gRPC access logs (`envoy.data.accesslog.v3`), as Envoy fills them.

use std::{
    net::SocketAddr,
    time::{Duration, SystemTime},
};

use cairn_exchange::{Exchange, Protocol, RequestHead, ResponseFlags, format::View};
use cairn_proto::envoy::{
    config::core::v3::{Address, RequestMethod, SocketAddress, address, socket_address::PortSpecifier},
    data::accesslog::v3::{
        AccessLogCommon, AccessLogType, ConnectionProperties, HttpAccessLogEntry, HttpRequestProperties, HttpResponseProperties,
        ResponseFlags as Flags, TcpAccessLogEntry, TlsProperties,
        http_access_log_entry::HttpVersion,
        response_flags::{Unauthorized, unauthorized::Reason},
        tls_properties::{
            CertificateProperties, TlsVersion,
            certificate_properties::{SubjectAltName, subject_alt_name::San},
        },
    },
};
use http::{HeaderName, HeaderValue, Method, header};
use prost::Message;

/// Fields that entries have beside those that all have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct More {
    /// Of requests.
    pub request: Vec<HeaderName>,
    /// Of answers.
    pub response: Vec<HeaderName>,
}

/// Writes the entry of a request.
pub(super) fn http(view: &View<'_>, more: &More, tags: &[(String, String)]) -> Vec<u8> {
    let exchange = view.exchange;
    HttpAccessLogEntry {
        common_properties: Some(common(exchange, AccessLogType::DownstreamEnd, tags)),
        protocol_version: match exchange.protocol {
            Protocol::Http10 => HttpVersion::Http10,
            Protocol::Http11 => HttpVersion::Http11,
            Protocol::Http2 => HttpVersion::Http2,
            Protocol::Tcp => HttpVersion::ProtocolUnspecified,
        }
        .into(),
        request: Some(
            view.request()
                .map_or_else(HttpRequestProperties::default, |head| request(exchange, head, &more.request)),
        ),
        response: Some(response(exchange, &more.response)),
    }
    .encode_to_vec()
}

/// Writes the entry of a connection.
pub(super) fn tcp(view: &View<'_>, tags: &[(String, String)]) -> Vec<u8> {
    let exchange = view.exchange;
    TcpAccessLogEntry {
        common_properties: Some(common(exchange, AccessLogType::TcpConnectionEnd, tags)),
        connection_properties: Some(ConnectionProperties {
            received_bytes: exchange.counts.received,
            sent_bytes: exchange.counts.sent,
        }),
    }
    .encode_to_vec()
}

fn text(value: &HeaderValue) -> String {
    String::from_utf8_lossy(value.as_bytes()).into_owned()
}

fn request(exchange: &Exchange, head: &RequestHead, more: &[HeaderName]) -> HttpRequestProperties {
    let field = |name: &str| head.headers.get(name).map(text).unwrap_or_default();
    let more = more
        .iter()
        .filter_map(|name| Some((name.to_string(), text(head.headers.get(name)?))));
    HttpRequestProperties {
        request_method: method(&head.method).into(),
        scheme: match head.scheme {
            cairn_exchange::Scheme::Http => "http",
            cairn_exchange::Scheme::Https => "https",
        }
        .into(),
        authority: text(&head.authority),
        path: head.path.to_string(),
        user_agent: field(header::USER_AGENT.as_str()),
        referer: field(header::REFERER.as_str()),
        forwarded_for: field("x-forwarded-for"),
        request_id: field("x-request-id"),
        original_path: field("x-envoy-original-path"),
        request_headers_bytes: exchange.counts.received_head,
        request_body_bytes: exchange.counts.received,
        request_headers: more.collect(),
        downstream_header_bytes_received: exchange.counts.received_head,
        ..HttpRequestProperties::default()
    }
}

fn method(method: &Method) -> RequestMethod {
    match *method {
        Method::GET => RequestMethod::Get,
        Method::HEAD => RequestMethod::Head,
        Method::POST => RequestMethod::Post,
        Method::PUT => RequestMethod::Put,
        Method::DELETE => RequestMethod::Delete,
        Method::CONNECT => RequestMethod::Connect,
        Method::OPTIONS => RequestMethod::Options,
        Method::TRACE => RequestMethod::Trace,
        Method::PATCH => RequestMethod::Patch,
        _ => RequestMethod::MethodUnspecified,
    }
}

fn response(exchange: &Exchange, more: &[HeaderName]) -> HttpResponseProperties {
    let kept = exchange.response_headers.iter().filter(|(name, _)| more.contains(name));
    HttpResponseProperties {
        response_code: exchange.status.map(|status| u32::from(status.as_u16())),
        response_headers_bytes: exchange.counts.sent_head,
        response_body_bytes: exchange.counts.sent,
        response_headers: kept.map(|(name, value)| (name.to_string(), text(value))).collect(),
        response_code_details: exchange.details.as_deref().unwrap_or_default().into(),
        downstream_header_bytes_sent: exchange.counts.sent_head,
        ..HttpResponseProperties::default()
    }
}

fn common(exchange: &Exchange, kind: AccessLogType, tags: &[(String, String)]) -> AccessLogCommon {
    let (connection, moments, counts) = (&exchange.connection, &exchange.moments, &exchange.counts);
    let upstream = exchange.upstream.as_ref();
    let after = |moment: Option<Duration>| moment.and_then(|moment| prost_types::Duration::try_from(moment).ok());
    AccessLogCommon {
        sample_rate: 1.0,
        downstream_remote_address: Some(address(exchange.client_address.unwrap_or(connection.remote_address))),
        downstream_local_address: connection.local_address.map(address),
        downstream_direct_remote_address: Some(address(connection.remote_address)),
        tls_properties: tls(exchange),
        start_time: Some(timestamp(exchange.wall)),
        time_to_last_rx_byte: after(moments.request_received),
        time_to_first_upstream_tx_byte: after(moments.first_upstream_sent),
        time_to_last_upstream_tx_byte: after(moments.last_upstream_sent),
        time_to_first_upstream_rx_byte: after(moments.first_upstream_received),
        time_to_last_upstream_rx_byte: after(moments.last_upstream_received),
        time_to_first_downstream_tx_byte: after(moments.first_sent),
        time_to_last_downstream_tx_byte: after(moments.last_sent),
        duration: after(Some(exchange.duration())),
        upstream_remote_address: upstream.map(|upstream| address(upstream.address)),
        upstream_local_address: upstream.and_then(|upstream| upstream.local_address).map(address),
        upstream_cluster: exchange
            .cluster
            .as_ref()
            .map(|cluster| cluster.name.to_string())
            .unwrap_or_default(),
        response_flags: (!exchange.flags.is_empty()).then(|| flags(exchange.flags)),
        upstream_transport_failure_reason: exchange.transport_failure.as_deref().unwrap_or_default().into(),
        route_name: exchange.route.as_deref().unwrap_or_default().into(),
        custom_tags: tags.iter().cloned().collect(),
        upstream_request_attempt_count: exchange.attempts,
        connection_termination_details: exchange.termination_details.as_deref().unwrap_or_default().into(),
        stream_id: stream(exchange),
        downstream_wire_bytes_sent: counts.sent_head.saturating_add(counts.sent),
        downstream_wire_bytes_received: counts.received_head.saturating_add(counts.received),
        access_log_type: kind.into(),
        ..AccessLogCommon::default()
    }
}

fn stream(exchange: &Exchange) -> String {
    let id = exchange.request.as_ref().and_then(|head| head.headers.get("x-request-id"));
    id.map(text).unwrap_or_default()
}

fn timestamp(time: SystemTime) -> prost_types::Timestamp {
    prost_types::Timestamp::from(time)
}

fn address(of: SocketAddr) -> Address {
    let socket = SocketAddress {
        address: of.ip().to_string(),
        port_specifier: Some(PortSpecifier::PortValue(of.port().into())),
        ..SocketAddress::default()
    };
    Address {
        address: Some(address::Address::SocketAddress(socket)),
    }
}

/// The client's tunnel.
fn tls(exchange: &Exchange) -> Option<TlsProperties> {
    let connection = &exchange.connection;
    let of = |id: &cairn_exchange::SpiffeId| CertificateProperties {
        subject_alt_name: vec![SubjectAltName {
            san: Some(San::Uri(id.as_str().into())),
        }],
        ..CertificateProperties::default()
    };
    let peer = connection.peer.as_ref()?;
    Some(TlsProperties {
        tls_version: TlsVersion::TlSv13.into(),
        tls_sni_hostname: connection.requested_server_name.as_deref().unwrap_or_default().into(),
        local_certificate_properties: connection.local.as_ref().map(of),
        peer_certificate_properties: Some(of(peer)),
        ..TlsProperties::default()
    })
}

fn flags(flags: ResponseFlags) -> Flags {
    let has = |flag| flags.contains(flag);
    Flags {
        failed_local_healthcheck: has(ResponseFlags::FAILED_LOCAL_HEALTH_CHECK),
        no_healthy_upstream: has(ResponseFlags::NO_HEALTHY_UPSTREAM),
        upstream_request_timeout: has(ResponseFlags::UPSTREAM_REQUEST_TIMEOUT),
        local_reset: has(ResponseFlags::LOCAL_RESET),
        upstream_remote_reset: has(ResponseFlags::UPSTREAM_REMOTE_RESET),
        upstream_connection_failure: has(ResponseFlags::UPSTREAM_CONNECTION_FAILURE),
        upstream_connection_termination: has(ResponseFlags::UPSTREAM_CONNECTION_TERMINATION),
        upstream_overflow: has(ResponseFlags::UPSTREAM_OVERFLOW),
        no_route_found: has(ResponseFlags::NO_ROUTE_FOUND),
        delay_injected: has(ResponseFlags::DELAY_INJECTED),
        fault_injected: has(ResponseFlags::FAULT_INJECTED),
        rate_limited: has(ResponseFlags::RATE_LIMITED),
        unauthorized_details: has(ResponseFlags::UNAUTHORIZED_EXTERNAL_SERVICE).then(|| Unauthorized {
            reason: Reason::ExternalService.into(),
        }),
        rate_limit_service_error: has(ResponseFlags::RATE_LIMIT_SERVICE_ERROR),
        downstream_connection_termination: has(ResponseFlags::DOWNSTREAM_CONNECTION_TERMINATION),
        upstream_retry_limit_exceeded: has(ResponseFlags::UPSTREAM_RETRY_LIMIT_EXCEEDED),
        stream_idle_timeout: has(ResponseFlags::STREAM_IDLE_TIMEOUT),
        invalid_envoy_request_headers: has(ResponseFlags::INVALID_ENVOY_REQUEST_HEADERS),
        downstream_protocol_error: has(ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR),
        upstream_max_stream_duration_reached: has(ResponseFlags::UPSTREAM_MAX_STREAM_DURATION_REACHED),
        response_from_cache_filter: has(ResponseFlags::RESPONSE_FROM_CACHE_FILTER),
        no_filter_config_found: has(ResponseFlags::NO_FILTER_CONFIG_FOUND),
        duration_timeout: has(ResponseFlags::DURATION_TIMEOUT),
        upstream_protocol_error: has(ResponseFlags::UPSTREAM_PROTOCOL_ERROR),
        no_cluster_found: has(ResponseFlags::NO_CLUSTER_FOUND),
        overload_manager: has(ResponseFlags::OVERLOAD_MANAGER),
        dns_resolution_failure: has(ResponseFlags::DNS_RESOLUTION_FAILED),
        downstream_remote_reset: has(ResponseFlags::DOWNSTREAM_REMOTE_RESET),
    }
}
