//! After a 101: bytes between client and endpoint until both sides have ended.

use std::sync::Arc;

use cairn_exchange::clock;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::copy_bidirectional;

use super::response::Tail;
use crate::proxy::under;

/// Passes bytes once both connections have been switched, and settles the exchange at their end.
pub fn pass(client: OnUpgrade, endpoint: OnUpgrade, mut tail: Box<Tail>) {
    tokio::spawn(async move {
        let proxy = Arc::clone(&tail.inner.proxy);
        let _counted = under(&proxy.live.streams);
        let (client, endpoint) = match tokio::try_join!(client, endpoint) {
            Ok(both) => both,
            Err(error) => {
                tracing::debug!(%error, "an upgrade was not completed");
                tail.finish(false);
                return;
            }
        };
        let (mut client, mut endpoint) = (TokioIo::new(client), TokioIo::new(endpoint));
        match copy_bidirectional(&mut client, &mut endpoint).await {
            Ok((received, sent)) => {
                tail.exchange.counts.received += received;
                tail.exchange.counts.sent += sent;
            }
            Err(error) => tracing::debug!(%error, "an upgraded connection was cut"),
        }
        tail.exchange.moments.last_upstream_received = Some(clock::now().saturating_duration_since(tail.exchange.start));
        tail.finish(false);
    });
}
