//! The body of a request: one bounded record, from which it can be sent again.
//!
//! Attempts read it one after the other; what has passed is kept while another attempt may follow. Where a limit on time begins with
//! the request's end, the exchange reads ahead of an attempt that is still connecting, or whose endpoint takes nothing: up to the same
//! bound, as Envoy buffers.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Wake, Waker, ready},
};

use bytes::Bytes;
use cairn_exchange::clock::{self, Instant};
use cairn_filters::{BodyRefusal, Run};
use futures_util::task::AtomicWaker;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use parking_lot::Mutex;

use super::{
    BodyError, GivenUp, Incoming,
    copy::{CopyBudget, CopyWriter, Progress, copy},
};
use crate::{
    snapshot::Chain,
    stall::{self, Stall},
};

/// The most that is kept of a request's body so that it can be sent again; a longer one is not retried once bytes of it were sent.
/// Envoy's buffer limit per stream.
pub const MAX_RECORDED: usize = 1024 * 1024;

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
    /// Those who wait, once the exchange waits for the end beside the attempts.
    waiting: Option<Arc<Waiting>>,
    /// What broke while nobody but the exchange read.
    broken: Option<BodyError>,
    /// When something came last, where that is asked for.
    moved: Option<Instant>,
    times_moves: bool,
    /// Bytes received from the client.
    pub received: u64,
    /// When the last byte came.
    pub ended: Option<Instant>,
    /// Whether the client's side failed.
    pub failed: bool,
    observer: Option<Observer>,
    /// Why a filter lets nothing more of it pass.
    pub refused: Option<BodyRefusal>,
    /// Copies of what passes.
    copies: Vec<CopyWriter>,
}

