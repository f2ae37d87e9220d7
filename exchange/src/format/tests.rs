//! Templates against the record of an exchange.

use std::{borrow::Cow, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};

use super::{Absent, FormatProblem, Kind, MetadataOf, Template, Value, View};
use crate::{ClusterFacts, Connection, Exchange, Protocol, RequestHead, ResponseFlags, Scheme, Upstream, Workload, clock};

/// Istio's default text format (contract runtime §7.5).
const ISTIO: &str = concat!(
    r#"[%START_TIME%] "%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%" %RESPONSE_CODE% %RESPONSE_FLAGS% "#,
    r#"%RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% "%UPSTREAM_TRANSPORT_FAILURE_REASON%" %BYTES_RECEIVED% "#,
    r#"%BYTES_SENT% %DURATION% %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% "%REQ(X-FORWARDED-FOR)%" "%REQ(USER-AGENT)%" "#,
    r#""%REQ(X-REQUEST-ID)%" "%REQ(:AUTHORITY)%" "%UPSTREAM_HOST%" %UPSTREAM_CLUSTER_RAW% %UPSTREAM_LOCAL_ADDRESS% "#,
    r#"%DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% %REQUESTED_SERVER_NAME% %ROUTE_NAME%"#,
    "\n"
);

fn connection() -> Connection {
    Connection {
        id: 7,
        authority: "10.96.1.10:80".into(),
        local_address: Some("10.96.1.10:80".parse().unwrap()),
        service_port: 80,
        remote_address: "10.244.0.5:41616".parse().unwrap(),
        peer: Some("spiffe://cluster.local/ns/app/sa/client".parse().unwrap()),
        local: Some("spiffe://cluster.local/ns/app/sa/waypoint".parse().unwrap()),
        source: Some(Arc::new(workload("client"))),
        requested_server_name: None,
        opened: clock::now(),
    }
}

fn workload(name: &str) -> Workload {
    Workload {
        uid: format!("Kubernetes//Pod/app/{name}-0").into(),
        name: format!("{name}-0").into(),
        namespace: "app".into(),
        network: "".into(),
        identity: Some(format!("spiffe://cluster.local/ns/app/sa/{name}").parse().unwrap()),
        service_account: name.into(),
        canonical_name: name.into(),
        canonical_revision: "v1".into(),
        workload_type: "deployment",
        workload_name: name.into(),
        cluster: "Kubernetes".into(),
        region: "eu".into(),
        zone: "eu-1".into(),
    }
}

/// A finished `GET /get?x=1` that went through a tunnel, at 2022-04-01T03:23:12.736Z.
pub(crate) fn finished() -> Exchange {
    let mut exchange = Exchange::begin(Protocol::Http11, Arc::new(connection()), "inbound-vip|80|http|web".into(), 1);
    exchange.wall = std::time::UNIX_EPOCH + Duration::from_millis(1_648_783_392_736);
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("user-agent", "curl/7.82.0-DEV"),
        ("x-request-id", "200efb6c-82be-4760-8ab6-7b6af588d4fb"),
        ("empty", ""),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    exchange.request = Some(RequestHead {
        method: Method::GET,
        path: "/get?x=1&y=a%20b".parse().unwrap(),
        authority: HeaderValue::from_static("httpbin:8000"),
        scheme: Scheme::Http,
        headers,
    });
    exchange.route = Some("default".into());
    exchange.cluster = Some(Arc::new(ClusterFacts {
        name: "inbound-vip|80|http|web.app.svc.cluster.local".into(),
        alt_stat_name: Some("inbound-vip|80|http|web.app.svc.cluster.local;".into()),
        service: None,
    }));
    exchange.upstream = Some(Upstream {
        display: "envoy://connect_originate/10.244.0.31:8080".into(),
        address: "10.244.0.31:8080".parse().unwrap(),
        workload: Some(Arc::new(workload("web"))),
        local_address: None,
    });
    exchange.upstream_protocol = Some(Protocol::Http11);
    exchange.attempts = 1;
    exchange.status = Some(StatusCode::OK);
    exchange.response_headers = vec![(
        HeaderName::from_static("x-envoy-upstream-service-time"),
        HeaderValue::from_static("3"),
    )];
    exchange.details = Some("via_upstream".into());
    exchange.counts.sent = 605;
    exchange.counts.received_head = 120;
    exchange.moments.request_received = Some(Duration::from_micros(1_500));
    exchange.moments.first_upstream_sent = Some(Duration::from_millis(1));
    exchange.moments.last_upstream_sent = Some(Duration::from_millis(2));
    exchange.moments.first_upstream_received = Some(Duration::from_millis(3));
    exchange.moments.last_sent = Some(Duration::from_millis(4));
    exchange
}

