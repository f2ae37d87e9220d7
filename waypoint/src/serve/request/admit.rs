//! What is done to every request before a filter sees it: its protocol's forms become one, what the chain does not take is refused,
//! and what says who is asking (forwarded addresses, ids, paths) is put in order.

use std::net::SocketAddr;

use bytes::Bytes;
use cairn_exchange::{Protocol, RequestHead, ResponseFlags, Scheme};
use cairn_filters::LocalReply;
use cairn_policy::headers::{incoming::Arrival, is_upgrade, upgrade_kind};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header, uri::PathAndQuery};

use super::Journey;
use crate::{serve::reply, snapshot::HttpSettings};

impl Journey<'_> {
    /// What is done to every request before a filter sees it; an error is the answer.
    pub(super) fn admit(&mut self, scheme_given: bool) -> Result<(), Box<LocalReply>> {
        let settings = &self.http.settings;
        let exchange = &mut self.tail.exchange;
        if exchange.protocol == Protocol::Http10 && !settings.accept_http10 {
            exchange.flags.insert(ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR);
            return Err(Box::new(LocalReply::new(
                StatusCode::UPGRADE_REQUIRED,
                ResponseFlags::NONE,
                "low_version",
                "Upgrade Required",
            )));
        }
        let connection = exchange.connection.clone();
        let Some(head) = exchange.request.as_mut() else {
            return Ok(());
        };
        // hyper ends such a connection; HTTP/1.0 clients are told so all the same, as by Envoy.
        self.tail.ends_connection = exchange.protocol == Protocol::Http10 && !asks_to_keep_alive(&head.headers);
        if head.authority.is_empty() && exchange.protocol != Protocol::Http10 {
            return Err(Box::new(reply::bad_request("missing_host_header")));
        }
        // HTTP/1 counts them while it reads.
        if head.headers.len() > settings.max_request_headers {
            exchange.flags.insert(ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR);
            let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
            return Err(Box::new(LocalReply::new(
                status,
                ResponseFlags::NONE,
                "http2.too_many_headers",
                Bytes::new(),
            )));
        }
        underscores(settings.underscores, &mut head.headers)?;
        // An offer to go on in HTTP/2, which some clients make with every request: not taken, and no reason to refuse.
        if upgrade_kind(&head.headers).is_some_and(|kind| kind.eq_ignore_ascii_case("h2c")) {
            head.headers.remove(header::UPGRADE);
            head.headers.remove("http2-settings");
        }
        if let Some(kind) = upgrade_kind(&head.headers).filter(|_| is_upgrade(&head.headers)) {
            let served = (settings.websocket && kind.eq_ignore_ascii_case("websocket"))
                || settings.upgrades.iter().any(|other| kind.eq_ignore_ascii_case(other));
            if !served {
                return Err(Box::new(LocalReply::new(
                    StatusCode::FORBIDDEN,
                    ResponseFlags::NONE,
                    "upgrade_failed",
                    Bytes::new(),
                )));
            }
            self.upgrading = true;
        }
        let arrival = Arrival {
            tls: false,
            scheme_given,
            port: connection.service_port,
            remote: connection.remote_address.ip(),
        };
        let origin = settings.incoming.prepare(head, arrival, || {
            let id = uuid::Uuid::new_v4();
            let mut text = [0; uuid::fmt::Hyphenated::LENGTH];
            HeaderValue::from_str(id.hyphenated().encode_lower(&mut text)).unwrap_or(HeaderValue::from_static(""))
        });
        // The header has no port.
        exchange.client_address = (origin.address != arrival.remote).then(|| SocketAddr::new(origin.address, 0));
        normalize(settings, head)?;
        self.trace();
        Ok(())
    }

    /// Begins the request's trace.
    fn trace(&mut self) {
        let (Some(tracer), Some(head)) = (&self.http.tracer, &mut self.tail.exchange.request) else {
            return;
        };
        let traced = self.http.settings.sampling.decide(&mut head.headers, self.random as u32);
        let trace = tracer.begin(&mut head.headers, traced);
        self.tail.exchange.traceable = traced;
        self.tail.exchange.trace = trace.ids();
        self.tail.trace = Some(Box::new(trace));
    }
}

/// Whether an HTTP/1.0 client wants its connection to go on.
fn asks_to_keep_alive(headers: &HeaderMap) -> bool {
    let options = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok());
    options
        .flat_map(|value| value.split(','))
        .any(|option| option.trim().eq_ignore_ascii_case("keep-alive"))
}

/// Takes a request apart into the form that all protocols share; the error is Envoy's reason for 400.
pub(super) fn head_of(method: Method, uri: Uri, mut headers: HeaderMap) -> Result<RequestHead, &'static str> {
    let parts = uri.into_parts();
    let host = join(&mut headers);
    let authority = match (parts.authority, host) {
        (Some(authority), _) => HeaderValue::try_from(authority.as_str()).unwrap_or(HeaderValue::from_static("")),
        (None, Some(host)) => host,
        (None, None) => return Err("missing_host_header"),
    };
    let scheme = match parts.scheme {
        Some(scheme) if scheme == http::uri::Scheme::HTTPS => Scheme::Https,
        _ => Scheme::Http,
    };
    let path = parts.path_and_query.unwrap_or(PathAndQuery::from_static("/"));
    Ok(RequestHead {
        method,
        path,
        authority,
        scheme,
        headers,
    })
}

/// The host header; several are joined, as Envoy does.
fn join(headers: &mut HeaderMap) -> Option<HeaderValue> {
    let mut all = headers.get_all(header::HOST).iter();
    let first = all.next()?.clone();
    let host = if all.next().is_none() {
        first
    } else {
        let joined: Vec<_> = headers.get_all(header::HOST).iter().map(HeaderValue::as_bytes).collect();
        HeaderValue::from_bytes(&joined.join(&b','))
            // Header values joined by a comma are a header value.
            .unwrap_or(first)
    };
    headers.remove(header::HOST);
    Some(host)
}

/// What a chain does to paths.
fn normalize(settings: &HttpSettings, head: &mut RequestHead) -> Result<(), Box<LocalReply>> {
    use cairn_policy::path::Normalized;
    match settings.path.apply(&head.path) {
        Normalized::Same => Ok(()),
        Normalized::Changed(path) => {
            head.path = path;
            Ok(())
        }
        Normalized::Redirect(path) => {
            let location = HeaderValue::try_from(path.as_str()).unwrap_or(HeaderValue::from_static("/"));
            let reply = LocalReply::new(
                StatusCode::TEMPORARY_REDIRECT,
                ResponseFlags::NONE,
                "path_normalization_redirect",
                Bytes::new(),
            );
            Err(Box::new(reply.with_header(header::LOCATION, location)))
        }
        Normalized::Reject => Err(Box::new(reply::bad_request("path_normalization_failed"))),
    }
}

/// Header names with underscores, as the chain wants them.
fn underscores(setting: crate::snapshot::chain::Underscores, headers: &mut HeaderMap) -> Result<(), Box<LocalReply>> {
    use crate::snapshot::chain::Underscores;
    if setting == Underscores::Allow {
        return Ok(());
    }
    let found: Vec<_> = headers.keys().filter(|name| name.as_str().contains('_')).cloned().collect();
    match setting {
        Underscores::Reject if !found.is_empty() => {
            let flags = ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR;
            let details = "http1.unexpected_underscore";
            Err(Box::new(LocalReply::new(
                StatusCode::BAD_REQUEST,
                flags,
                details,
                "Bad Request",
            )))
        }
        _ => {
            for name in found {
                headers.remove(name);
            }
            Ok(())
        }
    }
}
