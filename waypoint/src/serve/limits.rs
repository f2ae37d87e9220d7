//! How long an exchange may last, and what is said of one that lasts longer.
//!
//! Four limits, with Envoy's beginnings and words: silence in both directions (from the last piece of request or answer that passed),
//! the request's arrival (from the exchange's start), the whole stream (from the start), and the route's timeout (from the request's
//! end). An exchange without any has no [`Limits`], and pays nothing; one that has some sets one timer, however often something moves.
//!
//! Whoever holds the exchange up asks: the request's task until there is an answer, then the body of the answer, and while the client
//! takes nothing of it the connection that writes.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use cairn_exchange::{
    ResponseFlags,
    clock::{Instant, now},
};
use cairn_filters::LocalReply;
use http::StatusCode;
use parking_lot::Mutex;
use tokio::time::Sleep;

use crate::{body::RequestSource, snapshot::HttpSettings};

/// gRPC's DEADLINE_EXCEEDED.
const DEADLINE_EXCEEDED: u32 = 4;

/// The limits of one exchange.
pub struct Limits {
    state: Mutex<State>,
}

/// What an exchange has exceeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expired {
    /// Nothing moved for too long.
    Idle,
    /// The request did not arrive in time.
    Request,
    /// The stream lasted too long.
    Duration,
    /// The answer did not come in time after the request: the route's timeout.
    Answer,
}

struct State {
    begun: Instant,
    idle: Option<Duration>,
    /// How long the request may take to arrive.
    request: Option<Duration>,
    /// How long the stream may last.
    stream: Option<Duration>,
    /// How long the answer may take after the request, and when the route was found that says so.
    answer: Option<(Duration, Instant)>,
    end: RequestEnd,
    moved: Instant,
    timer: Option<Pin<Box<Sleep>>>,
    expired: Option<Expired>,
    over: bool,
}

/// What is known of the request's end.
enum RequestEnd {
    /// Filters still hold the request back.
    Unknown,
    /// It came then.
    At(Instant),
    /// Attempts read it from here.
    Of(Arc<Mutex<RequestSource>>),
}

/// Waits for `work`, as long as the exchange may last; the error is the answer that it lasted too long.
pub async fn within<T>(limits: Option<&Limits>, mut work: Pin<&mut impl Future<Output = T>>) -> Result<T, LocalReply> {
    match limits {
        None => Ok(work.await),
        Some(limits) => {
            poll_fn(|cx| match work.as_mut().poll(cx) {
                Poll::Ready(done) => Poll::Ready(Ok(done)),
                Poll::Pending => limits.poll(cx).map(|expired| Err(limits.reply(expired))),
            })
            .await
        }
    }
}

/// When the client's last byte came, if the body is still coming when it is asked for.
pub async fn request_end(source: &Mutex<RequestSource>) -> Instant {
    poll_fn(|cx| source.lock().poll_ended(cx)).await
}

// === impl Limits ===

