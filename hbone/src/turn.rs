//! Letting the streams go first, so that one write carries the frames of many.
//!
//! A stream that has something to send wakes the task of its connection, and the runtime runs a task that was just woken before all
//! others: each frame would leave in a write of its own. A connection's task that has several streams therefore goes once to the end
//! of the run queue before it works. Whoever is ready runs in between and adds its frames; nobody waits for a timer, and on an idle
//! worker the turn comes back at once.

use std::task::{Context, Poll};

/// Streams from which on a connection's task lets others go first: below, there is nobody to share a write with.
const FEW_STREAMS: u32 = 2;

/// Whose turn it is; one for each connection.
#[derive(Debug, Default)]
pub(crate) struct Turn {
    yielded: bool,
}

impl Turn {
    /// Pending once for each time that the connection, which has `streams`, is woken.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, streams: u32) -> Poll<()> {
        self.yielded = !self.yielded && streams >= FEW_STREAMS;
        if self.yielded {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicU32, Ordering},
        },
        task::{Wake, Waker},
    };

    use super::*;

    #[derive(Default)]
    struct Woken(AtomicU32);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_connection_with_streams_yields_once_for_each_time_it_is_woken() {
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(woken.clone());
        let mut cx = Context::from_waker(&waker);
        let mut turn = Turn::default();
        for time in 1..=3 {
            assert!(turn.poll(&mut cx, 2).is_pending());
            assert_eq!(woken.0.load(Ordering::Relaxed), time, "it must come back by itself");
            assert!(turn.poll(&mut cx, 2).is_ready());
        }
    }

    #[test]
    fn a_connection_that_has_nobody_to_wait_for_works_at_once() {
        let mut turn = Turn::default();
        let mut cx = Context::from_waker(Waker::noop());
        assert!(turn.poll(&mut cx, 0).is_ready());
        assert!(turn.poll(&mut cx, 1).is_ready());
    }
}
