//! What is told of one request, and the line that tells it.
//!
//! Who asked, what, the answer, which route, which endpoint, how long, and why it was refused: taken from the record that metrics and
//! access logs are made of, so that the line cannot say anything else.

use std::{fmt::Write as _, io::IsTerminal as _, time::Duration};

use cairn_exchange::{Exchange, Protocol, ResponseFlags};
use cairn_hbone::OpenError;

/// Characters of a path that a line shows.
const MAX_PATH: usize = 60;

/// The path as the client sent it.
const ORIGINAL_PATH: &str = "x-envoy-original-path";

/// What is told of one request or connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// The client's workload.
    pub who: String,
    /// Method and place.
    pub what: String,
    /// How it was answered.
    pub answer: Answer,
    /// The route that decided.
    pub route: Option<String>,
    /// The pod that answered.
    pub endpoint: Option<String>,
    /// From the first to the last byte.
    pub took: Duration,
    /// Why it was refused, or what went wrong.
    pub why: Option<String>,
}

/// How a request or connection was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// With this status.
    Status(u16),
    /// With bytes: so many from the client, so many to it.
    Bytes(u64, u64),
    /// Not: the client went away first.
    None,
    /// The tunnel was refused, with this status where there was one.
    Refused(Option<u16>),
}

/// Colours, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paint(bool);

// === impl Told ===

impl Told {
    /// What the record of an exchange tells.
    pub fn of(exchange: &Exchange) -> Self {
        let connection = &exchange.connection;
        let who = match (&connection.source, &connection.peer) {
            (Some(workload), _) => workload.name.to_string(),
            (None, Some(peer)) => peer.service_account().unwrap_or(peer.as_str()).to_owned(),
            (None, None) => connection.remote_address.to_string(),
        };
        let what = match &exchange.request {
            Some(head) => {
                // A route that rewrites the path keeps the client's own in a header, as Envoy does.
                let original = head.headers.get(ORIGINAL_PATH).and_then(|path| path.to_str().ok());
                let mut path = original.unwrap_or(head.path.as_str()).chars();
                let mut shown: String = path.by_ref().take(MAX_PATH).collect();
                if path.next().is_some() {
                    shown.push('…');
                }
                format!("{} {shown}", head.method)
            }
            None => format!("TCP {}", connection.authority),
        };
        let answer = match (exchange.status, exchange.protocol) {
            (Some(status), _) => Answer::Status(status.as_u16()),
            (None, Protocol::Tcp) => Answer::Bytes(exchange.counts.received, exchange.counts.sent),
            (None, _) => Answer::None,
        };
        let endpoint = exchange.upstream.as_ref().map(|upstream| match &upstream.workload {
            Some(workload) => format!("{} {}", workload.name, upstream.address),
            None => upstream.address.to_string(),
        });
        Self {
            who,
            what,
            answer,
            route: exchange.route.as_deref().map(str::to_owned),
            endpoint,
            took: exchange.duration(),
            why: why(exchange),
        }
    }

    /// A tunnel that the waypoint refused, as the client's ztunnel sees it.
    pub fn refused(who: &str, authority: &str, error: &OpenError, took: Duration) -> Self {
        let why = match error {
            OpenError::Refused { body, .. } if !body.is_empty() => {
                let text = String::from_utf8_lossy(body);
                let text = text.trim_end();
                text.strip_prefix(authority)
                    .and_then(|rest| rest.strip_prefix(": "))
                    .unwrap_or(text)
                    .to_owned()
            }
            other => other.to_string(),
        };
        Self {
            who: who.to_owned(),
            what: format!("CONNECT {authority}"),
            answer: Answer::Refused(error.status().map(|status| status.as_u16())),
            route: None,
            endpoint: None,
            took,
            why: Some(why),
        }
    }

    /// One line about it.
    pub fn line(&self, paint: Paint) -> String {
        let mut line = format!("{}  {}  {}", self.who, self.what, paint.answer(self.answer));
        if let Some(route) = &self.route {
            let _ = write!(line, "  route {route}");
        }
        if let Some(endpoint) = &self.endpoint {
            let _ = write!(line, "  → {endpoint}");
        }
        line.push_str(&paint.dim(&format!("  {}", millis(self.took))));
        if let Some(why) = &self.why {
            let _ = write!(line, "  {}", paint.bad(why));
        }
        line
    }
}

/// Why it was refused or went wrong, in Envoy's words and with its flags.
fn why(exchange: &Exchange) -> Option<String> {
    let well = exchange.status.is_none_or(|status| status.as_u16() < 400) && exchange.transport_failure.is_none();
    if well && exchange.flags == ResponseFlags::NONE {
        return None;
    }
    let details = exchange.details.as_deref().filter(|details| *details != "via_upstream");
    let mut words: Vec<String> = details.into_iter().map(str::to_owned).collect();
    words.extend(exchange.transport_failure.as_deref().map(str::to_owned));
    if exchange.flags != ResponseFlags::NONE {
        words.push(format!("({})", exchange.flags));
    }
    (!words.is_empty()).then(|| words.join(" "))
}

/// A duration as people read it: `0.8 ms`, `301 ms`.
pub fn millis(duration: Duration) -> String {
    let millis = duration.as_secs_f64() * 1000.0;
    if millis < 10.0 {
        format!("{millis:.1} ms")
    } else {
        format!("{millis:.0} ms")
    }
}

// === impl Paint ===

impl Paint {
    /// No colours.
    #[cfg(test)]
    pub const PLAIN: Self = Self(false);

