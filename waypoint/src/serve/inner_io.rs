//! The bytes of one inner connection, as hyper and h2 want to read and write them.
//!
//! Between the tunnel's stream and the HTTP/1 server stand three small duties: bytes that protocol detection has already read come
//! first; the framing of requests is watched ([`super::framing`]), and what is refused there, or by hyper's own parser, is answered in
//! the words users know from Envoy; and informational answers (103 and the like), which hyper's server cannot send, are written where
//! hyper flushes, that is never inside another answer.

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::{Buf as _, Bytes};
use cairn_hbone::TunnelStream;
use h2::Reason;
use http::StatusCode;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Sleep,
};

use super::{
    framing::{Framing, Violation},
    line::Line,
};
use crate::stall::{self, Stall};

/// Most informational answers that wait to be written; more are dropped, they are advice only.
const MAX_INFORMATIONAL: usize = 16;

/// Where answers of the 1xx kind are put for the connection to write.
#[derive(Debug, Default)]
pub struct Informational {
    waiting: AtomicBool,
    queue: Mutex<Vec<http::Response<()>>>,
}

/// What the connection reads and writes.
pub struct InnerIo {
    /// Gone after a reset.
    stream: Option<TunnelStream>,
    /// Read, and not yet handed on.
    held: Bytes,
    watch: Option<Box<Watch>>,
    /// How long the client has taken nothing.
    stall: Stall,
}

struct Watch {
    framing: Framing,
    /// Read behind a request for another protocol: what it is, that request's answer decides.
    behind: Option<Box<Bytes>>,
    line: Arc<Line>,
    max_head: usize,
    /// Time for a head to arrive.
    head_timeout: u32,
    /// Runs while a head has begun and not ended.
    head_timer: Option<Pin<Box<Sleep>>>,
    /// Bytes of ours of which a part was written.
    writing: Bytes,
    /// Nothing more is read: the request was refused.
    refused: bool,
}

/// A request that was answered before it became one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Early {
    /// The answer's status.
    pub status: StatusCode,
    /// Why, in Envoy's words.
    pub details: &'static str,
}

// === impl Informational ===

impl Informational {
    /// Puts an answer where the connection will write it; the connection's task has to be polled afterwards.
    pub fn push(&self, answer: http::Response<()>) {
        let mut queue = self.queue.lock();
        if queue.len() < MAX_INFORMATIONAL {
            queue.push(answer);
            self.waiting.store(true, Ordering::Release);
        }
    }

    /// Whether an answer waits to be written.
    pub fn is_waiting(&self) -> bool {
        self.waiting.load(Ordering::Acquire)
    }

    /// Takes what waits.
    pub fn take(&self) -> Vec<http::Response<()>> {
        if !self.waiting.swap(false, Ordering::AcqRel) {
            return Vec::new();
        }
        std::mem::take(&mut *self.queue.lock())
    }

    /// Takes what waits, as HTTP/1.1.
    fn take_http1(&self) -> Bytes {
        let mut text = Vec::new();
        for answer in self.take() {
            let status = answer.status();
            text.extend_from_slice(
                format!("HTTP/1.1 {} {}\r\n", status.as_u16(), status.canonical_reason().unwrap_or("")).as_bytes(),
            );
            for (name, value) in answer.headers() {
                text.extend_from_slice(name.as_str().as_bytes());
                text.extend_from_slice(b": ");
                text.extend_from_slice(value.as_bytes());
                text.extend_from_slice(b"\r\n");
            }
            text.extend_from_slice(b"\r\n");
        }
        text.into()
    }
}

// === impl InnerIo ===

impl InnerIo {
    /// The stream with what was read of it already.
    pub fn new(stream: TunnelStream, held: Bytes) -> Self {
        Self {
            stream: Some(stream),
            held,
            watch: None,
            stall: Stall::default(),
        }
    }

