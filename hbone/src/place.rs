//! The tunnels to one destination: which one takes the next stream, and when another one is dialed.
//!
//! All decisions are made under one short lock for each destination, never held across an await. The rules:
//!
//! * The next stream goes to the live tunnel with the fewest streams, within the peer's limit and ours.
//! * Another tunnel is dialed when even that one is busy ([`PoolSettings::spread_streams`]) and fewer than
//!   [`PoolSettings::spread_tunnels`] exist, or when none has room and fewer than [`PoolSettings::max_tunnels`] exist. Whoever finds
//!   room does not wait for it. One dial at a time is waited for; those who need it wait together, and share its failure.
//! * A dial that all who waited for have given up goes on, but who comes later does not wait for its late packets (a SYN that was
//!   lost is repeated after 1, 3, 7 s): once it is a second old, another one overtakes it, and whichever succeeds is used.
//! * A tunnel that the peer has said good-bye to (GOAWAY), or that is over, takes no new streams.

use std::{
    pin::pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use cairn_exchange::clock::{self, Instant};
use parking_lot::Mutex;
use smallvec::SmallVec;
use tokio::time::timeout_at;

use crate::{
    open_error::OpenError,
    pool::{Destination, PoolSettings},
    shared::{Slot, Waiting},
    tunnel::Tunnel,
};

/// The tunnels to one destination.
pub(crate) struct Place {
    pub(crate) destination: Destination,
    pub(crate) waiting: Arc<Waiting>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    tunnels: SmallVec<[Arc<Tunnel>; 2]>,
    /// The dial on its way that is waited for: its number, and since when.
    dialing: Option<(u64, Instant)>,
    /// How many dials were begun; the number of the latest.
    dials: u64,
    /// The latest dial that failed, by number, and why.
    failed: Option<(u64, OpenError)>,
    /// No dial that nobody waits for before this time, after one failed.
    spread_after: Option<Instant>,
    /// Taken out of the pool's map.
    removed: bool,
}

/// Who looks for a tunnel.
#[derive(Clone, Copy)]
pub(crate) enum Asking {
    /// One who takes what is there. Begins no dial that it would have to wait for: it is not counted as waiting, so the dial could
    /// fail, and the place be removed, before it comes to wait.
    InPassing,
    /// The first of those who wait now, who has just come.
    First,
    /// One who waits; since the dial of this number, if there was one.
    Waiting { since: Option<u64> },
}

/// What came of looking for a tunnel.
pub(crate) enum Pick {
    /// This one, and a place on it.
    Ready(Arc<Tunnel>, Slot),
    /// None has room; the number of the dial that is on its way, if one is.
    Wait(Option<u64>),
    /// The dial that was waited for failed.
    Failed(OpenError),
    /// The place is no longer in the pool; look it up again.
    Removed,
}

/// One who waits.
struct Waiter<'a>(&'a AtomicU32);

/// After a dial failed that nobody needed, the next such waits this long.
const SPREAD_PAUSE: Duration = Duration::from_secs(1);
/// A dial that nobody waited for any more is overtaken when it is this old.
const OVERTAKEN: Duration = Duration::from_secs(1);

// === impl Place ===

impl Place {
    pub(crate) fn new(destination: Destination) -> Self {
        Self {
            destination,
            waiting: Arc::default(),
            state: Mutex::default(),
        }
    }

    /// Looks for a tunnel with room; `avoid` is used only if nothing else is left. When it answers a number, the caller must begin
    /// the dial of that number.
    pub(crate) fn pick(&self, settings: &PoolSettings, asking: Asking, avoid: Option<&Arc<Tunnel>>) -> (Pick, Option<u64>) {
        let mut state = self.state.lock();
        if state.removed {
            return (Pick::Removed, None);
        }
        state.tunnels.retain(|tunnel| !tunnel.is_gone());
        let has_room = |tunnel: &&Arc<Tunnel>| tunnel.streams() < tunnel.max_streams().min(settings.max_streams);
        let avoided = |tunnel: &&Arc<Tunnel>| avoid.is_some_and(|avoid| Arc::ptr_eq(avoid, tunnel));
        let count = state.tunnels.len();
        let mut best = state
            .tunnels
            .iter()
            .filter(has_room)
            .filter(|tunnel| !avoided(tunnel))
            .min_by_key(|tunnel| tunnel.streams());
        if best.is_none() && count >= settings.max_tunnels {
            best = state.tunnels.iter().find(has_room);
        }
        let best = best.cloned();
        if best.is_none() {
            match (asking, &state.failed) {
                (Asking::InPassing, _) => return (Pick::Wait(None), None),
                (Asking::Waiting { since: Some(since) }, Some((number, error))) if *number >= since => {
                    return (Pick::Failed(error.clone()), None);
                }
                (Asking::First | Asking::Waiting { .. }, _) => {}
            }
        }
        let wants_another = match &best {
            Some(tunnel) => {
                tunnel.streams() >= settings.spread_streams
                    && count < settings.spread_tunnels.min(settings.max_tunnels)
                    && state.spread_after.is_none_or(|after| clock::now() >= after)
            }
            None => count < settings.max_tunnels,
        };
        let on_its_way = state
            .dialing
            .filter(|(_, begun)| !matches!(asking, Asking::First) || clock::now() < *begun + OVERTAKEN);
        let dial = (wants_another && on_its_way.is_none()).then(|| state.begin());
        let pick = match best {
            Some(tunnel) => {
                let slot = tunnel.take_slot();
                Pick::Ready(tunnel, slot)
            }
            None => Pick::Wait(state.dialing.map(|(number, _)| number)),
        };
        (pick, dial)
    }

