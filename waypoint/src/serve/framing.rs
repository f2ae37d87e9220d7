//! Watches the framing of HTTP/1 requests before hyper reads them.
//!
//! hyper accepts a request that carries both `Content-Length` and `Transfer-Encoding` and drops the former. Envoy answers 400, and a
//! disagreement about framing is how requests are smuggled (RFC 9112 §6.3), so such a request must not pass. This is no parser: it
//! follows where heads end and how long bodies are, and knows only the fields that decide that. What it cannot follow it leaves to
//! hyper to refuse.

use memchr::memmem;

/// Longest line of a chunk's size and extensions.
const MAX_CHUNK_LINE: usize = 17 * 1024;
/// Length of the longest end of a head, from the line feed of its last field.
const BLANK_LINE: usize = 3;

/// What is wrong with a request's framing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// Both `Content-Length` and `Transfer-Encoding`.
    LengthAndChunked,
    /// A transfer coding other than `chunked` alone. hyper passes a request whose last coding is chunked, and another reader may look at
    /// the first; Envoy answers 501.
    UnknownCoding,
}

/// Follows the requests of one connection.
#[derive(Debug, Default)]
pub struct Framing {
    state: State,
    /// What has been seen of a head or of a chunk's line that has not ended yet.
    partial: Vec<u8>,
    /// The last head asked for another protocol: whether the bytes behind its request are HTTP, its answer decides.
    undecided: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// Before or in a head.
    #[default]
    Head,
    /// In a body, or in a chunk with its line end: this much is left.
    Skip { left: u64, then: Then },
    /// In the line that starts a chunk.
    ChunkLine,
    /// In the trailers after the last chunk.
    Trailers,
    /// Nothing more can be said: an upgraded connection, or bytes that hyper will refuse.
    Blind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    Head,
    ChunkLine,
}

// === impl Framing ===

impl Framing {
    /// Whether a head has begun and not ended.
    pub fn is_in_head(&self) -> bool {
        self.state == State::Head && !self.partial.is_empty()
    }

    /// Whether the last head asked for another protocol, and it is not known yet whether it gets it.
    pub fn is_undecided(&self) -> bool {
        self.undecided
    }

    /// Whether nothing more can be looked at before that is known.
    pub fn waits(&self) -> bool {
        self.undecided && self.state == State::Head
    }

    /// The connection goes on in another protocol, or in HTTP after all.
    pub fn decide(&mut self, switched: bool) {
        self.undecided = false;
        if switched {
            self.state = State::Blind;
            self.partial = Vec::new();
        }
    }

    /// Looks at the next bytes of the connection; `max_head` bounds what is kept of an unfinished head. Returns how many of them may
    /// pass: what follows a request for another protocol may not before its answer.
    pub fn observe(&mut self, all: &[u8], max_head: usize) -> Result<usize, Violation> {
        let mut data = all;
        while !data.is_empty() && !self.waits() {
            match self.state {
                State::Blind => return Ok(all.len()),
                State::Skip { left, then } => {
                    let skipped = usize::try_from(left).unwrap_or(usize::MAX).min(data.len());
                    data = data.get(skipped..).unwrap_or_default();
                    let left = left - skipped as u64;
                    self.state = match (left, then) {
                        (0, Then::Head) => State::Head,
                        (0, Then::ChunkLine) => State::ChunkLine,
                        (left, then) => State::Skip { left, then },
                    };
                }
                State::Head => {
                    // Empty lines before a request are allowed (RFC 9112 §2.2).
                    if self.partial.is_empty() {
                        let blank = data.iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
                        data = data.get(blank..).unwrap_or_default();
                        // Most heads come whole: nothing is copied, and no buffer kept.
                        if let Some((head, rest)) = blank_line(data).and_then(|end| data.split_at_checked(end)) {
                            (self.state, self.undecided) = after_head(head)?;
                            data = rest;
                            continue;
                        }
                    }
                    let Some(head) = self.take_until(&mut data, BLANK_LINE - 1, blank_line, max_head) else {
                        continue;
                    };
                    (self.state, self.undecided) = after_head(&head)?;
                    self.give_back(head);
                }
                State::ChunkLine => {
                    let Some(line) = self.take_until(&mut data, 1, line_end, MAX_CHUNK_LINE) else {
                        continue;
                    };
                    self.state = match chunk_size(&line) {
                        None => State::Blind,
                        Some(0) => State::Trailers,
                        // The chunk's own line end belongs to it.
                        Some(size) => size.checked_add(2).map_or(State::Blind, |left| State::Skip {
                            left,
                            then: Then::ChunkLine,
                        }),
                    };
                    self.give_back(line);
                }
                State::Trailers => {
                    let Some(line) = self.take_until(&mut data, 1, line_end, max_head) else {
                        continue;
                    };
                    if line.len() == 2 {
                        self.state = State::Head;
                    }
                    self.give_back(line);
                }
            }
        }
        Ok(all.len() - data.len())
    }