    /// The same for HTTP/1: requests are watched. An answer that was given without a request is told on the line.
    #[must_use]
    pub fn watched(mut self, max_head: usize, head_timeout: Option<Duration>, line: Arc<Line>) -> Self {
        let mut watch = Watch {
            framing: Framing::default(),
            behind: None,
            line,
            max_head,
            head_timeout: head_timeout.map_or(0, |limit| u32::try_from(limit.as_millis()).unwrap_or(u32::MAX)),
            head_timer: None,
            writing: Bytes::new(),
            refused: false,
        };
        watch.observe(&mut self.held);
        self.watch = Some(Box::new(watch));
        self
    }

    /// Ends the connection so that the client sees that something was cut: a reset, never a clean end. An answer that was given
    /// without a request is all that there is to say, and goes out first.
    pub fn abort(&mut self) {
        let Some(mut stream) = self.stream.take() else { return };
        if let Some(watch) = self.watch.as_mut().filter(|watch| watch.refused && !watch.writing.is_empty()) {
            let sent = stream.poll_send(&mut Context::from_waker(Waker::noop()), &mut watch.writing, true);
            if matches!(sent, Poll::Ready(Ok(_))) && stream.is_write_ended() {
                return;
            }
        }
        stream.reset(Reason::CONNECT_ERROR);
    }

    /// Half-closes, behind all that is still to be said.
    pub async fn end(mut self) {
        if let Err(error) = poll_fn(|cx| AsyncWrite::poll_shutdown(Pin::new(&mut self), cx)).await {
            tracing::debug!(%error, "the client took no end of its connection");
        }
    }

    /// The stream, for bytes that are nobody's business any more, and what was read of it and is still to be passed: what hyper has
    /// already taken, and what it has not.
    pub fn into_parts(mut self, taken: Bytes) -> Option<(TunnelStream, Bytes)> {
        let stream = self.stream.take()?;
        let held = std::mem::take(&mut self.held);
        let behind = self.watch.as_mut().and_then(|watch| watch.behind.take());
        Some((
            stream,
            join(join(taken, held), behind.map_or_else(Bytes::new, |behind| *behind)),
        ))
    }

    /// Learns what an answer has decided. Nothing behind its request is read before.
    fn poll_decided(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(watch) = self.watch.as_mut().filter(|watch| watch.framing.is_undecided()) else {
            return Poll::Ready(());
        };
        let decided = if watch.framing.waits() {
            Some(ready!(watch.line.poll_decision(cx)))
        } else {
            watch.line.take_decision()
        };
        if let Some(switched) = decided {
            watch.framing.decide(switched);
        }
        Poll::Ready(())
    }

    /// The client takes nothing: asks whether that has gone on for too long, or its exchange has.
    fn poll_stalled(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        let line = self.watch.as_ref().map(|watch| &watch.line);
        let limits = line.and_then(|line| line.limits());
        if limits.as_ref().is_some_and(|limits| limits.poll(cx).is_ready()) {
            return Poll::Ready(io::ErrorKind::TimedOut.into());
        }
        let limit = limits.and_then(|limits| limits.idle()).unwrap_or(stall::LONGEST);
        ready!(self.stall.poll(cx, limit));
        if let Some(line) = line {
            line.stall();
        }
        Poll::Ready(io::ErrorKind::TimedOut.into())
    }

