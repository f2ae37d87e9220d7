//! Requests are asked for their tokens (contract xds §3.6): 401 for those that are not good.
//!
//! What a token must be is decided by [`cairn_policy::jwt`]; here keys that are elsewhere are fetched, by one request for all that wait
//! for them, and kept for as long as the configuration says. A request that waits is asked again from its beginning, with the head as
//! it was.

use std::{sync::Arc, time::Duration};

use cairn_exchange::{Exchange, RequestHead, ResponseFlags, Scheme, clock};
use cairn_policy::jwt::{Authentication, Checked, FetchedKeys, Keys, PerRoute, Problem};
use futures_util::future::{BoxFuture, FutureExt, Shared};
use http::{HeaderValue, StatusCode, header};
use parking_lot::Mutex;

use crate::{
    contract::{HttpFilter, LocalReply, Resume, Slot, Verdict},
    on_route::{RouteConfig, Scope},
    services::{HttpCall, Services},
};

/// The filter.
#[derive(Debug)]
pub struct JwtAuthn {
    /// What does not change from request to request.
    pub shared: Arc<Settings>,
}

/// Settings of the filter.
#[derive(Debug)]
pub struct Settings {
    /// Providers and rules.
    pub authentication: Authentication,
    /// Keys that are elsewhere, by the provider's place.
    pub remote: Vec<Option<RemoteKeys>>,
    /// Answers do not say what was wrong.
    pub strip_failure_response: bool,
    /// Claims may change the route.
    pub clear_route_cache: bool,
}

/// Keys that have to be fetched.
#[derive(Debug)]
pub struct RemoteKeys {
    /// How they are asked for.
    pub call: HttpCall,
    /// For how long they are good.
    pub cached: Duration,
    state: Mutex<State>,
}

type Fetched = Result<Arc<Keys>, Problem>;

#[derive(Debug, Default)]
struct State {
    /// The last that came, and until when they are good.
    known: Option<(Arc<Keys>, clock::Instant)>,
    /// A request that is under way.
    asked: Option<Shared<BoxFuture<'static, Fetched>>>,
}

/// Longest part of the path that answers repeat.
const MAX_REALM_PATH: usize = 256;
/// Most numbers of times that one request waits for keys, as there may be several issuers.
const MAX_FETCHES: usize = 8;

// === impl RemoteKeys ===

impl RemoteKeys {
    /// Keys that are asked for like this.
    pub fn new(call: HttpCall, cached: Duration) -> Self {
        Self {
            call,
            cached,
            state: Mutex::default(),
        }
    }

    /// The keys, as long as they are good.
    pub fn known(&self) -> Option<Arc<Keys>> {
        let state = self.state.lock();
        let (keys, until) = state.known.as_ref()?;
        (*until > clock::now()).then(|| keys.clone())
    }

    /// Asks for them, or joins those who have asked.
    fn fetch(&self, services: &dyn Services) -> Shared<BoxFuture<'static, Fetched>> {
        let mut state = self.state.lock();
        if let Some(asked) = state.asked.as_ref().filter(|asked| asked.peek().is_none()) {
            return asked.clone();
        }
        let answer = services.http(self.call.clone());
        let from = self.call.cluster.clone();
        let fetched = async move {
            let keys = match answer.await {
                Ok(reply) if reply.status == StatusCode::OK => {
                    Keys::parse(&String::from_utf8_lossy(&reply.body)).map_err(|problem| problem.to_string())
                }
                Ok(reply) => Err(format!("the answer is {}", reply.status.as_u16())),
                Err(error) => Err(error.to_string()),
            };
            keys.map(Arc::new).map_err(|error| {
                tracing::warn!(cluster = %from, %error, "the keys of an issuer of tokens could not be fetched: its tokens are refused");
                Problem::FetchFailed
            })
        };
        let fetched = fetched.boxed().shared();
        state.asked = Some(fetched.clone());
        fetched
    }

    fn came(&self, keys: &Fetched) {
        let mut state = self.state.lock();
        state.asked = None;
        if let Ok(keys) = keys {
            state.known = Some((keys.clone(), clock::now() + self.cached));
        }
    }
}

// === impl JwtAuthn ===