impl Limits {
    /// Without limits yet.
    pub fn new(begun: Instant) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                begun,
                idle: None,
                request: None,
                stream: None,
                answer: None,
                end: RequestEnd::Unknown,
                moved: begun,
                timer: None,
                expired: None,
                over: false,
            }),
        })
    }

    /// The limits of a chain, if it has any.
    pub fn of_chain(settings: &HttpSettings, begun: Instant) -> Option<Arc<Self>> {
        let (idle, request, stream) = (
            settings.stream_idle_timeout,
            settings.request_timeout,
            settings.max_stream_duration,
        );
        idle.or(request).or(stream)?;
        let limits = Self::new(begun);
        {
            let mut state = limits.state.lock();
            (state.idle, state.request, state.stream) = (idle, request, stream);
        }
        Some(limits)
    }

    /// What a route says of silence, instead of the chain; zero is no limit.
    pub fn idle_by_route(&self, idle: Duration) {
        self.state.lock().idle = Some(idle).filter(|idle| !idle.is_zero());
    }

    /// What a route says of the whole stream, instead of the chain.
    pub fn stream_by_route(&self, stream: Option<Duration>) {
        self.state.lock().stream = stream;
    }

    /// The route's timeout; it begins now, or when the request ends.
    pub fn answer_by_route(&self, answer: Duration) {
        self.state.lock().answer = Some((answer, now()));
    }

    /// The limit on silence.
    pub fn idle(&self) -> Option<Duration> {
        self.state.lock().idle
    }

    /// When the stream has to be over.
    pub fn stream_end(&self) -> Option<Instant> {
        let state = self.state.lock();
        state.stream.map(|limit| state.begun + limit)
    }

    /// Something of the request or its answer has passed.
    pub fn moved(&self) {
        let mut state = self.state.lock();
        if state.idle.is_some() {
            state.moved = now();
        }
    }

    /// The request has come whole.
    pub fn request_ended(&self) {
        self.state.lock().end = RequestEnd::At(now());
    }

    /// Where the rest of the request comes from, unless it has come whole already.
    pub fn request_from(&self, source: Arc<Mutex<RequestSource>>) {
        let mut state = self.state.lock();
        if matches!(state.end, RequestEnd::At(_)) {
            return;
        }
        if state.idle.is_some() {
            source.lock().time_moves();
        }
        state.end = RequestEnd::Of(source);
    }

    /// What was exceeded, if something was.
    pub fn expired(&self) -> Option<Expired> {
        self.state.lock().expired
    }

    /// The exchange is over.
    pub fn finish(&self) {
        let mut state = self.state.lock();
        state.over = true;
        state.timer = None;
        state.end = RequestEnd::Unknown;
    }

    /// Completes when a limit is exceeded.
    pub fn poll(&self, cx: &mut Context<'_>) -> Poll<Expired> {
        let mut state = self.state.lock();
        let state = &mut *state;
        if let Some(expired) = state.expired {
            return Poll::Ready(expired);
        }
        if state.over {
            return Poll::Pending;
        }
        let ended = state.poll_request_end(cx);
        loop {
            let Some((at, what)) = state.next(ended) else {
                return Poll::Pending;
            };
            if at <= now() {
                state.expired = Some(what);
                return Poll::Ready(what);
            }
            let timer = state.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(at)));
            // What moves only puts the end off: a timer that is early asks again.
            if timer.deadline() > at || timer.is_elapsed() {
                timer.as_mut().reset(at);
            }
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
    }

    /// The answer for an exchange that has exceeded a limit before there was one; nothing but silence can cut it. A request that has come whole is not its
    /// client's fault (504), another is (408), as Envoy answers.
    fn reply(&self, expired: Expired) -> LocalReply {
        let mut state = self.state.lock();
        let state = &mut *state;
        (state.expired, state.request, state.stream, state.answer) = (None, None, None, None);
        state.moved = now();
        let whole = match &state.end {
            RequestEnd::Unknown => false,
            RequestEnd::At(_) => true,
            RequestEnd::Of(source) => source.lock().ended.is_some(),
        };
        let status = if whole || expired == Expired::Answer {
            StatusCode::GATEWAY_TIMEOUT
        } else {
            StatusCode::REQUEST_TIMEOUT
        };
        let (flags, details) = expired.told();
        let body = match expired {
            Expired::Idle => "stream timeout",
            Expired::Request => "request timeout",
            Expired::Duration => "downstream duration timeout",
            Expired::Answer => "upstream request timeout",
        };
        let mut reply = LocalReply::new(status, flags, details, body);
        if expired == Expired::Duration {
            reply.grpc_status = Some(DEADLINE_EXCEEDED);
        }
        reply
    }
}

impl std::fmt::Debug for Limits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Limits")
            .field("expired", &self.expired())
            .finish_non_exhaustive()
    }
}

// === impl Expired ===

impl Expired {
    /// What the record says.
    pub fn told(self) -> (ResponseFlags, &'static str) {
        match self {
            Expired::Idle => (ResponseFlags::STREAM_IDLE_TIMEOUT, "stream_idle_timeout"),
            Expired::Request => (ResponseFlags::NONE, "request_overall_timeout"),
            Expired::Duration => (ResponseFlags::NONE, "max_duration_timeout"),
            Expired::Answer => (ResponseFlags::UPSTREAM_REQUEST_TIMEOUT, "response_timeout"),
        }
    }
}

// === impl State ===

impl State {
    /// When the request ended. Only a limit that depends on it waits for it.
    fn poll_request_end(&self, cx: &mut Context<'_>) -> Option<Instant> {
        match &self.end {
            RequestEnd::Unknown => None,
            RequestEnd::At(at) => Some(*at),
            RequestEnd::Of(source) => {
                let mut source = source.lock();
                if self.request.is_some() || self.answer.is_some() {
                    match source.poll_ended(cx) {
                        Poll::Ready(at) => Some(at),
                        Poll::Pending => None,
                    }
                } else {
                    source.ended
                }
            }
        }
    }

    /// The limit that is exceeded first.
    fn next(&self, ended: Option<Instant>) -> Option<(Instant, Expired)> {
        let passed = match &self.end {
            RequestEnd::Of(source) if self.idle.is_some() => source.lock().moved(),
            _ => None,
        };
        let moved = passed.map_or(self.moved, |passed| passed.max(self.moved));
        let request = self.request.filter(|_| ended.is_none());
        let answer = self.answer.and_then(|(limit, from)| Some(from.max(ended?) + limit));
        [
            self.stream.map(|limit| (self.begun + limit, Expired::Duration)),
            answer.map(|at| (at, Expired::Answer)),
            request.map(|limit| (self.begun + limit, Expired::Request)),
            self.idle.map(|limit| (moved + limit, Expired::Idle)),
        ]
        .into_iter()
        .flatten()
        .min_by_key(|(at, _)| *at)
    }
}
