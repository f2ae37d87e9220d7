//! Logs that go to collectors: gRPC access logs of requests and connections, and OpenTelemetry's.
//!
//! gRPC access logs are a stream of messages; ours has one message, whose first part says who sends it, as the first message of
//! Envoy's stream does.

use std::{sync::Arc, time::Duration};

use cairn_exchange::format::View;
use cairn_proto::{
    envoy::{
        config::core::v3::Node,
        extensions::access_loggers::{
            grpc::v3::{CommonGrpcAccessLogConfig, HttpGrpcAccessLogConfig, TcpGrpcAccessLogConfig},
            open_telemetry::v3::OpenTelemetryAccessLogConfig,
        },
        service::accesslog::v3::{StreamAccessLogsMessage, stream_access_logs_message::Identifier},
        r#type::tracing::v3::{CustomTag, custom_tag::Type},
    },
    opentelemetry::proto::common::v1::{AnyValue, KeyValue, KeyValueList, any_value::Value},
};
use cairn_telemetry::{
    access_log::{Output, Remote, otlp},
    export::{Envelope, Layer, Limits, Spec},
};
use http::HeaderName;
use prost::Message;

use super::entry::{self, More};
use crate::{
    config::{
        chain::Outputs,
        grpc_service,
        report::{Malformed, Notes, ignore_set, unneeded},
        tracer,
        value::duration,
    },
    export::Destination,
};

/// The method of gRPC access logs.
const STREAM: &str = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs";
/// `StreamAccessLogsMessage.http_logs` and `.tcp_logs`, and the entries in them.
const HTTP_LOGS: u32 = 2;
const TCP_LOGS: u32 = 3;
const ENTRIES: u32 = 1;

/// Where Envoy's logs wait.
const INTERVAL: Duration = Duration::from_secs(1);
const BYTES: usize = 16 * 1024;

/// What all of these logs have in common.
struct Common {
    name: String,
    destination: Option<Destination>,
    limits: Limits,
    tags: Vec<(String, String)>,
}

fn common(config: CommonGrpcAccessLogConfig, method: &'static str, notes: &mut Notes) -> Result<Common, Malformed> {
    let CommonGrpcAccessLogConfig {
        log_name,
        grpc_service,
        transport_api_version,
        buffer_flush_interval,
        buffer_size_bytes,
        filter_state_objects_to_log,
        grpc_stream_retry_policy,
        custom_tags,
    } = config;
    // Envoy's own objects of filter state, whose messages are nobody's but Envoy's.
    unneeded!(transport_api_version, filter_state_objects_to_log, grpc_stream_retry_policy);
    let destination = match grpc_service {
        None => None,
        Some(service) => notes.within("grpc_service", |notes| {
            let timeout = service
                .timeout
                .map(|timeout| duration("timeout", timeout, notes))
                .transpose()?;
            let service = grpc_service::collector(service, timeout, notes)?;
            Ok::<_, Malformed>(service.map(|service| Destination::Grpc {
                service: service.into(),
                method,
            }))
        })?,
    };
    Ok(Common {
        name: log_name,
        destination,
        limits: limits(buffer_flush_interval, buffer_size_bytes, notes)?,
        tags: tags(custom_tags, notes),
    })
}

fn limits(interval: Option<prost_types::Duration>, bytes: Option<u32>, notes: &Notes) -> Result<Limits, Malformed> {
    let interval = interval
        .map(|interval| duration("buffer_flush_interval", interval, notes))
        .transpose()?;
    Ok(Limits {
        interval: interval.filter(|interval| !interval.is_zero()).unwrap_or(INTERVAL),
        bytes: bytes.map_or(BYTES, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX)),
        ..Limits::default()
    })
}

