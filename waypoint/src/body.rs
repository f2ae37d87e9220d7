//! Bodies of messages, wherever they come from: one type for what a client sends, one for what an endpoint sends.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
};

use bytes::Bytes;
use cairn_exchange::clock::Instant;
use cairn_filters::Run;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use parking_lot::Mutex;

use crate::snapshot::Chain;

/// The most that is kept of a request's body so that it can be sent again; a longer one is not retried once bytes of it were sent.
/// Envoy's buffer limit per stream.
pub const MAX_RECORDED: usize = 1024 * 1024;

/// Why a body ended early.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// HTTP/1 failed.
    #[error(transparent)]
    Http1(#[from] hyper::Error),
    /// HTTP/2 failed.
    #[error(transparent)]
    Http2(#[from] h2::Error),
    /// A newer attempt has taken the body over, or it is too long to be sent again.
    #[error("the body cannot be sent again")]
    NotAgain,
    /// The exchange took too long.
    #[error("the exchange took too long")]
    Timeout,
}

/// Bytes as a peer sends them.
#[derive(Debug, Default)]
pub enum Incoming {
    /// None.
    #[default]
    Empty,
    /// All of them at once, and the trailers behind them.
    Whole(Bytes, Option<Box<HeaderMap>>),
    /// The first of them, which have been looked at, and then the rest.
    Begun(Bytes, Box<Incoming>),
    /// HTTP/1. Its trailers are not passed on, as Envoy does not by default.
    Http1(hyper::body::Incoming),
    /// HTTP/2.
    Http2(h2::RecvStream),
}

/// A request's body, shared by the attempts to send it: the one bounded record from which it can be sent again.
pub struct RequestSource {
    incoming: Incoming,
    record: Vec<Bytes>,
    recorded: usize,
    /// How much of the record the current attempt has read.
    position: usize,
    trailers: Option<HeaderMap>,
    /// Whether what passes is kept.
    recording: bool,
    /// Whether bytes have passed that were not kept.
    lost: bool,
    /// Which attempt may read.
    attempt: u32,
    /// The task that waits for more of it.
    reader: Option<Waker>,
    /// Bytes received from the client.
    pub received: u64,
    /// When the last byte came.
    pub ended: Option<Instant>,
    /// Whether the client's side failed.
    pub failed: bool,
    observer: Option<Observer>,
}

/// Filters that watch a request's body.
struct Observer {
    chain: Arc<Chain>,
    run: Arc<Mutex<Run>>,
}

/// What one attempt sends.
#[derive(Default)]
pub struct RequestBody {
    source: Option<Arc<Mutex<RequestSource>>>,
    attempt: u32,
    hint: SizeHint,
    ended: bool,
}

// === impl Incoming ===

impl Incoming {
    /// The body of an HTTP/1 message.
    pub fn http1(body: hyper::body::Incoming) -> Self {
        if body.is_end_stream() {
            Incoming::Empty
        } else {
            Incoming::Http1(body)
        }
    }

    /// The body of an HTTP/2 message.
    pub fn http2(body: h2::RecvStream) -> Self {
        if body.is_end_stream() {
            Incoming::Empty
        } else {
            Incoming::Http2(body)
        }
    }

    /// All of a body at once.
    pub fn whole(data: Bytes, trailers: Option<HeaderMap>) -> Self {
        if data.is_empty() && trailers.is_none() {
            Incoming::Empty
        } else {
            Incoming::Whole(data, trailers.map(Box::new))
        }
    }

    /// The same with bytes before it.
    #[must_use]
    pub fn behind(self, start: Bytes) -> Self {
        match self {
            rest if start.is_empty() => rest,
            Incoming::Empty => Incoming::whole(start, None),
            Incoming::Whole(data, trailers) if data.is_empty() => Incoming::Whole(start, trailers),
            rest => Incoming::Begun(start, Box::new(rest)),
        }
    }

    /// Whether nothing (more) comes.
    pub fn is_empty(&self) -> bool {
        self.is_end_stream()
    }
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        match this {
            Incoming::Empty => Poll::Ready(None),
            Incoming::Whole(data, trailers) => {
                let (data, trailers) = (std::mem::take(data), trailers.take());
                *this = Incoming::Empty;
                if data.is_empty() {
                    return Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(*trailers))));
                }
                if trailers.is_some() {
                    *this = Incoming::Whole(Bytes::new(), trailers);
                }
                Poll::Ready(Some(Ok(Frame::data(data))))
            }
            Incoming::Begun(start, rest) => {
                let (start, rest) = (std::mem::take(start), std::mem::take(&mut **rest));
                *this = rest;
                Poll::Ready(Some(Ok(Frame::data(start))))
            }
            Incoming::Http1(body) => loop {
                match ready!(Pin::new(&mut *body).poll_frame(cx)) {
                    Some(Ok(frame)) if frame.is_data() => return Poll::Ready(Some(Ok(frame))),
                    Some(Ok(_)) => {}
                    Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                    None => return Poll::Ready(None),
                }
            },
            Incoming::Http2(body) => loop {
                match ready!(body.poll_data(cx)) {
                    Some(Ok(data)) => {
                        // Taken by the next hop: the peer may send as much again. Fails only when the stream is over.
                        let _ = body.flow_control().release_capacity(data.len());
                        if !data.is_empty() {
                            return Poll::Ready(Some(Ok(Frame::data(data))));
                        }
                    }
                    Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                    None => {
                        return Poll::Ready(match ready!(body.poll_trailers(cx)) {
                            Ok(Some(trailers)) => Some(Ok(Frame::trailers(trailers))),
                            Ok(None) => None,
                            Err(error) => Some(Err(error.into())),
                        });
                    }
                }
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Incoming::Empty => true,
            Incoming::Whole(data, trailers) => data.is_empty() && trailers.is_none(),
            Incoming::Begun(..) => false,
            Incoming::Http1(body) => body.is_end_stream(),
            Incoming::Http2(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Incoming::Empty => SizeHint::with_exact(0),
            Incoming::Whole(data, _) => SizeHint::with_exact(data.len() as u64),
            Incoming::Begun(start, rest) => {
                let (rest, start) = (rest.size_hint(), start.len() as u64);
                let mut hint = SizeHint::new();
                hint.set_lower(rest.lower().saturating_add(start));
                if let Some(upper) = rest.upper() {
                    hint.set_upper(upper.saturating_add(start));
                }
                hint
            }
            Incoming::Http1(body) => body.size_hint(),
            Incoming::Http2(body) => {
                if body.is_end_stream() {
                    SizeHint::with_exact(0)
                } else {
                    SizeHint::default()
                }
            }
        }
    }
}

