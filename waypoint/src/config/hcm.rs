//! `http_connection_manager` (contract xds §3.1): settings of HTTP, the filters, and the routes.
//!
//! Every field that could change who gets through or what is answered is either done or refuses the chain; fields of logs, traces
//! and Envoy's own defences are listed or left.

use std::time::Duration;

use cairn_filters::FilterChain;
use cairn_policy::{
    headers::{incoming::Incoming, outgoing::ServerHeader},
    matcher::CidrSet,
    path::{EscapedSlashes, PathNormalization},
};
use cairn_proto::envoy::{
    config::accesslog::v3::AccessLog,
    config::core::v3::{
        Http1ProtocolOptions, Http2ProtocolOptions, HttpProtocolOptions, KeepaliveSettings,
        http_protocol_options::HeadersWithUnderscoresAction,
    },
    config::route::v3::RouteConfiguration,
    extensions::{
        filters::network::http_connection_manager::v3::{
            HttpConnectionManager, HttpFilter, RequestIdExtension,
            http_connection_manager::{
                CodecType, ForwardClientCertDetails, InternalAddressConfig, PathWithEscapedSlashesAction, RouteSpecifier,
                ServerHeaderTransformation, Tracing, UpgradeConfig,
            },
        },
        request_id::uuid::v3::UuidRequestIdConfig,
    },
};
use http::HeaderValue;

use super::{
    access_log,
    any::{Unknown, type_name, unpack},
    chain::Context,
    http_filters,
    protocol_options::{self, Http1, Http2},
    report::{Malformed, Notes, ignore_set, refuse_set, unneeded},
    route, tracer,
    value::{self, limit},
};
use crate::snapshot::{HttpChain, HttpSettings, chain::Underscores};

/// Which connections a manager handles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Where {
    /// Tunnels: `connect_terminate`.
    Tunnel,
    /// What is inside of them: `main_internal`.
    Inside,
}

/// A connection manager taken apart.
pub(crate) struct Taken {
    /// Its settings.
    pub settings: HttpSettings,
    /// Its filters.
    pub http_filters: Vec<HttpFilter>,
    /// Its routes.
    pub route_specifier: Option<RouteSpecifier>,
    /// Its logs.
    pub access_log: Vec<AccessLog>,
    /// Its traces.
    pub tracing: Option<Tracing>,
    /// PINGs on HTTP/2 connections.
    pub keepalive: Option<KeepaliveSettings>,
}

/// Compiles a connection manager of `main_internal`.
pub(crate) fn compile(manager: HttpConnectionManager, context: &mut Context, notes: &mut Notes) -> Result<HttpChain, Malformed> {
    let Taken {
        mut settings,
        http_filters,
        route_specifier,
        access_log,
        tracing,
        keepalive,
    } = take(manager, Where::Inside, notes)?;
    if keepalive.is_some() {
        notes.ignore(
            "http2_protocol_options.connection_keepalive",
            "connections inside a tunnel live with the tunnel",
        );
    }
    let mut filters = http_filters::compile(http_filters, context, notes)?;
    settings.suppress_envoy_headers = filters.suppress_envoy_headers;
    let routes = match route_specifier {
        Some(RouteSpecifier::RouteConfig(config)) => {
            notes.within("route_config", |notes| route::compile(config, context, notes))?
        }
        // Envoy would take them, and what they say is not known: nothing of the chain is served.
        Some(RouteSpecifier::Rds(_)) => {
            notes.refuse(
                "rds",
                "routes by RDS are not supported: istiod never sends them to a waypoint",
            );
            route::compile(RouteConfiguration::default(), context, notes)?
        }
        Some(RouteSpecifier::ScopedRoutes(_)) => {
            notes.refuse("scoped_routes", "is not supported");
            route::compile(RouteConfiguration::default(), context, notes)?
        }
        None => return Err(notes.malformed("route_config", "is missing")),
    };
    filters.drop_inert(context);
    let tracer = match tracing {
        Some(tracing) => Some(notes.within("tracing", |notes| {
            tracer::compile(tracing, &mut settings.sampling, context, notes)
        })?),
        None => None,
    };
    Ok(HttpChain {
        settings,
        filters: FilterChain::of(filters.chain),
        routes,
        access_logs: access_log::compile(access_log, &context.outputs, notes)?,
        tracer,
        metrics: filters.metrics.into(),
        shared: None,
    })
}