/// Tags that are the same for every entry; others are listed.
fn tags(tags: Vec<CustomTag>, notes: &mut Notes) -> Vec<(String, String)> {
    let literal = |CustomTag { tag, r#type }| match r#type {
        Some(Type::Literal(literal)) => Some((tag, literal.value)),
        Some(Type::Environment(variable)) => {
            let value = tracer::environment(&variable.name).unwrap_or(variable.default_value);
            Some((tag, value))
        }
        _ => {
            notes.ignore("custom_tags", format!("tag {tag} is neither literal nor of the environment"));
            None
        }
    };
    tags.into_iter().filter_map(literal).collect()
}

/// Compiles a gRPC log of requests.
pub(super) fn http(config: HttpGrpcAccessLogConfig, outputs: &Outputs, notes: &mut Notes) -> Result<Option<Output>, Malformed> {
    let HttpGrpcAccessLogConfig {
        common_config,
        additional_request_headers_to_log,
        additional_response_headers_to_log,
        additional_response_trailers_to_log,
    } = config;
    ignore_set!(notes, additional_response_trailers_to_log);
    let common = notes.within("common_config", |notes| {
        common(common_config.unwrap_or_default(), STREAM, notes)
    })?;
    let fields = |names: Vec<String>| names.iter().filter_map(|name| HeaderName::try_from(name).ok()).collect();
    let more = More {
        request: fields(additional_request_headers_to_log),
        response: fields(additional_response_headers_to_log),
    };
    let (reads, tags) = (more.response.clone(), common.tags.clone());
    let envelope = stream(&common.name, HTTP_LOGS, outputs);
    let write = Arc::new(move |view: &View<'_>| entry::http(view, &more, &tags));
    Ok(open(common.destination, common.limits, envelope, outputs)
        .map(|exporter| Output::Remote(Remote { exporter, write, reads })))
}

/// Compiles a gRPC log of connections.
pub(super) fn tcp(config: TcpGrpcAccessLogConfig, outputs: &Outputs, notes: &mut Notes) -> Result<Option<Output>, Malformed> {
    let TcpGrpcAccessLogConfig { common_config } = config;
    let common = notes.within("common_config", |notes| {
        common(common_config.unwrap_or_default(), STREAM, notes)
    })?;
    let tags = common.tags.clone();
    let envelope = stream(&common.name, TCP_LOGS, outputs);
    let write = Arc::new(move |view: &View<'_>| entry::tcp(view, &tags));
    Ok(open(common.destination, common.limits, envelope, outputs).map(|exporter| {
        Output::Remote(Remote {
            exporter,
            write,
            reads: Vec::new(),
        })
    }))
}

fn stream(name: &str, field: u32, outputs: &Outputs) -> Envelope {
    let node = &outputs.node;
    let message = StreamAccessLogsMessage {
        identifier: Some(Identifier {
            node: Some(Node {
                id: node.id.to_string(),
                cluster: node.cluster.to_string(),
                ..Node::default()
            }),
            log_name: name.to_owned(),
        }),
        ..StreamAccessLogsMessage::default()
    };
    let layers = [
        Layer {
            before: message.encode_to_vec().into(),
            field,
        },
        Layer {
            before: Default::default(),
            field: ENTRIES,
        },
    ];
    Envelope::Protobuf(layers.into())
}

fn open(
    destination: Option<Destination>,
    limits: Limits,
    envelope: Envelope,
    outputs: &Outputs,
) -> Option<cairn_telemetry::export::Exporter> {
    let destination = destination?;
    Some(outputs.exports.open(Spec {
        name: destination.cluster().clone(),
        destination,
        envelope,
        kind: "access_logs",
        limits,
    }))
}

/// Compiles a log for OpenTelemetry.
pub(super) fn open_telemetry(
    config: OpenTelemetryAccessLogConfig,
    outputs: &Outputs,
    notes: &mut Notes,
) -> Result<Option<Output>, Malformed> {
    let OpenTelemetryAccessLogConfig {
        common_config,
        http_service,
        grpc_service,
        disable_builtin_labels,
        resource_attributes,
        body,
        attributes,
        stat_prefix,
        formatters,
        log_name,
        buffer_flush_interval,
        buffer_size_bytes,
        filter_state_objects_to_log,
        custom_tags,
    } = config;
    unneeded!(stat_prefix, filter_state_objects_to_log);
    super::check_formatters(&formatters, notes);
    let mut given = match common_config {
        Some(config) => notes.within("common_config", |notes| common(config, otlp::METHOD, notes))?,
        None => Common {
            name: log_name,
            destination: None,
            limits: limits(buffer_flush_interval, buffer_size_bytes, notes)?,
            tags: tags(custom_tags, notes),
        },
    };
    if let Some(service) = http_service {
        given.destination = notes.within("http_service", |notes| tracer::over_http(service, notes))?;
    } else if let Some(service) = grpc_service {
        let config = CommonGrpcAccessLogConfig {
            grpc_service: Some(service),
            ..CommonGrpcAccessLogConfig::default()
        };
        given.destination = common(config, otlp::METHOD, notes)?.destination;
    }
    let node = &outputs.node;
    let mut facts: Vec<(String, String)> = Vec::new();
    if !disable_builtin_labels {
        let labels = [
            ("log_name", given.name.as_str()),
            ("zone_name", &node.zone),
            ("cluster_name", &node.cluster),
            ("node_name", &node.id),
        ];
        facts.extend(labels.map(|(key, value)| (key.to_owned(), value.to_owned())));
    }
    for KeyValue { key, value, .. } in resource_attributes.map(|list| list.values).unwrap_or_default() {
        match value.and_then(|value| value.value) {
            Some(Value::StringValue(text)) => facts.push((key, text)),
            _ => notes.ignore("resource_attributes", format!("{key} is no text")),
        }
    }
    let body = body.map(|body| shape("body", body, notes)).transpose()?.flatten();
    let mut attributes = fields("attributes", attributes.unwrap_or_default(), notes)?;
    for (key, value) in given.tags {
        let value = otlp::Shape::text(&value.replace('%', "%%"));
        attributes.extend(value.ok().map(|value| (key, value)));
    }
    let record = otlp::OtlpRecord { body, attributes };
    for operator in record.templates().into_iter().flat_map(|template| template.unrecorded()) {
        notes.ignore("body", format!("%{operator}% has no value here"));
    }
    let reads = record.response_headers();
    let envelope = otlp::envelope(facts.iter().map(|(key, value)| (key.as_str(), value.as_str())));
    let write = Arc::new(move |view: &View<'_>| record.write(view));
    Ok(
        open(given.destination, given.limits, envelope, outputs)
            .map(|exporter| Output::Remote(Remote { exporter, write, reads })),
    )
}

/// A value whose texts are formats; Envoy takes texts, lists and objects.
fn shape(field: &str, value: AnyValue, notes: &mut Notes) -> Result<Option<otlp::Shape>, Malformed> {
    Ok(Some(match value.value {
        None => return Ok(None),
        Some(Value::StringValue(text)) => otlp::Shape::text(&text).map_err(|error| notes.malformed(field, error.to_string()))?,
        Some(Value::ArrayValue(list)) => {
            let values = list.values.into_iter().map(|value| shape(field, value, notes));
            let values = values.collect::<Result<Vec<_>, _>>()?;
            otlp::Shape::List(values.into_iter().flatten().collect())
        }
        Some(Value::KvlistValue(list)) => otlp::Shape::Object(fields(field, list, notes)?),
        Some(_) => return Err(notes.malformed(field, "is neither text nor list nor object")),
    }))
}

fn fields(field: &str, list: KeyValueList, notes: &mut Notes) -> Result<Vec<(String, otlp::Shape)>, Malformed> {
    let mut fields = Vec::new();
    for KeyValue { key, value, .. } in list.values {
        if let Some(shape) = shape(field, value.unwrap_or_default(), notes)? {
            fields.push((key, shape));
        }
    }
    Ok(fields)
}
