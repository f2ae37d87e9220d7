//! Options of HTTP/1 and HTTP/2 as connection managers and clusters have them (contract xds §3.1, §5.2): what both sides take alike is
//! decided here, what they take differently is handed back.

use cairn_proto::envoy::{
    config::core::v3::{
        Http1ProtocolOptions, Http2ProtocolOptions, KeepaliveSettings,
        http1_protocol_options::{HeaderKeyFormat, header_key_format::HeaderFormat},
    },
    extensions::http::header_formatters::preserve_case::v3::PreserveCaseFormatterConfig,
    r#type::matcher::v3::StringMatcher,
};

use super::{
    any::{Unknown, type_name, unpack},
    report::{Malformed, Notes, ignore_set, refuse_set, unneeded},
};

/// What is left of HTTP/1's options, named as they are.
pub(crate) struct Http1 {
    pub allow_absolute_url: Option<bool>,
    pub accept_http_10: bool,
    pub default_host_for_http_10: String,
    pub enable_trailers: bool,
    pub override_stream_error_on_invalid_http_message: Option<bool>,
    pub send_fully_qualified_url: bool,
    pub ignore_http_11_upgrade: Vec<StringMatcher>,
    /// `header_key_format` asks for names as they were written.
    pub preserve_case: bool,
}

/// What is left of HTTP/2's options, named as they are.
pub(crate) struct Http2 {
    pub max_concurrent_streams: Option<u32>,
    pub initial_stream_window_size: Option<u32>,
    pub initial_connection_window_size: Option<u32>,
    pub allow_connect: bool,
    pub connection_keepalive: Option<KeepaliveSettings>,
}

/// Takes options of HTTP/1 apart.
pub(crate) fn http1(options: Http1ProtocolOptions, notes: &mut Notes) -> Result<Http1, Malformed> {
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
    unneeded!(use_balsa_parser, allow_custom_methods);
    refuse_set!(notes, allow_chunked_length);
    Ok(Http1 {
        allow_absolute_url,
        accept_http_10,
        default_host_for_http_10,
        enable_trailers,
        override_stream_error_on_invalid_http_message,
        send_fully_qualified_url,
        ignore_http_11_upgrade,
        preserve_case: preserves_case(header_key_format, notes)?,
    })
}

/// Whether a format of header names is the one that keeps their spelling.
fn preserves_case(format: Option<HeaderKeyFormat>, notes: &mut Notes) -> Result<bool, Malformed> {
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

/// Takes options of HTTP/2 apart.
pub(crate) fn http2(options: Http2ProtocolOptions, notes: &mut Notes) -> Http2 {
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
    // Envoy's own defences against floods, and its codecs; ours are those of our HTTP/2 library.
    unneeded!(
        hpack_table_size,
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
    ignore_set!(notes, allow_metadata, custom_settings_parameters);
    Http2 {
        max_concurrent_streams,
        initial_stream_window_size,
        initial_connection_window_size,
        allow_connect,
        connection_keepalive,
    }
}