    /// Takes bytes up to where `end` finds their end; `None` when more are needed. Past `max` bytes nothing more can be said.
    fn take_until(
        &mut self,
        data: &mut &[u8],
        overlap: usize,
        end: impl Fn(&[u8]) -> Option<usize>,
        max: usize,
    ) -> Option<Vec<u8>> {
        // The end may be cut in two: search again from where it could begin.
        let from = self.partial.len().saturating_sub(overlap);
        let before = self.partial.len();
        self.partial.extend_from_slice(data);
        let found = end(self.partial.get(from..).unwrap_or_default());
        let Some(end) = found else {
            *data = &[];
            if self.partial.len() > max {
                self.partial = Vec::new();
                self.state = State::Blind;
            }
            return None;
        };
        let taken = from + end;
        self.partial.truncate(taken);
        *data = data.get(taken.saturating_sub(before)..).unwrap_or_default();
        Some(std::mem::take(&mut self.partial))
    }

    /// Keeps the buffer for the next head.
    fn give_back(&mut self, mut buffer: Vec<u8>) {
        buffer.clear();
        self.partial = buffer;
    }
}

/// Where a line's end ends.
fn line_end(bytes: &[u8]) -> Option<usize> {
    memmem::find(bytes, b"\r\n").map(|at| at + 2)
}

/// Where the empty line ends that ends a head. As in hyper's parser, a line may end without a carriage return (RFC 9112 §2.2).
fn blank_line(bytes: &[u8]) -> Option<usize> {
    memchr::memchr_iter(b'\n', bytes).find_map(|at| match bytes.get(at + 1..)? {
        [b'\n', ..] => Some(at + 2),
        [b'\r', b'\n', ..] => Some(at + 3),
        _ => None,
    })
}

/// What follows a head, and whether its answer may switch to another protocol.
fn after_head(head: &[u8]) -> Result<(State, bool), Violation> {
    let (mut length, mut encoding, mut chunked, mut upgrade, mut unreadable) = (None, false, true, false, false);
    let mut at = memchr::memchr(b'\n', head).map_or(head.len(), |end| end + 1);
    while let Some(line) = head.get(at..).filter(|rest| !rest.is_empty()) {
        let end = memchr::memchr(b'\n', line).map_or(line.len(), |end| end + 1);
        at += end;
        let line = line.get(..end).unwrap_or_default();
        // Most names begin with another letter.
        match line.first() {
            Some(b'c' | b'C') => {
                if let Some(value) = value_of(line, b"content-length") {
                    length = std::str::from_utf8(value)
                        .ok()
                        .and_then(|text| text.trim().parse::<u64>().ok())
                        .or(length);
                    unreadable |= length.is_none();
                }
            }
            Some(b't' | b'T') => {
                if let Some(value) = value_of(line, b"transfer-encoding") {
                    // A second one makes it a list.
                    chunked &= !encoding && value.trim_ascii_end().eq_ignore_ascii_case(b"chunked");
                    encoding = true;
                }
            }
            Some(b'u' | b'U') => upgrade |= value_of(line, b"upgrade").is_some(),
            _ => {}
        }
    }
    let state = match (length, encoding, chunked) {
        (Some(_), true, _) => return Err(Violation::LengthAndChunked),
        (None, true, true) => State::ChunkLine,
        (None, true, false) => return Err(Violation::UnknownCoding),
        (Some(left @ 1..), false, _) => State::Skip { left, then: Then::Head },
        // hyper refuses a length that is no number.
        (Some(0) | None, false, _) if unreadable => State::Blind,
        (Some(0) | None, false, _) => State::Head,
    };
    Ok((state, upgrade))
}

fn value_of<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let (found, rest) = line.split_at_checked(name.len())?;
    if !found.eq_ignore_ascii_case(name) {
        return None;
    }
    rest.trim_ascii_start().strip_prefix(b":").map(<[u8]>::trim_ascii_start)
}