    /// What came of writing; nothing for too long is an error.
    fn written<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        match written {
            Poll::Ready(written) => {
                self.stall.moved();
                Poll::Ready(written)
            }
            Poll::Pending => self.poll_stalled(cx).map(Err),
        }
    }

    fn poll_bytes(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
        if !self.held.is_empty() {
            return Poll::Ready(Ok(std::mem::take(&mut self.held)));
        }
        if self.watch.as_ref().is_some_and(|watch| watch.refused) {
            // As if nothing more came; the answer leaves when hyper shuts the connection down.
            return Poll::Ready(Ok(Bytes::new()));
        }
        ready!(self.poll_decided(cx));
        let waiting = self.watch.as_mut().and_then(|watch| watch.behind.take());
        let mut data = match waiting {
            Some(behind) => *behind,
            None => match ready!(self.poll_stream(cx))? {
                Some(data) => data,
                None => return Poll::Ready(Ok(Bytes::new())),
            },
        };
        if let Some(watch) = &mut self.watch {
            watch.observe(&mut data);
        }
        Poll::Ready(Ok(data))
    }

    /// Reads on; nothing is the end, or what is taken for it.
    fn poll_stream(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        let Some(stream) = &mut self.stream else {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        };
        let next = stream.poll_data(cx);
        if next.is_pending() && self.watch.as_mut().is_some_and(|watch| watch.poll_head_late(cx).is_ready()) {
            return Poll::Ready(Ok(None));
        }
        next.map(Option::transpose)
    }

    /// Keeps what was not taken; but no reference to a received buffer of which nothing is left.
    fn hold(&mut self, rest: Bytes) {
        self.held = if rest.is_empty() { Bytes::new() } else { rest };
    }

    /// Writes informational answers. Only a flush may `begin` one: hyper flushes when it holds nothing back, so that none gets into
    /// an earlier answer of a pipelining client.
    fn poll_informational(&mut self, cx: &mut Context<'_>, begin: bool) -> Poll<io::Result<()>> {
        let (Some(watch), Some(stream)) = (&mut self.watch, &mut self.stream) else {
            return Poll::Ready(Ok(()));
        };
        loop {
            while !watch.writing.is_empty() {
                ready!(stream.poll_send(cx, &mut watch.writing, false))?;
            }
            if !begin || !watch.line.relay.queue.is_waiting() {
                return Poll::Ready(Ok(()));
            }
            watch.writing = watch.line.relay.queue.take_http1();
            // The final answer may be waiting for these to be on their way.
            cx.waker().wake_by_ref();
        }
    }

    /// The same, but not for ever.
    fn poll_early(&mut self, cx: &mut Context<'_>, begin: bool) -> Poll<io::Result<()>> {
        match self.poll_informational(cx, begin) {
            Poll::Pending => self.poll_stalled(cx).map(Err),
            written => written,
        }
    }

    fn stream(&mut self) -> io::Result<Pin<&mut TunnelStream>> {
        self.stream
            .as_mut()
            .map(Pin::new)
            .ok_or_else(|| io::ErrorKind::ConnectionReset.into())
    }
}

// === impl Watch ===

impl Watch {
    /// Looks at what came; a request that may not pass takes everything with it.
    fn observe(&mut self, data: &mut Bytes) {
        match self.framing.observe(data, self.max_head) {
            Ok(passes) => {
                let behind = data.split_off(passes.min(data.len()));
                self.behind = (!behind.is_empty()).then(|| Box::new(behind));
            }
            Err(violation) => {
                *data = Bytes::new();
                self.refused = true;
                let (status, details) = match violation {
                    Violation::LengthAndChunked => (StatusCode::BAD_REQUEST, "http1.content_length_and_chunked_not_allowed"),
                    Violation::UnknownCoding => (StatusCode::NOT_IMPLEMENTED, "http1.invalid_transfer_encoding"),
                };
                self.answer(status, details);
            }
        }
    }

    /// Completes when a head that has begun does not end in time; then it has been answered.
    fn poll_head_late(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.head_timeout == 0 || !self.framing.is_in_head() {
            self.head_timer = None;
            return Poll::Pending;
        }
        let limit = Duration::from_millis(self.head_timeout.into());
        let timer = self.head_timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        ready!(timer.as_mut().poll(cx));
        self.refused = true;
        self.answer(StatusCode::REQUEST_TIMEOUT, "request_header_timeout");
        Poll::Ready(())
    }

    /// Answers without a request.
    fn answer(&mut self, status: StatusCode, details: &'static str) {
        self.writing = early_answer(status);
        self.line.answered_early(Early { status, details });
    }

