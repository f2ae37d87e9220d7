//! What one inner connection is told of changes of its service: that what is open on it has to be decided again, or that it ends.
//!
//! Whoever holds something open on the connection waits here. HTTP/1, and bytes, are one task a connection, which registers itself
//! whenever it asks whether the connection is over. The requests of an HTTP/2 connection are tasks of their own: each has a place
//! here while it waits.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
};

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;

use super::Inner;
use crate::snapshot::{Chain, Serves, Snapshot, Unserved};

/// What one inner connection is told.
#[derive(Default)]
pub struct Changes {
    /// The version of the configuration that changed the connection's chain last, as far as it has been looked at.
    version: AtomicU64,
    /// The service is gone.
    gone: AtomicBool,
    /// The service was gone for too long.
    ended: AtomicBool,
    /// The connection's own task.
    connection: AtomicWaker,
    state: Mutex<State>,
}

/// What a request remembers of its place; nothing is number 0.
#[derive(Default)]
pub struct Place(AtomicU32);

#[derive(Default)]
struct Places {
    wakers: Vec<Option<Waker>>,
    free: Vec<u32>,
}

/// Small, since every connection has one.
#[derive(Default)]
struct State {
    /// What was found when it was looked last.
    chain: Option<Arc<Chain>>,
    /// Requests that are tasks of their own, once there was one.
    requests: Option<Box<Places>>,
}

/// What became of the connection's service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Service {
    /// It is there, or gone, as it was before.
    AsBefore,
    /// It is gone now.
    Gone,
    /// It is back.
    Back,
}

// === impl Changes ===

impl Changes {
    /// Looks at what the configuration says of the connection now, and tells what is open on it.
    pub(super) fn look(&self, inner: &Inner, snapshot: &Snapshot) -> Service {
        let serves = snapshot.serves(&inner.facts());
        let gone = matches!(serves, Serves::Nobody(Unserved::NoService));
        match serves {
            Serves::Http(chain) | Serves::Tcp(chain) => {
                let mut state = self.state.lock();
                if !state.chain.as_ref().is_some_and(|known| Arc::ptr_eq(known, &chain)) {
                    state.chain = Some(chain);
                    drop(state);
                    self.version.store(snapshot.version, Ordering::Release);
                    self.wake();
                }
            }
            // The old chain comes back as another.
            Serves::Nobody(Unserved::NoService) => self.state.lock().chain = None,
            // It speaks another protocol now, or cannot be applied: nobody has denied anything.
            Serves::Detect | Serves::Nobody(_) => {}
        }
        match (self.gone.swap(gone, Ordering::AcqRel), gone) {
            (false, true) => Service::Gone,
            (true, false) => Service::Back,
            _ => Service::AsBefore,
        }
    }

    /// Ends the connection, whose service has been gone for too long.
    pub(super) fn end(&self, inner: &Inner) {
        if inner.is_busy() {
            tracing::info!(
                authority = %inner.connection.authority,
                client = %inner.connection.remote_address,
                "an open connection is closed: its service is gone"
            );
        }
        self.ended.store(true, Ordering::Release);
        self.wake();
    }

    /// Whether the connection was ended because its service was gone.
    pub fn is_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Completes when the connection is to end, since its service is gone. For the connection's own task, which is woken whenever
    /// something that is open on the connection has to be decided again.
    pub fn poll_ended(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.connection.register(cx.waker());
        if self.is_ended() { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Whether something that was decided by this version has to be decided again.
    pub(super) fn concern(&self, decided: u64) -> bool {
        decided < self.version.load(Ordering::Acquire)
    }

    /// Wakes this task at a change; for requests that are tasks of their own.
    pub(super) fn wait(&self, place: &Place, cx: &Context<'_>) {
        let mut state = self.state.lock();
        let places = state.requests.get_or_insert_default();
        let number = match place.0.load(Ordering::Relaxed) {
            0 => {
                let number = places.take();
                place.0.store(number, Ordering::Relaxed);
                number
            }
            number => number,
        };
        if let Some(waker) = places.at(number)
            && !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()))
        {
            *waker = Some(cx.waker().clone());
        }
    }

    /// Gives a place back.
    pub(super) fn leave(&self, place: &Place) {
        let number = place.0.swap(0, Ordering::Relaxed);
        if number == 0 {
            return;
        }
        let mut state = self.state.lock();
        let Some(places) = &mut state.requests else { return };
        let waker = places.at(number).and_then(Option::take);
        places.free.push(number);
        drop((state, waker));
    }

    fn wake(&self) {
        self.connection.wake();
        let waiting: Vec<_> = match &mut self.state.lock().requests {
            Some(places) => places.wakers.iter_mut().filter_map(Option::take).collect(),
            None => return,
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}

// === impl Places ===

impl Places {
    /// A free place. There are as many as requests have waited at once.
    fn take(&mut self) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            self.wakers.push(None);
            u32::try_from(self.wakers.len()).unwrap_or(u32::MAX)
        })
    }

    fn at(&mut self, number: u32) -> Option<&mut Option<Waker>> {
        self.wakers.get_mut(usize::try_from(number).ok()?.checked_sub(1)?)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use futures_util::task::{ArcWake, waker};

    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl ArcWake for Count {
        fn wake_by_ref(this: &Arc<Self>) {
            this.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn places_are_used_again_and_whoever_has_left_is_not_woken() {
        let changes = Changes::default();
        let (first, second, third) = (Place::default(), Place::default(), Place::default());
        let (stayed, left) = (Arc::<Count>::default(), Arc::<Count>::default());
        let wait = |place, who: &Arc<Count>| changes.wait(place, &Context::from_waker(&waker(who.clone())));
        wait(&first, &left);
        wait(&second, &stayed);
        wait(&second, &stayed);
        changes.leave(&first);
        wait(&third, &stayed);
        assert_eq!(
            changes.state.lock().requests.as_ref().unwrap().wakers.len(),
            2,
            "the first one's place went to the third"
        );
        changes.wake();
        assert_eq!((stayed.0.load(Ordering::Relaxed), left.0.load(Ordering::Relaxed)), (2, 0));
        for place in [&first, &second, &third, &second] {
            changes.leave(place);
        }
        assert_eq!(changes.state.lock().requests.as_ref().unwrap().free.len(), 2);
    }
}
