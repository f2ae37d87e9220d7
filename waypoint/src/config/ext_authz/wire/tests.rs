//! What is asked and understood.

use std::sync::Arc;

use cairn_exchange::{Connection, Exchange, Protocol, RequestHead, Scheme, clock};
use cairn_filters::ext_authz::question::Told;
use cairn_policy::matcher::StringMatcher;
use cairn_proto::{envoy::r#type::v3::HttpStatus, google::rpc::Status};
use http::{HeaderName, Method, uri::PathAndQuery};
use serde_json::json;

use super::*;

fn exchange(protocol: Protocol) -> Exchange {
    let connection = Connection {
        id: 1,
        authority: "10.96.1.10:80".into(),
        local_address: "10.96.1.10:80".parse().ok(),
        service_port: 80,
        remote_address: "10.244.0.9:41000".parse().unwrap(),
        peer: SpiffeId::workload("cluster.local", "app", "client").ok(),
        local: SpiffeId::workload("cluster.local", "app", "waypoint").ok(),
        source: None,
        requested_server_name: Some("web.example".into()),
        opened: clock::now(),
    };
    let mut exchange = Exchange::begin(protocol, Arc::new(connection), "chain".into(), 1);
    exchange.metadata.set(
        "jwt".into(),
        "payload".into(),
        Arc::new(json!({"sub": "ann", "n": [1, true, null]})),
    );
    exchange.metadata.set("other".into(), "secret".into(), Arc::new(json!("x")));
    exchange
}

fn request(exchange: &mut Exchange, headers: &[(&'static str, &[u8])]) {
    let field =
        |(name, value): &(&'static str, &[u8])| (HeaderName::from_static(name), http::HeaderValue::from_bytes(value).unwrap());
    exchange.request = Some(RequestHead {
        method: Method::POST,
        path: PathAndQuery::from_static("/a?q=1"),
        authority: http::HeaderValue::from_static("web"),
        scheme: Scheme::Http,
        headers: headers.iter().map(field).collect(),
    });
}

fn asked(question: &Question<'_>) -> AttributeContext {
    let asked = CheckRequest::decode(super::question(question)).unwrap();
    asked.attributes.unwrap()
}

#[test]
fn a_question_says_who_asks_for_what() {
    let mut exchange = exchange(Protocol::Http11);
    request(
        &mut exchange,
        &[
            ("x-a", b"1"),
            ("x-a", b"2"),
            ("x-b", b"\xffb"),
            ("content-length", b"100"),
            ("x-envoy-downstream-service-cluster", b"web.app"),
            ("x-envoy-auth-partial-body", b"false"),
        ],
    );
    let told = Told {
        namespaces: vec!["jwt".into(), "none".into()],
        server_name: true,
        ..Told::default()
    };
    let body = Body {
        bytes: Bytes::from_static(b"b\xfe"),
        partial: true,
        received: 2,
        as_bytes: false,
    };
    let question = Question::of_request(&exchange, &told, &[("k", "v")], Some(&body));
    let attributes = asked(&question);
    let source = attributes.source.unwrap();
    assert_eq!(
        (source.principal.as_str(), source.service.as_str()),
        ("spiffe://cluster.local/ns/app/sa/client", "web.app")
    );
    assert_eq!(
        attributes.destination.unwrap().principal,
        "spiffe://cluster.local/ns/app/sa/waypoint"
    );
    assert_eq!(attributes.context_extensions["k"], "v");
    assert_eq!(attributes.tls_session.unwrap().sni, "web.example");
    let metadata = attributes.metadata_context.unwrap().filter_metadata;
    assert_eq!(
        metadata.keys().collect::<Vec<_>>(),
        ["jwt"],
        "what is not asked for is not told"
    );
    let noted = notes_of(metadata["jwt"].clone()).unwrap();
    assert_eq!(noted, [("payload".to_owned(), json!({"sub": "ann", "n": [1, true, null]}))]);
    let request = attributes.request.unwrap();
    assert!(request.time.is_some());
    let http = request.http.unwrap();
    assert_eq!(
        (http.method.as_str(), http.path.as_str(), http.host.as_str()),
        ("POST", "/a?q=1", "web")
    );
    assert_eq!(
        (http.protocol.as_str(), http.size, http.body.as_str()),
        ("HTTP/1.1", 100, "b!")
    );
    for (name, value) in [
        (":method", "POST"),
        (":path", "/a?q=1"),
        (":authority", "web"),
        ("x-a", "1,2"),
        ("x-b", "!b"),
        ("x-envoy-auth-partial-body", "true"),
    ] {
        assert_eq!(http.headers.get(name).map(String::as_str), Some(value), "{name}");
    }
}

#[test]
fn a_question_tells_the_headers_that_it_may() {
    let mut exchange = exchange(Protocol::Http2);
    request(&mut exchange, &[("authorization", b"a"), ("x-a", b"1"), ("x-b", b"\xff")]);
    let names = |told: &Told| {
        let attributes = asked(&Question::of_request(&exchange, told, &[], None));
        let http = attributes.request.unwrap().http.unwrap();
        let raw = http
            .header_map
            .map(|map| map.headers.into_iter().map(|header| header.key).collect());
        raw.unwrap_or_else(|| http.headers.into_keys().collect::<Vec<_>>()).join(" ")
    };
    let list = |name: &str| vec![StringMatcher::exact(name)];
    for (allowed, disallowed, expected) in [
        (None, vec![], ":authority :method :path :scheme authorization x-a x-b"),
        (Some(vec![]), vec![], "authorization"),
        (Some(list("x-a")), vec![], "authorization x-a"),
        (None, list("authorization"), ":authority :method :path :scheme x-a x-b"),
        (Some(list("x-a")), list("x-a"), "authorization"),
    ] {
        for raw_headers in [false, true] {
            let told = Told {
                allowed: allowed.clone(),
                disallowed: disallowed.clone(),
                raw_headers,
                ..Told::default()
            };
            assert_eq!(names(&told), expected, "{allowed:?} {disallowed:?}");
        }
    }
}

#[test]
fn a_question_about_a_connection_has_no_request() {
    let exchange = exchange(Protocol::Tcp);
    let attributes = asked(&Question::of_connection(&exchange, &Told::default()));
    assert!(attributes.request.is_none() && attributes.route_metadata_context.is_none());
    assert_eq!(attributes.metadata_context, Some(Metadata::default()));
    assert!(attributes.tls_session.is_none());
}

fn option(name: &str, append: Option<bool>, action: HeaderAppendAction) -> HeaderValueOption {
    HeaderValueOption {
        header: Some(HeaderValue {
            key: name.into(),
            value: "v".into(),
            raw_value: Vec::new(),
        }),
        append,
        append_action: action as i32,
        keep_empty_value: false,
    }
}

fn read(code: Option<i32>, response: Option<HttpResponse>) -> Result<Answer, String> {
    let said = CheckResponse {
        status: code.map(|code| Status {
            code,
            ..Status::default()
        }),
        dynamic_metadata: None,
        http_response: response,
    };
    answer(&said.encode_to_vec())
}

#[test]
fn the_status_of_an_answer_decides() {
    let ok = || Some(HttpResponse::OkResponse(OkHttpResponse::default()));
    let no = |status| DeniedHttpResponse {
        status: Some(HttpStatus { code: status }),
        headers: Vec::new(),
        body: "no".into(),
    };
    let denial = |status| Some(HttpResponse::DeniedResponse(no(status)));
    let error = |status| Some(HttpResponse::ErrorResponse(no(status)));
    for (code, response, expected) in [
        (None, None, Some((0, 0))),
        (Some(0), None, Some((0, 0))),
        (Some(0), ok(), Some((0, 0))),
        (Some(7), None, Some((1, 403))),
        (Some(7), ok(), Some((1, 403))),
        (Some(16), denial(401), Some((1, 401))),
        (Some(16), denial(0), Some((1, 403))),
        (Some(16), denial(99_999), Some((1, 403))),
        (Some(16), denial(101), Some((1, 403))),
        (Some(0), error(503), Some((2, 503))),
        (Some(13), error(0), Some((2, 500))),
        (Some(0), denial(403), None),
    ] {
        let said = read(code, response.clone()).ok().map(|answer| match answer.decision {
            Decision::Allowed(_) => (0, 0),
            Decision::Denied(denied) => (1, denied.status.as_u16()),
            Decision::Failed(denied) => (2, denied.status.as_u16()),
        });
        assert_eq!(said, expected, "{code:?} {response:?}");
    }
    assert!(answer(b"\xff\xff").is_err());
}

#[test]
fn edits_are_read_as_envoy_reads_them() {
    use HeaderAppendAction::{AddIfAbsent, AppendIfExistsOrAdd, OverwriteIfExists, OverwriteIfExistsOrAdd};
    for (append, action, request, response) in [
        (None, AppendIfExistsOrAdd, How::Set, How::Add),
        (Some(true), OverwriteIfExists, How::AppendIfThere, How::Add),
        (Some(false), AppendIfExistsOrAdd, How::Set, How::Set),
        (None, AddIfAbsent, How::AddIfAbsent, How::AddIfAbsent),
        (None, OverwriteIfExistsOrAdd, How::Set, How::Set),
        (None, OverwriteIfExists, How::ReplaceIfThere, How::ReplaceIfThere),
    ] {
        let said = OkHttpResponse {
            headers: vec![option("a", append, action)],
            response_headers_to_add: vec![option("b", append, action)],
            ..OkHttpResponse::default()
        };
        let Decision::Allowed(allowed) = read(Some(0), Some(HttpResponse::OkResponse(said))).unwrap().decision else {
            panic!("it is yes")
        };
        assert_eq!(
            (&allowed.request[0], &allowed.response[0]),
            (&Edit::new("a", "v", request), &Edit::new("b", "v", response)),
            "{append:?} {action:?}"
        );
    }
}