fn render(template: &str, view: &View<'_>) -> String {
    let mut out = Vec::new();
    Template::parse(template).unwrap().render(view, &mut out);
    String::from_utf8(out).unwrap()
}

#[test]
fn istios_default_line_is_byte_for_byte_envoys() {
    assert_eq!(
        render(ISTIO, &View::new(&finished())),
        concat!(
            r#"[2022-04-01T03:23:12.736Z] "GET /get?x=1&y=a%20b HTTP/1.1" 200 - via_upstream - "-" 0 605 4 3 "-" "#,
            r#""curl/7.82.0-DEV" "200efb6c-82be-4760-8ab6-7b6af588d4fb" "httpbin:8000" "#,
            r#""envoy://connect_originate/10.244.0.31:8080" inbound-vip|80|http|web.app.svc.cluster.local "#,
            "envoy://internal_client_address/ 10.96.1.10:80 10.244.0.5:41616 - default\n"
        )
    );
}

#[test]
fn a_tcp_line_has_dashes_and_a_zero_for_what_only_http_has() {
    let mut exchange = finished();
    exchange.protocol = Protocol::Tcp;
    exchange.request = None;
    exchange.status = None;
    exchange.details = None;
    exchange.route = None;
    exchange.response_headers.clear();
    exchange.flags = ResponseFlags::UPSTREAM_CONNECTION_FAILURE | ResponseFlags::UPSTREAM_RETRY_LIMIT_EXCEEDED;
    exchange.moments.first_upstream_sent = None;
    exchange.transport_failure = Some("delayed connect error: Connection refused".into());
    assert_eq!(
        render(ISTIO, &View::new(&exchange)),
        concat!(
            r#"[2022-04-01T03:23:12.736Z] "- - -" 0 UF,URX - - "delayed_connect_error:_Connection_refused" 0 605 4 - "-" "-" "#,
            r#""-" "-" "envoy://connect_originate/10.244.0.31:8080" inbound-vip|80|http|web.app.svc.cluster.local "#,
            "- 10.96.1.10:80 10.244.0.5:41616 - -\n"
        )
    );
}