impl HttpFilter for JwtAuthn {
    fn name(&self) -> &str {
        "envoy.filters.http.jwt_authn"
    }

    fn decode_head(&self, _slot: &mut Slot, exchange: &mut Exchange, scope: &Scope<'_>) -> Verdict {
        let per_route = match scope.config() {
            Some(RouteConfig::Jwt(per_route)) => Some(per_route),
            _ => None,
        };
        let remote = self.shared.remote.iter().any(Option::is_some);
        // Only where a request may have to wait is its head needed once more.
        let before = exchange.request.as_ref().filter(|_| remote).cloned();
        let mut answers = Answers::default();
        match self.shared.check(per_route, exchange, &answers) {
            Checked::Passed => Verdict::Continue,
            Checked::Refused(problem) => self.shared.refuse(problem, exchange, before.as_ref()),
            Checked::NeedsKeys(provider) => {
                // Those of all issuers are asked for, as the others may be needed next and there is nobody to ask then.
                let asked = self.shared.remote.iter().enumerate();
                let asked = asked.filter_map(|(index, remote)| {
                    let remote = remote.as_ref()?;
                    let wanted = index == provider || remote.known().is_none();
                    wanted.then(|| (index, remote.fetch(scope.services)))
                });
                let asked: Vec<_> = asked.take(MAX_FETCHES).collect();
                let settings = self.shared.clone();
                let per_route = per_route.cloned();
                Verdict::Stop(Box::pin(async move {
                    for (index, fetch) in asked {
                        let fetched = fetch.await;
                        if let Some(remote) = settings.remote.get(index).and_then(Option::as_ref) {
                            remote.came(&fetched);
                        }
                        answers.0.push((index, fetched));
                    }
                    let resume: Resume = Box::new(move |exchange| {
                        exchange.request.clone_from(&before);
                        match settings.check(per_route.as_ref(), exchange, &answers) {
                            Checked::Passed => Verdict::Continue,
                            Checked::Refused(problem) => settings.refuse(problem, exchange, before.as_ref()),
                            Checked::NeedsKeys(_) => settings.refuse(Problem::FetchFailed, exchange, before.as_ref()),
                        }
                    });
                    resume
                }))
            }
        }
    }
}

/// What came for this request, by the provider's place.
#[derive(Default)]
struct Answers(Vec<(usize, Fetched)>);

/// What came for this request, or is known from before.
struct Known<'a> {
    settings: &'a Settings,
    answers: &'a Answers,
}

impl FetchedKeys for Known<'_> {
    fn keys(&self, provider: usize) -> Option<Fetched> {
        let answered = self.answers.0.iter().find(|(index, _)| *index == provider);
        if let Some((_, answer)) = answered {
            return Some(answer.clone());
        }
        self.settings.remote.get(provider)?.as_ref()?.known().map(Ok)
    }
}

// === impl Settings ===

impl Settings {
    fn check(&self, per_route: Option<&PerRoute>, exchange: &mut Exchange, answers: &Answers) -> Checked {
        let Exchange { request, metadata, .. } = exchange;
        let Some(head) = request else { return Checked::Passed };
        let known = Known { settings: self, answers };
        let checked = self
            .authentication
            .check(per_route, head, metadata, fastrand::u64(..), clock::unix_seconds(), &known);
        if checked == Checked::Passed && self.clear_route_cache && !metadata.is_empty() {
            exchange.reroute = true;
        }
        checked
    }

    fn refuse(&self, problem: Problem, exchange: &Exchange, before: Option<&RequestHead>) -> Verdict {
        let status = match problem {
            Problem::Audience => StatusCode::FORBIDDEN,
            _ => StatusCode::UNAUTHORIZED,
        };
        if self.strip_failure_response {
            return Verdict::Reply(LocalReply::new(status, ResponseFlags::NONE, problem.details(), ""));
        }
        let reply = LocalReply::new(status, ResponseFlags::NONE, problem.details(), problem.to_string());
        let challenge = before.or(exchange.request.as_ref()).and_then(|head| challenge(head, problem));
        Verdict::Reply(match challenge {
            Some(challenge) => reply.with_header(header::WWW_AUTHENTICATE, challenge),
            None => reply,
        })
    }
}

