//! Answers that a filter slows down: the body goes out in slices, none before its time.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use cairn_exchange::clock;
use http_body::{Body as _, Frame};
use tokio::time::Sleep;

use crate::body::{BodyError, Incoming};

/// Slices a second, as Envoy's limiter has.
const SLICES: u64 = 16;

/// A body that is not faster than its rate.
pub struct Pace {
    slice: usize,
    interval: Duration,
    /// When the next slice may go.
    turn: Pin<Box<Sleep>>,
    held: Bytes,
}

// === impl Pace ===

impl Pace {
    /// This many bytes a second.
    pub fn new(rate: u64) -> Self {
        let slice = (rate / SLICES).max(1);
        Self {
            slice: usize::try_from(slice).unwrap_or(usize::MAX),
            interval: Duration::from_secs_f64(slice as f64 / rate.max(1) as f64),
            turn: Box::pin(tokio::time::sleep_until(clock::now())),
            held: Bytes::new(),
        }
    }

    /// The next slice of a body, when its time has come.
    pub fn poll(&mut self, body: &mut Incoming, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.held.is_empty() {
            match ready!(Pin::new(body).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.held = data,
                    Err(other) => return Poll::Ready(Some(Ok(other))),
                },
                other => return Poll::Ready(other),
            }
        }
        ready!(self.turn.as_mut().poll(cx));
        let now = clock::now();
        let slice = self.held.split_to(self.slice.min(self.held.len()));
        self.turn.as_mut().reset(now + self.interval);
        Poll::Ready(Some(Ok(Frame::data(slice))))
    }

    /// Whether nothing is held back.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_body_takes_the_time_that_its_rate_says() {
        let mut body = Incoming::whole(Bytes::from(vec![b'x'; 4096]), None);
        let mut pace = Pace::new(1024);
        let start = clock::now();
        let mut read = 0;
        while let Some(frame) = poll_fn(|cx| pace.poll(&mut body, cx)).await {
            let data = frame.unwrap().into_data().unwrap();
            assert!(data.len() <= 64);
            read += data.len();
        }
        assert!(pace.is_empty());
        assert_eq!(read, 4096);
        // The first slice goes at once.
        let took = clock::now() - start;
        assert!(
            (Duration::from_millis(3900)..Duration::from_millis(4100)).contains(&took),
            "{took:?}"
        );
    }
}
