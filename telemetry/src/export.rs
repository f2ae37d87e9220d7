//! Records on their way to a collector: a bounded queue for each destination, sent in batches, never in a request's way.
//!
//! A record is written where it arises, and handed over as bytes; [`Exporter::push`] never waits and counts what finds no room. A task
//! on another runtime gathers records until there are enough or the oldest has waited long enough, puts them into one message
//! ([`Envelope`]), and has a [`Courier`] carry it: this crate knows neither clusters nor connections. A message that does not arrive is
//! counted and forgotten. Chains with the same destination share its queue, and a queue nobody writes to ends by itself.

mod envelope;
#[cfg(test)]
mod tests;

use std::{
    fmt,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use cairn_exchange::clock;
use parking_lot::Mutex;
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot},
    time::{timeout, timeout_at},
};

pub use envelope::{Envelope, Layer};

use crate::{Counter, Registry};

/// Most bytes of records that wait for one destination.
pub const QUEUE_BYTES: usize = 8 * 1024 * 1024;
/// Most bytes of records in one message: below what gRPC servers take by default.
pub const BATCH_BYTES: usize = 1024 * 1024;
/// Most destinations at once; configuration that names more is not exported to the rest.
pub const MAX_DESTINATIONS: usize = 256;

/// Carries messages to destinations of kind `D`.
pub trait Courier<D>: Send + Sync {
    /// Carries a message there, within a time of its own; an error says in words why it did not arrive.
    fn carry(&self, to: &D, message: Bytes) -> Carried;
}

/// Done when the message has arrived.
pub type Carried = Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;

/// What is sent, and where.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec<D> {
    /// Where to.
    pub destination: D,
    /// What the records of a message are put into.
    pub envelope: Envelope,
    /// What the records are, in metrics: `traces`.
    pub kind: &'static str,
    /// Where they go, in metrics: a cluster.
    pub name: Arc<str>,
    /// How many wait, and how long.
    pub limits: Limits,
}

/// How many records wait, and how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Records that wait at most.
    pub queue: usize,
    /// Records in a message at most.
    pub batch: usize,
    /// Bytes after which a message is sent.
    pub bytes: usize,
    /// Time after which a message is sent.
    pub interval: Duration,
}

/// All destinations of the process; clones share them. The default has none, and forgets what it is given.
pub struct Exports<D> {
    inner: Option<Arc<Inner<D>>>,
}

struct Inner<D> {
    runtime: Handle,
    registry: Registry,
    courier: Arc<dyn Courier<D>>,
    open: Mutex<Vec<Open<D>>>,
}

/// A destination that somebody may still write to, and its counters.
type Open<D> = (Spec<D>, mpsc::WeakSender<Item>, Exporter);

/// The queue to one destination; cheap to clone.
#[derive(Clone, Debug)]
pub struct Exporter {
    sender: Option<mpsc::Sender<Item>>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    waiting: AtomicUsize,
    sent: Counter,
    dropped: Counter,
    failed: Counter,
}

#[derive(Debug)]
enum Item {
    Record(Vec<u8>),
    /// Send what waits, and say so.
    Flush(oneshot::Sender<()>),
}

// === impl Limits ===

impl Default for Limits {
    fn default() -> Self {
        Self {
            queue: 2048,
            batch: 512,
            bytes: BATCH_BYTES,
            interval: Duration::from_secs(1),
        }
    }
}

// === impl Exports ===

impl<D> Clone for Exports<D> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
        }
    }
}

impl<D> Default for Exports<D> {
    fn default() -> Self {
        Self { inner: None }
    }
}

impl<D> fmt::Debug for Exports<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let open = self.inner.as_ref().map_or(0, |inner| inner.open.lock().len());
        write!(f, "Exports({open} destinations)")
    }
}