    /// As [`Place::pick`], and waits until there is room, the dial fails, or the time is over. `dial` is called when one must begin.
    pub(crate) async fn wait(
        &self,
        settings: &PoolSettings,
        avoid: Option<&Arc<Tunnel>>,
        dial: impl Fn(u64),
    ) -> Result<Option<(Arc<Tunnel>, Slot)>, OpenError> {
        let address = self.destination.address;
        let deadline = clock::now() + settings.connect_timeout;
        let waiter = Waiter(&self.waiting.count);
        let others = waiter.0.fetch_add(1, Ordering::SeqCst);
        if others >= settings.max_waiting {
            return Err(OpenError::Overflow {
                address,
                limit: settings.max_waiting,
            });
        }
        let mut asking = if others == 0 {
            Asking::First
        } else {
            Asking::Waiting { since: None }
        };
        loop {
            let mut changed = pin!(self.waiting.changed.notified());
            changed.as_mut().enable();
            let (pick, must_dial) = self.pick(settings, asking, avoid);
            if let Some(number) = must_dial {
                dial(number);
            }
            match pick {
                Pick::Ready(tunnel, slot) => return Ok(Some((tunnel, slot))),
                Pick::Failed(error) => return Err(error),
                Pick::Removed => return Ok(None),
                Pick::Wait(dialing) => {
                    let since = match asking {
                        Asking::Waiting { since } => since.or(dialing),
                        Asking::First | Asking::InPassing => dialing,
                    };
                    asking = Asking::Waiting { since };
                }
            }
            if timeout_at(deadline, changed).await.is_err() {
                return Err(OpenError::ConnectTimeout {
                    address,
                    after: settings.connect_timeout,
                });
            }
        }
    }

    /// The dial of this number succeeded.
    pub(crate) fn add(&self, number: u64, tunnel: Arc<Tunnel>) {
        let mut state = self.state.lock();
        state.end(number);
        // A place that was emptied while its dial was on the way has nobody left who wants the tunnel.
        if !state.removed {
            state.tunnels.push(tunnel);
        }
        drop(state);
        self.waiting.changed.notify_waiters();
    }

    /// The dial of this number failed.
    pub(crate) fn fail(&self, number: u64, error: OpenError) {
        let mut state = self.state.lock();
        if !state.end(number) {
            return;
        }
        state.failed = Some((number, error));
        state.spread_after = Some(clock::now() + SPREAD_PAUSE);
        drop(state);
        self.waiting.changed.notify_waiters();
    }

    /// The tunnel is over.
    pub(crate) fn lost(&self, tunnel: &Weak<Tunnel>) {
        self.state
            .lock()
            .tunnels
            .retain(|other| Arc::as_ptr(other) != tunnel.as_ptr());
        self.waiting.changed.notify_waiters();
    }

    /// Lets go of a tunnel if it has no stream; true if it is no longer here.
    pub(crate) fn retire(&self, tunnel: &Weak<Tunnel>) -> bool {
        let mut state = self.state.lock();
        match state.tunnels.iter().position(|other| Arc::as_ptr(other) == tunnel.as_ptr()) {
            Some(index) if state.tunnels.get(index).is_some_and(|tunnel| tunnel.streams() == 0) => {
                state.tunnels.remove(index);
                true
            }
            Some(_) => false,
            None => true,
        }
    }

    /// Lets go of all tunnels; each ends with its last stream.
    pub(crate) fn retire_all(&self) {
        self.state.lock().tunnels.clear();
    }

    /// Marks the place as removed if nothing is in it and nobody waits.
    pub(crate) fn remove_if_empty(&self) -> bool {
        let mut state = self.state.lock();
        state.removed |= state.tunnels.is_empty() && state.dialing.is_none() && self.waiting.count.load(Ordering::SeqCst) == 0;
        state.removed
    }

    /// How many tunnels there are, and how many streams on them.
    pub(crate) fn count(&self) -> (usize, usize) {
        let state = self.state.lock();
        (
            state.tunnels.len(),
            state.tunnels.iter().map(|tunnel| tunnel.streams() as usize).sum(),
        )
    }
}

// === impl State ===

impl State {
    /// Another dial is on its way; its number.
    fn begin(&mut self) -> u64 {
        self.dials += 1;
        self.dialing = Some((self.dials, clock::now()));
        self.dials
    }

    /// The dial of this number is over; false if it had been overtaken.
    fn end(&mut self, number: u64) -> bool {
        let waited_for = self.dialing.is_some_and(|(current, _)| current == number);
        if waited_for {
            self.dialing = None;
        }
        waited_for
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}
