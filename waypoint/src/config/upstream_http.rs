//! `HttpProtocolOptions` of a cluster (contract xds §5.2, §5.3): which HTTP is spoken to endpoints, and how long connections
//! live.

use std::{collections::BTreeMap, time::Duration};

use cairn_proto::envoy::{
    config::core::v3::{
        Http1ProtocolOptions, Http2ProtocolOptions, HttpProtocolOptions as CommonOptions, UpstreamHttpProtocolOptions,
    },
    extensions::upstreams::http::v3::{
        HttpProtocolOptions,
        http_protocol_options::{
            ExplicitHttpConfig, UpstreamProtocolOptions, UseDownstreamHttpConfig, explicit_http_config::ProtocolConfig,
        },
    },
};

use super::{
    any::{Unknown, unpack},
    mirrors,
    protocol_options::{self, Http1, Http2},
    report::{Malformed, Notes, ignore_set, refuse_set, unneeded},
    route_action,
    value::limit,
};
use crate::upstream::{ClusterSettings, NamesByHost, UpstreamProtocol};

/// Name of the options among a cluster's.
const HTTP_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

/// Envoy closes an idle upstream connection after this unless told otherwise.
const IDLE_TIMEOUT: Duration = Duration::from_secs(3600);

/// Reads the options into the settings.
pub(crate) fn apply(
    options: &BTreeMap<String, prost_types::Any>,
    settings: &mut ClusterSettings,
    notes: &mut Notes,
) -> Result<(), Malformed> {
    for (name, any) in options {
        notes.within(format!("typed_extension_protocol_options[{name}]"), |notes| {
            if name != HTTP_OPTIONS {
                notes.refuse("", "is not known");
                return Ok(());
            }
            http_options(unpack(any, Unknown::Refuses, notes)?, settings, notes)
        })?;
    }
    Ok(())
}

fn http_options(options: HttpProtocolOptions, settings: &mut ClusterSettings, notes: &mut Notes) -> Result<(), Malformed> {
    let HttpProtocolOptions {
        common_http_protocol_options,
        upstream_http_protocol_options,
        http_filters,
        header_validation_config,
        outlier_detection,
        request_mirror_policies,
        hash_policy,
        retry_policy,
        upstream_protocol_options,
    } = options;
    refuse_set!(notes, http_filters, header_validation_config, retry_policy);
    settings.mirrors = mirrors::list_of(request_mirror_policies, notes)?;
    ignore_set!(notes, outlier_detection);
    for (index, policy) in hash_policy.into_iter().enumerate() {
        let compiled = notes.at("hash_policy", index, |notes| route_action::hash(policy, notes))?;
        settings.hash_policies.extend(compiled);
    }
    if let Some(common) = common_http_protocol_options {
        notes.within("common_http_protocol_options", |notes| {
            common_options(common, settings, notes)
        })?;
    }
    if let Some(UpstreamHttpProtocolOptions {
        auto_sni,
        auto_san_validation,
        override_auto_sni_header,
    }) = upstream_http_protocol_options
    {
        refuse_set!(notes, override_auto_sni_header);
        settings.names_by_host = NamesByHost {
            server_name: auto_sni,
            verify: auto_san_validation,
        };
    }
    settings.protocol = match upstream_protocol_options {
        None => return Err(notes.malformed("upstream_protocol_options", "is missing")),
        Some(UpstreamProtocolOptions::ExplicitHttpConfig(ExplicitHttpConfig { protocol_config })) => match protocol_config {
            None => return Err(notes.malformed("explicit_http_config", "is empty")),
            Some(ProtocolConfig::HttpProtocolOptions(options)) => {
                settings.preserve_header_case = notes.within("http_protocol_options", |notes| http1(options, notes))?;
                UpstreamProtocol::Http1
            }
            Some(ProtocolConfig::Http2ProtocolOptions(options)) => {
                notes.within("http2_protocol_options", |notes| http2(options, settings, notes));
                UpstreamProtocol::Http2
            }
            Some(ProtocolConfig::Http3ProtocolOptions(_)) => {
                notes.refuse("explicit_http_config", "HTTP/3 is not supported");
                UpstreamProtocol::Http1
            }
        },
        Some(UpstreamProtocolOptions::UseDownstreamProtocolConfig(config)) => {
            let UseDownstreamHttpConfig {
                http_protocol_options,
                http2_protocol_options,
                http3_protocol_options,
            } = config;
            refuse_set!(notes, http3_protocol_options);
            if let Some(options) = http_protocol_options {
                settings.preserve_header_case = notes.within("http_protocol_options", |notes| http1(options, notes))?;
            }
            if let Some(options) = http2_protocol_options {
                notes.within("http2_protocol_options", |notes| http2(options, settings, notes));
            }
            UpstreamProtocol::Downstream
        }
        Some(UpstreamProtocolOptions::AutoConfig(_)) => {
            notes.refuse("auto_config", "is not supported");
            UpstreamProtocol::Http1
        }
    };
    Ok(())
}

fn common_options(options: CommonOptions, settings: &mut ClusterSettings, notes: &mut Notes) -> Result<(), Malformed> {
    let CommonOptions {
        idle_timeout,
        max_connection_duration,
        max_connection_duration_jitter,
        max_headers_count,
        max_response_headers_kb,
        max_stream_duration,
        headers_with_underscores_action,
        max_requests_per_connection,
    } = options;
    unneeded!(headers_with_underscores_action, max_connection_duration_jitter);
    ignore_set!(notes, max_headers_count, max_response_headers_kb);
    refuse_set!(notes, max_stream_duration);
    settings.idle_timeout = limit("idle_timeout", idle_timeout, Some(IDLE_TIMEOUT), notes)?;
    settings.max_connection_duration = limit("max_connection_duration", max_connection_duration, None, notes)?;
    if let Some(max) = max_requests_per_connection {
        settings.max_requests_per_connection = Some(max).filter(|max| *max > 0);
    }
    Ok(())
}

/// Whether the spelling of header names is kept.
fn http1(options: Http1ProtocolOptions, notes: &mut Notes) -> Result<bool, Malformed> {
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
    unneeded!(
        allow_absolute_url,
        accept_http_10,
        default_host_for_http_10,
        override_stream_error_on_invalid_http_message,
        ignore_http_11_upgrade,
    );
    refuse_set!(notes, send_fully_qualified_url);
    ignore_set!(notes, enable_trailers);
    Ok(preserve_case)
}

fn http2(options: Http2ProtocolOptions, settings: &mut ClusterSettings, notes: &mut Notes) {
    let Http2 {
        max_concurrent_streams,
        initial_stream_window_size,
        initial_connection_window_size,
        allow_connect,
        connection_keepalive,
    } = protocol_options::http2(options, notes);
    // Windows follow our budget.
    unneeded!(initial_stream_window_size, initial_connection_window_size, allow_connect);
    ignore_set!(notes, connection_keepalive);
    settings.http2_max_concurrent_streams = max_concurrent_streams;
}