impl<D: Clone + PartialEq + Send + Sync + 'static> Exports<D> {
    /// Destinations that `courier` reaches; messages are made on `runtime`, which should not be the one that serves requests.
    pub fn new(runtime: Handle, registry: &Registry, courier: Arc<dyn Courier<D>>) -> Self {
        Self {
            inner: Some(Arc::new(Inner {
                runtime,
                registry: registry.clone(),
                courier,
                open: Mutex::default(),
            })),
        }
    }

    /// The queue to a destination: the one that is there, or a new one.
    pub fn open(&self, spec: Spec<D>) -> Exporter {
        let Some(inner) = &self.inner else {
            return Exporter {
                sender: None,
                shared: Arc::default(),
            };
        };
        let mut open = inner.open.lock();
        open.retain(|(_, sender, _)| sender.strong_count() > 0);
        let known = open.iter().find(|(known, ..)| *known == spec);
        if let Some((sender, exporter)) = known.and_then(|(_, sender, exporter)| Some((sender.upgrade()?, exporter))) {
            return Exporter {
                sender: Some(sender),
                shared: exporter.shared.clone(),
            };
        }
        let labels = [("kind", spec.kind), ("destination", &*spec.name)];
        let count = |name, help| inner.registry.counter(name, help, &labels);
        let shared = Arc::new(Shared {
            waiting: AtomicUsize::new(0),
            sent: count("cairn_export_sent_records_total", "Records that a collector has taken."),
            dropped: count(
                "cairn_export_dropped_records_total",
                "Records that were dropped because their collector is too slow.",
            ),
            failed: count(
                "cairn_export_failed_records_total",
                "Records that are lost because they could not be sent to their collector.",
            ),
        });
        let nowhere = Exporter {
            sender: None,
            shared: shared.clone(),
        };
        if open.len() >= MAX_DESTINATIONS {
            tracing::warn!(destination = %spec.name, "records are not exported: there are {MAX_DESTINATIONS} destinations already, which is the limit");
            return nowhere;
        }
        let (sender, receiver) = mpsc::channel(spec.limits.queue.max(1));
        inner
            .runtime
            .spawn(send_all(spec.clone(), inner.courier.clone(), shared.clone(), receiver));
        open.push((spec, sender.downgrade(), nowhere));
        Exporter {
            sender: Some(sender),
            shared,
        }
    }

    /// Sends what waits, everywhere; gives up after `deadline` and says whether all was sent or lost by then.
    pub async fn flush(&self, deadline: Duration) -> bool {
        let Some(inner) = &self.inner else { return true };
        let senders: Vec<_> = inner
            .open
            .lock()
            .iter()
            .filter_map(|(_, sender, _)| sender.upgrade())
            .collect();
        let all = async {
            let mut done = Vec::new();
            for sender in senders {
                let (tell, told) = oneshot::channel();
                if sender.send(Item::Flush(tell)).await.is_ok() {
                    done.push(told);
                }
            }
            for told in done {
                // Whoever has ended has nothing left.
                let _ = told.await;
            }
        };
        timeout(deadline, all).await.is_ok()
    }
}

// === impl Exporter ===

impl Exporter {
    /// Hands a record over; never waits.
    pub fn push(&self, record: Vec<u8>) {
        let Some(sender) = &self.sender else {
            self.shared.dropped.add(1);
            return;
        };
        let length = record.len();
        if self.shared.waiting.load(Relaxed).saturating_add(length) > QUEUE_BYTES {
            self.shared.dropped.add(1);
            return;
        }
        self.shared.waiting.fetch_add(length, Relaxed);
        if sender.try_send(Item::Record(record)).is_err() {
            self.shared.waiting.fetch_sub(length, Relaxed);
            self.shared.dropped.add(1);
        }
    }
}

impl PartialEq for Exporter {
    /// Whether both write to the same queue.
    fn eq(&self, other: &Self) -> bool {
        match (&self.sender, &other.sender) {
            (Some(one), Some(other)) => one.same_channel(other),
            (None, None) => true,
            _ => false,
        }
    }
}

/// Sends until nobody writes any more.
async fn send_all<D>(spec: Spec<D>, courier: Arc<dyn Courier<D>>, shared: Arc<Shared>, mut receiver: mpsc::Receiver<Item>) {
    let Limits {
        batch: most,
        bytes: enough,
        interval,
        ..
    } = spec.limits;
    let mut batch: Vec<Vec<u8>> = Vec::new();
    let mut failing = false;
    loop {
        let mut bytes = 0;
        let mut flushed = None;
        let mut take = |item, batch: &mut Vec<Vec<u8>>| match item {
            Item::Record(record) => {
                bytes += record.len();
                batch.push(record);
                batch.len() >= most || bytes >= enough
            }
            Item::Flush(tell) => {
                flushed = Some(tell);
                true
            }
        };
        let Some(first) = receiver.recv().await else { return };
        if !take(first, &mut batch) {
            let deadline = clock::now() + interval;
            while let Ok(Some(item)) = timeout_at(deadline, receiver.recv()).await {
                if take(item, &mut batch) {
                    break;
                }
            }
        }
        if !batch.is_empty() {
            shared.waiting.fetch_sub(bytes, Relaxed);
            let records = u64::try_from(batch.len()).unwrap_or(u64::MAX);
            let message = spec.envelope.wrap(&batch);
            batch.clear();
            let carried = courier.carry(&spec.destination, message).await;
            match &carried {
                Ok(()) => {
                    shared.sent.add(records);
                    if failing {
                        tracing::info!(destination = %spec.name, kind = spec.kind, "the collector takes records again");
                    }
                }
                Err(why) => {
                    shared.failed.add(records);
                    if !failing {
                        tracing::warn!(destination = %spec.name, kind = spec.kind, why, "records are lost: their collector did not take them");
                    }
                }
            }
            failing = carried.is_err();
        }
        if let Some(tell) = flushed {
            // Nobody may be waiting any more.
            let _ = tell.send(());
        }
    }
}
