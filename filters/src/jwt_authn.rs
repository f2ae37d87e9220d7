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
