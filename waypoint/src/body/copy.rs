//! Copies of a request's body, for mirrors.
//!
//! What an attempt reads of the client's body goes into each copy too. A copy is never waited for: one that its mirror takes more slowly
//! than the request's endpoint takes the original is kept back up to [`MAX_BEHIND`] bytes, and all of them together up to [`MAX_HELD`];
//! beyond that it is cut, which resets the mirror's request, and counted.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Frame, SizeHint};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::BodyError;

/// The most that a copy may be behind its original.
pub const MAX_BEHIND: usize = 1024 * 1024;
/// The most that all copies together may be behind.
pub const MAX_HELD: usize = 64 * 1024 * 1024;

/// What all copies hold together.
#[derive(Debug, Default)]
pub struct CopyBudget {
    held: AtomicUsize,
    /// Copies that were cut because they were too far behind.
    pub cut: AtomicU64,
}

/// Where the original writes.
pub(super) struct CopyWriter {
    shared: Arc<Shared>,
    /// Dropped with the writer: whoever waits for it learns that nothing more comes.
    _open: oneshot::Sender<()>,
}

/// What a mirror reads.
pub struct CopyReader {
    shared: Arc<Shared>,
    hint: SizeHint,
}

/// How far a copy has come.
pub struct Progress {
    shared: Arc<Shared>,
    ended: oneshot::Receiver<()>,
}

struct Shared {
    budget: Arc<CopyBudget>,
    state: Mutex<State>,
    /// The mirror has read all of it.
    taken: AtomicBool,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Bytes>,
    behind: usize,
    trailers: Option<HeaderMap>,
    end: Option<End>,
    reader: Option<Waker>,
}

/// How a copy ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// With all that there was.
    Whole,
    /// Before it.
    Cut,
}

/// A copy of a body of this length.
pub(super) fn copy(hint: SizeHint, budget: &Arc<CopyBudget>) -> (CopyWriter, CopyReader, Progress) {
    let shared = Arc::new(Shared {
        budget: budget.clone(),
        state: Mutex::default(),
        taken: AtomicBool::new(false),
    });
    let (open, ended) = oneshot::channel();
    let writer = CopyWriter {
        shared: shared.clone(),
        _open: open,
    };
    let progress = Progress {
        shared: shared.clone(),
        ended,
    };
    (writer, CopyReader { shared, hint }, progress)
}

// === impl CopyBudget ===

impl CopyBudget {
    /// Bytes that wait for mirrors.
    pub fn held(&self) -> usize {
        self.held.load(Relaxed)
    }
}

// === impl Shared ===

impl Shared {
    fn end(&self, state: &mut State, end: End) {
        state.end = Some(end);
        if end == End::Cut {
            self.budget.held.fetch_sub(state.behind, Relaxed);
            (state.waiting, state.behind, state.trailers) = (VecDeque::new(), 0, None);
        }
        if let Some(reader) = state.reader.take() {
            reader.wake();
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.budget.held.fetch_sub(self.state.get_mut().behind, Relaxed);
    }
}

// === impl CopyWriter ===

impl CopyWriter {
    /// A piece of the original passes; whether the copy goes on.
    pub fn write(&self, data: &Bytes) -> bool {
        let mut state = self.shared.state.lock();
        if state.end.is_some() {
            return false;
        }
        let budget = &self.shared.budget;
        let held = budget.held.fetch_add(data.len(), Relaxed) + data.len();
        state.behind += data.len();
        if state.behind > MAX_BEHIND || held > MAX_HELD {
            budget.cut.fetch_add(1, Relaxed);
            self.shared.end(&mut state, End::Cut);
            return false;
        }
        state.waiting.push_back(data.clone());
        if let Some(reader) = state.reader.take() {
            reader.wake();
        }
        true
    }

    /// The original is complete.
    pub fn finish(self, trailers: Option<&HeaderMap>) {
        let mut state = self.shared.state.lock();
        if state.end.is_none() {
            state.trailers = trailers.cloned();
            self.shared.end(&mut state, End::Whole);
        }
    }
}

impl Drop for CopyWriter {
    /// An original that nobody reads to its end leaves no copy that could be taken for a whole.
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        if state.end.is_none() {
            self.shared.end(&mut state, End::Cut);
        }
    }
}

// === impl CopyReader ===

