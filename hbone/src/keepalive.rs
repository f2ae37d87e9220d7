//! Whether the peer is still there: PINGs on one connection.
//!
//! A PING goes out at each interval, whatever else happens, as `connect_terminate` and ztunnel do it (10 s), and a peer that has not
//! answered within the timeout (20 s) is gone. What runs with it keeps the windows in step with the number of streams.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use cairn_exchange::clock;
use h2::{Ping, PingPong};
use tokio::time::{Sleep, sleep_until};

use crate::{
    shared::Shared,
    windows::{Sizes, Windows},
};

/// When a peer that is silent counts as gone.
#[derive(Clone, Copy, Debug)]
pub struct KeepaliveSettings {
    /// Between two PINGs (10 s).
    pub interval: Duration,
    /// How long the peer may take to answer one (20 s).
    pub timeout: Duration,
}

/// The PINGs of one connection, and the window sizes that follow from them.
pub(crate) struct Keepalive {
    ping_pong: PingPong,
    settings: KeepaliveSettings,
    windows: Windows,
    timer: Pin<Box<Sleep>>,
    in_flight: bool,
    /// What the connection was told last, as far as it took it.
    applied: Sizes,
}

/// The peer did not answer a PING in time.
#[derive(Debug)]
pub(crate) struct PeerGone;

/// The parts of a connection that change its windows, the same on both sides.
pub(crate) trait Resize {
    fn set_connection_window(&mut self, bytes: u32);
    /// False while an earlier change waits for the peer's acknowledgement.
    fn set_stream_window(&mut self, bytes: u32) -> bool;
}

impl Default for KeepaliveSettings {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(10),
            timeout: Duration::from_secs(20),
        }
    }
}

// === impl Keepalive ===

impl Keepalive {
    pub(crate) fn new(ping_pong: PingPong, settings: KeepaliveSettings, windows: Windows) -> Self {
        let now = clock::now();
        Self {
            ping_pong,
            settings,
            applied: windows.sizes(),
            windows,
            timer: Box::pin(sleep_until(now + settings.interval)),
            in_flight: false,
        }
    }

    /// Sends and awaits PINGs and keeps the windows right; called whenever the connection's task runs.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, shared: &Shared, connection: &mut impl Resize) -> Poll<PeerGone> {
        self.windows.cover(shared.streams());
        loop {
            match self.step(cx) {
                Ok(true) => {}
                Ok(false) => break,
                Err(gone) => return Poll::Ready(gone),
            }
        }
        self.apply(cx, shared, connection);
        Poll::Pending
    }

    /// One PING sent or answered; false when there is nothing more to do now.
    fn step(&mut self, cx: &mut Context<'_>) -> Result<bool, PeerGone> {
        if self.in_flight {
            match self.ping_pong.poll_pong(cx) {
                Poll::Ready(Ok(_)) => {
                    self.in_flight = false;
                    self.timer.as_mut().reset(clock::now() + self.settings.interval);
                    return Ok(true);
                }
                // The connection is over, of which its own poll tells more.
                Poll::Ready(Err(_)) => return Ok(false),
                Poll::Pending => {}
            }
            return if self.timer.as_mut().poll(cx).is_ready() {
                Err(PeerGone)
            } else {
                Ok(false)
            };
        }
        if self.timer.as_mut().poll(cx).is_pending() || self.ping_pong.send_ping(Ping::opaque()).is_err() {
            return Ok(false);
        }
        self.in_flight = true;
        self.timer.as_mut().reset(clock::now() + self.settings.timeout);
        Ok(true)
    }

    /// Tells the connection its new sizes: the larger window first when growing, the smaller first when shrinking.
    fn apply(&mut self, cx: &Context<'_>, shared: &Shared, connection: &mut impl Resize) {
        let sizes = self.windows.sizes();
        if sizes == self.applied {
            return;
        }
        if sizes.connection > self.applied.connection {
            connection.set_connection_window(sizes.connection);
            self.applied.connection = sizes.connection;
        }
        if sizes.stream != self.applied.stream && connection.set_stream_window(sizes.stream) {
            self.applied.stream = sizes.stream;
            // `h2` sends the SETTINGS at its next poll, and does not ask for one.
            cx.waker().wake_by_ref();
        }
        if sizes.connection < self.applied.connection && sizes.stream == self.applied.stream {
            connection.set_connection_window(sizes.connection);
            self.applied.connection = sizes.connection;
        }
        shared.set_release_at(self.windows.release_at());
    }
}