// === impl RequestSource ===

impl RequestSource {
    /// A body that may be sent several times while `recording` goes on.
    pub fn new(incoming: Incoming, recording: bool) -> Self {
        Self {
            incoming,
            record: Vec::new(),
            recorded: 0,
            position: 0,
            trailers: None,
            recording,
            lost: false,
            attempt: 0,
            reader: None,
            received: 0,
            ended: None,
            failed: false,
            observer: None,
        }
    }

    /// Lets the filters of a run see what passes.
    pub fn observe(&mut self, chain: Arc<Chain>, run: Arc<Mutex<Run>>) {
        self.observer = Some(Observer { chain, run });
    }

    /// Whether another attempt could send all of it.
    pub fn can_repeat(&self) -> bool {
        !self.lost && !self.failed
    }

    /// Nothing has to be sent again: forgets what was kept, as soon as the current attempt has read it.
    pub fn stop_recording(&mut self) {
        self.recording = false;
        self.forget();
    }

    /// The exchange is over: nobody reads what has not been read, and who waits for it gives up.
    pub fn close(&mut self) {
        self.attempt = u32::MAX;
        self.incoming = Incoming::Empty;
        self.recording = false;
        self.record = Vec::new();
        self.lost = true;
        self.wake_reader();
    }

    /// Forgets the record when nobody needs it any more.
    fn forget(&mut self) {
        if !self.recording && self.position >= self.record.len() {
            self.lost |= self.recorded > 0;
            self.record = Vec::new();
            self.position = 0;
        }
    }

    /// What of the record the current attempt has not read yet.
    fn replay(&mut self) -> Option<Bytes> {
        let data = self.record.get(self.position)?.clone();
        self.position += 1;
        self.forget();
        Some(data)
    }

