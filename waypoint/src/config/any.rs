//! Bytes into messages: type URLs, `Any`, and fields that are newer than we are.
//!
//! prost drops fields that it does not know. Whether there were any shows in the length: what was decoded encodes to fewer bytes than
//! there were. Only then the message is decoded once more with the descriptor pool, which names them. An unknown field refuses the
//! unit that it stands in, for it may be the one that decides; in a message about logs or traces it is only listed.

use std::collections::BTreeMap;

use cairn_proto as proto;
use prost::Message;
use prost_reflect::{DynamicMessage, Value};

use super::report::{Malformed, Notes};

/// Nesting of messages that is looked into for unknown fields.
const MAX_DEPTH: usize = 64;

/// A message that we read, by its name.
pub(crate) trait Named: Message + Default {
    /// Full name of the message.
    const NAME: &'static str;
}

macro_rules! named {
    ($($name:literal => $type:path),* $(,)?) => { $( impl Named for $type { const NAME: &'static str = $name; } )* };
}

named! {
    "envoy.config.rbac.v3.Action" => proto::envoy::config::rbac::v3::Action,
    "envoy.type.matcher.v3.HttpRequestHeaderMatchInput" => proto::envoy::r#type::matcher::v3::HttpRequestHeaderMatchInput,
    "xds.type.matcher.v3.CelMatcher" => proto::xds::r#type::matcher::v3::CelMatcher,
    "envoy.config.cluster.v3.Cluster" => proto::envoy::config::cluster::v3::Cluster,
    "envoy.config.core.v3.TypedExtensionConfig" => proto::envoy::config::core::v3::TypedExtensionConfig,
    "envoy.config.endpoint.v3.ClusterLoadAssignment" => proto::envoy::config::endpoint::v3::ClusterLoadAssignment,
    "envoy.config.endpoint.v3.LbEndpoint" => proto::envoy::config::endpoint::v3::LbEndpoint,
    "envoy.config.endpoint.v3.LocalityLbEndpoints" => proto::envoy::config::endpoint::v3::LocalityLbEndpoints,
    "envoy.config.listener.v3.FilterChain" => proto::envoy::config::listener::v3::FilterChain,
    "envoy.config.route.v3.FilterConfig" => proto::envoy::config::route::v3::FilterConfig,
    "envoy.config.listener.v3.Listener" => proto::envoy::config::listener::v3::Listener,
    "envoy.config.trace.v3.OpenTelemetryConfig" => proto::envoy::config::trace::v3::OpenTelemetryConfig,
    "envoy.config.trace.v3.ZipkinConfig" => proto::envoy::config::trace::v3::ZipkinConfig,
    "envoy.extensions.tracers.opentelemetry.resource_detectors.v3.StaticConfigResourceDetectorConfig" => proto::envoy::extensions::tracers::opentelemetry::resource_detectors::v3::StaticConfigResourceDetectorConfig,
    "envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter" => proto::envoy::extensions::access_loggers::filters::cel::v3::ExpressionFilter,
    "envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig" => proto::envoy::extensions::access_loggers::grpc::v3::HttpGrpcAccessLogConfig,
    "envoy.extensions.access_loggers.grpc.v3.TcpGrpcAccessLogConfig" => proto::envoy::extensions::access_loggers::grpc::v3::TcpGrpcAccessLogConfig,
    "envoy.extensions.access_loggers.open_telemetry.v3.OpenTelemetryAccessLogConfig" => proto::envoy::extensions::access_loggers::open_telemetry::v3::OpenTelemetryAccessLogConfig,
    "envoy.extensions.access_loggers.file.v3.FileAccessLog" => proto::envoy::extensions::access_loggers::file::v3::FileAccessLog,
    "envoy.extensions.clusters.dynamic_forward_proxy.v3.ClusterConfig" => proto::envoy::extensions::clusters::dynamic_forward_proxy::v3::ClusterConfig,
    "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz" => proto::envoy::extensions::filters::http::ext_authz::v3::ExtAuthz,
    "envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute" => proto::envoy::extensions::filters::http::ext_authz::v3::ExtAuthzPerRoute,
    "envoy.extensions.filters.network.ext_authz.v3.ExtAuthz" => proto::envoy::extensions::filters::network::ext_authz::v3::ExtAuthz,
    "envoy.extensions.filters.http.buffer.v3.Buffer" => proto::envoy::extensions::filters::http::buffer::v3::Buffer,
    "envoy.extensions.filters.http.buffer.v3.BufferPerRoute" => proto::envoy::extensions::filters::http::buffer::v3::BufferPerRoute,
    "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication" => proto::envoy::extensions::filters::http::jwt_authn::v3::JwtAuthentication,
    "envoy.extensions.filters.http.jwt_authn.v3.PerRouteConfig" => proto::envoy::extensions::filters::http::jwt_authn::v3::PerRouteConfig,
    "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit" => proto::envoy::extensions::filters::http::local_ratelimit::v3::LocalRateLimit,
    "envoy.extensions.filters.http.ratelimit.v3.RateLimit" => proto::envoy::extensions::filters::http::ratelimit::v3::RateLimit,
    "envoy.extensions.filters.http.ratelimit.v3.RateLimitPerRoute" => proto::envoy::extensions::filters::http::ratelimit::v3::RateLimitPerRoute,
    "envoy.extensions.filters.network.local_ratelimit.v3.LocalRateLimit" => proto::envoy::extensions::filters::network::local_ratelimit::v3::LocalRateLimit,
    "envoy.extensions.filters.http.rbac.v3.RBACPerRoute" => proto::envoy::extensions::filters::http::rbac::v3::RbacPerRoute,
    "envoy.extensions.filters.http.cors.v3.CorsPolicy" => proto::envoy::extensions::filters::http::cors::v3::CorsPolicy,
    "envoy.extensions.filters.http.cors.v3.Cors" => proto::envoy::extensions::filters::http::cors::v3::Cors,
    "envoy.extensions.filters.http.dynamic_forward_proxy.v3.FilterConfig" => proto::envoy::extensions::filters::http::dynamic_forward_proxy::v3::FilterConfig,
    "envoy.extensions.filters.http.fault.v3.HTTPFault" => proto::envoy::extensions::filters::http::fault::v3::HttpFault,
    "envoy.extensions.filters.http.grpc_stats.v3.FilterConfig" => proto::envoy::extensions::filters::http::grpc_stats::v3::FilterConfig,
    "envoy.extensions.filters.http.grpc_web.v3.GrpcWeb" => proto::envoy::extensions::filters::http::grpc_web::v3::GrpcWeb,
    "envoy.extensions.filters.http.header_mutation.v3.HeaderMutationPerRoute" => proto::envoy::extensions::filters::http::header_mutation::v3::HeaderMutationPerRoute,
    "envoy.extensions.filters.http.header_mutation.v3.HeaderMutation" => proto::envoy::extensions::filters::http::header_mutation::v3::HeaderMutation,
    "envoy.extensions.filters.http.rbac.v3.RBAC" => proto::envoy::extensions::filters::http::rbac::v3::Rbac,
    "envoy.extensions.filters.http.router.v3.Router" => proto::envoy::extensions::filters::http::router::v3::Router,
    "envoy.extensions.filters.http.set_filter_state.v3.Config" => proto::envoy::extensions::filters::http::set_filter_state::v3::Config,
    "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager" => proto::envoy::extensions::filters::network::http_connection_manager::v3::HttpConnectionManager,
    "envoy.extensions.filters.network.mongo_proxy.v3.MongoProxy" => proto::envoy::extensions::filters::network::mongo_proxy::v3::MongoProxy,
    "envoy.extensions.filters.network.rbac.v3.RBAC" => proto::envoy::extensions::filters::network::rbac::v3::Rbac,
    "envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig" => proto::envoy::extensions::path::r#match::uri_template::v3::UriTemplateMatchConfig,
    "envoy.extensions.rbac.principals.mtls_authenticated.v3.Config" => proto::envoy::extensions::rbac::principals::mtls_authenticated::v3::Config,
    "envoy.extensions.filters.network.set_filter_state.v3.Config" => proto::envoy::extensions::filters::network::set_filter_state::v3::Config,
    "envoy.extensions.filters.network.sni_dynamic_forward_proxy.v3.FilterConfig" => proto::envoy::extensions::filters::network::sni_dynamic_forward_proxy::v3::FilterConfig,
    "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy" => proto::envoy::extensions::filters::network::tcp_proxy::v3::TcpProxy,
    "envoy.extensions.http.header_formatters.preserve_case.v3.PreserveCaseFormatterConfig" => proto::envoy::extensions::http::header_formatters::preserve_case::v3::PreserveCaseFormatterConfig,
    "envoy.extensions.load_balancing_policies.least_request.v3.LeastRequest" => proto::envoy::extensions::load_balancing_policies::least_request::v3::LeastRequest,
    "envoy.extensions.load_balancing_policies.round_robin.v3.RoundRobin" => proto::envoy::extensions::load_balancing_policies::round_robin::v3::RoundRobin,
    "envoy.extensions.load_balancing_policies.random.v3.Random" => proto::envoy::extensions::load_balancing_policies::random::v3::Random,
    "envoy.extensions.load_balancing_policies.ring_hash.v3.RingHash" => proto::envoy::extensions::load_balancing_policies::ring_hash::v3::RingHash,
    "envoy.extensions.load_balancing_policies.maglev.v3.Maglev" => proto::envoy::extensions::load_balancing_policies::maglev::v3::Maglev,
    "envoy.extensions.load_balancing_policies.cluster_provided.v3.ClusterProvided" => proto::envoy::extensions::load_balancing_policies::cluster_provided::v3::ClusterProvided,
    "envoy.extensions.load_balancing_policies.wrr_locality.v3.WrrLocality" => proto::envoy::extensions::load_balancing_policies::wrr_locality::v3::WrrLocality,
    "envoy.extensions.matching.common_inputs.network.v3.FilterStateInput" => proto::envoy::extensions::matching::common_inputs::network::v3::FilterStateInput,
    "envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig" => proto::envoy::extensions::request_id::uuid::v3::UuidRequestIdConfig,
    "envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig" => proto::envoy::extensions::retry::priority::previous_priorities::v3::PreviousPrioritiesConfig,
    "envoy.extensions.transport_sockets.internal_upstream.v3.InternalUpstreamTransport" => proto::envoy::extensions::transport_sockets::internal_upstream::v3::InternalUpstreamTransport,
    "envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport" => proto::envoy::extensions::transport_sockets::proxy_protocol::v3::ProxyProtocolUpstreamTransport,
    "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer" => proto::envoy::extensions::transport_sockets::raw_buffer::v3::RawBuffer,
    "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext" => proto::envoy::extensions::transport_sockets::tls::v3::DownstreamTlsContext,
    "envoy.extensions.transport_sockets.tls.v3.Secret" => proto::envoy::extensions::transport_sockets::tls::v3::Secret,
    "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext" => proto::envoy::extensions::transport_sockets::tls::v3::UpstreamTlsContext,
    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions" => proto::envoy::extensions::upstreams::http::v3::HttpProtocolOptions,
    "istio.workload.Address" => proto::istio::workload::Address,
    "istio.workload.Workload" => proto::istio::workload::Workload,
    "stats.PluginConfig" => proto::stats::PluginConfig,
    "udpa.type.v1.TypedStruct" => proto::udpa::r#type::v1::TypedStruct,
    "xds.type.matcher.v3.IPMatcher" => proto::xds::r#type::matcher::v3::IpMatcher,
    "xds.type.v3.TypedStruct" => proto::xds::r#type::v3::TypedStruct,
}

/// The message's name in a type URL.
pub(crate) fn type_name(type_url: &str) -> &str {
    type_url.rsplit('/').next().unwrap_or(type_url)
}

/// How an unknown field is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unknown {
    /// It may be one that decides.
    Refuses,
    /// It is about logs, traces, statistics.
    Ignored,
}

/// Decodes a message and lists unknown fields.
pub(crate) fn decode<M: Named>(bytes: &[u8], unknown: Unknown, notes: &mut Notes) -> Result<M, Malformed> {
    let message = M::decode(bytes).map_err(|error| notes.malformed("", format!("is no {}: {error}", M::NAME)))?;
    if message.encoded_len() != bytes.len() {
        list_unknown::<M>(bytes, unknown, notes);
    }
    Ok(message)
}

/// Decodes the message in an `Any` of this type.
pub(crate) fn unpack<M: Named>(any: &prost_types::Any, unknown: Unknown, notes: &mut Notes) -> Result<M, Malformed> {
    let found = type_name(&any.type_url);
    if found != M::NAME {
        return Err(notes.malformed("", format!("is a {found} where a {} belongs", M::NAME)));
    }
    decode(&any.value, unknown, notes)
}

/// An `Any`, with a `TypedStruct` in it taken out of its wrapping.
#[derive(Clone, Debug)]
pub(crate) enum Typed<'a> {
    /// A message.
    Message(&'a str, &'a prost_types::Any),
    /// A structure of this type.
    Struct(String, prost_types::Struct),
}

impl Typed<'_> {
    /// Name of the type, whatever wraps it.
    pub(crate) fn name(&self) -> &str {
        match self {
            Typed::Message(name, _) => name,
            Typed::Struct(name, _) => name,
        }
    }
}

