//! After a 101: bytes between client and endpoint until both sides have ended.

use std::sync::Arc;

use cairn_exchange::clock;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncWriteExt as _, copy_bidirectional};

use super::response::Tail;
use crate::proxy::under;

/// Ends the connection of a client whose upgrade was refused, once its answer is out: hyper hands a connection that was asked to
/// switch over to whoever waits for it, whatever the answer was, and does not end it itself.
pub fn end(client: OnUpgrade) {
    tokio::spawn(async move {
        if let Ok(client) = client.await {
            let _ = TokioIo::new(client).shutdown().await;
        }
    });
}

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
