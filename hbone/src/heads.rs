//! HTTP/2 heads that never end.
//!
//! A peer that sends HEADERS without END_HEADERS and then nothing, or half of a frame, holds its connection up: nothing else on it may be
//! read before (RFC 9113 §4.3), answers to PINGs neither, and h2 does not tell of it. So [`Watched`] stands below h2 and follows the
//! frames that are read, nine bytes of each: everything but the payload of DATA has to come whole within a time from its first byte.
//! [`Late`] tells the connection's task when it does not, which then says good-bye with ENHANCE_YOUR_CALM.
//!
//! It costs a few nanoseconds a frame, and the time of day only when what was read ends within a frame. It is no parser: what it cannot
//! follow h2 refuses.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use cairn_exchange::clock::{self, Instant};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep_until},
};

/// Bytes below HTTP/2, watched as they are read.
pub struct Watched<Io> {
    io: Io,
    frames: Frames,
    shared: Arc<Unfinished>,
}

/// Tells when a head, or another frame that is not DATA, was not finished in time.
pub struct Late {
    shared: Arc<Unfinished>,
    limit: Duration,
    timer: Option<Pin<Box<Sleep>>>,
}

/// What the reader tells.
struct Unfinished {
    opened: Instant,
    /// When what is not finished began, in milliseconds since the connection was opened, plus one; 0 is nothing.
    since: AtomicU64,
}

/// Where in which frame the reader is.
#[derive(Debug)]
struct Frames {
    head: [u8; HEAD],
    /// How much of a frame's head has come.
    have: usize,
    /// How much of a payload is still to come.
    left: u32,
    /// Whether the payload is DATA.
    is_data: bool,
    /// A head has begun that END_HEADERS has not ended.
    in_block: bool,
}

/// Length of a frame's head.
const HEAD: usize = 9;
/// `PRI * HTTP/2.0 … SM`, with which clients begin.
const PREFACE: u32 = 24;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PUSH_PROMISE: u8 = 5;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;

/// Watches what a client sends. Heads are late after `limit`.
pub fn watch<Io>(io: Io, limit: Duration) -> (Watched<Io>, Late) {
    let shared = Arc::new(Unfinished {
        opened: clock::now(),
        since: AtomicU64::new(0),
    });
    let late = Late {
        shared: shared.clone(),
        limit,
        timer: None,
    };
    let frames = Frames {
        head: [0; HEAD],
        have: 0,
        left: PREFACE,
        is_data: false,
        in_block: false,
    };
    (Watched { io, frames, shared }, late)
}

// === impl Frames ===

impl Frames {
    /// Follows what was read. Returns whether anything was finished on the way.
    fn follow(&mut self, mut bytes: &[u8]) -> bool {
        let mut finished = false;
        while !bytes.is_empty() {
            if self.left > 0 {
                let take = bytes.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
                bytes = bytes.get(take..).unwrap_or_default();
                // No more than `left` is.
                self.left -= u32::try_from(take).unwrap_or(self.left);
            } else {
                let take = bytes.len().min(HEAD - self.have);
                let (head, rest) = bytes.split_at(take);
                if let Some(place) = self.head.get_mut(self.have..self.have + take) {
                    place.copy_from_slice(head);
                }
                self.have += take;
                bytes = rest;
                if self.have < HEAD {
                    break;
                }
                self.begin();
            }
            finished |= !self.is_unfinished();
        }
        finished
    }

    /// The head of a frame is there.
    fn begin(&mut self) {
        let [long, middle, short, kind, flags, ..] = self.head;
        self.have = 0;
        self.left = u32::from_be_bytes([0, long, middle, short]);
        self.is_data = kind == DATA;
        if matches!(kind, HEADERS | PUSH_PROMISE | CONTINUATION) {
            self.in_block = flags & END_HEADERS == 0;
        }
    }

    fn is_unfinished(&self) -> bool {
        self.have > 0 || self.in_block || (self.left > 0 && !self.is_data)
    }
}

// === impl Watched ===

impl<Io> Watched<Io> {
    fn note(&mut self, read: &[u8]) {
        let finished = self.frames.follow(read);
        let shared = &self.shared;
        if !self.frames.is_unfinished() {
            if shared.since.load(Ordering::Relaxed) != 0 {
                shared.since.store(0, Ordering::Release);
            }
        } else if finished || shared.since.load(Ordering::Relaxed) == 0 {
            let passed = clock::now().saturating_duration_since(shared.opened).as_millis();
            let since = u64::try_from(passed).unwrap_or(u64::MAX - 1) + 1;
            shared.since.store(since, Ordering::Release);
        }
    }
}

impl<Io: AsyncRead + Unpin> AsyncRead for Watched<Io> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.io).poll_read(cx, buf))?;
        this.note(buf.filled().get(before..).unwrap_or_default());
        Poll::Ready(Ok(()))
    }
}

impl<Io: AsyncWrite + Unpin> AsyncWrite for Watched<Io> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(cx, buf)
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}

// === impl Late ===

