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
mod tests;
