//! Logs to collectors: what they are sent; filters: what is logged.

use std::sync::Arc;

use bytes::Bytes;
use cairn_exchange::{Connection, Exchange, Protocol, RequestHead, ResponseFlags, Scheme, TraceIds, clock, format::View};
use cairn_proto::{
    envoy::{
        config::{
            accesslog::v3::{
                AccessLogFilter, ComparisonFilter, ExtensionFilter, GrpcStatusFilter, HeaderFilter, LogTypeFilter, RuntimeFilter,
                StatusCodeFilter, access_log_filter::FilterSpecifier, comparison_filter::Op, extension_filter,
            },
            core::v3::{GrpcService, RuntimeUInt32, grpc_service},
            route::v3::{HeaderMatcher, header_matcher::HeaderMatchSpecifier},
        },
        data::accesslog::v3::AccessLogType,
        extensions::access_loggers::{
            filters::cel::v3::ExpressionFilter,
            grpc::v3::{CommonGrpcAccessLogConfig, HttpGrpcAccessLogConfig, TcpGrpcAccessLogConfig},
            open_telemetry::v3::OpenTelemetryAccessLogConfig,
        },
        service::accesslog::v3::{StreamAccessLogsMessage, stream_access_logs_message::LogEntries},
        r#type::v3::FractionalPercent,
    },
    opentelemetry::proto::common::v1::{AnyValue, KeyValue, KeyValueList, any_value::Value},
};
use cairn_telemetry::{
    Registry,
    access_log::{AccessLog, Filter, Output, Sink},
    export::{Carried, Courier},
    trace::NodeFacts,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use parking_lot::Mutex;
use prost::Message;
use tokio::runtime::Handle;

use super::{filter, remote};
use crate::{
    config::{chain::Outputs, report::Notes},
    export::{Destination, Exports},
};

type Carries = Arc<Mutex<Vec<(Destination, Bytes)>>>;

struct Notebook(Carries);

impl Courier<Destination> for Notebook {
    fn carry(&self, to: &Destination, message: Bytes) -> Carried {
        self.0.lock().push((to.clone(), message));
        Box::pin(async { Ok(()) })
    }
}

fn exchange(protocol: Protocol) -> Exchange {
    let connection = Connection {
        id: 1,
        authority: "10.96.1.10:80".into(),
        local_address: Some("10.96.1.10:80".parse().unwrap()),
        service_port: 80,
        remote_address: "10.244.0.5:41616".parse().unwrap(),
        peer: Some("spiffe://cluster.local/ns/shop/sa/client".parse().unwrap()),
        local: None,
        source: None,
        requested_server_name: None,
        opened: clock::now(),
    };
    let mut exchange = Exchange::begin(protocol, Arc::new(connection), "chain".into(), 1);
    if protocol != Protocol::Tcp {
        let fields = [("x-tenant", "t"), ("x-request-id", "00000064-0000-4000-8000-000000000001")];
        exchange.request = Some(RequestHead {
            method: Method::GET,
            path: "/x?y".parse().unwrap(),
            authority: HeaderValue::from_static("web"),
            scheme: Scheme::Http,
            headers: fields
                .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
                .into_iter()
                .collect::<HeaderMap>(),
        });
        exchange.status = Some(StatusCode::SERVICE_UNAVAILABLE);
        exchange.because(ResponseFlags::NO_HEALTHY_UPSTREAM, "no_healthy_upstream");
    }
    exchange.counts.received = 3;
    exchange.counts.sent = 5;
    exchange
}

fn common(name: &str) -> CommonGrpcAccessLogConfig {
    CommonGrpcAccessLogConfig {
        log_name: name.into(),
        grpc_service: Some(GrpcService {
            target_specifier: Some(grpc_service::TargetSpecifier::EnvoyGrpc(grpc_service::EnvoyGrpc {
                cluster_name: "outbound|4317||otel".into(),
                authority: "otel".into(),
                ..Default::default()
            })),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// What a collector is sent of an exchange.
async fn sent(exchange: &Exchange, compile: impl FnOnce(&Outputs, &mut Notes) -> Option<Output>) -> (String, Bytes) {
    let carries = Carries::default();
    let outputs = Outputs {
        exports: Exports::new(Handle::current(), &Registry::new(), Arc::new(Notebook(carries.clone()))),
        node: NodeFacts {
            id: "waypoint~10.0.0.1".into(),
            cluster: "waypoint.app".into(),
            ..NodeFacts::default()
        },
        ..Outputs::default()
    };
    let mut notes = Notes::of("test");
    let output = compile(&outputs, &mut notes).unwrap();
    assert_eq!(notes.into_list(), []);
    let log = AccessLog::new([Sink {
        filter: Filter::Always,
        output,
    }]);
    log.log(&View::new(exchange));
    assert!(outputs.exports.flush(std::time::Duration::from_secs(5)).await);
    let carried = carries.lock().clone();
    let [(Destination::Grpc { service, method }, message)] = &carried[..] else {
        panic!("{carried:?}")
    };
    assert_eq!(
        (&*service.cluster, service.authority.to_str().unwrap()),
        ("outbound|4317||otel", "otel")
    );
    (method.to_string(), message.clone())
}

#[tokio::test]
async fn requests_are_entries_of_a_grpc_log() {
    let config = HttpGrpcAccessLogConfig {
        common_config: Some(common("http_envoy_accesslog")),
        additional_request_headers_to_log: vec!["x-tenant".into()],
        ..Default::default()
    };
    let (method, message) = sent(&exchange(Protocol::Http11), |outputs, notes| {
        remote::http(config, outputs, notes).unwrap()
    })
    .await;
    assert_eq!(method, "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs");
    let message = StreamAccessLogsMessage::decode(message).unwrap();
    let identifier = message.identifier.unwrap();
    assert_eq!(
        (identifier.log_name.as_str(), identifier.node.unwrap().cluster.as_str()),
        ("http_envoy_accesslog", "waypoint.app")
    );
    let Some(LogEntries::HttpLogs(logs)) = message.log_entries else {
        panic!("no requests")
    };
    let [entry] = &logs.log_entry[..] else { panic!("{logs:?}") };
    let (request, response) = (entry.request.as_ref().unwrap(), entry.response.as_ref().unwrap());
    assert_eq!(
        (request.path.as_str(), request.request_headers["x-tenant"].as_str()),
        ("/x?y", "t")
    );
    assert_eq!(
        (response.response_code, response.response_code_details.as_str()),
        (Some(503), "no_healthy_upstream")
    );
    let common = entry.common_properties.as_ref().unwrap();
    assert!(common.response_flags.as_ref().unwrap().no_healthy_upstream);
    assert_eq!(common.access_log_type(), AccessLogType::DownstreamEnd);
    assert_eq!(common.stream_id, "00000064-0000-4000-8000-000000000001");
}

#[tokio::test]
async fn connections_are_entries_of_a_grpc_log() {
    let config = TcpGrpcAccessLogConfig {
        common_config: Some(common("tcp_envoy_accesslog")),
    };
    let (_, message) = sent(&exchange(Protocol::Tcp), |outputs, notes| {
        remote::tcp(config, outputs, notes).unwrap()
    })
    .await;
    let message = StreamAccessLogsMessage::decode(message).unwrap();
    let Some(LogEntries::TcpLogs(logs)) = message.log_entries else {
        panic!("no connections")
    };
    let connection = logs.log_entry[0].connection_properties.as_ref().unwrap();
    assert_eq!((connection.received_bytes, connection.sent_bytes), (3, 5));
}

#[tokio::test]
async fn opentelemetry_gets_a_body_and_attributes() {
    use opentelemetry_proto::tonic::{collector::logs::v1::ExportLogsServiceRequest, common::v1::any_value::Value as Told};
    let text = |text: &str| AnyValue {
        value: Some(Value::StringValue(text.into())),
    };
    let config = OpenTelemetryAccessLogConfig {
        common_config: Some(common("waypoint_log")),
        body: Some(text("%REQ(:PATH)%")),
        attributes: Some(KeyValueList {
            values: vec![KeyValue {
                key: "code".into(),
                value: Some(text("%RESPONSE_CODE%")),
                ..Default::default()
            }],
        }),
        ..Default::default()
    };
    let mut exchange = exchange(Protocol::Http11);
    exchange.trace = Some(TraceIds {
        trace: 7,
        span: 9,
        sampled: true,
    });
    let (method, message) = sent(&exchange, |outputs, notes| {
        remote::open_telemetry(config, outputs, notes).unwrap()
    })
    .await;
    assert_eq!(method, "/opentelemetry.proto.collector.logs.v1.LogsService/Export");
    let request = ExportLogsServiceRequest::decode(message).unwrap();
    let logs = &request.resource_logs[0];
    let labels: Vec<_> = logs
        .resource
        .as_ref()
        .unwrap()
        .attributes
        .iter()
        .map(|fact| fact.key.as_str())
        .collect();
    assert_eq!(labels, ["log_name", "zone_name", "cluster_name", "node_name"]);
    let record = &logs.scope_logs[0].log_records[0];
    let value = |value: &Option<opentelemetry_proto::tonic::common::v1::AnyValue>| match value {
        Some(opentelemetry_proto::tonic::common::v1::AnyValue {
            value: Some(Told::StringValue(text)),
        }) => text.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(
        (value(&record.body), value(&record.attributes[0].value)),
        ("/x?y".into(), "503".into())
    );
    assert_eq!((record.trace_id.last(), record.span_id.last()), (Some(&7), Some(&9)));
}

/// Whether a filter logs the failed request, and whether it logs a connection.
fn logs(specifier: FilterSpecifier) -> [bool; 2] {
    let filter = AccessLogFilter {
        filter_specifier: Some(specifier),
    };
    let mut notes = Notes::of("test");
    let Ok(filter) = filter::compile(filter, &mut notes) else {
        panic!("{:?}", notes.into_list())
    };
    [Protocol::Http11, Protocol::Tcp].map(|protocol| filter.matches(&View::new(&exchange(protocol))))
}

#[test]
fn every_filter_decides_as_envoys() {
    let status = |op: Op, value| {
        FilterSpecifier::StatusCodeFilter(StatusCodeFilter {
            comparison: Some(ComparisonFilter {
                op: op.into(),
                value: Some(RuntimeUInt32 {
                    default_value: value,
                    runtime_key: "k".into(),
                }),
            }),
        })
    };
    let share = |numerator| {
        FilterSpecifier::RuntimeFilter(RuntimeFilter {
            percent_sampled: Some(FractionalPercent {
                numerator,
                denominator: 1,
            }),
            ..Default::default()
        })
    };
    let codes = |exclude| {
        FilterSpecifier::GrpcStatusFilter(GrpcStatusFilter {
            statuses: vec![14],
            exclude,
        })
    };
    let tenant = |exact: &str| {
        FilterSpecifier::HeaderFilter(HeaderFilter {
            header: Some(HeaderMatcher {
                name: "x-tenant".into(),
                header_match_specifier: Some(HeaderMatchSpecifier::ExactMatch(exact.into())),
                ..Default::default()
            }),
        })
    };
    let kinds = |exclude| {
        FilterSpecifier::LogTypeFilter(LogTypeFilter {
            types: vec![AccessLogType::TcpConnectionEnd.into()],
            exclude,
        })
    };
    let expression = |expression: &str| {
        let message = ExpressionFilter {
            expression: expression.into(),
            cel_config: None,
        };
        FilterSpecifier::ExtensionFilter(ExtensionFilter {
            name: "cel".into(),
            config_type: Some(extension_filter::ConfigType::TypedConfig(prost_types::Any {
                type_url: "type.googleapis.com/envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter".into(),
                value: message.encode_to_vec(),
            })),
        })
    };
    for (name, specifier, expected) in [
        ("status", status(Op::Ge, 500), [true, false]),
        ("status of nothing", status(Op::Eq, 0), [false, true]),
        // The request's id begins with 0x64: number 100 of ten thousand.
        ("sampled", share(101), [true, false]),
        ("not sampled", share(0), [false, false]),
        ("grpc", codes(false), [true, false]),
        ("all but grpc", codes(true), [false, true]),
        ("header", tenant("t"), [true, false]),
        ("other header", tenant("u"), [false, false]),
        ("connections", kinds(false), [false, true]),
        ("all but connections", kinds(true), [true, false]),
        (
            "not traced",
            FilterSpecifier::TraceableFilter(Default::default()),
            [false, false],
        ),
        (
            "cel",
            expression("response.code >= 500 || request.headers['x-log'] == '1'"),
            [true, false],
        ),
        (
            "cel that fails",
            expression("request.headers['x-log'] == '1'"),
            [false, false],
        ),
    ] {
        let decided = logs(specifier);
        if name == "sampled" {
            assert!(decided[0], "{name}");
        } else {
            assert_eq!(decided, expected, "{name}");
        }
    }
}
