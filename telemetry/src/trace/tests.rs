//! Contexts as Envoy 1.40 reads and writes them, and what its spans tell.

use opentelemetry_proto::tonic::trace::v1::Span as Written;
use prost::Message;

use super::*;
use crate::testing;

use cairn_exchange::{Exchange, ResponseFlags, ShadowDecision, format::Template};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const TRACE: u128 = 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c;
const SPAN: u64 = 0xb7ad_6b71_6920_3331;

fn headers(fields: &[(&'static str, &str)]) -> HeaderMap {
    let field = |(name, value): &(&'static str, &str)| (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap());
    fields.iter().map(field).collect()
}

fn tracer(provider: Provider) -> Tracer {
    Tracer {
        provider,
        tags: Box::default(),
        operation: None,
        upstream_operation: None,
        max_path: 256,
        verbose: false,
        upstream_spans: false,
        propagate: true,
    }
}

fn otel(always: bool) -> Tracer {
    tracer(Provider::OpenTelemetry {
        exporter: nowhere(),
        always,
    })
}

fn b3(propagation: Propagation) -> Tracer {
    tracer(Provider::Zipkin {
        exporter: nowhere(),
        propagation,
    })
}

fn nowhere() -> crate::export::Exporter {
    crate::export::Exports::<()>::default().open(crate::export::Spec {
        destination: (),
        envelope: crate::export::Envelope::Json,
        kind: "traces",
        name: "".into(),
        limits: crate::export::Limits::default(),
    })
}

/// What a request that brought these fields takes along.
fn taken(tracer: &Tracer, fields: &[(&'static str, &str)], traced: bool) -> (Trace, HeaderMap) {
    let mut exchange = testing::exchange();
    let head = exchange.request.as_mut().unwrap();
    head.headers = headers(fields);
    let mut trace = tracer.begin(&mut head.headers, traced);
    tracer.attempt(&mut trace, &mut exchange, &NodeFacts::default());
    (trace, exchange.request.unwrap().headers)
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).map_or("", |value| value.to_str().unwrap())
}

#[test]
fn w3c_contexts_go_on() {
    let upper = PARENT.to_uppercase();
    let (newer, longer, zero) = (
        PARENT.replacen("00", "ff", 1),
        format!("{PARENT}-x"),
        PARENT.replace("0af7651916cd43dd8448eb211c80319c", &"0".repeat(32)),
    );
    let (unsampled, both_flags) = (format!("{}0", &PARENT[..54]), format!("{}3", &PARENT[..54]));
    // What is brought, whether the chain traces, whether it is read, and whether it goes on as sampled.
    let cases = [
        (PARENT, true, true, true),
        (PARENT, false, true, false),
        (&unsampled, true, true, false),
        (&both_flags, true, true, true),
        (&upper, true, true, true),
        (&newer, true, true, true),
        (&longer, true, false, false),
        (&zero, true, false, false),
        ("00-zz-1-01", true, false, false),
    ];
    for (parent, traced, read, sampled) in cases {
        let (trace, sent) = taken(&otel(false), &[("traceparent", parent), ("tracestate", "a=b,c=d")], traced);
        if !read {
            assert_eq!(text(&sent, "traceparent"), parent, "what cannot be read passes");
            assert_eq!(trace.ids(), None);
            continue;
        }
        let ids = trace.ids().unwrap();
        assert_eq!((ids.trace, ids.sampled), (TRACE, sampled), "{parent} {traced}");
        assert_ne!(ids.span, SPAN);
        let flag = if sampled { "01" } else { "00" };
        assert_eq!(
            text(&sent, "traceparent"),
            format!("00-{TRACE:032x}-{:016x}-{flag}", ids.span)
        );
        assert_eq!(text(&sent, "tracestate"), "a=b,c=d");
    }
}

#[test]
fn a_request_without_a_context_begins_a_trace() {
    for traced in [true, false] {
        let (trace, sent) = taken(&otel(false), &[("tracestate", "x=y")], traced);
        let ids = trace.ids().unwrap();
        assert_eq!(ids.sampled, traced);
        assert!(text(&sent, "traceparent").starts_with(&format!("00-{:032x}-", ids.trace)));
        assert_eq!(sent.get("tracestate").unwrap(), "", "a state without a parent is dropped");
    }
    let quiet = Tracer {
        propagate: false,
        ..otel(false)
    };
    assert_eq!(taken(&quiet, &[], true).1, HeaderMap::new());
    assert_eq!(
        text(&taken(&quiet, &[("traceparent", PARENT)], true).1, "traceparent"),
        PARENT
    );
    let nobody = tracer(Provider::None);
    assert_eq!(
        text(&taken(&nobody, &[("traceparent", PARENT)], true).1, "traceparent"),
        PARENT
    );
    let unsampled = format!("{}0", &PARENT[..54]);
    assert!(
        taken(&otel(true), &[("traceparent", &unsampled)], true)
            .0
            .ids()
            .unwrap()
            .sampled
    );
    assert!(!taken(&otel(true), &[("traceparent", PARENT)], false).0.ids().unwrap().sampled);
}

#[test]
fn zipkin_contexts_go_on_in_the_form_that_they_have() {
    let wide = Propagation {
        wide: true,
        ..Propagation::default()
    };
    let (trace, span) = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331");
    let single = format!("{trace}-{span}");
    let (single_sampled, single_parent) = (format!("{single}-1"), format!("{single}-0-{span}"));
    let ids = [("x-b3-traceid", trace), ("x-b3-spanid", span)];
    let with = |flag| [ids[0], ids[1], ("x-b3-sampled", flag)];
    // The fields, whether the chain traces, whether the span goes on as sampled.
    let cases: [(&[_], bool, bool); 8] = [
        (&with("1"), false, true),
        (&with("0"), true, false),
        (&ids, true, true),
        (&ids, false, false),
        (&[("b3", &single)], true, true),
        (&[("b3", &single)], false, false),
        (&[("b3", &single_sampled)], false, true),
        (&[("b3", &single_parent)], true, false),
    ];
    for (fields, traced, sampled) in cases {
        let (made, sent) = taken(&b3(wide), fields, traced);
        let made = made.ids().unwrap();
        assert_eq!((made.trace, made.sampled), (TRACE, sampled), "{fields:?} {traced}");
        let flag = if sampled { "1" } else { "0" };
        if fields[0].0 == "b3" {
            assert_eq!(text(&sent, "b3"), format!("{trace}-{:016x}-{flag}-{span}", made.span));
            assert!(!sent.contains_key("x-b3-traceid"));
        } else {
            assert_eq!(text(&sent, "x-b3-spanid"), format!("{:016x}", made.span));
            assert_eq!((text(&sent, "x-b3-parentspanid"), text(&sent, "x-b3-sampled")), (span, flag));
        }
    }
    for (fields, traced, sampled) in [
        (&[("b3", "0")][..], true, false),
        (&[("b3", "d")], false, true),
        (&[("x-b3-sampled", "true")], false, true),
        (&[], true, true),
    ] {
        let (made, sent) = taken(&b3(wide), fields, traced);
        let made = made.ids().unwrap();
        assert_eq!(made.sampled, sampled, "{fields:?}");
        assert_eq!(made.trace as u64, made.span, "a new trace has its first span's number");
        assert!(made.trace >> 64 != 0);
        assert!(!sent.contains_key("x-b3-parentspanid"));
    }
    for fields in [[("b3", "junk")], [("b3", "0af7651916cd43dd8448eb211c80319c-")]] {
        assert_eq!(taken(&b3(wide), &fields, true), (Trace::default(), headers(&fields)));
    }
    let narrow = taken(&b3(Propagation::default()), &[], true).1;
    assert_eq!(text(&narrow, "x-b3-traceid"), text(&narrow, "x-b3-spanid"));
    let shared = Propagation { shared: true, ..wide };
    assert_eq!(text(&taken(&b3(shared), &ids, true).1, "x-b3-spanid"), span);
    let both = Propagation { w3c: true, ..wide };
    let (made, sent) = taken(&b3(both), &[("traceparent", PARENT)], true);
    assert_eq!(made.ids().unwrap().trace, TRACE);
    assert!(sent.contains_key("traceparent") && sent.contains_key("x-b3-traceid"));
}

impl PartialEq for Trace {
    fn eq(&self, other: &Self) -> bool {
        self.ids() == other.ids()
    }
}

/// The spans that an exchange brings about.
fn spans(tracer: &Tracer, fields: &[(&'static str, &str)], edit: impl FnOnce(&mut Exchange)) -> Vec<Written> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let heard = std::sync::Arc::new(parking_lot::Mutex::new(Vec::new()));
    let told = heard.clone();
    struct To(std::sync::Arc<parking_lot::Mutex<Vec<bytes::Bytes>>>);
    impl crate::export::Courier<()> for To {
        fn carry(&self, (): &(), message: bytes::Bytes) -> crate::export::Carried {
            self.0.lock().push(message);
            Box::pin(async { Ok(()) })
        }
    }
    runtime.block_on(async {
        let exports = crate::export::Exports::new(
            tokio::runtime::Handle::current(),
            &crate::Registry::new(),
            std::sync::Arc::new(To(told)),
        );
        let exporter = exports.open(crate::export::Spec {
            destination: (),
            envelope: otlp::envelope([("service.name", "waypoint.app")]),
            kind: "traces",
            name: "".into(),
            limits: crate::export::Limits::default(),
        });
        let tracer = Tracer {
            provider: Provider::OpenTelemetry { exporter, always: false },
            ..tracer.clone()
        };
        let node = NodeFacts {
            id: "node-1".into(),
            zone: "z1".into(),
            ..NodeFacts::default()
        };
        let mut exchange = testing::exchange();
        let head = exchange.request.as_mut().unwrap();
        head.headers = headers(fields);
        let mut trace = tracer.begin(&mut head.headers, true);
        trace.decorate(HeaderValue::from_static("web.app.svc.cluster.local:80/*"));
        tracer.attempt(&mut trace, &mut exchange, &node);
        edit(&mut exchange);
        tracer.finish(trace, &exchange, &node);
        assert!(exports.flush(std::time::Duration::from_secs(5)).await);
    });
    use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
    let messages = heard.lock().clone();
    let requests = messages
        .into_iter()
        .map(|message| ExportTraceServiceRequest::decode(message).unwrap());
    let scopes = requests.flat_map(|request| request.resource_spans).flat_map(|resource| {
        let service = &resource.resource.as_ref().unwrap().attributes[0];
        assert_eq!(service.key, "service.name");
        resource.scope_spans
    });
    scopes.flat_map(|scope| scope.spans).collect()
}

fn facts(span: &Written) -> Vec<String> {
    use opentelemetry_proto::tonic::common::v1::any_value::Value;
    let text = |value: &Option<_>| match value {
        Some(opentelemetry_proto::tonic::common::v1::AnyValue {
            value: Some(Value::StringValue(text)),
        }) => text.clone(),
        other => format!("{other:?}"),
    };
    span.attributes
        .iter()
        .map(|fact| format!("{}={}", fact.key, text(&fact.value)))
        .collect()
}

/// Names, order and values as Envoy 1.40 was seen to write them.
#[test]
fn a_span_tells_what_envoys_tells() {
    let tag = |name: &str, value| CustomTag {
        name: name.into(),
        value,
    };
    let dry_run = Template::of_metadata("envoy.filters.http.rbac", ["istio_dry_run_allow_shadow_engine_result".into()]);
    let tracer = Tracer {
        tags: [
            tag("lit", TagValue::Literal("v".into())),
            tag("hdr", TagValue::Header(HeaderName::from_static("x-tenant"), "none".into())),
            tag("val", TagValue::Format("%REQ(:METHOD)%-%RESPONSE_CODE%".parse().unwrap())),
            tag("none", TagValue::Format("%REQ(nope)%".parse().unwrap())),
            tag(
                "source",
                TagValue::Format("%FILTER_STATE(downstream_peer_obj:FIELD:workload)%".parse().unwrap()),
            ),
            tag("dry", TagValue::Metadata(dry_run, "dd".into())),
        ]
        .into(),
        max_path: 2,
        ..otel(false)
    };
    let fields = [
        ("x-request-id", "some-id"),
        ("x-forwarded-proto", "https"),
        ("traceparent", PARENT),
    ];
    let spans = spans(&tracer, &fields, |exchange| {
        exchange.shadow.push(ShadowDecision {
            prefix: "istio_dry_run_allow_".into(),
            allowed: true,
            policy: None,
        });
    });
    let [span] = &spans[..] else { panic!("{spans:?}") };
    assert_eq!(span.name, "web.app.svc.cluster.local:80/*");
    assert_eq!((span.flags, span.kind, &span.status), (0x301, 2, &None));
    assert_eq!(span.trace_id, TRACE.to_be_bytes());
    assert_eq!(span.parent_span_id, SPAN.to_be_bytes());
    assert_eq!(span.end_time_unix_nano - span.start_time_unix_nano, 4_000_000);
    let cluster = "inbound-vip|80|http|web.app.svc.cluster.local";
    let expected = format!(
        "node_id=node-1 zone=z1 guid:x-request-id=some-id http.url=https://web/x http.method=GET downstream_cluster=- user_agent=- \
         http.protocol=HTTP/1.1 peer.address=10.244.0.5 request_size=10 response_size=600 component=proxy upstream_cluster={cluster} \
         upstream_cluster.name={cluster} http.status_code=200 response_flags=- lit=v hdr=none val=GET-200 source=client-v2 dry=allowed"
    );
    assert_eq!(facts(span).join(" "), expected);
}

#[test]
fn failures_show() {
    let spans = spans(&otel(false), &[], |exchange| {
        exchange.status = Some(StatusCode::SERVICE_UNAVAILABLE);
        exchange.flags = ResponseFlags::NO_HEALTHY_UPSTREAM;
    });
    let facts = facts(&spans[0]);
    for fact in ["http.status_code=503", "response_flags=UH", "error=true"] {
        assert!(facts.iter().any(|told| told == fact), "{fact}: {facts:?}");
    }
    assert_eq!(spans[0].status.as_ref().unwrap().code, 2);
    assert_eq!(spans[0].flags, 0x101);
}

#[test]
fn a_name_that_the_request_brings_goes_before_the_routes() {
    let named = spans(&otel(false), &[("x-envoy-decorator-operation", "mine")], |_| {});
    assert_eq!(named[0].name, "mine");
    let tracer = Tracer {
        operation: Some("op-%REQ(:METHOD)%".parse().unwrap()),
        ..otel(false)
    };
    assert_eq!(spans(&tracer, &[], |_| {})[0].name, "op-GET");
}

#[test]
fn an_attempt_has_a_span_of_its_own_where_that_is_wanted() {
    let tracer = Tracer {
        upstream_spans: true,
        verbose: true,
        ..otel(false)
    };
    let spans = spans(&tracer, &[], |_| {});
    let [attempt, request] = &spans[..] else { panic!("{spans:?}") };
    assert_eq!(attempt.name, "router inbound-vip|80|http|web.app.svc.cluster.local egress");
    assert_eq!((attempt.kind, request.kind), (3, 2));
    assert_eq!(attempt.parent_span_id, request.span_id);
    assert!(facts(attempt).contains(&"peer.address=envoy://connect_originate/10.244.0.31:8080".to_owned()));
    assert_eq!(attempt.events[0].name, "first_upstream_tx_byte_sent");
    assert_eq!(request.events.last().unwrap().name, "last_downstream_tx_byte_sent");
}

#[test]
fn zipkin_reads_its_json() {
    let node = NodeFacts {
        cluster: "waypoint.app".into(),
        address: Some("10.244.0.2".parse().unwrap()),
        ..NodeFacts::default()
    };
    let mut span = Span {
        context: Context {
            trace: TRACE,
            span: SPAN,
            parent: Some(7),
            sampled: true,
        },
        remote_parent: true,
        state: None,
        name: "web:80/*".into(),
        kind: SpanKind::Server,
        start: std::time::UNIX_EPOCH + std::time::Duration::from_micros(1_795_270_277_539_423),
        took: std::time::Duration::from_micros(43_023),
        tags: Vec::new(),
        events: Vec::new(),
        failed: false,
    };
    span.tag("http.method", "GET");
    let written: serde_json::Value = serde_json::from_slice(&zipkin::write(&span, &node, false)).unwrap();
    let expected = serde_json::json!({
        "traceId": "0af7651916cd43dd8448eb211c80319c", "id": "b7ad6b7169203331", "parentId": "0000000000000007", "name": "web:80/*",
        "kind": "SERVER", "timestamp": 1_795_270_277_539_423_u64, "duration": 43_023,
        "localEndpoint": {"serviceName": "waypoint.app", "ipv4": "10.244.0.2", "port": 0},
        "annotations": [{"timestamp": 1_795_270_277_582_446_u64, "value": "ss"}], "tags": {"http.method": "GET"},
    });
    assert_eq!(written, expected);
}
