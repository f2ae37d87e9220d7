//! Authorizers that speak plain HTTP: the request's own method and path, some of its headers, and a status for an answer.
//!
//! 200 allows, 5xx is no answer, anything else denies with what it says. Which headers go where is the configuration's.

use std::{sync::Arc, time::Duration};

use cairn_exchange::{RequestHead, Scheme};
use cairn_policy::{
    headers::{HeaderEdits, record_alone},
    matcher::StringMatcher,
};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header, uri::PathAndQuery};
use serde_json::Value;

use super::{
    Said,
    answer::{Allowed, Answer, Decision, Denied, Edit, How},
    any,
    edits::frames,
    question::Question,
};
use crate::services::{HttpCall, HttpReply, Services};

const INTERNAL: HeaderName = HeaderName::from_static("x-envoy-internal");
const EXPECTED: HeaderName = HeaderName::from_static("x-envoy-expected-rq-timeout-ms");
/// Names of headers that the request loses, in an answer.
const TO_REMOVE: HeaderName = HeaderName::from_static("x-envoy-auth-headers-to-remove");

/// An authorizer.
#[derive(Debug)]
pub struct HttpAuthorizer {
    /// The cluster.
    pub cluster: Arc<str>,
    /// How long it has; `None`: for ever.
    pub timeout: Option<Duration>,
    /// Where it is asked.
    pub path: AskedAt,
    /// Headers that it is told besides.
    pub add: HeaderEdits,
    /// Which headers of its answer go where.
    pub goes: Goes,
    /// Most bytes of its answer's body.
    pub max_answer: usize,
}

/// Where an authorizer is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AskedAt {
    /// At the request's path behind this.
    Under(Box<str>),
    /// Here.
    This(PathAndQuery),
}

/// Which headers of an answer go where.
#[derive(Clone, Debug, Default)]
pub struct Goes {
    /// Of one that allows: to the request, in the place of others.
    pub upstream: Vec<StringMatcher>,
    /// To the request, beside others.
    pub upstream_beside: Vec<StringMatcher>,
    /// To the answer.
    pub client_on_success: Vec<StringMatcher>,
    /// Of one that denies: to the client; `None`: all.
    pub client: Option<Vec<StringMatcher>>,
    /// To what is noted of the request.
    pub notes: Vec<StringMatcher>,
}

// === impl HttpAuthorizer ===

impl HttpAuthorizer {
    /// Asks.
    pub(super) fn ask(self: &Arc<Self>, question: &Question<'_>, services: &dyn Services) -> Said {
        let call = match self.call(question) {
            Ok(call) => call,
            Err(error) => return Box::pin(async move { Err(error) }),
        };
        let answer = services.http(call);
        let asked = self.clone();
        Box::pin(async move {
            let reply = answer.await.map_err(|error| error.to_string())?;
            asked.goes.read(reply)
        })
    }

    fn call(&self, question: &Question<'_>) -> Result<HttpCall, String> {
        let request = question.request.as_ref().ok_or("there is no request to ask about")?;
        let path = match &self.path {
            AskedAt::This(path) => path.clone(),
            AskedAt::Under(prefix) if prefix.is_empty() => request.head.path.clone(),
            AskedAt::Under(prefix) => PathAndQuery::try_from(format!("{prefix}{}", request.head.path))
                .map_err(|_| format!("`{prefix}` and the path of the request are no path"))?,
        };
        let body = request.body.map(|body| body.bytes.clone()).unwrap_or_default();
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
        for (name, value) in question.headers() {
            // Pseudo-headers are no names of fields.
            if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::from_bytes(&value))
                && !frames(&name)
            {
                headers.append(name, value);
            }
        }
        self.add.apply_to_response(&mut headers, question.exchange, &record_alone);
        headers.insert(INTERNAL, HeaderValue::from_static("true"));
        if let Some(timeout) = self.timeout.and_then(|timeout| u64::try_from(timeout.as_millis()).ok()) {
            headers.insert(EXPECTED, HeaderValue::from(timeout));
        }
        Ok(HttpCall {
            cluster: self.cluster.clone(),
            timeout: self.timeout,
            head: RequestHead {
                method: request.head.method.clone(),
                path,
                authority: request.head.authority.clone(),
                scheme: Scheme::Http,
                headers,
            },
            body,
            max_answer: self.max_answer,
        })
    }
}

// === impl Goes ===