/// What is asked for, and where.
fn challenge(head: &RequestHead, problem: Problem) -> Option<HeaderValue> {
    let scheme = match head.scheme {
        Scheme::Http => "http",
        Scheme::Https => "https",
    };
    let host = head.authority.to_str().ok()?;
    let path = head.path.as_str();
    let path = path.get(..MAX_REALM_PATH).unwrap_or(path);
    let error = if problem == Problem::Missing {
        ""
    } else {
        ", error=\"invalid_token\""
    };
    HeaderValue::try_from(format!("Bearer realm=\"{scheme}://{host}{path}\"{error}")).ok()
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        time::Duration,
    };

    use bytes::Bytes;
    use cairn_exchange::{Connection, Protocol};
    use cairn_policy::{
        jwt::{KeySource, Provider, ProviderSettings, Requirement},
        matcher::{PathMatch, PathMatcher},
        route::RouteMatch,
    };
    use http::{HeaderMap, Method, uri::PathAndQuery};

    use super::*;
    use crate::{Filter, FilterChain, GrpcAnswer, GrpcCall, HttpAnswer, HttpError, HttpReply, NoServices, OnRoute, Run};

    /// The key `secret`.
    const KEY: &str = r#"{"keys":[{"kty":"oct","k":"c2VjcmV0"}]}"#;
    /// `{"alg":"HS256"}`, `{"iss":"a","scope":"read write"}`, signed with it.
    const TOKEN: &str = include_str!("jwt_authn/token.txt");

    /// A service that hands out keys, or not.
    struct KeyServer {
        answer: Result<&'static str, HttpError>,
        status: StatusCode,
        asked: AtomicUsize,
    }

    impl KeyServer {
        fn new(answer: Result<&'static str, HttpError>) -> Self {
            Self {
                answer,
                status: StatusCode::OK,
                asked: AtomicUsize::new(0),
            }
        }
    }

    impl Services for KeyServer {
        fn grpc(&self, call: GrpcCall) -> GrpcAnswer {
            NoServices.grpc(call)
        }

        fn http(&self, call: HttpCall) -> HttpAnswer {
            assert_eq!((&*call.cluster, call.head.path.as_str()), ("keys", "/jwks"));
            self.asked.fetch_add(1, Ordering::SeqCst);
            let (answer, status) = (self.answer.clone(), self.status);
            Box::pin(async move {
                tokio::time::sleep(Duration::from_millis(10)).await;
                answer.map(|body| HttpReply {
                    status,
                    headers: HeaderMap::new(),
                    body: Bytes::from_static(body.as_bytes()),
                })
            })
        }

        fn node_cluster(&self) -> &str {
            ""
        }
    }

    fn head(path: &'static str) -> RequestHead {
        RequestHead {
            method: Method::GET,
            path: PathAndQuery::from_static(path),
            authority: HeaderValue::from_static("web.app"),
            scheme: Scheme::Http,
            headers: HeaderMap::new(),
        }
    }

    fn exchange(token: Option<&str>) -> Exchange {
        let connection = Connection {
            id: 1,
            authority: "10.96.1.10:80".into(),
            local_address: "10.96.1.10:80".parse().ok(),
            service_port: 80,
            remote_address: "10.244.0.9:41000".parse().unwrap(),
            peer: None,
            local: None,
            source: None,
            requested_server_name: None,
            opened: clock::now(),
        };
        let mut exchange = Exchange::begin(Protocol::Http11, Arc::new(connection), "chain".into(), 1);
        let mut head = head("/a?b=c");
        if let Some(token) = token {
            let value = format!("Bearer {token}");
            head.headers.insert(header::AUTHORIZATION, value.parse().unwrap());
        }
        exchange.request = Some(head);
        exchange
    }

    fn filter(strip_failure_response: bool) -> Filter {
        let settings = ProviderSettings {
            issuer: Some("a".into()),
            payload_in_metadata: Some("payload".into()),
            ..ProviderSettings::default()
        };
        let matches = RouteMatch::path(PathMatcher::new(PathMatch::Prefix("/".into()), false));
        let requires = Requirement::Provider {
            provider: 0,
            audiences: None,
        };
        let providers = vec![Provider::new(settings, KeySource::Remote)];
        let call = HttpCall {
            cluster: "keys".into(),
            timeout: None,
            head: head("/jwks"),
            body: Bytes::new(),
            max_answer: 1000,
        };
        let shared = Arc::new(Settings {
            authentication: Authentication::new(providers, vec![(matches, requires)], vec![], true).unwrap(),
            remote: vec![Some(RemoteKeys::new(call, Duration::from_secs(300)))],
            strip_failure_response,
            clear_route_cache: true,
        });
        Filter::Other(Arc::new(JwtAuthn { shared }))
    }

    /// What becomes of a request with this token: the reply, or whether its route is chosen again.
    async fn ask(chain: &FilterChain, services: &dyn Services, token: Option<&str>) -> Result<bool, LocalReply> {
        let mut exchange = exchange(token);
        let mut run = Run::default();
        let mut verdict = chain.decode_head(&mut run, &mut exchange, &OnRoute::NONE, services);
        loop {
            verdict = match verdict {
                Verdict::Continue => return Ok(exchange.reroute),
                Verdict::Reply(reply) => return Err(reply),
                Verdict::Stop(wait) => wait.await(&mut exchange),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn keys_are_fetched_once_for_all_that_wait_and_kept_until_they_are_old() {
        let chain = FilterChain::new(vec![filter(false)]);
        let server = KeyServer::new(Ok(KEY));
        let asks = (0..10).map(|_| ask(&chain, &server, Some(TOKEN.trim())));
        for answer in futures_util::future::join_all(asks).await {
            assert!(answer.unwrap(), "claims may change the route");
        }
        assert_eq!(server.asked.load(Ordering::SeqCst), 1);
        // A token that is not remembered needs the keys again.
        let forged = format!("{}A", TOKEN.trim());
        assert!(ask(&chain, &server, Some(&forged)).await.is_err());
        assert_eq!(server.asked.load(Ordering::SeqCst), 1);
        tokio::time::advance(Duration::from_secs(301)).await;
        assert!(ask(&chain, &server, Some(&forged)).await.is_err());
        assert_eq!(server.asked.load(Ordering::SeqCst), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn without_keys_every_token_is_refused_and_the_next_request_asks_again() {
        for (answer, status) in [
            (Err(HttpError::Timeout), StatusCode::OK),
            (Ok(KEY), StatusCode::NOT_FOUND),
            (Ok("nonsense"), StatusCode::OK),
        ] {
            let chain = FilterChain::new(vec![filter(false)]);
            let server = KeyServer {
                status,
                ..KeyServer::new(answer)
            };
            for asked in 1..=2 {
                let reply = ask(&chain, &server, Some(TOKEN.trim())).await.unwrap_err();
                assert_eq!(
                    (reply.status, &reply.body[..]),
                    (StatusCode::UNAUTHORIZED, &b"Jwks remote fetch is failed"[..])
                );
                assert_eq!(server.asked.load(Ordering::SeqCst), asked);
            }
        }
    }

    #[tokio::test]
    async fn a_refusal_says_what_is_wrong_and_where_unless_it_must_not() {
        let server = KeyServer::new(Ok(KEY));
        let reply = ask(&FilterChain::new(vec![filter(false)]), &server, None).await.unwrap_err();
        assert_eq!(
            (reply.status, &reply.body[..]),
            (StatusCode::UNAUTHORIZED, &b"Jwt is missing"[..])
        );
        assert_eq!(reply.details, "jwt_authn_access_denied{Jwt_is_missing}");
        let challenge = HeaderValue::from_static("Bearer realm=\"http://web.app/a?b=c\"");
        assert_eq!(reply.headers, [(header::WWW_AUTHENTICATE, challenge)]);
        let reply = ask(&FilterChain::new(vec![filter(false)]), &server, Some("x"))
            .await
            .unwrap_err();
        assert!(reply.headers[0].1.to_str().unwrap().ends_with(", error=\"invalid_token\""));
        let reply = ask(&FilterChain::new(vec![filter(true)]), &server, Some("x"))
            .await
            .unwrap_err();
        assert_eq!((&reply.body[..], reply.headers.len()), (&b""[..], 0));
        assert_eq!(server.asked.load(Ordering::SeqCst), 0, "nobody needed the keys");
    }
}
