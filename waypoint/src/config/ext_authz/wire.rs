//! The messages of a gRPC authorizer: `envoy.service.auth.v3.Authorization/Check`.

use std::{borrow::Cow, collections::BTreeMap, net::SocketAddr};

use bytes::Bytes;
use cairn_exchange::SpiffeId;
use cairn_filters::ext_authz::{
    answer::{Allowed, Answer, Decision, Denied, Edit, How},
    question::{Body, Question, Request, Wire},
};
use cairn_proto::envoy::{
    config::core::v3::{
        Address, HeaderMap, HeaderValue, HeaderValueOption, Metadata, QueryParameter, SocketAddress, address,
        header_value_option::HeaderAppendAction, socket_address::PortSpecifier,
    },
    service::auth::v3::{
        AttributeContext, CheckRequest, CheckResponse, DeniedHttpResponse, OkHttpResponse,
        attribute_context::{self, HttpRequest, Peer, TlsSession},
        check_response::HttpResponse,
    },
};
use http::StatusCode;
use prost::Message as _;
use prost_types::{Struct, Timestamp, Value, value::Kind};
use serde_json::Value as Json;

use super::super::structure;

/// The messages.
pub(super) const WIRE: Wire = Wire {
    method: "/envoy.service.auth.v3.Authorization/Check",
    question,
    answer,
};

/// gRPC's status for "yes".
const OK: i32 = 0;
/// The header that names the service a client calls itself.
const CLIENT_SERVICE: &str = "x-envoy-downstream-service-cluster";

fn question(question: &Question<'_>) -> Bytes {
    let connection = &question.exchange.connection;
    let service = question.request.as_ref().and_then(|request| {
        let service = request.head.headers.get(CLIENT_SERVICE)?;
        Some(text(service.as_bytes()).into_owned())
    });
    let source = Peer {
        service: service.unwrap_or_default(),
        ..peer(Some(connection.remote_address), connection.peer.as_ref())
    };
    let context = question.context.iter();
    let attributes = AttributeContext {
        source: Some(source),
        destination: Some(peer(connection.local_address, connection.local.as_ref())),
        request: question.request.as_ref().map(|request| attribute_context::Request {
            time: Some(Timestamp::from(question.exchange.wall)),
            http: Some(http_request(question, request)),
        }),
        context_extensions: context.map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        metadata_context: Some(metadata(question)),
        route_metadata_context: question.request.as_ref().map(|_| Metadata::default()),
        tls_session: question.server_name().map(|sni| TlsSession { sni: sni.to_owned() }),
    };
    let request = CheckRequest {
        attributes: Some(attributes),
    };
    request.encode_to_vec().into()
}

fn peer(address: Option<SocketAddr>, identity: Option<&SpiffeId>) -> Peer {
    Peer {
        address: address.map(|address| Address {
            address: Some(address::Address::SocketAddress(SocketAddress {
                address: address.ip().to_string(),
                port_specifier: Some(PortSpecifier::PortValue(address.port().into())),
                ..SocketAddress::default()
            })),
        }),
        principal: identity.map(|identity| identity.as_str().to_owned()).unwrap_or_default(),
        ..Peer::default()
    }
}

fn http_request(question: &Question<'_>, request: &Request<'_>) -> HttpRequest {
    let Request { head, body, id } = request;
    let mut headers: BTreeMap<String, String> = BTreeMap::new();
    let mut raw = Vec::new();
    for (name, value) in question.headers() {
        if question.told.raw_headers {
            raw.push(HeaderValue {
                key: name.to_owned(),
                value: String::new(),
                raw_value: value.into_owned(),
            });
            continue;
        }
        let value = text(&value);
        match headers.get_mut(name) {
            // As RFC 9110 §5.3 has it, of cookies too, which is how Envoy tells them.
            Some(joined) => {
                joined.push(',');
                joined.push_str(&value);
            }
            None => {
                headers.insert(name.to_owned(), value.into_owned());
            }
        }
    }
    let (body, raw_body) = match body {
        None => (String::new(), Vec::new()),
        Some(Body {
            bytes, as_bytes: true, ..
        }) => (String::new(), bytes.to_vec()),
        Some(Body {
            bytes, as_bytes: false, ..
        }) => (text(bytes).into_owned(), Vec::new()),
    };
    HttpRequest {
        id: id.to_string(),
        method: head.method.as_str().to_owned(),
        headers,
        header_map: question.told.raw_headers.then_some(HeaderMap { headers: raw }),
        path: head.path.as_str().to_owned(),
        host: text(head.authority.as_bytes()).into_owned(),
        scheme: match head.scheme {
            cairn_exchange::Scheme::Http => "http".into(),
            cairn_exchange::Scheme::Https => "https".into(),
        },
        // Both are part of the path.
        query: String::new(),
        fragment: String::new(),
        size: i64::try_from(question.size()).unwrap_or(i64::MAX),
        protocol: question.protocol().to_owned(),
        body,
        raw_body,
    }
}

/// Bytes as text; each that is none becomes `!`, as Envoy has it.
fn text(bytes: &[u8]) -> Cow<'_, str> {
    match String::from_utf8_lossy(bytes) {
        Cow::Borrowed(text) => Cow::Borrowed(text),
        Cow::Owned(text) => Cow::Owned(text.replace(char::REPLACEMENT_CHARACTER, "!")),
    }
}

