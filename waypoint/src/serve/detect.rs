//! What is spoken inside a tunnel, from its first bytes.
//!
//! As Envoy's HTTP inspector: the preface of HTTP/2, or a request line of HTTP/1.0 or 1.1, or something else. Other than Envoy's, it
//! decides as soon as the bytes cannot become HTTP any more. What follows from silence is its caller's business.

use std::{
    future::poll_fn,
    io,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use cairn_hbone::TunnelStream;
use tokio::time::timeout;

use crate::snapshot::matcher::Spoken;

/// The preface of HTTP/2 (RFC 9113 §3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Longest request line that is waited for; a longer one is taken for HTTP by its method.
const MAX_REQUEST_LINE: usize = 16 * 1024;
/// Longest method (llhttp's are shorter).
const MAX_METHOD: usize = 32;

/// How far a look at the first bytes leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// It is this.
    Is(Spoken),
    /// More bytes are needed.
    More,
}

/// The first bytes of a connection, as far as they have come.
#[derive(Debug)]
pub struct FirstBytes {
    held: Bytes,
    look: fn(&[u8]) -> Look,
}

// === impl FirstBytes ===

impl FirstBytes {
    /// For a port on which anything may be spoken.
    pub fn of_anything() -> Self {
        Self {
            held: Bytes::new(),
            look,
        }
    }

    /// For a port on which HTTP is spoken, 1 or 2.
    pub fn of_http() -> Self {
        Self {
            held: Bytes::new(),
            look: look_for_preface,
        }
    }

    /// Whether nothing has come.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// How many bytes have come.
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// What has come, to be read again.
    pub fn take(self) -> Bytes {
        self.held
    }

    /// Reads until it is known what is spoken; the client's end decides too.
    pub fn poll(&mut self, cx: &mut Context<'_>, stream: &mut TunnelStream) -> Poll<io::Result<Spoken>> {
        loop {
            let next = match ready!(stream.poll_data(cx)) {
                None => return Poll::Ready(Ok(Spoken::Other)),
                Some(next) => next?,
            };
            self.held = if self.held.is_empty() {
                next
            } else {
                let mut joined = BytesMut::with_capacity(self.held.len() + next.len());
                joined.extend_from_slice(&self.held);
                joined.extend_from_slice(&next);
                joined.freeze()
            };
            if let Look::Is(spoken) = (self.look)(&self.held) {
                return Poll::Ready(Ok(spoken));
            }
        }
    }

    /// The same with patience: `None` when the client says nothing new for so long.
    pub async fn within(&mut self, patience: Duration, stream: &mut TunnelStream) -> io::Result<Option<Spoken>> {
        match timeout(patience, poll_fn(|cx| self.poll(cx, stream))).await {
            Ok(spoken) => spoken.map(Some),
            Err(_) => Ok(None),
        }
    }
}

/// For a port on which HTTP is spoken anyway: the preface, or something else.
fn look_for_preface(bytes: &[u8]) -> Look {
    let common = bytes.iter().zip(PREFACE).take_while(|(a, b)| a == b).count();
    match (common == bytes.len(), common == PREFACE.len()) {
        (_, true) => Look::Is(Spoken::Http2),
        (true, false) => Look::More,
        (false, false) => Look::Is(Spoken::Http11),
    }
}

/// What the first bytes of a connection say.
pub fn look(bytes: &[u8]) -> Look {
    let common = bytes.iter().zip(PREFACE).take_while(|(a, b)| a == b).count();
    if common == PREFACE.len() {
        return Look::Is(Spoken::Http2);
    }
    if common == bytes.len() {
        return Look::More;
    }
    // A method is letters and few marks; anything else decides at once, so that short messages of other protocols go on.
    let method = bytes
        .iter()
        .take_while(|byte| byte.is_ascii_uppercase() || **byte == b'-')
        .count();
    match bytes.get(method) {
        None if method <= MAX_METHOD => return Look::More,
        Some(b' ') if (1..=MAX_METHOD).contains(&method) => {}
        _ => return Look::Is(Spoken::Other),
    }
    let Some(end) = memchr::memchr(b'\n', bytes) else {
        let plausible = bytes.len() <= MAX_REQUEST_LINE
            && bytes
                .get(method + 1)
                .is_none_or(|byte| matches!(byte, b'/' | b'*' | b'h' | b'H'));
        return if plausible { Look::More } else { Look::Is(Spoken::Other) };
    };
    let line = bytes.get(..end).unwrap_or_default().trim_ascii_end();
    Look::Is(if line.ends_with(b" HTTP/1.1") {
        Spoken::Http11
    } else if line.ends_with(b" HTTP/1.0") {
        Spoken::Http10
    } else {
        Spoken::Other
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bytes_tell_what_is_spoken() {
        let cases: &[(&[u8], Look)] = &[
            (PREFACE, Look::Is(Spoken::Http2)),
            (b"PRI * HT", Look::More),
            (b"", Look::More),
            (b"G", Look::More),
            (b"GET /a HTTP/1.1\r\n", Look::Is(Spoken::Http11)),
            (b"GET /a HTTP/1.0\r\nx: y", Look::Is(Spoken::Http10)),
            (b"GET /a HTT", Look::More),
            (b"M-SEARCH * HTTP/1.1\r\n", Look::Is(Spoken::Http11)),
            (b"OPTIONS http://a/ HTTP/1.1\r\n", Look::Is(Spoken::Http11)),
            (b"GET key\r\n", Look::Is(Spoken::Other)),
            (b"GET k", Look::Is(Spoken::Other)),
            (b"PING\r\n", Look::Is(Spoken::Other)),
            (b"hello", Look::Is(Spoken::Other)),
            (b"\x16\x03\x01", Look::Is(Spoken::Other)),
            (b"r", Look::Is(Spoken::Other)),
        ];
        for (bytes, expected) in cases {
            assert_eq!(look(bytes), *expected, "{:?}", String::from_utf8_lossy(bytes));
        }
    }
}