    /// Colours when standard output is a terminal and `NO_COLOR` (no-color.org) is not set.
    pub fn for_stdout() -> Self {
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self(std::io::stdout().is_terminal() && !unwanted)
    }

    fn with(self, code: &str, text: &str) -> String {
        if self.0 {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    /// For what matters.
    pub fn bold(self, text: &str) -> String {
        self.with("1", text)
    }

    /// For what matters less.
    pub fn dim(self, text: &str) -> String {
        self.with("2", text)
    }

    /// For what is right.
    pub fn good(self, text: &str) -> String {
        self.with("32", text)
    }

    /// For what went wrong.
    pub fn bad(self, text: &str) -> String {
        self.with("31", text)
    }

    fn answer(self, answer: Answer) -> String {
        let text = answer.to_string();
        match answer {
            Answer::Status(200..300) | Answer::Bytes(..) => self.good(&text),
            Answer::Status(300..400) => self.with("36", &text),
            Answer::Status(400..500) => self.with("33", &text),
            Answer::Status(_) | Answer::Refused(_) | Answer::None => self.bad(&text),
        }
    }
}

impl std::fmt::Display for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Answer::Status(status) => write!(f, "{status}"),
            Answer::Bytes(from, to) => write!(f, "{from} bytes in, {to} out"),
            Answer::None => f.write_str("no answer"),
            Answer::Refused(Some(status)) => write!(f, "refused {status}"),
            Answer::Refused(None) => f.write_str("refused"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use cairn_exchange::{Connection, RequestHead, Scheme, SpiffeId, clock};
    use http::{HeaderMap, HeaderValue, Method, StatusCode};

    use super::*;

    fn exchange(protocol: Protocol) -> Exchange {
        let connection = Connection {
            id: 1,
            authority: "10.96.1.10:80".into(),
            local_address: None,
            service_port: 80,
            remote_address: "127.0.1.1:40000".parse().unwrap(),
            peer: Some(SpiffeId::workload("cluster.local", "demo", "visitor").unwrap()),
            local: None,
            source: None,
            requested_server_name: None,
            opened: clock::now(),
        };
        let mut exchange = Exchange::begin(protocol, Arc::new(connection), "chain".into(), 1);
        exchange.moments.last_sent = Some(Duration::from_micros(1240));
        exchange
    }

    fn request(path: &'static str) -> Exchange {
        let mut exchange = exchange(Protocol::Http11);
        exchange.request = Some(RequestHead {
            method: Method::GET,
            path: path.parse().unwrap(),
            authority: HeaderValue::from_static("shop"),
            scheme: Scheme::Http,
            headers: HeaderMap::new(),
        });
        exchange
    }

    #[test]
    fn a_line_says_who_what_route_endpoint_and_how_long() {
        let mut exchange = request("/api/cart");
        exchange.status = Some(StatusCode::OK);
        exchange.route = Some("api".into());
        exchange.details = Some("via_upstream".into());
        exchange.upstream = Some(cairn_exchange::Upstream {
            display: "".into(),
            address: "127.0.1.11:8080".parse().unwrap(),
            workload: None,
            local_address: None,
        });
        assert_eq!(
            Told::of(&exchange).line(Paint::PLAIN),
            "visitor  GET /api/cart  200  route api  → 127.0.1.11:8080  1.2 ms"
        );
    }

    #[test]
    fn a_line_says_why_it_was_refused() {
        let mut exchange = request("/");
        exchange.status = Some(StatusCode::NOT_FOUND);
        exchange.because(ResponseFlags::NO_ROUTE_FOUND, "route_not_found");
        assert_eq!(
            Told::of(&exchange).line(Paint::PLAIN),
            "visitor  GET /  404  1.2 ms  route_not_found (NR)"
        );
    }

    #[test]
    fn a_connection_is_told_by_its_bytes() {
        let mut exchange = exchange(Protocol::Tcp);
        exchange.counts.received = 5;
        exchange.counts.sent = 7;
        assert_eq!(
            Told::of(&exchange).line(Paint::PLAIN),
            "visitor  TCP 10.96.1.10:80  5 bytes in, 7 out  1.2 ms"
        );
    }

    #[test]
    fn a_refused_tunnel_is_told_in_the_words_of_the_waypoint() {
        let error = OpenError::Refused {
            address: "127.0.0.1:15008".parse().unwrap(),
            status: StatusCode::SERVICE_UNAVAILABLE,
            headers: Box::default(),
            body: "10.96.9.9:80: nobody is there\n".into(),
        };
        let told = Told::refused("visitor", "10.96.9.9:80", &error, Duration::from_millis(12));
        assert_eq!(
            told.line(Paint::PLAIN),
            "visitor  CONNECT 10.96.9.9:80  refused 503  12 ms  nobody is there"
        );
    }

    #[test]
    fn a_rewritten_path_is_told_as_the_client_sent_it() {
        let mut exchange = request("/cart");
        exchange
            .request
            .as_mut()
            .unwrap()
            .headers
            .insert(ORIGINAL_PATH, HeaderValue::from_static("/api/cart"));
        assert_eq!(Told::of(&exchange).what, "GET /api/cart");
    }

    #[test]
    fn long_paths_are_cut() {
        let path: &'static str = Box::leak(format!("/{}", "a".repeat(100)).into_boxed_str());
        assert_eq!(Told::of(&request(path)).what.chars().count(), "GET ".len() + MAX_PATH + 1);
    }

    #[test]
    fn colours_are_for_terminals() {
        assert_eq!(Paint(true).answer(Answer::Status(200)), "\x1b[32m200\x1b[0m");
        assert_eq!(Paint(false).answer(Answer::Status(200)), "200");
    }
}
