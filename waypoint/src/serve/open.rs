//! Connections that are open for long, and whether policy still allows them: TCP, and HTTP that was switched to another protocol.
//!
//! A request is decided when it comes; what stays open for hours would outlive any number of policies. So each such connection keeps
//! its [`Ticket`], and a task off the data path looks at all of them when the configuration has changed: one whose chain is another
//! now is decided again, and closed if it is denied. Nothing else ends it (architecture §4, rule 2).

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use cairn_exchange::{DynamicMetadata, Exchange, Protocol, RequestHead};
use cairn_filters::OnRoute;
use cairn_policy::route::Facts;
use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use tokio::time::sleep;

use super::{Inner, ask::FromRequest};
use crate::{
    proxy::Proxy,
    snapshot::{Chain, ChainKind, Serves, Snapshot},
};

/// What becomes of open connections when the policy of their service changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnChange {
    /// They stay, whatever the new policy says.
    Continue,
    /// Those that the new policy denies are closed.
    #[default]
    Recheck,
    /// All whose chain has changed are closed.
    Close,
}

/// All open connections, by shards of their numbers.
#[derive(Debug, Default)]
pub struct OpenConnections {
    shards: [Mutex<Vec<Weak<Ticket>>>; SHARDS],
}

/// One open connection. It is forgotten when this is dropped.
pub struct Ticket {
    inner: Arc<Inner>,
    /// The chain that has decided last.
    chain: Mutex<Arc<Chain>>,
    asked: Asked,
    denied: AtomicBool,
    waker: AtomicWaker,
}

/// What was asked, as filters saw it.
#[derive(Default)]
pub struct Asked {
    /// The request; none for TCP.
    pub request: Option<Box<RequestHead>>,
    /// What filters had noted.
    pub metadata: DynamicMetadata,
}

/// What the log says of a connection that was closed.
pub const DENIED: &str = "rbac_access_denied_by_changed_policy";
const SHARDS: usize = 16;
/// How often it is looked whether the configuration has changed.
const LOOK: Duration = Duration::from_millis(100);

// === impl OpenConnections ===

impl OpenConnections {
    /// A connection that this chain has let in.
    pub fn enter(&self, inner: Arc<Inner>, chain: Arc<Chain>, asked: Asked) -> Arc<Ticket> {
        let number = inner.connection.id;
        let ticket = Arc::new(Ticket {
            inner,
            chain: Mutex::new(chain),
            asked,
            denied: AtomicBool::new(false),
            waker: AtomicWaker::new(),
        });
        #[expect(clippy::cast_possible_truncation, reason = "the remainder is small")]
        let shard = self.shards.get((number % SHARDS as u64) as usize);
        if let Some(shard) = shard {
            let mut open = shard.lock();
            // Those that have ended go before the list would grow.
            if open.len() == open.capacity() {
                open.retain(|ticket| ticket.strong_count() > 0);
            }
            open.push(Arc::downgrade(&ticket));
        }
        // What was published since it was let in has been looked at without it.
        let proxy = &ticket.inner.proxy;
        ticket.recheck(proxy.settings.open_connections, &proxy.snapshot.load_full());
        ticket
    }

    /// Looks at all of them, with the newest configuration.
    fn recheck(&self, proxy: &Proxy, snapshot: &Arc<Snapshot>) {
        for shard in &self.shards {
            let open: Vec<_> = {
                let mut open = shard.lock();
                open.retain(|ticket| ticket.strong_count() > 0);
                open.iter().filter_map(Weak::upgrade).collect()
            };
            for ticket in open {
                ticket.recheck(proxy.settings.open_connections, snapshot);
            }
        }
    }
}

/// Decides about open connections again whenever the configuration has changed, for as long as there is a proxy.
pub async fn watch(proxy: Weak<Proxy>) {
    let mut seen = None;
    loop {
        sleep(LOOK).await;
        let Some(proxy) = proxy.upgrade() else { return };
        let snapshot = proxy.snapshot.load_full();
        let version = Some(snapshot.version);
        if seen != version && proxy.settings.open_connections != OnChange::Continue {
            proxy.open.recheck(&proxy, &snapshot);
        }
        seen = version;
    }
}

// === impl Ticket ===

impl Ticket {
    fn recheck(&self, on_change: OnChange, snapshot: &Arc<Snapshot>) {
        if on_change == OnChange::Continue {
            return;
        }
        let chain = match snapshot.serves(&self.inner.facts()) {
            Serves::Http(chain) | Serves::Tcp(chain) => chain,
            // The service is gone, or speaks another protocol now: nobody has denied anything.
            Serves::Detect | Serves::Nobody(_) => return,
        };
        if Arc::ptr_eq(&chain, &self.chain.lock()) {
            return;
        }
        let denied = match on_change {
            OnChange::Continue => None,
            OnChange::Close => Some("its service's configuration has changed".to_owned()),
            OnChange::Recheck => self.denied_by(&chain, snapshot),
        };
        *self.chain.lock() = chain;
        if let Some(why) = denied {
            tracing::info!(
                authority = %self.inner.connection.authority,
                client = %self.inner.connection.remote_address,
                %why,
                "an open connection is closed: policy denies it now"
            );
            self.denied.store(true, Ordering::Release);
            self.waker.wake();
        }
    }

    /// Why the chain would not let it in now.
    fn denied_by(&self, chain: &Arc<Chain>, snapshot: &Arc<Snapshot>) -> Option<String> {
        if let Some(refusal) = &chain.refuse {
            return Some(refusal.reason.to_string());
        }
        let connection = self.inner.connection.clone();
        let is_http = self.asked.request.is_some();
        let protocol = if is_http { Protocol::Http11 } else { Protocol::Tcp };
        let mut exchange = Exchange::begin(protocol, connection, chain.name.clone(), snapshot.version);
        exchange.request = self.asked.request.as_deref().cloned();
        exchange.metadata = self.asked.metadata.clone();
        match &chain.kind {
            ChainKind::Tcp(tcp) if !is_http => tcp.rbac.check(&mut exchange).err().map(|denied| denied.details()),
            ChainKind::Http(http) => {
                let head = self.asked.request.as_deref()?;
                let facts = Facts {
                    random: 0,
                    metadata: &self.asked.metadata,
                };
                let route = OnRoute::new(http.routes.find(head, facts), None);
                let services = FromRequest::new(&self.inner, snapshot);
                http.filters.denies(&mut exchange, &route, &services)
            }
            _ => None,
        }
    }

    /// Ready when it is to be closed.
    pub fn poll_denied(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.waker.register(cx.waker());
        if self.denied.load(Ordering::Acquire) {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }
}

impl std::fmt::Debug for Ticket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ticket")
            .field("connection", &self.inner.connection)
            .finish_non_exhaustive()
    }
}
