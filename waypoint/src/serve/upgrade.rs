//! After a 101: bytes between client and endpoint until both sides have ended.

use std::sync::Arc;

use bytes::Bytes;
use cairn_exchange::{ResponseFlags, clock};
use cairn_hbone::TunnelStream;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;

use super::{
    inner_io::InnerIo,
    limits::{Expired, Limits},
    open::{self, Asked, Standing, Vigil},
    relay::{End, Relay, Terms},
    response::Tail,
};
use crate::{proxy::under, upstream::UpstreamIo};

/// Passes bytes once both connections have been switched, and settles the exchange at their end. What limits the stream's silence
/// and life goes on to.
pub fn pass(client: OnUpgrade, endpoint: OnUpgrade, mut tail: Box<Tail>) {
    tokio::spawn(async move {
        let proxy = tail.inner.proxy.clone();
        let _counted = under(&proxy.live.streams);
        let Some((mut relay, terms)) = switched(client, endpoint, tail.limits.clone()).await else {
            tracing::debug!("an upgrade was not completed");
            tail.finish(false);
            return;
        };
        let Some(chain) = tail.chain.clone() else { return };
        let standing = Standing {
            inner: tail.inner.clone(),
            chain,
            asked: Asked::request(&tail.exchange, tail.asked.take().as_deref()),
            vigil: Vigil::new(tail.exchange.snapshot),
        };
        let end = relay.run(terms, &standing, |_| {}).await;
        let exchange = &mut tail.exchange;
        exchange.counts.received += relay.received;
        exchange.counts.sent += relay.sent;
        exchange.moments.last_upstream_received = Some(clock::now().saturating_duration_since(exchange.start));
        let expired = match end {
            End::Idle => Some(Expired::Idle),
            End::Duration => Some(Expired::Duration),
            End::Clean | End::ClientGone | End::EndpointGone | End::Denied | End::Gone => None,
        };
        let cut = match end {
            End::Denied => Some(open::DENIED),
            End::Gone => Some(open::GONE),
            _ => None,
        };
        if let Some(details) = cut {
            exchange.details = None;
            exchange.because(ResponseFlags::NONE, details);
        }
        if let Some((flags, details)) = expired.map(Expired::told) {
            exchange.details = None;
            exchange.because(flags, details);
        }
        tail.finish(false);
    });
}

/// The bytes of both sides, once hyper has let go of them.
async fn switched(client: OnUpgrade, endpoint: OnUpgrade, limits: Option<Arc<Limits>>) -> Option<(Relay, Terms)> {
    let (client, endpoint) = tokio::try_join!(client, endpoint).ok()?;
    let client = client.downcast::<InnerIo>().ok()?;
    let endpoint = endpoint.downcast::<TokioIo<UpstreamIo>>().ok()?;
    let (stream, held): (TunnelStream, Bytes) = client.io.into_parts(client.read_buf)?;
    let relay = Relay::new(stream, endpoint.io.into_inner(), held, endpoint.read_buf);
    let terms = Terms {
        idle: limits.as_ref().and_then(|limits| limits.idle()),
        until: limits.as_ref().and_then(|limits| limits.stream_end()),
        interval: None,
    };
    Some((relay, terms))
}