/// Takes a connection manager apart.
pub(crate) fn take(manager: HttpConnectionManager, at: Where, notes: &mut Notes) -> Result<Taken, Malformed> {
    let HttpConnectionManager {
        codec_type,
        stat_prefix,
        http_filters,
        add_user_agent,
        tracing,
        common_http_protocol_options,
        http1_safe_max_connection_duration,
        http_protocol_options,
        http2_protocol_options,
        http3_protocol_options,
        server_name,
        server_header_transformation,
        scheme_header_transformation,
        max_request_headers_kb,
        stream_idle_timeout,
        stream_flush_timeout,
        request_timeout,
        request_headers_timeout,
        drain_timeout,
        drain_timeout_jitter,
        delayed_close_timeout,
        access_log,
        access_log_flush_interval,
        flush_access_log_on_new_request,
        access_log_options,
        use_remote_address,
        xff_num_trusted_hops,
        original_ip_detection_extensions,
        early_header_mutation_extensions,
        internal_address_config,
        skip_xff_append,
        via,
        generate_request_id,
        preserve_external_request_id,
        always_set_request_id_in_response,
        forward_client_cert_details,
        set_current_client_cert_details,
        forward_client_cert_matcher,
        proxy_100_continue,
        represent_ipv4_remote_address_as_ipv4_mapped_ipv6,
        upgrade_configs,
        normalize_path,
        merge_slashes,
        path_with_escaped_slashes_action,
        request_id_extension,
        local_reply_config,
        strip_matching_host_port,
        stream_error_on_invalid_http_message,
        path_normalization_options,
        strip_trailing_host_dot,
        proxy_status_config,
        typed_header_validation_config,
        append_x_forwarded_port,
        append_local_overload,
        add_proxy_protocol_connection_state,
        forward_proto_config,
        route_specifier,
        strip_port_mode,
    } = manager;
    unneeded!(
        stat_prefix,
        http1_safe_max_connection_duration,
        stream_flush_timeout,
        drain_timeout,
        drain_timeout_jitter
    );
    unneeded!(
        delayed_close_timeout,
        skip_xff_append,
        add_proxy_protocol_connection_state,
        append_local_overload
    );
    // Details of certificates are taken from a TLS connection, and there is none inside the tunnel.
    unneeded!(set_current_client_cert_details);
    if add_user_agent == Some(true) {
        notes.refuse("add_user_agent", "is not supported");
    }
    if use_remote_address == Some(true) {
        notes.refuse("use_remote_address", "is not supported");
    }
    refuse_set!(
        notes,
        http3_protocol_options,
        scheme_header_transformation,
        original_ip_detection_extensions,
        early_header_mutation_extensions,
        via,
        always_set_request_id_in_response,
        forward_client_cert_matcher,
        represent_ipv4_remote_address_as_ipv4_mapped_ipv6,
        local_reply_config,
        strip_matching_host_port,
        strip_port_mode,
        strip_trailing_host_dot,
        path_normalization_options,
        proxy_status_config,
        typed_header_validation_config,
        forward_proto_config,
    );
    ignore_set!(
        notes,
        access_log_flush_interval,
        flush_access_log_on_new_request,
        access_log_options,
        preserve_external_request_id,
        stream_error_on_invalid_http_message,
    );
    check_codec(codec_type, notes)?;

    let mut settings = HttpSettings {
        path: PathNormalization {
            normalize: normalize_path == Some(true),
            merge_slashes,
            escaped_slashes: escaped_slashes(path_with_escaped_slashes_action, notes)?,
        },
        incoming: Incoming {
            trusted_hops: xff_num_trusted_hops,
            internal: internal_addresses(internal_address_config, notes)?,
            generate_request_id: generate_request_id != Some(false),
            append_forwarded_port: append_x_forwarded_port,
            forward_client_cert: forward_client_cert(forward_client_cert_details, notes)?,
        },
        server: server_header(server_header_transformation, &server_name, notes)?,
        proxy_100_continue,
        ..HttpSettings::default()
    };
    if let Some(kilobytes) = max_request_headers_kb {
        settings.max_request_head = usize::try_from(kilobytes).unwrap_or(usize::MAX).saturating_mul(1024);
    }
    let stream_idle_default = settings.stream_idle_timeout;
    settings.stream_idle_timeout = limit("stream_idle_timeout", stream_idle_timeout, stream_idle_default, notes)?;
    settings.request_timeout = limit("request_timeout", request_timeout, None, notes)?;
    settings.request_headers_timeout = limit("request_headers_timeout", request_headers_timeout, None, notes)?;
    if let Some(options) = common_http_protocol_options {
        notes.within("common_http_protocol_options", |notes| {
            common_options(options, &mut settings, notes)
        })?;
    }
    if let Some(options) = http_protocol_options {
        notes.within("http_protocol_options", |notes| http1(options, &mut settings, notes))?;
    }
    let mut keepalive = None;
    if let Some(options) = http2_protocol_options {
        keepalive = notes.within("http2_protocol_options", |notes| http2(options, at, &mut settings, notes));
    }
    upgrades(upgrade_configs, at, &mut settings, notes);
    request_id(request_id_extension, &mut settings, notes)?;

    Ok(Taken {
        settings,
        http_filters,
        route_specifier,
        access_log,
        tracing,
        keepalive,
    })
}

