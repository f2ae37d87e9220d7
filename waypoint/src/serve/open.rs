//! What is open for long, and whether it may stay: TCP connections, HTTP that was switched to another protocol, and requests whose
//! body or answer goes on.
//!
//! A request is decided when it comes; what stays open for hours would outlive any number of policies. So every inner connection is
//! known here, and a task off the data path looks at all of them when the configuration has changed. Where the chain of one is
//! another now, what is open in it is told ([`Changes`]) and decides again in its own task ([`Vigil`]): what is denied is closed. Where
//! the service itself is gone, what is open has the drain time, and is then ended. Nothing else ends it (architecture §4, rule 2).

mod changes;
mod decide;
mod vigil;

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use cairn_exchange::clock::{self, Instant};
use parking_lot::Mutex;
use tokio::time::sleep;

pub use changes::Changes;
use changes::Service;
pub use decide::Asked;
pub use vigil::{Over, Standing, Vigil};

use super::Inner;
use crate::{proxy::Proxy, snapshot::Snapshot};

/// What becomes of what is open when the configuration of its service changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnChange {
    /// It stays, whatever the new policy says.
    Continue,
    /// What the new policy denies is closed.
    #[default]
    Recheck,
    /// All whose chain has changed is closed.
    Close,
}

/// All inner connections, by shards of their numbers.
#[derive(Default)]
pub struct OpenConnections {
    shards: [Mutex<Vec<Weak<Inner>>>; SHARDS],
    /// Those whose service is gone, and since when.
    gone: Mutex<Vec<(Instant, Weak<Inner>)>>,
}

/// What the log says of what policy has closed.
pub const DENIED: &str = "rbac_access_denied_by_changed_policy";
/// What the log says of what ended because its service was gone.
pub const GONE: &str = "downstream_local_disconnect(service_gone)";
/// Envoy's drain time, which is also istiod's default: `ProxyConfig.drainDuration`.
pub const DRAIN: Duration = Duration::from_secs(45);
/// How long the connection of a service that is gone may take to say good-bye when nothing is under way on it.
pub const GOODBYE: Duration = Duration::from_secs(1);
const SHARDS: usize = 16;
/// How often it is looked whether the configuration has changed.
const LOOK: Duration = Duration::from_millis(100);

// === impl OpenConnections ===

impl OpenConnections {
    /// A connection on which something may stay open for long.
    pub fn enter(&self, inner: &Arc<Inner>) {
        #[expect(clippy::cast_possible_truncation, reason = "the remainder is small")]
        let shard = self.shards.get((inner.connection.id % SHARDS as u64) as usize);
        if let Some(shard) = shard {
            let mut open = shard.lock();
            // Those that have ended go before the list would grow.
            if open.len() == open.capacity() {
                open.retain(|inner| inner.strong_count() > 0);
            }
            open.push(Arc::downgrade(inner));
        }
        // What was published since it was let in has been looked at without it.
        self.look_at(inner, &inner.proxy.snapshot.load_full());
    }

    /// Looks at all of them, with the newest configuration.
    fn look(&self, snapshot: &Arc<Snapshot>) {
        for shard in &self.shards {
            let open: Vec<_> = {
                let mut open = shard.lock();
                open.retain(|inner| inner.strong_count() > 0);
                open.iter().filter_map(Weak::upgrade).collect()
            };
            for inner in open {
                self.look_at(&inner, snapshot);
            }
        }
    }

    fn look_at(&self, inner: &Arc<Inner>, snapshot: &Arc<Snapshot>) {
        if inner.proxy.settings.open_connections == OnChange::Continue {
            return;
        }
        match inner.changes.look(inner, snapshot) {
            Service::AsBefore => {}
            Service::Gone => self.gone.lock().push((clock::now(), Arc::downgrade(inner))),
            Service::Back => self
                .gone
                .lock()
                .retain(|(_, gone)| !std::ptr::eq(gone.as_ptr(), Arc::as_ptr(inner))),
        }
    }

    /// Ends what has been without its service for so long.
    fn end_gone(&self, drain: Duration) {
        let now = clock::now();
        let mut late = Vec::new();
        {
            let mut gone = self.gone.lock();
            gone.retain(|(since, inner)| {
                if *since + drain > now {
                    return inner.strong_count() > 0;
                }
                late.extend(inner.upgrade());
                false
            });
        }
        for inner in late {
            inner.changes.end(&inner);
        }
    }
}

impl std::fmt::Debug for OpenConnections {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenConnections").finish_non_exhaustive()
    }
}

/// Looks at what is open whenever the configuration has changed, for as long as there is a proxy.
pub async fn watch(proxy: Weak<Proxy>) {
    let mut seen = None;
    loop {
        sleep(LOOK).await;
        let Some(proxy) = proxy.upgrade() else { return };
        let snapshot = proxy.snapshot.load_full();
        let version = Some(snapshot.version);
        if seen != version {
            proxy.open.look(&snapshot);
        }
        proxy.open.end_gone(proxy.settings.service_drain);
        seen = version;
    }
}
