//! Faults put in on purpose (contract xds §3.8, §4.8): delays, errors, slow answers.
//!
//! The route's own faults replace those of the chain. A delay holds the request up before it goes anywhere, and its abort, if there is
//! one, comes after it. How many are under way at once is counted for the filter, whatever route they stand on.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use cairn_exchange::{Exchange, ResponseFlags};
use cairn_policy::fault::{Aborted, Faults};
use http::StatusCode;

use crate::{
    contract::{LocalReply, Slot, Verdict},
    on_route::{RouteConfig, Scope},
};

/// The filter.
#[derive(Debug, Default)]
pub struct Fault {
    /// Faults where the route says nothing.
    pub faults: Arc<Faults>,
    /// Faults under way.
    pub active: Arc<AtomicU64>,
}

/// What it keeps for a request.
#[derive(Debug, Default)]
pub struct Injected {
    /// Bytes a second of the answer.
    rate: Option<u64>,
    _counted: Option<Counted>,
}

/// One fault under way, until it is dropped.
#[derive(Debug)]
struct Counted(Arc<AtomicU64>);

// === impl Fault ===

impl Fault {
    pub(crate) fn decode_head(&self, slot: &mut Slot, exchange: &mut Exchange, scope: &Scope<'_>) -> Verdict {
        let faults = match scope.config() {
            Some(RouteConfig::Fault(faults)) => faults,
            _ => &self.faults,
        };
        if faults.is_inert() {
            return Verdict::Continue;
        }
        let Some(head) = &exchange.request else {
            return Verdict::Continue;
        };
        if !faults.applies(head, scope.route.cluster().map(|name| &**name)) {
            return Verdict::Continue;
        }
        let rate = faults.rate(head, fastrand::u64(..));
        let delay = faults.delay(head, fastrand::u64(..));
        let abort = faults.abort(head, fastrand::u64(..));
        let counted = if delay.is_some() || abort.is_some() || rate.is_some() {
            match Counted::one_more(&self.active, faults.max_active) {
                Some(counted) => Some(counted),
                None => return Verdict::Continue,
            }
        } else {
            return Verdict::Continue;
        };
        *slot = Slot::Fault(Injected { rate, _counted: counted });
        match (delay, abort) {
            (None, None) => Verdict::Continue,
            (None, Some(abort)) => Verdict::Reply(aborted(abort)),
            (Some(delay), abort) => {
                exchange.flags.insert(ResponseFlags::DELAY_INJECTED);
                Verdict::Stop(Box::pin(held_up(delay, abort)))
            }
        }
    }
}

async fn held_up(delay: Duration, abort: Option<Aborted>) -> crate::contract::Resume {
    tokio::time::sleep(delay).await;
    Box::new(move |_| match abort {
        Some(abort) => Verdict::Reply(aborted(abort)),
        None => Verdict::Continue,
    })
}

fn aborted(abort: Aborted) -> LocalReply {
    let (status, grpc_status) = match abort {
        Aborted::Http(status) => (status, None),
        Aborted::Grpc(code) => (StatusCode::OK, Some(code)),
    };
    let body = Bytes::from_static(b"fault filter abort");
    LocalReply {
        grpc_status,
        ..LocalReply::new(status, ResponseFlags::FAULT_INJECTED, "fault_filter_abort", body)
    }
}

// === impl Injected ===

impl Injected {
    /// Bytes a second of the answer, where they are limited.
    pub(crate) fn rate(&self) -> Option<u64> {
        self.rate
    }
}

// === impl Counted ===

impl Counted {
    fn one_more(active: &Arc<AtomicU64>, most: Option<u64>) -> Option<Self> {
        let most = most.unwrap_or(u64::MAX);
        let counted = active.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| (now < most).then_some(now + 1));
        counted.is_ok().then(|| Self(active.clone()))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