impl CopyReader {
    pub(super) fn poll_frame(&mut self, cx: &Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let mut state = self.shared.state.lock();
        if let Some(data) = state.waiting.pop_front() {
            state.behind -= data.len();
            self.shared.budget.held.fetch_sub(data.len(), Relaxed);
            self.note_taken(&state);
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        match state.end {
            None => {
                state.reader = Some(cx.waker().clone());
                Poll::Pending
            }
            Some(End::Cut) => Poll::Ready(Some(Err(BodyError::Cut))),
            Some(End::Whole) => {
                let trailers = state.trailers.take();
                self.note_taken(&state);
                Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
            }
        }
    }

    fn note_taken(&self, state: &State) {
        if state.is_all() {
            self.shared.taken.store(true, Relaxed);
        }
    }

    pub(super) fn is_end_stream(&self) -> bool {
        self.shared.state.lock().is_all()
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        self.hint
    }
}

impl State {
    /// Whether nothing more comes.
    fn is_all(&self) -> bool {
        self.end == Some(End::Whole) && self.waiting.is_empty() && self.trailers.is_none()
    }
}

impl Drop for CopyReader {
    /// Nobody reads any more: nothing is kept.
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        if !state.is_all() {
            self.shared.end(&mut state, End::Cut);
        }
    }
}

impl std::fmt::Debug for CopyReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CopyReader").finish_non_exhaustive()
    }
}

// === impl Progress ===

impl Progress {
    /// Completes when the original has ended, or the copy was cut: whether it is whole.
    pub async fn original_ended(&mut self) -> bool {
        // Nothing is ever sent: the writer's end is the sign.
        let _ = (&mut self.ended).await;
        self.shared.state.lock().end == Some(End::Whole)
    }

    /// Whether the mirror has read all of it.
    pub fn is_taken(&self) -> bool {
        self.shared.taken.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    async fn next(reader: &mut CopyReader) -> Option<Result<Frame<Bytes>, BodyError>> {
        poll_fn(|cx| reader.poll_frame(cx)).await
    }

    #[tokio::test]
    async fn a_copy_is_read_as_it_was_written() {
        let budget = Arc::default();
        let (writer, mut reader, mut progress) = copy(SizeHint::default(), &budget);
        assert!(writer.write(&Bytes::from_static(b"abc")) && writer.write(&Bytes::from_static(b"de")));
        assert_eq!(budget.held.load(Relaxed), 5);
        let trailers: HeaderMap = [(http::header::EXPIRES, http::HeaderValue::from_static("0"))]
            .into_iter()
            .collect();
        writer.finish(Some(&trailers));
        assert!(progress.original_ended().await);
        for piece in ["abc", "de"] {
            assert!(!progress.is_taken() && !reader.is_end_stream());
            assert_eq!(next(&mut reader).await.unwrap().unwrap().into_data().unwrap(), piece);
        }
        assert_eq!(next(&mut reader).await.unwrap().unwrap().into_trailers().unwrap(), trailers);
        assert!(next(&mut reader).await.is_none());
        assert!(progress.is_taken() && reader.is_end_stream());
        assert_eq!(budget.held.load(Relaxed), 0);
    }

    #[tokio::test]
    async fn a_copy_that_is_too_far_behind_is_cut_and_holds_nothing() {
        let budget = Arc::<CopyBudget>::default();
        let (writer, mut reader, _) = copy(SizeHint::default(), &budget);
        let piece = Bytes::from(vec![0; MAX_BEHIND / 4]);
        assert!((0..4).all(|_| writer.write(&piece)));
        assert!(!writer.write(&piece) && !writer.write(&piece));
        assert_eq!((budget.held.load(Relaxed), budget.cut.load(Relaxed)), (0, 1));
        assert!(matches!(next(&mut reader).await, Some(Err(BodyError::Cut))));
    }

    #[tokio::test]
    async fn all_copies_together_hold_no_more_than_they_may() {
        let budget = Arc::<CopyBudget>::default();
        let piece = Bytes::from(vec![0; MAX_BEHIND]);
        let copies: Vec<_> = (0..=MAX_HELD / MAX_BEHIND)
            .map(|_| copy(SizeHint::default(), &budget))
            .collect();
        let written = copies.iter().filter(|(writer, ..)| writer.write(&piece)).count();
        assert_eq!(written, MAX_HELD / MAX_BEHIND);
        assert_eq!(budget.held.load(Relaxed), MAX_HELD);
        drop(copies);
        assert_eq!(budget.held.load(Relaxed), 0);
    }

    #[tokio::test]
    async fn an_original_that_is_given_up_leaves_no_whole_copy() {
        let (writer, mut reader, mut progress) = copy(SizeHint::default(), &Arc::default());
        writer.write(&Bytes::from_static(b"abc"));
        drop(writer);
        assert!(!progress.original_ended().await);
        assert!(matches!(next(&mut reader).await, Some(Err(BodyError::Cut))));
        assert!(!progress.is_taken());
    }

    #[test]
    fn nothing_is_kept_for_a_mirror_that_reads_no_more() {
        let budget = Arc::<CopyBudget>::default();
        let (writer, reader, _) = copy(SizeHint::default(), &budget);
        writer.write(&Bytes::from_static(b"abc"));
        drop(reader);
        assert!(!writer.write(&Bytes::from_static(b"de")));
        assert_eq!((budget.held.load(Relaxed), budget.cut.load(Relaxed)), (0, 0));
    }
}
