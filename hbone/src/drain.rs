//! A drain: telling work to end, and knowing when it has.
//!
//! A [`Trigger`] belongs to whoever decides that it is time; every piece of work holds a [`Watch`]. Starting the drain only *asks*: each
//! holder stops taking new work, finishes what it has, and drops its watch. The number of watches alive is the number of pieces of
//! work not yet ended, so the owner of the trigger can wait for all of them, with a deadline of its own choosing.
//!
//! A trigger that is dropped counts as started: nobody is left who could ever start it.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker, ready},
};

use tokio::sync::watch;

/// Makes a drain: the side that starts it and the side that obeys.
pub fn channel() -> (Trigger, Watch) {
    let (sender, receiver) = watch::channel(());
    let started = Arc::new(AtomicBool::new(false));
    (
        Trigger {
            started: started.clone(),
            sender,
        },
        Watch { started, receiver },
    )
}

/// Starts a drain and learns when all work has ended.
#[derive(Debug)]
pub struct Trigger {
    started: Arc<AtomicBool>,
    sender: watch::Sender<()>,
}

/// Tells one piece of work when to end; while it lives, that work counts as going on.
#[derive(Clone, Debug)]
pub struct Watch {
    started: Arc<AtomicBool>,
    receiver: watch::Receiver<()>,
}

/// Completes when the drain starts, and holds its watch until it is dropped.
///
/// For tasks that are woken often for other reasons: asking again costs one atomic load, not the lock that all watches share.
pub struct Drained {
    started: Arc<AtomicBool>,
    waiting: Pin<Box<dyn Future<Output = Watch> + Send>>,
    waker: Option<Waker>,
    watch: Option<Watch>,
}

// === impl Trigger ===

impl Trigger {
    /// Asks every holder of a [`Watch`] to end. Starting twice is the same as starting once.
    pub fn start(&self) {
        self.started.store(true, Ordering::Release);
        self.sender.send_replace(());
    }

    /// Whether the drain was started.
    pub fn is_started(&self) -> bool {
        self.started.load(Ordering::Acquire)
    }

    /// How many watches are alive.
    pub fn active(&self) -> usize {
        self.sender.receiver_count()
    }

    /// Another watch, for work that begins later.
    pub fn watch(&self) -> Watch {
        Watch {
            started: self.started.clone(),
            receiver: self.sender.subscribe(),
        }
    }

    /// Waits until no watch is left.
    pub async fn ended(&self) {
        self.sender.closed().await;
    }
}

impl Drop for Trigger {
    fn drop(&mut self) {
        self.start();
    }
}

// === impl Watch ===

impl Watch {
    /// Waits until the drain starts; at once if it has. Safe to drop and call again.
    pub async fn drained(&mut self) {
        while !self.is_draining() {
            // An error means that the trigger is gone, and a trigger starts the drain before it goes.
            let _ = self.receiver.changed().await;
        }
    }

    /// As [`Watch::drained`], as a future that a task can keep beside its other work.
    pub fn into_drained(mut self) -> Drained {
        let started = self.started.clone();
        let waiting = Box::pin(async move {
            self.drained().await;
            self
        });
        Drained {
            started,
            waiting,
            waker: None,
            watch: None,
        }
    }

    /// Whether the drain was started.
    pub fn is_draining(&self) -> bool {
        self.started.load(Ordering::Acquire)
    }
}

// === impl Drained ===

impl Future for Drained {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.watch.is_some() {
            return Poll::Ready(());
        }
        let known = self.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()));
        if known && !self.started.load(Ordering::Acquire) {
            return Poll::Pending;
        }
        self.waker = Some(cx.waker().clone());
        self.watch = Some(ready!(self.waiting.as_mut().poll(cx)));
        Poll::Ready(())
    }
}

impl fmt::Debug for Drained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Drained")
            .field("started", &self.started)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[tokio::test]
    async fn a_watch_learns_of_the_start_and_the_owner_of_the_end() {
        let (trigger, mut watch) = channel();
        let second = watch.clone();
        assert!(watch.drained().now_or_never().is_none());
        assert!(trigger.ended().now_or_never().is_none());
        trigger.start();
        watch.drained().await;
        assert!(second.is_draining() && trigger.is_started());
        drop(watch);
        assert_eq!(trigger.active(), 1);
        assert!(trigger.ended().now_or_never().is_none());
        drop(second);
        trigger.ended().await;
    }

    #[tokio::test]
    async fn a_watch_made_after_the_start_is_draining_at_once() {
        let (trigger, watch) = channel();
        drop(watch);
        trigger.start();
        trigger.watch().drained().await;
    }

    #[tokio::test]
    async fn a_trigger_that_is_gone_counts_as_started() {
        let (trigger, watch) = channel();
        drop(trigger);
        assert!(watch.is_draining());
        watch.into_drained().await;
    }

    #[tokio::test]
    async fn a_task_that_asks_often_is_woken_and_keeps_its_watch() {
        let (trigger, watch) = channel();
        let mut drained = watch.into_drained();
        let task = tokio::spawn(async move {
            for _ in 0..3 {
                assert!((&mut drained).now_or_never().is_none());
            }
            (&mut drained).await;
            Some(drained)
        });
        tokio::task::yield_now().await;
        trigger.start();
        let drained = task.await.unwrap();
        assert_eq!(trigger.active(), 1);
        drop(drained);
        trigger.ended().await;
    }
}