fn check_codec(codec: i32, notes: &mut Notes) -> Result<(), Malformed> {
    match CodecType::try_from(codec) {
        Ok(CodecType::Auto) => {}
        Ok(other) => notes.refuse("codec_type", format!("{} alone is not supported", other.as_str_name())),
        Err(_) => return Err(notes.malformed("codec_type", format!("{codec} is not known"))),
    }
    Ok(())
}

fn escaped_slashes(action: i32, notes: &Notes) -> Result<EscapedSlashes, Malformed> {
    Ok(match PathWithEscapedSlashesAction::try_from(action) {
        Ok(PathWithEscapedSlashesAction::ImplementationSpecificDefault | PathWithEscapedSlashesAction::KeepUnchanged) => {
            EscapedSlashes::Keep
        }
        Ok(PathWithEscapedSlashesAction::RejectRequest) => EscapedSlashes::Reject,
        Ok(PathWithEscapedSlashesAction::UnescapeAndRedirect) => EscapedSlashes::Redirect,
        Ok(PathWithEscapedSlashesAction::UnescapeAndForward) => EscapedSlashes::Unescape,
        Err(_) => return Err(notes.malformed("path_with_escaped_slashes_action", format!("{action} is not known"))),
    })
}

fn server_header(transformation: i32, name: &str, notes: &Notes) -> Result<ServerHeader, Malformed> {
    let name = if name.is_empty() { "envoy" } else { name };
    let name =
        HeaderValue::try_from(name).map_err(|_| notes.malformed("server_name", format!("`{name}` cannot stand in a header")))?;
    Ok(match ServerHeaderTransformation::try_from(transformation) {
        Ok(ServerHeaderTransformation::Overwrite) => ServerHeader::Overwrite(name),
        Ok(ServerHeaderTransformation::AppendIfAbsent) => ServerHeader::IfAbsent(name),
        Ok(ServerHeaderTransformation::PassThrough) => ServerHeader::PassThrough,
        Err(_) => return Err(notes.malformed("server_header_transformation", format!("{transformation} is not known"))),
    })
}

/// Whether the client's header passes. Inside the tunnel there is no TLS, and without TLS all ways but one remove it
/// (contract xds §3.1).
fn forward_client_cert(details: i32, notes: &Notes) -> Result<bool, Malformed> {
    match ForwardClientCertDetails::try_from(details) {
        Ok(
            ForwardClientCertDetails::Sanitize
            | ForwardClientCertDetails::ForwardOnly
            | ForwardClientCertDetails::AppendForward
            | ForwardClientCertDetails::SanitizeSet,
        ) => Ok(false),
        Ok(ForwardClientCertDetails::AlwaysForwardOnly) => Ok(true),
        Err(_) => Err(notes.malformed("forward_client_cert_details", format!("{details} is not known"))),
    }
}

fn internal_addresses(config: Option<InternalAddressConfig>, notes: &Notes) -> Result<CidrSet, Malformed> {
    let Some(InternalAddressConfig {
        unix_sockets: _,
        cidr_ranges,
    }) = config
    else {
        return Ok(CidrSet::default());
    };
    cidr_ranges
        .into_iter()
        .map(|range| value::range("internal_address_config.cidr_ranges", range, notes))
        .collect()
}