#[test]
fn each_operator_prints_its_fact() {
    let mut exchange = finished();
    exchange.client_address = Some("192.0.2.9:0".parse().unwrap());
    exchange.termination_details = Some("rbac_access_denied_matched_policy[none]".into());
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-message", HeaderValue::from_static("fine"));
    let view = View {
        trailers: Some(&trailers),
        ..View::new(&exchange)
    };
    for (template, printed) in [
        ("%START_TIME(%Y/%m/%dT%H:%M:%S%z %s)%", "2022/04/01T03:23:12+0000 1648783392"),
        ("%START_TIME(%s.%3f)%|%START_TIME(%H)%", "1648783392.736|03"),
        ("100%% of %PROTOCOL%", "100% of HTTP/1.1"),
        ("%REQ(user-agent):4%", "curl"),
        ("%REQ(X-NONE?USER-AGENT):6%", "curl/7"),
        ("%REQ(EMPTY?USER-AGENT)%", ""),
        ("%REQ(X-NONE?Y-NONE)%", "-"),
        ("%REQ(host)% %REQ(:scheme)%", "httpbin:8000 http"),
        ("%REQ_WITHOUT_QUERY(X-ENVOY-ORIGINAL-PATH?:PATH)%", "/get"),
        (
            "%PATH()% %PATH(NQ)% %PATH(WQ:ORIG)% %PATH(NQ:PATH)%",
            "/get?x=1&y=a%20b /get - /get",
        ),
        ("%QUERY_PARAM(y)% %QUERY_PARAM(y):1% %QUERY_PARAM(z)%", "a b a -"),
        (
            "%RESP(:STATUS)% %RESP(x-envoy-upstream-service-time)% %RESP(server)%",
            "200 3 -",
        ),
        ("%TRAILER(GRPC-MESSAGE)%", "fine"),
        ("%RESPONSE_FLAGS% %RESPONSE_FLAGS_LONG%", "- -"),
        ("%CONNECTION_TERMINATION_DETAILS%", "rbac_access_denied_matched_policy[none]"),
        (
            "%REQUEST_DURATION% %REQUEST_TX_DURATION% %RESPONSE_DURATION% %RESPONSE_TX_DURATION%",
            "1 2 3 1",
        ),
        (
            "%COMMON_DURATION(DS_RX_BEG:DS_RX_END:us)% %COMMON_DURATION(US_TX_BEG:US_CX_END)%",
            "1500 -",
        ),
        ("%COMMON_DURATION(DS_TX_END:DS_RX_BEG)%", "-"),
        (
            "%UPSTREAM_HOST% %UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
            "envoy://connect_originate/10.244.0.31:8080 10.244.0.31",
        ),
        (
            "%UPSTREAM_HOST_NAME_WITHOUT_PORT% %UPSTREAM_REMOTE_PORT%",
            "envoy://connect_originate/10.244.0.31 8080",
        ),
        ("%UPSTREAM_CLUSTER%", "inbound-vip|80|http|web.app.svc.cluster.local;"),
        ("%UPSTREAM_LOCAL_PORT% %UPSTREAM_PROTOCOL%", "- HTTP/1.1"),
        (
            "%DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_LOCAL_PORT%",
            "10.96.1.10 80",
        ),
        (
            "%DOWNSTREAM_REMOTE_ADDRESS% %DOWNSTREAM_DIRECT_REMOTE_ADDRESS%",
            "192.0.2.9:0 10.244.0.5:41616",
        ),
        (
            "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_REMOTE_PORT%",
            "192.0.2.9 0",
        ),
        ("%DOWNSTREAM_PEER_URI_SAN%", "spiffe://cluster.local/ns/app/sa/client"),
        ("%DOWNSTREAM_LOCAL_URI_SAN%", "spiffe://cluster.local/ns/app/sa/waypoint"),
        ("%UPSTREAM_REQUEST_ATTEMPT_COUNT% %CONNECTION_ID%", "1 7"),
        ("%STREAM_ID%", "200efb6c-82be-4760-8ab6-7b6af588d4fb"),
        (
            "%FILTER_CHAIN_NAME% %ACCESS_LOG_TYPE%",
            "inbound-vip|80|http|web DownstreamEnd",
        ),
        (
            "%DOWNSTREAM_WIRE_BYTES_RECEIVED% %DOWNSTREAM_HEADER_BYTES_RECEIVED%",
            "120 120",
        ),
        ("%REQUEST_HEADERS_BYTES%", "142"),
        ("%FILTER_STATE(downstream_peer_obj:FIELD:workload)%", "client"),
        (
            "%FILTER_STATE(upstream_peer_obj:FIELD:name):3% %FILTER_STATE(upstream_peer_obj:FIELD:what)%",
            "web -",
        ),
        (
            "By=%FILTER_STATE(io.istio.local_principal:PLAIN)%;URI=%FILTER_STATE(io.istio.peer_principal:PLAIN)%",
            "By=spiffe://cluster.local/ns/app/sa/waypoint;URI=spiffe://cluster.local/ns/app/sa/client",
        ),
        ("%DYNAMIC_METADATA(a:b)% %GRPC_STATUS% %TRACE_ID%", "- - -"),
        ("a)b%%(c", "a)b%(c"),
        ("", ""),
    ] {
        assert_eq!(render(template, &view), printed, "{template}");
    }
}