    /// Replaces what hyper says of a request that it could not read. Our own answers all have a date, hyper's have none.
    fn replace(&mut self, from: &[u8]) -> bool {
        const LONGEST: usize = 128;
        let is_hypers = from.len() <= LONGEST
            && from.starts_with(b"HTTP/1.1 4")
            && from.ends_with(b"\r\n\r\n")
            && !from.windows(6).any(|word| word.eq_ignore_ascii_case(b"\ndate:"));
        let status = from
            .get(9..12)
            .filter(|_| is_hypers)
            .and_then(|digits| StatusCode::from_bytes(digits).ok());
        let Some(status) = status else { return false };
        self.refused = true;
        if status == StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE {
            self.answer(status, "http1.headers_too_large");
        } else {
            self.answer(StatusCode::BAD_REQUEST, "http1.codec_error");
        }
        true
    }
}

/// Both, one behind the other.
fn join(first: Bytes, second: Bytes) -> Bytes {
    match (first.is_empty(), second.is_empty()) {
        (_, true) => first,
        (true, false) => second,
        (false, false) => Bytes::from([first, second].concat()),
    }
}

/// An answer with Envoy's text for its status, and the end of the connection.
fn early_answer(status: StatusCode) -> Bytes {
    let reason = status.canonical_reason().unwrap_or_default();
    let date = super::date::now();
    let date = date.to_str().unwrap_or_default();
    format!(
        "HTTP/1.1 {} {reason}\r\ncontent-length: {}\r\ncontent-type: text/plain\r\ndate: {date}\r\nserver: istio-envoy\r\nconnection: close\r\n\r\n{reason}",
        status.as_u16(),
        reason.len(),
    )
    .into()
}

impl AsyncRead for InnerIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let mut data = ready!(this.poll_bytes(cx))?;
        let count = data.len().min(into.remaining());
        into.put_slice(data.get(..count).unwrap_or_default());
        data.advance(count);
        this.hold(data);
        Poll::Ready(Ok(()))
    }
}

impl hyper::rt::Read for InnerIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, mut into: hyper::rt::ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let mut data = ready!(this.poll_bytes(cx))?;
        let count = data.len().min(into.remaining());
        into.put_slice(data.get(..count).unwrap_or_default());
        data.advance(count);
        this.hold(data);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for InnerIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_early(cx, false))?;
        if this.watch.as_mut().is_some_and(|watch| watch.replace(from)) {
            return Poll::Ready(Ok(from.len()));
        }
        let written = this.stream()?.poll_write(cx, from);
        this.written(cx, written)
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_early(cx, false))?;
        if let ([only], Some(watch)) = (from, this.watch.as_mut())
            && watch.replace(only)
        {
            return Poll::Ready(Ok(only.len()));
        }
        let written = this.stream()?.poll_write_vectored(cx, from);
        this.written(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// While hyper waits for an answer it reads nothing, but it flushes: here it learns that the client is gone.
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if let Some(stream) = &mut this.stream
            && let Poll::Ready(error) = stream.poll_reset(cx)
        {
            return Poll::Ready(Err(error));
        }
        this.poll_early(cx, true)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_early(cx, false))?;
        this.stream()?.poll_shutdown(cx)
    }
}

impl hyper::rt::Write for InnerIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        AsyncWrite::poll_write(self, cx, from)
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        AsyncWrite::poll_write_vectored(self, cx, from)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        AsyncWrite::poll_flush(self, cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        AsyncWrite::poll_shutdown(self, cx)
    }
}

impl Drop for InnerIo {
    /// Whoever drops a connection without having shut it down has cut it: the client must not take what it has for the whole.
    fn drop(&mut self) {
        if self.stream.as_ref().is_some_and(|stream| !stream.is_write_ended()) {
            self.abort();
        }
    }
}

impl std::fmt::Debug for InnerIo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InnerIo")
            .field("stream", &self.stream)
            .field("held", &self.held.len())
            .finish_non_exhaustive()
    }
}