fn common_options(options: HttpProtocolOptions, settings: &mut HttpSettings, notes: &mut Notes) -> Result<(), Malformed> {
    let HttpProtocolOptions {
        idle_timeout,
        max_connection_duration,
        max_connection_duration_jitter,
        max_headers_count,
        max_response_headers_kb,
        max_stream_duration,
        headers_with_underscores_action,
        max_requests_per_connection,
    } = options;
    unneeded!(max_connection_duration_jitter);
    ignore_set!(notes, max_response_headers_kb, max_requests_per_connection);
    let idle_default: Option<Duration> = settings.idle_timeout;
    settings.idle_timeout = limit("idle_timeout", idle_timeout, idle_default, notes)?;
    settings.max_connection_duration = limit("max_connection_duration", max_connection_duration, None, notes)?;
    settings.max_stream_duration = limit("max_stream_duration", max_stream_duration, None, notes)?;
    if let Some(count) = max_headers_count {
        settings.max_request_headers = usize::try_from(count).unwrap_or(usize::MAX);
    }
    settings.underscores = match HeadersWithUnderscoresAction::try_from(headers_with_underscores_action) {
        Ok(HeadersWithUnderscoresAction::Allow) => Underscores::Allow,
        Ok(HeadersWithUnderscoresAction::RejectRequest) => Underscores::Reject,
        Ok(HeadersWithUnderscoresAction::DropHeader) => Underscores::Drop,
        Err(_) => {
            let what = format!("{headers_with_underscores_action} is not known");
            return Err(notes.malformed("headers_with_underscores_action", what));
        }
    };
    Ok(())
}

fn http1(options: Http1ProtocolOptions, settings: &mut HttpSettings, notes: &mut Notes) -> Result<(), Malformed> {
    let Http1 {
        allow_absolute_url,
        accept_http_10,
        default_host_for_http_10,
        enable_trailers,
        override_stream_error_on_invalid_http_message,
        send_fully_qualified_url,
        ignore_http_11_upgrade,
        preserve_case,
    } = protocol_options::http1(options, notes)?;
    unneeded!(send_fully_qualified_url, enable_trailers);
    refuse_set!(notes, default_host_for_http_10, ignore_http_11_upgrade);
    ignore_set!(notes, override_stream_error_on_invalid_http_message);
    if allow_absolute_url == Some(false) {
        notes.refuse("allow_absolute_url", "cannot be turned off");
    }
    settings.accept_http10 = accept_http_10;
    settings.preserve_header_case = preserve_case;
    Ok(())
}

fn http2(options: Http2ProtocolOptions, at: Where, settings: &mut HttpSettings, notes: &mut Notes) -> Option<KeepaliveSettings> {
    let Http2 {
        max_concurrent_streams,
        initial_stream_window_size,
        initial_connection_window_size,
        allow_connect,
        connection_keepalive,
    } = protocol_options::http2(options, notes);
    // Of tunnels it is CONNECT itself that is allowed, and that is always.
    settings.http2_extended_connect = at == Where::Inside && allow_connect;
    settings.http2_max_concurrent_streams = max_concurrent_streams;
    settings.http2_stream_window = initial_stream_window_size;
    settings.http2_connection_window = initial_connection_window_size;
    connection_keepalive
}

fn upgrades(configs: Vec<UpgradeConfig>, at: Where, settings: &mut HttpSettings, notes: &mut Notes) {
    for (
        index,
        UpgradeConfig {
            upgrade_type,
            filters,
            enabled,
        },
    ) in configs.into_iter().enumerate()
    {
        notes.at("upgrade_configs", index, |notes| {
            refuse_set!(notes, filters);
            if enabled == Some(false) {
                return;
            }
            match upgrade_type.to_ascii_lowercase().as_str() {
                "websocket" => settings.websocket = true,
                "connect" if at == Where::Tunnel => {}
                "connect" | "connect-udp" => {
                    notes.refuse("upgrade_type", format!("{upgrade_type} is not supported inside a tunnel"))
                }
                other => settings.upgrades.push(other.into()),
            }
        });
    }
}

fn request_id(extension: Option<RequestIdExtension>, settings: &mut HttpSettings, notes: &mut Notes) -> Result<(), Malformed> {
    let Some(any) = extension.and_then(|RequestIdExtension { typed_config }| typed_config) else {
        return Ok(());
    };
    notes.within("request_id_extension", |notes| {
        if type_name(&any.type_url) != "envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig" {
            notes.ignore("", format!("{} is not known; UUIDs are used", type_name(&any.type_url)));
            return Ok(());
        }
        let UuidRequestIdConfig {
            pack_trace_reason,
            use_request_id_for_trace_sampling,
        } = unpack(&any, Unknown::Ignored, notes)?;
        settings.sampling.tell = pack_trace_reason != Some(false);
        settings.sampling.by_request_id = use_request_id_for_trace_sampling != Some(false);
        Ok(())
    })
}