fn chunk_size(line: &[u8]) -> Option<u64> {
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    let digits = std::str::from_utf8(line.get(..digits)?).ok()?;
    u64::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: usize = 60 * 1024;

    /// Feeds the text in pieces of every size.
    fn observe(text: &str) -> Vec<Result<State, Violation>> {
        [1, 2, 3, 7, 50, text.len().max(1)]
            .into_iter()
            .map(|piece| {
                let mut framing = Framing::default();
                for chunk in text.as_bytes().chunks(piece) {
                    framing.observe(chunk, MAX)?;
                }
                Ok(framing.state)
            })
            .collect()
    }

    #[test]
    fn a_request_with_length_and_chunked_is_found_wherever_it_comes() {
        let bad = "POST /b HTTP/1.1\r\nhost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
        for before in [
            "",
            "\r\n",
            "GET / HTTP/1.1\r\nhost: a\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello",
            "GET / HTTP/1.1\nhost: a\n\n",
            "POST / HTTP/1.1\nContent-Length: 5\r\n\nhello",
            "POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n1F\r\n0123456789012345678901234567890\r\n0\r\nx-sum: 1\r\n\r\n",
        ] {
            for result in observe(&format!("{before}{bad}")) {
                assert_eq!(result, Err(Violation::LengthAndChunked), "after {before:?}");
            }
            for result in observe(&format!("{before}{}", bad.replace('\r', ""))) {
                assert_eq!(
                    result,
                    Err(Violation::LengthAndChunked),
                    "with bare line feeds after {before:?}"
                );
            }
        }
    }

    #[test]
    fn codings_other_than_chunked_alone_are_found() {
        for fields in [
            "transfer-encoding: gzip",
            "Transfer-Encoding: gzip, chunked",
            "transfer-encoding: chunked, identity",
            "transfer-encoding: x\r\nTransfer-Encoding: chunked",
            "transfer-encoding: chunked\r\ntransfer-encoding: chunked",
            "transfer-encoding:",
        ] {
            for result in observe(&format!("POST / HTTP/1.1\r\n{fields}\r\n\r\n")) {
                assert_eq!(result, Err(Violation::UnknownCoding), "{fields}");
            }
        }
        for fields in [
            "transfer-encoding: chunked",
            "Transfer-Encoding:\tChunked \t",
            "x-transfer-encoding: gzip",
        ] {
            for result in observe(&format!("POST / HTTP/1.1\r\n{fields}\r\n\r\n")) {
                assert!(result.is_ok(), "{fields}");
            }
        }
    }

    #[test]
    fn a_body_that_looks_like_such_a_head_is_no_head() {
        let body = "POST / HTTP/1.1\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n";
        let sized = format!("POST / HTTP/1.1\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        let chunked = format!(
            "POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n",
            body.len()
        );
        for result in observe(&sized).into_iter().chain(observe(&chunked)) {
            assert_eq!(result, Ok(State::Head));
        }
    }

    #[test]
    fn behind_a_request_for_another_protocol_its_answer_decides() {
        let bad = "POST / HTTP/1.1\r\ncontent-length: 1\r\ntransfer-encoding: x\r\n\r\n";
        for ask in [
            "GET /chat HTTP/1.1\r\nUpgrade: websocket\r\n\r\n",
            "POST /chat HTTP/1.1\r\nUpgrade: websocket\r\ncontent-length: 2\r\n\r\nhi",
            "POST /chat HTTP/1.1\r\nUpgrade: websocket\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
        ] {
            for piece in [1, 7, 1000] {
                for switched in [true, false] {
                    let mut framing = Framing::default();
                    for chunk in ask.as_bytes().chunks(piece) {
                        assert_eq!(framing.observe(chunk, MAX), Ok(chunk.len()));
                    }
                    assert!(framing.waits());
                    assert_eq!(framing.observe(bad.as_bytes(), MAX), Ok(0), "nothing passes unseen");
                    framing.decide(switched);
                    let expected = if switched {
                        Ok(bad.len())
                    } else {
                        Err(Violation::LengthAndChunked)
                    };
                    assert_eq!(framing.observe(bad.as_bytes(), MAX), expected, "{ask} switched {switched}");
                }
            }
            let both = format!("{ask}{bad}");
            assert_eq!(Framing::default().observe(both.as_bytes(), MAX), Ok(ask.len()));
        }
    }

    #[test]
    fn an_endless_head_is_not_kept() {
        let mut framing = Framing::default();
        for _ in 0..100 {
            framing.observe(&[b'x'; 1024], MAX).unwrap();
        }
        assert!(framing.partial.capacity() <= MAX * 2);
        assert_eq!(framing.state, State::Blind);
    }
}
