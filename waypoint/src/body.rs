//! Bodies of messages, wherever they come from: one type for what a client sends, one for what an endpoint sends.

mod copy;
mod request;

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};

pub use copy::{CopyBudget, CopyReader, MAX_BEHIND, MAX_HELD, Progress};
pub use request::{MAX_RECORDED, RequestBody, RequestSource};

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
    /// Policy denies the exchange, which it has let in before.
    #[error("policy denies the exchange now")]
    Denied,
    /// Whoever it is sent to takes nothing.
    #[error("nothing of the body was taken for too long")]
    Stalled,
    /// A filter lets nothing more of it pass.
    #[error("a filter refuses the body")]
    Refused,
    /// A copy for a mirror that is too far behind, or whose original ended early.
    #[error("the copy of the body was cut")]
    Cut,
}

/// A body that may have to be given up while its reader takes nothing of it.
pub trait GivenUp: Body {
    /// Completes when no more of the body is to be sent. Asked while the reader takes nothing; asking for a frame ends such a pause.
    fn poll_given_up(&mut self, cx: &mut Context<'_>) -> Poll<Self::Error>;
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
    /// A copy of what a client sends.
    Copy(CopyReader),
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
            Incoming::Copy(copy) => copy.poll_frame(cx),
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
            Incoming::Copy(copy) => copy.is_end_stream(),
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
            Incoming::Copy(copy) => copy.size_hint(),
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
