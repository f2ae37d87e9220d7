//! `HttpProtocolOptions` of a cluster (contract xds §5.2, §5.3): which HTTP is spoken to endpoints, and how long connections
//! live.

use std::{collections::BTreeMap, time::Duration};

use cairn_proto::envoy::{
    config::core::v3::{
        Http1ProtocolOptions, Http2ProtocolOptions, HttpProtocolOptions as CommonOptions, UpstreamHttpProtocolOptions,
        http1_protocol_options::{HeaderKeyFormat, header_key_format::HeaderFormat},
    },
    extensions::{
        http::header_formatters::preserve_case::v3::PreserveCaseFormatterConfig,
        upstreams::http::v3::{
            HttpProtocolOptions,
            http_protocol_options::{
                ExplicitHttpConfig, UpstreamProtocolOptions, UseDownstreamHttpConfig, explicit_http_config::ProtocolConfig,
            },
        },
    },
};

use super::{
    any::{Unknown, type_name, unpack},
    report::{Malformed, Notes, ignore_set, refuse_set, unneeded},
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
    refuse_set!(
        notes,
        http_filters,
        header_validation_config,
        request_mirror_policies,
        retry_policy
    );
    ignore_set!(notes, outlier_detection, hash_policy);
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
    let Http1ProtocolOptions {
        allow_absolute_url,
        accept_http_10,
        default_host_for_http_10,
        header_key_format,
        enable_trailers,
        allow_chunked_length,
        override_stream_error_on_invalid_http_message,
        send_fully_qualified_url,
        use_balsa_parser,
        allow_custom_methods,
        ignore_http_11_upgrade,
    } = options;
    unneeded!(
        allow_absolute_url,
        accept_http_10,
        default_host_for_http_10,
        override_stream_error_on_invalid_http_message,
        use_balsa_parser,
        allow_custom_methods,
        ignore_http_11_upgrade,
    );
    refuse_set!(notes, allow_chunked_length, send_fully_qualified_url);
    ignore_set!(notes, enable_trailers);
    preserves_case(header_key_format, notes)
}

/// Whether a format of header names is the one that keeps their spelling.
pub(crate) fn preserves_case(format: Option<HeaderKeyFormat>, notes: &mut Notes) -> Result<bool, Malformed> {
    let Some(HeaderKeyFormat { header_format }) = format else {
        return Ok(false);
    };
    match header_format {
        None => Ok(false),
        Some(HeaderFormat::ProperCaseWords(_)) => {
            notes.ignore(
                "header_key_format",
                "proper case is not supported; names are sent in lower case",
            );
            Ok(false)
        }
        Some(HeaderFormat::StatefulFormatter(extension)) => {
            let any = extension
                .typed_config
                .ok_or_else(|| notes.malformed("header_key_format", "has no configuration"))?;
            if type_name(&any.type_url) != "envoy.extensions.http.header_formatters.preserve_case.v3.PreserveCaseFormatterConfig"
            {
                notes.ignore("header_key_format", format!("{} is not known", type_name(&any.type_url)));
                return Ok(false);
            }
            let PreserveCaseFormatterConfig {
                forward_reason_phrase,
                formatter_type_on_envoy_headers,
            } = notes.within("header_key_format", |notes| unpack(&any, Unknown::Ignored, notes))?;
            ignore_set!(notes, forward_reason_phrase, formatter_type_on_envoy_headers);
            Ok(true)
        }
    }
}

fn http2(options: Http2ProtocolOptions, settings: &mut ClusterSettings, notes: &mut Notes) {
    let Http2ProtocolOptions {
        hpack_table_size,
        max_concurrent_streams,
        initial_stream_window_size,
        initial_connection_window_size,
        allow_connect,
        allow_metadata,
        max_outbound_frames,
        max_outbound_control_frames,
        max_consecutive_inbound_frames_with_empty_payload,
        max_inbound_priority_frames_per_stream,
        max_inbound_window_update_frames_per_data_frame_sent,
        stream_error_on_invalid_http_messaging,
        override_stream_error_on_invalid_http_message,
        custom_settings_parameters,
        connection_keepalive,
        use_oghttp2_codec,
        max_metadata_size,
        enable_huffman_encoding,
        max_header_field_size_kb,
        disallow_obs_text,
        stream_reset_burst,
        stream_reset_rate,
    } = options;
    // Limits of frames and codecs are Envoy's own defence; windows follow our budget.
    unneeded!(
        hpack_table_size,
        initial_stream_window_size,
        initial_connection_window_size,
        allow_connect,
        max_outbound_frames,
        max_outbound_control_frames,
        max_consecutive_inbound_frames_with_empty_payload,
        max_inbound_priority_frames_per_stream,
        max_inbound_window_update_frames_per_data_frame_sent,
        stream_error_on_invalid_http_messaging,
        override_stream_error_on_invalid_http_message,
        use_oghttp2_codec,
        max_metadata_size,
        enable_huffman_encoding,
        max_header_field_size_kb,
        disallow_obs_text,
        stream_reset_burst,
        stream_reset_rate,
    );
    ignore_set!(notes, allow_metadata, custom_settings_parameters, connection_keepalive);
    settings.http2_max_concurrent_streams = max_concurrent_streams;
}