    /// Whether the data has been read to its end, and no trailers follow.
    fn is_all(&self) -> bool {
        self.ended.is_some() && self.trailers.is_none() && self.position >= self.record.len()
    }

    fn wake_reader(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = match ready!(Pin::new(&mut self.incoming).poll_frame(cx)) {
            None => {
                self.ended.get_or_insert_with(cairn_exchange::clock::now);
                return Poll::Ready(None);
            }
            Some(Err(error)) => {
                self.failed = true;
                return Poll::Ready(Some(Err(error)));
            }
            Some(Ok(frame)) => frame,
        };
        match frame.into_data() {
            Ok(mut data) => {
                self.received += data.len() as u64;
                if let Some(observer) = &self.observer
                    && let crate::snapshot::ChainKind::Http(http) = &observer.chain.kind
                {
                    http.filters
                        .decode_data(&mut observer.run.lock(), &mut data, self.incoming.is_end_stream());
                }
                self.recorded += data.len();
                if self.incoming.is_end_stream() {
                    self.ended.get_or_insert_with(cairn_exchange::clock::now);
                }
                if self.recording && self.recorded <= MAX_RECORDED {
                    self.record.push(data.clone());
                    self.position = self.record.len();
                } else {
                    self.recording = false;
                    self.record = Vec::new();
                    self.position = 0;
                    self.lost = true;
                }
                Poll::Ready(Some(Ok(Frame::data(data))))
            }
            Err(frame) => match frame.into_trailers() {
                Ok(mut trailers) => {
                    if let Some(observer) = &self.observer
                        && let crate::snapshot::ChainKind::Http(http) = &observer.chain.kind
                    {
                        http.filters.decode_trailers(&mut observer.run.lock(), &mut trailers);
                    }
                    self.ended.get_or_insert_with(cairn_exchange::clock::now);
                    self.trailers = Some(trailers.clone());
                    Poll::Ready(Some(Ok(Frame::trailers(trailers))))
                }
                Err(_) => Poll::Ready(None),
            },
        }
    }
}

// === impl RequestBody ===

impl RequestBody {
    /// No body.
    pub fn empty() -> Self {
        Self {
            hint: SizeHint::with_exact(0),
            ended: true,
            ..Self::default()
        }
    }

    /// The body for the next attempt; attempts before it can read no more.
    pub fn next_attempt(source: &Arc<Mutex<RequestSource>>) -> Self {
        let mut locked = source.lock();
        locked.attempt = locked.attempt.saturating_add(1);
        locked.position = 0;
        // The attempt before it has to learn that it is over.
        locked.wake_reader();
        // A filter that sees the data may change its length.
        let hint = if locked.attempt == 1 && locked.observer.is_none() {
            locked.incoming.size_hint()
        } else {
            SizeHint::default()
        };
        let attempt = if locked.can_repeat() { locked.attempt } else { 0 };
        Self {
            source: Some(source.clone()),
            attempt,
            hint,
            ended: false,
        }
    }

    /// Whether all of it was sent.
    pub fn is_ended(&self) -> bool {
        self.ended
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        let Some(source) = &this.source else {
            return Poll::Ready(None);
        };
        let mut source = source.lock();
        if source.attempt != this.attempt {
            return Poll::Ready(Some(Err(BodyError::NotAgain)));
        }
        if this.ended {
            return Poll::Ready(None);
        }
        if let Some(data) = source.replay() {
            this.ended = source.is_all();
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        if source.ended.is_some() {
            this.ended = true;
            return Poll::Ready(source.trailers.clone().map(|trailers| Ok(Frame::trailers(trailers))));
        }
        let Poll::Ready(next) = source.poll_next(cx) else {
            if !source.reader.as_ref().is_some_and(|reader| reader.will_wake(cx.waker())) {
                source.reader = Some(cx.waker().clone());
            }
            return Poll::Pending;
        };
        this.ended = match &next {
            Some(Ok(frame)) if frame.is_data() => source.is_all(),
            Some(Ok(_)) | None => true,
            Some(Err(_)) => false,
        };
        Poll::Ready(next)
    }

    fn is_end_stream(&self) -> bool {
        self.ended || self.source.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        self.hint
    }
}

impl std::fmt::Debug for RequestBody {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RequestBody")
            .field("attempt", &self.attempt)
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}