impl Late {
    /// Ready when something was not finished in time. Asked in the connection's own task, after it has read what there was.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let since = match self.shared.since.load(Ordering::Acquire) {
                // The timer is kept: who is slow once is slow again.
                0 => return Poll::Pending,
                since => Duration::from_millis(since - 1),
            };
            let end = self.shared.opened + since + self.limit;
            if clock::now() >= end {
                return Poll::Ready(());
            }
            let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(end)));
            if timer.deadline() > end || timer.is_elapsed() {
                timer.as_mut().reset(end);
            }
            ready!(timer.as_mut().poll(cx));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use proptest::prelude::*;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
        time::{advance, timeout},
    };

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let mut bytes = length[1..].to_vec();
        bytes.extend([kind, flags, 0, 0, 0, 1]);
        bytes.extend(payload);
        bytes
    }

    /// A client's side, and what reads it.
    fn connected() -> (DuplexStream, Watched<DuplexStream>, Late) {
        let (client, server) = duplex(1 << 16);
        let (watched, late) = watch(server, LIMIT);
        (client, watched, late)
    }

    async fn read(watched: &mut Watched<DuplexStream>) {
        let mut buffer = vec![0; 1 << 16];
        assert!(watched.read(&mut buffer).await.unwrap() > 0);
    }

    async fn is_late(late: &mut Late, after: Duration) -> bool {
        timeout(after, poll_fn(|cx| late.poll(cx))).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_that_does_not_end_is_late_and_one_that_ends_is_not() {
        let (mut client, mut watched, mut late) = connected();
        client.write_all(&[b'x'; PREFACE as usize]).await.unwrap();
        client.write_all(&frame(HEADERS, 0, b"begin")).await.unwrap();
        read(&mut watched).await;
        assert!(!is_late(&mut late, LIMIT / 2).await);
        client.write_all(&frame(CONTINUATION, 0, b"more")).await.unwrap();
        read(&mut watched).await;
        assert!(!is_late(&mut late, LIMIT / 4).await, "more of it puts nothing off");
        client.write_all(&frame(CONTINUATION, END_HEADERS, b"end")).await.unwrap();
        read(&mut watched).await;
        assert!(!is_late(&mut late, 100 * LIMIT).await);
        client.write_all(&frame(HEADERS, 0, b"begin")).await.unwrap();
        read(&mut watched).await;
        assert!(!is_late(&mut late, LIMIT - Duration::from_millis(2)).await);
        assert!(is_late(&mut late, Duration::from_millis(3)).await);
    }

    #[tokio::test(start_paused = true)]
    async fn half_a_frame_is_late_but_half_of_data_is_not() {
        let whole = |kind| [vec![b'x'; PREFACE as usize], frame(kind, END_HEADERS, &[0; 100])].concat();
        for (kind, cut, expected) in [
            (DATA, 50, false),
            (DATA, 105, true),
            (HEADERS, 50, true),
            (6, 50, true),
            (6, 0, false),
            (0, PREFACE as usize + 90, true),
        ] {
            let (mut client, mut watched, mut late) = connected();
            let bytes = whole(kind);
            client.write_all(&bytes[..bytes.len() - cut]).await.unwrap();
            read(&mut watched).await;
            assert_eq!(is_late(&mut late, 2 * LIMIT).await, expected, "{kind} {cut}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_busy_connection_is_not_late_though_every_read_ends_within_a_frame() {
        let (mut client, mut watched, mut late) = connected();
        client.write_all(&[b'x'; PREFACE as usize]).await.unwrap();
        let request = frame(HEADERS, END_HEADERS, &[0; 40]);
        let (begin, end) = request.split_at(20);
        client.write_all(begin).await.unwrap();
        for _ in 0..10 {
            read(&mut watched).await;
            assert!(!is_late(&mut late, LIMIT / 2).await);
            advance(LIMIT / 4).await;
            client.write_all(end).await.unwrap();
            client.write_all(begin).await.unwrap();
        }
    }

    proptest! {
        #[test]
        fn however_frames_are_cut_the_reader_knows_where_it_is(
            frames in prop::collection::vec((0..12u8, any::<u8>(), 0..300usize), 1..20),
            cuts in prop::collection::vec(1..64usize, 1..20),
        ) {
            let bytes: Vec<u8> = frames.iter().flat_map(|(kind, flags, length)| frame(*kind, *flags, &vec![7; *length])).collect();
            let new = || Frames { head: [0; HEAD], have: 0, left: 0, is_data: false, in_block: false };
            let (mut at_once, mut cut) = (new(), new());
            at_once.follow(&bytes);
            let mut rest = &bytes[..];
            for size in cuts.iter().cycle() {
                if rest.is_empty() { break; }
                let (now, later) = rest.split_at((*size).min(rest.len()));
                cut.follow(now);
                rest = later;
            }
            prop_assert_eq!((at_once.have, at_once.left, at_once.in_block), (0, 0, cut.in_block));
            prop_assert_eq!((cut.have, cut.left), (0, 0));
            let ends = frames.iter().rev().find(|(kind, ..)| matches!(*kind, HEADERS | PUSH_PROMISE | CONTINUATION));
            prop_assert_eq!(cut.in_block, ends.is_some_and(|(_, flags, _)| flags & END_HEADERS == 0));
        }
    }
}