fn metadata(question: &Question<'_>) -> Metadata {
    let mut filter_metadata = BTreeMap::new();
    for namespace in &question.told.namespaces {
        let noted = question.exchange.metadata.namespace(namespace);
        let fields: BTreeMap<_, _> = noted.map(|(key, value)| (key.to_owned(), value_of(value))).collect();
        if !fields.is_empty() {
            filter_metadata.insert(namespace.to_string(), Struct { fields });
        }
    }
    Metadata {
        filter_metadata,
        typed_filter_metadata: BTreeMap::new(),
    }
}

fn value_of(json: &Json) -> Value {
    let kind = match json {
        Json::Null => Kind::NullValue(0),
        Json::Bool(truth) => Kind::BoolValue(*truth),
        Json::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or_default()),
        Json::String(text) => Kind::StringValue(text.clone()),
        Json::Array(items) => Kind::ListValue(prost_types::ListValue {
            values: items.iter().map(value_of).collect(),
        }),
        Json::Object(fields) => Kind::StructValue(Struct {
            fields: fields.iter().map(|(key, value)| (key.clone(), value_of(value))).collect(),
        }),
    };
    Value { kind: Some(kind) }
}

fn answer(bytes: &[u8]) -> Result<Answer, String> {
    let CheckResponse {
        status,
        dynamic_metadata,
        http_response,
    } = CheckResponse::decode(bytes).map_err(|error| format!("the answer is no CheckResponse: {error}"))?;
    // Without a status it is "yes", as Envoy reads it.
    let yes = status.is_none_or(|status| status.code == OK);
    let mut notes = dynamic_metadata;
    let decision = match (yes, http_response) {
        (true, None) => Decision::Allowed(Box::default()),
        (true, Some(HttpResponse::OkResponse(response))) => {
            let (allowed, noted) = allowed(response);
            notes = notes.or(noted);
            Decision::Allowed(Box::new(allowed))
        }
        (true, Some(HttpResponse::DeniedResponse(_))) => {
            return Err("the answer is yes by its status and no by its response".into());
        }
        (_, Some(HttpResponse::ErrorResponse(response))) => Decision::Failed(denied(response, StatusCode::INTERNAL_SERVER_ERROR)),
        (false, Some(HttpResponse::DeniedResponse(response))) => Decision::Denied(denied(response, StatusCode::FORBIDDEN)),
        (false, None | Some(HttpResponse::OkResponse(_))) => Decision::Denied(Denied {
            status: StatusCode::FORBIDDEN,
            headers: Vec::new(),
            body: Bytes::new(),
        }),
    };
    Ok(Answer {
        decision,
        notes: notes.map(notes_of).transpose()?.unwrap_or_default(),
    })
}

fn notes_of(noted: Struct) -> Result<Vec<(String, Json)>, String> {
    match structure::fields(&noted, 0) {
        Some(Json::Object(fields)) => Ok(fields.into_iter().collect()),
        _ => Err("the answer's metadata is nested too deeply".into()),
    }
}

#[allow(deprecated, reason = "older authorizers note there")]
fn allowed(response: OkHttpResponse) -> (Allowed, Option<Struct>) {
    let OkHttpResponse {
        headers,
        headers_to_remove,
        dynamic_metadata,
        response_headers_to_add,
        query_parameters_to_set,
        query_parameters_to_remove,
    } = response;
    let parameters = query_parameters_to_set.into_iter();
    let allowed = Allowed {
        request: headers.into_iter().filter_map(|option| edit(option, How::Set)).collect(),
        remove: headers_to_remove,
        set_parameters: parameters.map(|QueryParameter { key, value }| (key, value)).collect(),
        remove_parameters: query_parameters_to_remove,
        response: response_headers_to_add
            .into_iter()
            .filter_map(|option| edit(option, How::Add))
            .collect(),
    };
    (allowed, dynamic_metadata)
}

fn denied(response: DeniedHttpResponse, otherwise: StatusCode) -> Denied {
    let DeniedHttpResponse { status, headers, body } = response;
    let status = status.and_then(|status| StatusCode::from_u16(u16::try_from(status.code).ok()?).ok());
    Denied {
        status: status.filter(|status| !status.is_informational()).unwrap_or(otherwise),
        headers: headers.into_iter().filter_map(|option| edit(option, How::Set)).collect(),
        body: body.into(),
    }
}

/// An edit; the first of the actions, which is also what unset ones look like, is what `otherwise` says.
fn edit(option: HeaderValueOption, otherwise: How) -> Option<Edit> {
    let HeaderValueOption {
        header,
        append,
        append_action,
        keep_empty_value: _,
    } = option;
    let HeaderValue { key, value, raw_value } = header?;
    let value = if raw_value.is_empty() { value.into_bytes() } else { raw_value };
    let how = match (append, HeaderAppendAction::try_from(append_action)) {
        (Some(true), _) if otherwise == How::Set => How::AppendIfThere,
        (Some(true), _) => How::Add,
        (Some(false), _) | (None, Ok(HeaderAppendAction::OverwriteIfExistsOrAdd)) => How::Set,
        (None, Ok(HeaderAppendAction::AddIfAbsent)) => How::AddIfAbsent,
        (None, Ok(HeaderAppendAction::OverwriteIfExists)) => How::ReplaceIfThere,
        (None, Ok(HeaderAppendAction::AppendIfExistsOrAdd) | Err(_)) => otherwise,
    };
    Some(Edit::new(key, value, how))
}

#[cfg(test)]
mod tests {
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
        let field = |(name, value): &(&'static str, &[u8])| {
            (HeaderName::from_static(name), http::HeaderValue::from_bytes(value).unwrap())
        };
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
}
