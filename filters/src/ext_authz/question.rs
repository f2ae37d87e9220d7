//! What an authorizer is told: the parties of a connection, and of a request its head and as much of its body as it asks for.
//!
//! The client's identity is that of its tunnel. Envoy's waypoints leave it out, since the listener that asks has no TLS of its own.

use std::borrow::Cow;

use bytes::Bytes;
use cairn_exchange::{Exchange, Protocol, RequestHead, Scheme};
use cairn_policy::matcher::StringMatcher;

use super::{answer::Answer, any};

/// Whether not all of the body is told.
const PARTIAL: &str = "x-envoy-auth-partial-body";

/// How the messages of an authorizer are written.
#[derive(Clone, Copy, Debug)]
pub struct Wire {
    /// The method.
    pub method: &'static str,
    /// The question.
    pub question: fn(&Question<'_>) -> Bytes,
    /// The answer, or why it is none.
    pub answer: fn(&[u8]) -> Result<Answer, String>,
}

/// What is told, whoever asks.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// Headers that are told; `None`: all.
    pub allowed: Option<Vec<StringMatcher>>,
    /// Headers that are not, though they may be among the others.
    pub disallowed: Vec<StringMatcher>,
    /// Headers with the bytes of their values and one entry a field, not as text with one entry a name.
    pub raw_headers: bool,
    /// What filters have noted under these names.
    pub namespaces: Vec<Box<str>>,
    /// The server name of the client's own TLS.
    pub server_name: bool,
}

/// A question.
#[derive(Debug)]
pub struct Question<'a> {
    /// What it is about.
    pub exchange: &'a Exchange,
    /// What of it is told.
    pub told: &'a Told,
    /// The request; `None` for a connection.
    pub request: Option<Request<'a>>,
    /// What routes add.
    pub context: &'a [(&'a str, &'a str)],
}

/// The request of a question.
#[derive(Debug)]
pub struct Request<'a> {
    /// Its head.
    pub head: &'a RequestHead,
    /// Its body, where it is told.
    pub body: Option<&'a Body>,
    /// Names it.
    pub id: u64,
}

/// What is told of a body.
#[derive(Clone, Debug)]
pub struct Body {
    /// Its bytes, or the first of them.
    pub bytes: Bytes,
    /// There are more.
    pub partial: bool,
    /// How many have come.
    pub received: usize,
    /// It is told as bytes, not as text.
    pub as_bytes: bool,
}

// === impl Question ===

impl<'a> Question<'a> {
    /// About a request.
    pub fn of_request(exchange: &'a Exchange, told: &'a Told, context: &'a [(&'a str, &'a str)], body: Option<&'a Body>) -> Self {
        let request = exchange.request.as_ref().map(|head| Request {
            head,
            body,
            id: fastrand::u64(..),
        });
        Self {
            exchange,
            told,
            request,
            context,
        }
    }

    /// About a connection.
    pub fn of_connection(exchange: &'a Exchange, told: &'a Told) -> Self {
        Self {
            exchange,
            told,
            request: None,
            context: &[],
        }
    }

    /// The server name of the client's own TLS, where it is told.
    pub fn server_name(&self) -> Option<&str> {
        let name = self.exchange.connection.requested_server_name.as_deref();
        name.filter(|_| self.told.server_name)
    }

    /// The headers that are told, pseudo-headers among them: one entry a field, in lower case. An authorizer that speaks HTTP is told
    /// `:method`, `:path` and `:authority` apart.
    pub fn headers(&self) -> Vec<(&str, Cow<'_, [u8]>)> {
        let Some(request) = &self.request else { return Vec::new() };
        let head = request.head;
        let scheme = match head.scheme {
            Scheme::Http => "http",
            Scheme::Https => "https",
        };
        let pseudo = [
            (":authority", head.authority.as_bytes()),
            (":method", head.method.as_str().as_bytes()),
            (":path", head.path.as_str().as_bytes()),
            (":scheme", scheme.as_bytes()),
        ];
        let fields = head.headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes()));
        // A client does not say how much of its body is told.
        let own = |name: &str| request.body.is_some() && name == PARTIAL;
        let told = |(name, _): &(&str, _)| self.tells(name) && !own(name);
        let mut headers: Vec<(&str, Cow<'_, [u8]>)> = pseudo
            .into_iter()
            .chain(fields)
            .filter(told)
            .map(|(name, value)| (name, Cow::Borrowed(value)))
            .collect();
        if let Some(body) = request.body {
            let partial: &[u8] = if body.partial { b"true" } else { b"false" };
            headers.push((PARTIAL, partial.into()));
        }
        headers
    }

    /// Whether a header is told. Where some are named, the client's credentials are always among them.
    fn tells(&self, name: &str) -> bool {
        let Told { allowed, disallowed, .. } = self.told;
        let named = |allowed: &Vec<StringMatcher>| name == "authorization" || any(allowed, name);
        allowed.as_ref().is_none_or(named) && !any(disallowed, name)
    }

    /// How many bytes the request has: what it says itself, else what has come of it.
    pub fn size(&self) -> u64 {
        let Some(request) = &self.request else { return 0 };
        let said = request.head.headers.get(http::header::CONTENT_LENGTH);
        let said = said.and_then(|length| length.to_str().ok()?.parse().ok());
        said.unwrap_or_else(|| request.body.map_or(0, |body| body.received as u64))
    }

    /// The protocol, as Envoy names it.
    pub fn protocol(&self) -> &'static str {
        match self.exchange.protocol {
            Protocol::Tcp => "",
            Protocol::Http10 => "HTTP/1.0",
            Protocol::Http11 => "HTTP/1.1",
            Protocol::Http2 => "HTTP/2",
        }
    }
}
