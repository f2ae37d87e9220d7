//! Turns at asking the authority: a node's proxy asks for many identities, and few of them at a time.
//!
//! Who has a connection waiting goes before who prepares for one, and both before a renewal, for which there is half a life left.
//! Urgency may grow while one waits. Among the equally urgent, who came first goes first.

use std::sync::{
    Arc,
    atomic::{AtomicU8, Ordering},
};

use parking_lot::Mutex;
use tokio::sync::oneshot;

/// How urgent a certificate is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Urgency {
    /// There is one that is still good.
    Renewal = 0,
    /// Somebody may need it soon.
    Prepared = 1,
    /// Somebody waits.
    Waiting = 2,
}

/// Turns that many identities share.
#[derive(Clone, Debug)]
pub struct Turns(Arc<Mutex<Queue>>);

/// One identity's place among them.
#[derive(Clone, Debug)]
pub struct Turn {
    turns: Turns,
    urgency: Arc<AtomicU8>,
}

/// A turn that was given; it ends when dropped.
#[derive(Debug)]
pub struct Taken(Option<Turns>);

#[derive(Debug)]
struct Queue {
    free: usize,
    waiting: Vec<(Arc<AtomicU8>, oneshot::Sender<Taken>)>,
}

// === impl Turns ===

impl Turns {
    /// So many at a time.
    pub fn new(at_a_time: usize) -> Self {
        Self(Arc::new(Mutex::new(Queue {
            free: at_a_time.max(1),
            waiting: Vec::new(),
        })))
    }

    /// A place for one identity.
    pub fn turn(&self, urgency: Urgency) -> Turn {
        Turn {
            turns: self.clone(),
            urgency: Arc::new(AtomicU8::new(urgency as u8)),
        }
    }

    /// Gives the turn that is free to who needs it most.
    fn next(&self) {
        let mut queue = self.0.lock();
        while queue.free > 0 {
            let urgency = |(_, (urgency, _)): &(usize, &(Arc<AtomicU8>, _))| urgency.load(Ordering::Relaxed);
            // The first of the most urgent: the last one of the reversed order.
            let Some((at, _)) = queue.waiting.iter().enumerate().rev().max_by_key(urgency) else {
                return;
            };
            let (_, asked) = queue.waiting.remove(at);
            queue.free -= 1;
            if let Err(mut taken) = asked.send(Taken(Some(self.clone()))) {
                // Nobody waits for it any more; its drop would take the lock that is held here.
                taken.0 = None;
                queue.free += 1;
            }
        }
    }
}

// === impl Turn ===

impl Turn {
    /// Makes it more urgent, or less.
    pub fn set(&self, urgency: Urgency) {
        self.urgency.store(urgency as u8, Ordering::Relaxed);
    }

    /// Waits for the turn. The urgency is a renewal's from then on.
    pub(crate) async fn take(&self) -> Taken {
        let (asked, given) = oneshot::channel();
        self.turns.0.lock().waiting.push((self.urgency.clone(), asked));
        self.turns.next();
        // The sender is in the queue until it is used.
        let taken = given.await.unwrap_or(Taken(None));
        self.set(Urgency::Renewal);
        taken
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if let Some(turns) = &self.0 {
            turns.0.lock().free += 1;
            turns.next();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_waits_goes_first_and_the_early_before_the_late() {
        let turns = Turns::new(1);
        let first = turns.turn(Urgency::Renewal).take().await;
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut raised = None;
        let mut tasks = Vec::new();
        for (name, urgency) in [
            ("renewal", Urgency::Renewal),
            ("prepared", Urgency::Prepared),
            ("raised", Urgency::Renewal),
            ("waiting", Urgency::Waiting),
            ("prepared too", Urgency::Prepared),
        ] {
            let turn = turns.turn(urgency);
            if name == "raised" {
                raised = Some(turn.clone());
            }
            let order = order.clone();
            tasks.push(tokio::spawn(async move {
                let _turn = turn.take().await;
                order.lock().push(name);
                tokio::task::yield_now().await;
            }));
            tokio::task::yield_now().await;
        }
        raised.unwrap().set(Urgency::Waiting);
        // One that gives up is passed over.
        let given_up = turns.turn(Urgency::Waiting);
        assert!(
            tokio::time::timeout(std::time::Duration::from_secs(1), given_up.take())
                .await
                .is_err()
        );
        drop(first);
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(*order.lock(), ["raised", "waiting", "prepared", "prepared too", "renewal"]);
        assert_eq!(turns.0.lock().free, 1);
    }
}