#[test]
fn details_lose_their_spaces_unless_allowed() {
    let mut exchange = finished();
    exchange.details = Some("upstream_reset{remote connection failure}".into());
    let view = View::new(&exchange);
    assert_eq!(
        render("%RESPONSE_CODE_DETAILS%", &view),
        "upstream_reset{remote_connection_failure}"
    );
    assert_eq!(
        render("%RESPONSE_CODE_DETAILS(ALLOW_WHITESPACES)%", &view),
        "upstream_reset{remote connection failure}"
    );
}

#[test]
fn a_server_name_is_cleaned() {
    let mut exchange = finished();
    let mut connection = connection();
    connection.requested_server_name = Some("a_b.example.com\" \n".into());
    exchange.connection = Arc::new(connection);
    assert_eq!(render("%REQUESTED_SERVER_NAME%", &View::new(&exchange)), "a_b.example.com___");
}

#[test]
fn grpc_codes_print_in_three_forms() {
    let mut exchange = finished();
    let template = "%GRPC_STATUS% %GRPC_STATUS(SNAKE_STRING)% %GRPC_STATUS(NUMBER)% %GRPC_STATUS_NUMBER%";
    assert_eq!(render(template, &View::new(&exchange)), "- - - -", "not gRPC");
    let grpc = HeaderValue::from_static("application/grpc");
    exchange.request.as_mut().unwrap().headers.insert("content-type", grpc);
    for (code, status, printed) in [
        (Some(1), 200, "Canceled CANCELLED 1 1"),
        (Some(0), 200, "OK OK 0 0"),
        (Some(99), 200, "99 99 99 99"),
        (None, 503, "Unavailable UNAVAILABLE 14 14"),
        (None, 403, "PermissionDenied PERMISSION_DENIED 7 7"),
    ] {
        exchange.grpc_status = code;
        exchange.status = Some(StatusCode::from_u16(status).unwrap());
        assert_eq!(render(template, &View::new(&exchange)), printed);
    }
}