/// Looks through `TypedStruct`; [`structure::unwrapped`](super::structure::unwrapped) makes those messages that stand for one.
pub(crate) fn typed<'a>(any: &'a prost_types::Any, notes: &mut Notes) -> Result<Typed<'a>, Malformed> {
    use proto::{udpa, xds};
    let name = type_name(&any.type_url);
    let (type_url, value) = match name {
        "udpa.type.v1.TypedStruct" => {
            let udpa::r#type::v1::TypedStruct { type_url, value } = unpack(any, Unknown::Refuses, notes)?;
            (type_url, value)
        }
        "xds.type.v3.TypedStruct" => {
            let xds::r#type::v3::TypedStruct { type_url, value } = unpack(any, Unknown::Refuses, notes)?;
            (type_url, value)
        }
        _ => return Ok(Typed::Message(name, any)),
    };
    Ok(Typed::Struct(type_name(&type_url).to_owned(), value.unwrap_or_default()))
}

/// A member of a structure that is text.
pub(crate) fn text<'a>(fields: &'a BTreeMap<String, prost_types::Value>, key: &str) -> Option<&'a str> {
    match fields.get(key)?.kind.as_ref()? {
        prost_types::value::Kind::StringValue(text) => Some(text),
        _ => None,
    }
}

fn list_unknown<M: Named>(bytes: &[u8], unknown: Unknown, notes: &mut Notes) {
    let Some(descriptor) = proto::pool().get_message_by_name(M::NAME) else {
        return;
    };
    let Ok(message) = DynamicMessage::decode(descriptor, bytes) else {
        return;
    };
    let mut found = Vec::new();
    walk(&message, "", 0, &mut found);
    for (place, number) in found {
        let what = format!("field {number} is newer than this proxy");
        match unknown {
            Unknown::Refuses => notes.refuse(&place, what),
            Unknown::Ignored => notes.ignore(&place, what),
        }
    }
}

fn walk(message: &DynamicMessage, place: &str, depth: usize, found: &mut Vec<(String, u32)>) {
    if depth > MAX_DEPTH {
        return;
    }
    found.extend(message.unknown_fields().map(|field| (place.to_owned(), field.number())));
    for (field, value) in message.fields() {
        let inside = if place.is_empty() {
            field.name().to_owned()
        } else {
            format!("{place}.{}", field.name())
        };
        walk_value(value, &inside, depth, found);
    }
}

fn walk_value(value: &Value, place: &str, depth: usize, found: &mut Vec<(String, u32)>) {
    match value {
        Value::Message(message) => walk(message, place, depth + 1, found),
        Value::List(list) => {
            for (index, value) in list.iter().enumerate() {
                walk_value(value, &format!("{place}[{index}]"), depth, found);
            }
        }
        Value::Map(map) => {
            for value in map.values() {
                walk_value(value, place, depth, found);
            }
        }
        _ => {}
    }
}
