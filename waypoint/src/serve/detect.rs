//! What is spoken inside a tunnel, from its first bytes.
//!
//! As Envoy's HTTP inspector: the preface of HTTP/2, or a request line of HTTP/1.0 or 1.1, or something else. Other than Envoy's, it
//! decides as soon as the bytes cannot become HTTP any more, and it never waits for a client that waits for its server: after the
//! detection time silence means "something else" (architecture §6).

use std::{future::poll_fn, time::Duration};

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

/// Silence after bytes that may become HTTP: their rest was lost on its way more often than its sender waits for an answer. Longer
/// than a TCP retransmission takes.
const UNDECIDED_PATIENCE: Duration = Duration::from_millis(500);

/// How far a look at the first bytes leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// It is this.
    Is(Spoken),
    /// More bytes are needed.
    More,
}

/// Reads until it is known what is spoken; gives that and the bytes that were read. Silence of `patience` at the beginning means
/// [`Spoken::Other`], and so do the client's end and a longer silence in what may become HTTP.
pub async fn detect(stream: &mut TunnelStream, patience: Duration) -> std::io::Result<(Spoken, Bytes)> {
    read_until(stream, patience, patience.max(UNDECIDED_PATIENCE), look).await
}

/// For a chain that speaks HTTP anyway: whether it is HTTP/2. Waits for the client.
pub async fn preface(stream: &mut TunnelStream, patience: Duration) -> std::io::Result<(Spoken, Bytes)> {
    read_until(stream, patience, patience, |bytes| {
        let common = bytes.iter().zip(PREFACE).take_while(|(a, b)| a == b).count();
        match (common == bytes.len(), common == PREFACE.len()) {
            (_, true) => Look::Is(Spoken::Http2),
            (true, false) => Look::More,
            (false, false) => Look::Is(Spoken::Http11),
        }
    })
    .await
}

async fn read_until(
    stream: &mut TunnelStream,
    at_first: Duration,
    later: Duration,
    look: impl Fn(&[u8]) -> Look,
) -> std::io::Result<(Spoken, Bytes)> {
    let mut held = Bytes::new();
    loop {
        let patience = if held.is_empty() { at_first } else { later };
        let next = match timeout(patience, poll_fn(|cx| stream.poll_data(cx))).await {
            Err(_) | Ok(None) => return Ok((Spoken::Other, held)),
            Ok(Some(Err(error))) => return Err(error),
            Ok(Some(Ok(next))) => next,
        };
        held = if held.is_empty() {
            next
        } else {
            let mut joined = BytesMut::with_capacity(held.len() + next.len());
            joined.extend_from_slice(&held);
            joined.extend_from_slice(&next);
            joined.freeze()
        };
        if let Look::Is(spoken) = look(&held) {
            return Ok((spoken, held));
        }
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
    let method = bytes.iter().take_while(|byte| byte.is_ascii_uppercase() || **byte == b'-').count();
    match bytes.get(method) {
        None if method <= MAX_METHOD => return Look::More,
        Some(b' ') if (1..=MAX_METHOD).contains(&method) => {}
        _ => return Look::Is(Spoken::Other),
    }
    let Some(end) = memchr::memchr(b'\n', bytes) else {
        let plausible = bytes.len() <= MAX_REQUEST_LINE && bytes.get(method + 1).is_none_or(|byte| matches!(byte, b'/' | b'*' | b'h' | b'H'));
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