#[test]
fn what_the_view_adds_comes_before_the_record() {
    let exchange = finished();
    let mut response = HeaderMap::new();
    response.insert("server", HeaderValue::from_static("istio-envoy"));
    let filter_state = |key: &str| (key == "io.istio.peer_principal").then_some(Cow::Borrowed("mine"));
    let metadata = |of, namespace: &str, path: &[Box<str>]| match (of, namespace, path) {
        (MetadataOf::Dynamic, "ns", [key]) if &**key == "key" => Some(Value::text("value")),
        (MetadataOf::Cluster, "istio", []) => Some(Value::Json("{\"a\":1}".into())),
        _ => None,
    };
    let view = View {
        response: Some(&response),
        filter_state: Some(&filter_state),
        metadata: Some(&metadata),
        ..View::new(&exchange)
    };
    for (template, printed) in [
        ("%RESP(server)% %RESP(x-envoy-upstream-service-time)%", "istio-envoy -"),
        ("%FILTER_STATE(io.istio.peer_principal:PLAIN)%", "mine"),
        ("%PER_REQUEST_STATE(io.istio.peer_principal)%", "mine"),
        (
            "%DYNAMIC_METADATA(ns:key)% %DYNAMIC_METADATA(ns:key):2% %DYNAMIC_METADATA(ns:no)%",
            "value va -",
        ),
        (r#"%DYNAMIC_METADATA(["ns", "key"])%"#, "value"),
        ("%METADATA(CLUSTER:istio)% %CLUSTER_METADATA(istio)%", r#"{"a":1} {"a":1}"#),
    ] {
        assert_eq!(render(template, &view), printed, "{template}");
    }
}

#[test]
fn an_absent_value_is_empty_in_a_header() {
    let mut out = Vec::new();
    let exchange = finished();
    Template::parse("[%REQ(x-none)%]%RESPONSE_FLAGS%")
        .unwrap()
        .render_header(&View::new(&exchange), &mut out);
    assert_eq!(out, b"[]-");
}

#[test]
fn one_operator_alone_keeps_its_type() {
    let exchange = finished();
    for (template, kind) in [
        ("%DURATION%", Kind::Raw),
        ("%DURATION%.0", Kind::Text),
        ("%RESPONSE_CODE%", Kind::Raw),
        ("%RESPONSE_FLAGS%", Kind::Text),
        ("%START_TIME%", Kind::Text),
        ("%REQ(x-none)%", Kind::Absent),
        ("%REQ(x-none)%%REQ(x-none)%", Kind::Text),
        ("text", Kind::Text),
        ("%DOWNSTREAM_LOCAL_PORT%", Kind::Raw),
    ] {
        let template_ = Template::parse(template).unwrap();
        assert_eq!(
            template_.evaluate(&View::new(&exchange), Absent::Dash).kind(),
            kind,
            "{template}"
        );
    }
}

#[test]
fn a_template_tells_what_it_reads() {
    let template = Template::parse(
        "%RESP(X-A?X-B)% %RESP(:STATUS)% %REQ(x-c)% %DOWNSTREAM_TLS_VERSION% %CEL(xds.node.id)% %CEL(response.headers['x-d'])%",
    )
    .unwrap();
    assert_eq!(
        template.response_headers().map(HeaderName::as_str).collect::<Vec<_>>(),
        ["x-a", "x-b", "x-d"]
    );
    assert_eq!(
        template.unrecorded().collect::<Vec<_>>(),
        ["DOWNSTREAM_TLS_VERSION", "CEL(xds.node.id)"]
    );
    assert_eq!(template.is_literal(), None);
    assert_eq!(Template::parse("50%%").unwrap().is_literal(), Some("50%"));
    assert_eq!(Template::parse("").unwrap().is_literal(), Some(""));
}

#[test]
fn what_filters_have_noted_is_read_off_the_record() {
    let mut exchange = finished();
    let payload = serde_json::json!({"sub": "dev", "groups": ["a"]});
    exchange.metadata.set("jwt".into(), "payload".into(), Arc::new(payload));
    for (template, text) in [
        ("%DYNAMIC_METADATA(jwt:payload:sub)%", "dev"),
        ("%METADATA(DYNAMIC:jwt:payload:groups)%", r#"["a"]"#),
        ("%DYNAMIC_METADATA(jwt)%", r#"{"payload":{"groups":["a"],"sub":"dev"}}"#),
        (
            "%DYNAMIC_METADATA(jwt:payload:none)% %DYNAMIC_METADATA(none)% %CLUSTER_METADATA(jwt)%",
            "- - -",
        ),
    ] {
        assert_eq!(render(template, &View::new(&exchange)), text, "{template}");
    }
}

#[test]
fn an_expression_is_a_text_or_has_its_type_and_is_absent_where_it_fails() {
    let exchange = finished();
    let view = View::new(&exchange);
    for (template, text) in [
        ("%CEL(request.method)%", "GET"),
        ("%CEL(request.headers['user-agent']):4%", "curl"),
        ("%CEL(request.headers['none'])%", "-"),
        ("%CEL(response.code == 200 ? 'good' : 'bad')% and %CEL(1 + 1)%", "good and 2"),
        ("%CEL('(' in ['(', '%'])%|%TYPED_CEL(response.code)%", "true|200"),
    ] {
        assert_eq!(render(template, &view), text, "{template}");
    }
    for (template, kind) in [
        ("%CEL(response.code)%", Kind::Text),
        ("%TYPED_CEL(response.code)%", Kind::Raw),
        ("%TYPED_CEL(request.method)%", Kind::Text),
        ("%TYPED_CEL(request.none)%", Kind::Absent),
        ("%TYPED_CEL([1, 'a'])%", Kind::Raw),
    ] {
        let template = Template::parse(template).unwrap();
        assert_eq!(template.evaluate(&view, Absent::Dash).kind(), kind, "{template:?}");
    }
    for malformed in ["%CEL(1 +)%", "%CEL(nothing(1))%", "%CEL([1].all(x, x > 0))%", "%CEL()%"] {
        assert!(Template::parse(malformed).is_err(), "{malformed}");
        assert!(Template::parse_log(malformed).is_err(), "{malformed}");
    }
}

#[test]
fn errors_name_operator_and_position() {
    for (template, position, token, problem) in [
        ("ab %WHAT% c", 3, "WHAT", FormatProblem::UnknownOperator("WHAT".into())),
        ("%START_TIME", 0, "%START_TIME", FormatProblem::NoOperator),
        ("a % b", 2, "% b", FormatProblem::NoOperator),
        ("%lower%", 0, "%lower%", FormatProblem::NoOperator),
        ("%REQ(a", 0, "%REQ(a", FormatProblem::NoOperator),
        ("%REQ(a):%", 0, "%REQ(a):%", FormatProblem::NoOperator),
        ("%REQ(a):x%", 0, "%REQ(a):x%", FormatProblem::NoOperator),
        ("%REQ(a\n)%", 0, "%REQ(a\n)%", FormatProblem::NoOperator),
        ("%REQ%", 0, "REQ", FormatProblem::NeedsParameter("REQ".into())),
        ("%REQ(a b)%", 0, "REQ(a b)", FormatProblem::HeaderName("a b".into())),
        ("%REQ(a?b?c)%", 0, "REQ(a?b?c)", FormatProblem::Alternatives),
        (
            "%PROTOCOL(x)%",
            0,
            "PROTOCOL(x)",
            FormatProblem::TakesNothing("PROTOCOL".into()),
        ),
        (
            "%PROTOCOL:3%",
            0,
            "PROTOCOL:3",
            FormatProblem::TakesNothing("PROTOCOL".into()),
        ),
        (
            "%START_TIME:3%",
            0,
            "START_TIME:3",
            FormatProblem::TakesNoLength("START_TIME".into()),
        ),
        (
            "%START_TIME(%Q)%",
            0,
            "START_TIME(%Q)",
            FormatProblem::TimeFormat("%Q".into()),
        ),
        (
            "%START_TIME(%n)%",
            0,
            "START_TIME(%n)",
            FormatProblem::TimeFormat("%n".into()),
        ),
        (
            "%GRPC_STATUS(x)%",
            0,
            "GRPC_STATUS(x)",
            FormatProblem::Parameter {
                given: "x".into(),
                wanted: "CAMEL_STRING, SNAKE_STRING or NUMBER",
            },
        ),
    ] {
        let error = Template::parse(template).unwrap_err();
        assert_eq!(
            (error.position, error.token.as_str(), &error.problem),
            (position, token, &problem),
            "{template}"
        );
    }
    assert_eq!(
        Template::parse("x %WHAT%").unwrap_err().to_string(),
        "format string, at byte 2 (WHAT): there is no operator WHAT"
    );
}

proptest::proptest! {
    #[test]
    fn any_text_compiles_and_renders_or_is_refused_within_itself(
        text in "(\\PC|\n|%|%%|%(REQ|RESP|PATH|START_TIME|DURATION|FILTER_STATE|METADATA)|[(]|[)]|[)]:[0-9]{1,22}%|%[0-9E*]?[fSzYn]|:){0,12}"
    ) {
        match Template::parse(&text) {
            Ok(template) => {
                let exchange = finished();
                let mut out = Vec::new();
                template.render(&View::new(&exchange), &mut out);
                template.evaluate(&View::new(&exchange), Absent::Empty).write(&mut out);
            }
            Err(error) => proptest::prop_assert!(text.is_char_boundary(error.position) && error.position < text.len()),
        }
    }

    #[test]
    fn text_without_percent_signs_is_literal(text in "[^%]{0,40}") {
        let template = Template::parse(&text).unwrap();
        proptest::prop_assert_eq!(template.is_literal(), Some(text.as_str()));
    }
}

#[test]
fn a_log_may_have_operators_that_are_not_known_but_nothing_that_is_wrong() {
    let template = Template::parse_log("[%WHAT%] %WHAT(x.y):7% %PROTOCOL%").unwrap();
    assert_eq!(template.unrecorded().collect::<Vec<_>>(), ["WHAT", "WHAT(x.y):7"]);
    let exchange = finished();
    let mut out = Vec::new();
    template.render(&View::new(&exchange), &mut out);
    assert!(out.starts_with(b"[-] - "), "{}", String::from_utf8_lossy(&out));
    for wrong in ["%WHAT", "%REQ()%", "%PROTOCOL(x)%", "50% off"] {
        assert_eq!(Template::parse_log(wrong), Template::parse(wrong), "{wrong}");
        assert!(Template::parse_log(wrong).is_err(), "{wrong}");
    }
}