/// Those who wait for a client's bytes: the attempt that sends them on, and the exchange, whose time begins with their end.
#[derive(Default)]
struct Waiting {
    attempt: AtomicWaker,
    exchange: AtomicWaker,
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
    stall: Stall,
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
            waiting: None,
            broken: None,
            moved: None,
            times_moves: false,
            received: 0,
            ended: None,
            failed: false,
            observer: None,
            refused: None,
            copies: Vec::new(),
        }
    }

    /// Lets the filters of a run see what passes.
    pub fn observe(&mut self, chain: Arc<Chain>, run: Arc<Mutex<Run>>) {
        self.observer = Some(Observer { chain, run });
    }

    /// A copy of all of it, as it passes; `None` when its beginning has passed already and was not kept.
    pub fn copy(&mut self, budget: &Arc<CopyBudget>) -> Option<(Incoming, Progress)> {
        if !self.can_repeat() {
            return None;
        }
        let hint = self.hint(self.received == 0);
        let (writer, reader, progress) = copy(hint, budget);
        let all = self.record.iter().all(|data| writer.write(data));
        match (all, self.ended) {
            (true, None) => self.copies.push(writer),
            (true, Some(_)) => writer.finish(self.trailers.as_ref()),
            (false, _) => {}
        }
        Some((Incoming::Copy(reader), progress))
    }

    /// How long it is, as far as that is known while nobody has read (more than what is told again).
    fn hint(&self, unread: bool) -> SizeHint {
        // A filter that sees the data may change its length.
        if unread && self.observer.is_none() {
            self.incoming.size_hint()
        } else {
            SizeHint::default()
        }
    }

    /// Keeps the time at which something came last.
    pub fn time_moves(&mut self) {
        self.times_moves = true;
    }

    /// When something came last, if that is kept.
    pub fn moved(&self) -> Option<Instant> {
        self.moved
    }

    /// Completes when the client's last byte has come. Reads ahead of the attempt meanwhile, as far as may be kept: an endpoint that
    /// is not there yet, or takes nothing, must not keep the request's time from beginning.
    pub fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<Instant> {
        if let Some(at) = self.ended {
            return Poll::Ready(at);
        }
        let waiting = self.waiting.get_or_insert_with(|| {
            let waiting = Arc::<Waiting>::default();
            if let Some(reader) = &self.reader {
                waiting.attempt.register(reader);
            }
            waiting
        });
        waiting.exchange.register(cx.waker());
        while self.recording && self.recorded < MAX_RECORDED && !self.failed {
            match ready!(self.poll_incoming(cx)) {
                None => {}
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.record.push(data);
                    }
                }
                Some(Err(error)) => self.broken = Some(error),
            }
            self.wake_reader();
            if let Some(at) = self.ended {
                return Poll::Ready(at);
            }
        }
        Poll::Pending
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
        self.copies = Vec::new();
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

    /// Wakes this task when there is more, or nothing any more.
    fn wait(&mut self, cx: &Context<'_>) {
        if !self.reader.as_ref().is_some_and(|reader| reader.will_wake(cx.waker())) {
            self.reader = Some(cx.waker().clone());
        }
    }

    fn wake_reader(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }

    fn note_end(&mut self) {
        self.ended.get_or_insert_with(clock::now);
        for copy in std::mem::take(&mut self.copies) {
            copy.finish(self.trailers.as_ref());
        }
        if let Some(waiting) = &self.waiting {
            waiting.exchange.wake();
        }
    }

    /// What the attempt sends next, after what was kept.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(error) = self.broken.take() {
            return Poll::Ready(Some(Err(error)));
        }
        if let Some(waiting) = &self.waiting {
            waiting.attempt.register(cx.waker());
        }
        let next = ready!(self.poll_incoming(cx));
        if let Some(Ok(frame)) = &next
            && let Some(data) = frame.data_ref()
        {
            if self.recording && self.recorded <= MAX_RECORDED {
                self.record.push(data.clone());
                self.position = self.record.len();
            } else {
                self.recording = false;
                self.record = Vec::new();
                self.position = 0;
                self.lost = true;
            }
        }
        Poll::Ready(next)
    }

    /// What the client sends next, shown to the filters that watch; a piece of the body is still to be kept.
    fn poll_incoming(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let next = match &self.waiting {
            None => Pin::new(&mut self.incoming).poll_frame(cx),
            Some(waiting) => {
                let both = Waker::from(waiting.clone());
                Pin::new(&mut self.incoming).poll_frame(&mut Context::from_waker(&both))
            }
        };
        let frame = match ready!(next) {
            None => {
                self.note_end();
                return Poll::Ready(None);
            }
            Some(Err(error)) => {
                self.failed = true;
                self.copies = Vec::new();
                return Poll::Ready(Some(Err(error)));
            }
            Some(Ok(frame)) => frame,
        };
        if self.times_moves {
            self.moved = Some(clock::now());
        }
        match frame.into_data() {
            Ok(mut data) => {
                self.received += data.len() as u64;
                if let Some(observer) = &self.observer
                    && let crate::snapshot::ChainKind::Http(http) = &observer.chain.kind
                {
                    let mut run = observer.run.lock();
                    http.filters.decode_data(&mut run, &mut data, self.incoming.is_end_stream());
                    self.refused = http.filters.refused_body(&run);
                }
                if self.refused.is_some() {
                    self.failed = true;
                    self.copies = Vec::new();
                    return Poll::Ready(Some(Err(BodyError::Refused)));
                }
                self.recorded += data.len();
                self.copies.retain(|copy| copy.write(&data));
                if self.incoming.is_end_stream() {
                    self.note_end();
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
                    self.trailers = Some(trailers.clone());
                    self.note_end();
                    Poll::Ready(Some(Ok(Frame::trailers(trailers))))
                }
                Err(_) => Poll::Ready(None),
            },
        }
    }
}

impl Wake for Waiting {
    fn wake(self: Arc<Self>) {
        self.attempt.wake();
        self.exchange.wake();
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
        let hint = locked.hint(locked.attempt == 1);
        let attempt = if locked.can_repeat() { locked.attempt } else { 0 };
        Self {
            source: Some(source.clone()),
            attempt,
            hint,
            ended: false,
            stall: Stall::default(),
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
        this.stall.moved();
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
            source.wait(cx);
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

impl GivenUp for RequestBody {
    /// Over when another attempt has begun, or the exchange is; or when the endpoint takes nothing for too long.
    fn poll_given_up(&mut self, cx: &mut Context<'_>) -> Poll<BodyError> {
        if let Some(source) = &self.source {
            let mut source = source.lock();
            if source.attempt != self.attempt {
                return Poll::Ready(BodyError::NotAgain);
            }
            source.wait(cx);
        }
        self.stall.poll(cx, stall::LONGEST).map(|()| BodyError::Stalled)
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
