//! Mirrors: copies of requests, sent beside them and forgotten.
//!
//! A copy goes out with the first attempt, as the route edited the request, over the endpoints, tunnels and connections of the mirror's
//! cluster, and counts there as a request. It is made once, and its answer is thrown away. Nothing that becomes of it reaches the
//! request: its body is taken from what the endpoint reads, without waiting ([`crate::body::MAX_BEHIND`]), and there are at most
//! [`MAX_COPIES`] at once.

use std::{
    future::poll_fn,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use cairn_exchange::{Exchange, Protocol, RequestHead};
use cairn_policy::route::Mirror;
use futures_util::future::{Either, select};
use http::{HeaderName, HeaderValue, Method};
use http_body::Body as _;
use parking_lot::Mutex;
use tokio::time::sleep;

use super::{
    call::{self, Caller},
    request::Journey,
};
use crate::{
    body::{BodyError, CopyBudget, Incoming, Progress, RequestBody, RequestSource},
    proxy::{Proxy, Under, under},
    snapshot::Snapshot,
    upstream::Cluster,
};

/// Copies under way at once; beyond that none is made.
pub const MAX_COPIES: u64 = 4096;
/// How long a mirror may take to answer after the request's end, where its route says nothing.
const PATIENCE: Duration = Duration::from_secs(300);

const INTERNAL: HeaderName = HeaderName::from_static("x-envoy-internal");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// What is known of all copies.
#[derive(Debug, Default)]
pub struct Mirrors {
    under_way: AtomicU64,
    /// Copies that were begun.
    pub begun: AtomicU64,
    /// Copies that were not made: too many under way, or no such cluster.
    pub skipped: AtomicU64,
    /// Copies that got no whole answer.
    pub failed: AtomicU64,
    /// What their bodies hold.
    pub bodies: Arc<CopyBudget>,
}

/// One copy on its way.
struct Copy {
    proxy: Arc<Proxy>,
    snapshot: Arc<Snapshot>,
    cluster: Arc<Cluster>,
    head: RequestHead,
    body: Incoming,
    progress: Option<Progress>,
    caller: Caller,
    patience: Duration,
}

/// Sends the copies that are due of a request, which is about to leave itself.
pub fn begin(journey: &mut Journey<'_>, mirrors: &[Mirror], timeout: Option<Duration>) {
    let is_connect = |head: &RequestHead| head.method == Method::CONNECT;
    if journey.upgrading || journey.tail.exchange.request.as_ref().is_none_or(is_connect) {
        return;
    }
    for mirror in mirrors {
        if mirror.fraction.contains(journey.random) {
            let counts = &journey.tail.inner.proxy.clone().mirrors;
            match copy(journey, mirror, timeout) {
                Some(copy) => {
                    counts.begun.fetch_add(1, Relaxed);
                    tokio::spawn(copy.go());
                }
                None => {
                    counts.skipped.fetch_add(1, Relaxed);
                }
            }
        }
    }
}

fn copy(journey: &mut Journey<'_>, mirror: &Mirror, timeout: Option<Duration>) -> Option<Copy> {
    let tail = &mut journey.tail;
    let proxy = tail.inner.proxy.clone();
    if proxy.mirrors.under_way.load(Relaxed) >= MAX_COPIES {
        return None;
    }
    let name = mirror.choose(&tail.exchange.request.as_ref()?.headers)?;
    let cluster = journey.snapshot.clusters.get(name)?.clone();
    let head = edited(&mut tail.exchange, mirror, &proxy)?;
    let (body, progress) = match &tail.source {
        None => (Incoming::Empty, None),
        Some(source) => {
            let (body, progress) = source.lock().copy(&proxy.mirrors.bodies)?;
            (body, Some(progress))
        }
    };
    let connection = &tail.exchange.connection;
    Some(Copy {
        snapshot: journey.snapshot.clone(),
        cluster,
        head,
        body,
        progress,
        caller: Caller {
            principal: connection.peer.clone(),
            address: connection.remote_address,
            connection: connection.id,
            protocol: match tail.exchange.protocol {
                Protocol::Http2 => Protocol::Http2,
                _ => Protocol::Http11,
            },
        },
        patience: timeout.unwrap_or(PATIENCE),
        proxy,
    })
}

/// The head of a copy: the mirror's edits, then what tells that it is one.
fn edited(exchange: &mut Exchange, mirror: &Mirror, proxy: &Proxy) -> Option<RequestHead> {
    let original = exchange.request.clone();
    for edit in &mirror.edits {
        edit.apply_to_request(exchange);
    }
    let mut head = std::mem::replace(&mut exchange.request, original)?;
    head.authority = mirror.authority(&head.authority);
    head.headers.insert(INTERNAL, HeaderValue::from_static("true"));
    if let Some(address) = proxy.settings.node.address {
        let address = address.to_string();
        let all = match head.headers.get(FORWARDED_FOR) {
            None => HeaderValue::try_from(address),
            Some(before) => HeaderValue::from_bytes(&[before.as_bytes(), b",", address.as_bytes()].concat()),
        };
        if let Ok(all) = all {
            head.headers.insert(FORWARDED_FOR, all);
        }
    }
    Some(head)
}

// === impl Copy ===

impl Copy {
    async fn go(self) {
        let proxy = self.proxy.clone();
        let _counted: Under<'_> = under(&proxy.mirrors.under_way);
        let name = self.cluster.facts.name.clone();
        if let Err(reason) = self.send().await {
            proxy.mirrors.failed.fetch_add(1, Relaxed);
            tracing::debug!(cluster = %name, %reason, "a copy of a request was not answered");
        }
    }

    /// Sends it and throws the answer away; the error says why there is none, or no whole one.
    async fn send(self) -> Result<(), String> {
        let Self {
            proxy,
            snapshot,
            cluster,
            head,
            body,
            mut progress,
            caller,
            patience,
        } = self;
        let body = match progress {
            None => RequestBody::empty(),
            Some(_) => RequestBody::next_attempt(&Arc::new(Mutex::new(RequestSource::new(body, false)))),
        };
        let sent = {
            let exchanged = pin!(async {
                let mut sent = call::send_body(&proxy, &snapshot, cluster, &head, body, &caller).await?;
                while let Some(frame) = poll_fn(|cx| Pin::new(&mut sent.answer.body).poll_frame(cx)).await {
                    frame.map_err(|error| error.to_string())?;
                }
                Ok::<_, String>(sent)
            });
            let given_up = pin!(async {
                if let Some(progress) = &mut progress
                    && !progress.original_ended().await
                {
                    // A mirror that takes nothing may not notice it by its body.
                    return BodyError::Cut.to_string();
                }
                sleep(patience).await;
                format!("it took longer than {patience:?}")
            });
            match select(exchanged, given_up).await {
                Either::Left((sent, _)) => sent?,
                Either::Right((reason, _)) => return Err(reason),
            }
        };
        sent.settle(progress.is_none_or(|progress| progress.is_taken()), caller.connection);
        Ok(())
    }
}