impl Goes {
    fn read(&self, reply: HttpReply) -> Result<Answer, String> {
        let HttpReply {
            status,
            mut headers,
            body,
        } = reply;
        if status.is_server_error() || status.is_informational() {
            return Err(format!("it answered {}", status.as_u16()));
        }
        let removed = headers.get_all(TO_REMOVE).iter().filter_map(|value| value.to_str().ok());
        let removed = removed.flat_map(|names| names.split(',')).map(str::trim);
        let remove = removed.filter(|name| !name.is_empty()).map(Into::into).collect();
        headers.remove(TO_REMOVE);
        let pick = |matchers: &[StringMatcher], how| -> Vec<Edit> {
            let picked = headers
                .iter()
                .filter(|(name, _)| !frames(name) && any(matchers, name.as_str()));
            picked
                .map(|(name, value)| Edit::new(name.as_str(), value.as_bytes(), how))
                .collect()
        };
        let noted = headers.iter().filter(|(name, _)| any(&self.notes, name.as_str()));
        let notes = noted.map(|(name, value)| {
            let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
            (name.as_str().to_owned(), Value::from(value))
        });
        let notes = notes.collect();
        let decision = if status == StatusCode::OK {
            let mut request = pick(&self.upstream, How::Set);
            request.extend(pick(&self.upstream_beside, How::Add));
            Decision::Allowed(Box::new(Allowed {
                request,
                remove,
                response: pick(&self.client_on_success, How::Add),
                ..Allowed::default()
            }))
        } else {
            let goes = |name: &HeaderName| match &self.client {
                None => name != header::HOST,
                Some(named) => matches!(*name, header::WWW_AUTHENTICATE | header::LOCATION) || any(named, name.as_str()),
            };
            let fields = headers.iter().filter(|(name, _)| goes(name));
            let fields = fields.map(|(name, value)| Edit::new(name.as_str(), value.as_bytes(), How::Add));
            Decision::Denied(Denied {
                status,
                headers: fields.collect(),
                body,
            })
        };
        Ok(Answer { decision, notes })
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn exact(name: &str) -> Vec<StringMatcher> {
        vec![StringMatcher::exact(name)]
    }

    fn goes() -> Goes {
        Goes {
            upstream: exact("x-user"),
            upstream_beside: exact("x-role"),
            client_on_success: exact("set-cookie"),
            client: Some(exact("x-why")),
            notes: exact("x-note"),
        }
    }

    fn reply(status: u16) -> HttpReply {
        let fields = [
            ("x-user", "ann"),
            ("x-role", "a"),
            ("set-cookie", "c=1"),
            ("x-why", "no"),
            ("location", "/login"),
            ("x-note", "n"),
            ("x-other", "o"),
            ("content-length", "2"),
            ("x-envoy-auth-headers-to-remove", "x-secret, x-more"),
        ];
        let field = |(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value));
        HttpReply {
            status: StatusCode::from_u16(status).unwrap(),
            headers: fields.into_iter().map(field).collect(),
            body: Bytes::from_static(b"no"),
        }
    }

    #[test]
    fn only_200_allows_and_5xx_is_no_answer() {
        for (status, allows) in [
            (200, Some(true)),
            (204, Some(false)),
            (302, Some(false)),
            (403, Some(false)),
            (500, None),
            (503, None),
        ] {
            let decided = goes()
                .read(reply(status))
                .ok()
                .map(|answer| matches!(answer.decision, Decision::Allowed(_)));
            assert_eq!(decided, allows, "{status}");
        }
    }

    #[test]
    fn headers_go_where_the_configuration_says() {
        let Answer { decision, notes } = goes().read(reply(200)).unwrap();
        assert_eq!(notes, [("x-note".to_owned(), Value::from("n"))]);
        let Decision::Allowed(allowed) = decision else {
            panic!("{decision:?}")
        };
        assert_eq!(
            allowed.request,
            [Edit::new("x-user", "ann", How::Set), Edit::new("x-role", "a", How::Add)]
        );
        assert_eq!(allowed.remove, ["x-secret", "x-more"]);
        assert_eq!(allowed.response, [Edit::new("set-cookie", "c=1", How::Add)]);
        let names = |goes: &Goes| match goes.read(reply(302)).unwrap().decision {
            Decision::Denied(denied) => denied.headers.into_iter().map(|edit| edit.name).collect::<Vec<_>>(),
            other => panic!("{other:?}"),
        };
        assert_eq!(names(&goes()), ["x-why", "location"]);
        assert_eq!(names(&Goes::default()).len(), 8, "all, where nothing is said");
    }
}
