//! How long a peer may take nothing of what is there for it.
//!
//! A writer that waits for its peer holds a request, a connection and buffers. Envoy bounds that by the stream's idle timeout; where
//! the configuration has none (istiod's says "no limit"), [`LONGEST`] still ends a peer that is never coming back.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use cairn_exchange::clock::{Instant, now};
use tokio::time::Sleep;

/// The longest that a peer may take nothing, where nothing shorter is configured.
pub const LONGEST: Duration = Duration::from_secs(3600);

/// One writer's pauses. Nothing but a place for a pointer until there is one: idle connections are many.
#[derive(Debug, Default)]
pub struct Stall(Option<Box<Pause>>);

#[derive(Debug)]
struct Pause {
    since: Option<Instant>,
    /// Kept over pauses: a busy writer pauses often, and only a pause that lasts needs its timer set anew.
    timer: Pin<Box<Sleep>>,
}

impl Stall {
    /// The peer has taken something.
    pub fn moved(&mut self) {
        if let Some(pause) = &mut self.0 {
            pause.since = None;
        }
    }

    /// Completes when the peer has taken nothing for so long; asked whenever it takes nothing.
    pub fn poll(&mut self, cx: &mut Context<'_>, limit: Duration) -> Poll<()> {
        let Pause { since, timer } = &mut **self.0.get_or_insert_with(|| {
            Box::new(Pause {
                since: None,
                timer: Box::pin(tokio::time::sleep(limit)),
            })
        });
        let end = *since.get_or_insert_with(now) + limit;
        if timer.deadline() > end {
            timer.as_mut().reset(end);
        }
        loop {
            ready!(timer.as_mut().poll(cx));
            if now() >= end {
                return Poll::Ready(());
            }
            timer.as_mut().reset(end);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_pause_is_measured_from_its_own_beginning() {
        let mut stall = Stall::default();
        let limit = Duration::from_secs(10);
        for _ in 0..5 {
            let short = tokio::time::timeout(Duration::from_secs(8), poll_fn(|cx| stall.poll(cx, limit))).await;
            assert!(short.is_err(), "a peer that takes something now and then is waited for");
            stall.moved();
        }
        let began = now();
        poll_fn(|cx| stall.poll(cx, limit)).await;
        assert_eq!(now() - began, limit);
    }
}
