//! The flight recorder: the last exchanges of the running proxy, and the configurations that they saw.
//!
//! A finished exchange is written into a ring of its worker's own, so that no two requests wait for each other; a slot is used again
//! with its memory, so that a full recorder allocates next to nothing. Secrets are taken out while it is written: they are in no
//! record. What became of it is told in full only when somebody asks ([`crate::explain::record`]), from the last configurations that
//! are kept. Everything is bounded: records, bytes of each, configurations.

use std::{
    borrow::Cow,
    cell::Cell,
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use cairn_exchange::{ClusterFacts, Connection, DynamicMetadata, Exchange, Protocol, ResponseFlags};
use cairn_policy::miss::{HIDDEN, is_secret};
use http::Method;
use parking_lot::Mutex;

use crate::snapshot::Snapshot;

/// Records that are kept unless somebody says otherwise.
pub const RECORDS: usize = 1000;
/// Most records that may be asked for.
pub const MOST_RECORDS: usize = 100_000;
/// Configurations that are kept unless somebody says otherwise.
pub const SNAPSHOTS: usize = 4;
/// Most configurations that may be asked for.
pub const MOST_SNAPSHOTS: usize = 64;
/// Bytes of a request's head that are kept.
pub const MOST_HEAD: usize = 4096;
/// Records that a reader looks at before it lets the worker in.
const AT_ONCE: usize = 16;

/// How much is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecorderSettings {
    /// Exchanges; 0 keeps none, and costs nothing.
    pub records: usize,
    /// Configurations.
    pub snapshots: usize,
}

/// The recorder.
#[derive(Debug)]
pub struct Recorder {
    /// One for each worker.
    rings: Box<[Mutex<Ring>]>,
    /// The last configurations, the newest last.
    snapshots: Mutex<VecDeque<Arc<Snapshot>>>,
    most_snapshots: usize,
}

#[derive(Debug)]
struct Ring {
    slots: Vec<Record>,
    most: usize,
    /// How many were written so far: the next one's number.
    written: u64,
}

/// One exchange as it is kept.
#[derive(Clone, Debug)]
pub struct Record {
    /// Its worker and its number there: a name that no other record has.
    pub id: (usize, u64),
    /// When it began.
    pub wall: SystemTime,
    /// How long it took.
    pub duration: Duration,
    /// The parties.
    pub connection: Arc<Connection>,
    /// What was spoken.
    pub protocol: Protocol,
    /// The method; `None` for a connection.
    pub method: Option<Method>,
    /// Path, authority and fields without secrets, a line each.
    head: Vec<u8>,
    /// Whether `head` had to be cut.
    pub cut: bool,
    /// The chain.
    pub chain: Arc<str>,
    /// The route.
    pub route: Option<Arc<str>>,
    /// The cluster.
    pub cluster: Option<Arc<ClusterFacts>>,
    /// The endpoint.
    pub endpoint: Option<Arc<str>>,
    /// Status of the answer.
    pub status: Option<u16>,
    /// What went wrong.
    pub flags: ResponseFlags,
    /// Why it was answered so.
    pub details: Option<Cow<'static, str>>,
    /// How often it was tried.
    pub attempts: u32,
    /// The configuration's version.
    pub snapshot: u64,
    /// What filters noted.
    pub metadata: DynamicMetadata,
}

// === impl RecorderSettings ===

impl Default for RecorderSettings {
    fn default() -> Self {
        Self {
            records: RECORDS,
            snapshots: SNAPSHOTS,
        }
    }
}

// === impl Recorder ===

thread_local! {
    /// The worker's number, once it has recorded something.
    static WORKER: Cell<Option<usize>> = const { Cell::new(None) };
}
static WORKERS: AtomicUsize = AtomicUsize::new(0);

impl Recorder {
    /// A recorder for so many workers; `None` where nothing is to be kept.
    pub fn new(settings: RecorderSettings, workers: usize) -> Option<Self> {
        let records = settings.records.min(MOST_RECORDS);
        if records == 0 {
            return None;
        }
        let workers = workers.clamp(1, records);
        let ring = || Ring {
            slots: Vec::new(),
            most: records / workers,
            written: 0,
        };
        Some(Self {
            rings: std::iter::repeat_with(|| Mutex::new(ring())).take(workers).collect(),
            snapshots: Mutex::default(),
            most_snapshots: settings.snapshots.clamp(1, MOST_SNAPSHOTS),
        })
    }

    /// Keeps a configuration.
    pub fn published(&self, snapshot: Arc<Snapshot>) {
        let gone = {
            let mut kept = self.snapshots.lock();
            kept.push_back(snapshot);
            if kept.len() > self.most_snapshots {
                kept.pop_front()
            } else {
                None
            }
        };
        // What only it held goes outside of the lock.
        drop(gone);
    }

    /// The configuration of this version, where it is still kept.
    pub fn snapshot(&self, version: u64) -> Option<Arc<Snapshot>> {
        let kept = self.snapshots.lock();
        kept.iter().find(|snapshot| snapshot.version == version).cloned()
    }

    /// Writes a finished exchange down.
    pub fn record(&self, exchange: &Exchange) {
        let worker = WORKER.get().unwrap_or_else(|| {
            let worker = WORKERS.fetch_add(1, Ordering::Relaxed);
            WORKER.set(Some(worker));
            worker
        });
        let shard = worker % self.rings.len().max(1);
        if let Some(ring) = self.rings.get(shard) {
            ring.lock().write(shard, exchange);
        }
    }

    /// The records that `wanted` picks, the newest first, `most` at most.
    pub fn find(&self, most: usize, wanted: impl Fn(&Record) -> bool) -> Vec<Record> {
        let mut found = Vec::new();
        for ring in &self.rings {
            let mut before = u64::MAX;
            let mut here = 0;
            // A worker that finishes an exchange meanwhile waits for a few records at most.
            while here < most {
                let ring = ring.lock();
                let end = before.min(ring.written);
                let oldest = ring.written.saturating_sub(ring.slots.len() as u64);
                let begin = end.saturating_sub(AT_ONCE as u64).max(oldest);
                if begin >= end {
                    break;
                }
                for number in (begin..end).rev() {
                    if here < most
                        && let Some(record) = ring.at(number).filter(|record| wanted(record))
                    {
                        found.push(record.clone());
                        here += 1;
                    }
                }
                before = begin;
            }
        }
        found.sort_by_key(|record| std::cmp::Reverse(record.wall + record.duration));
        found.truncate(most);
        found
    }
}

// === impl Ring ===

impl Ring {
    fn at(&self, number: u64) -> Option<&Record> {
        let at = usize::try_from(number % self.most.max(1) as u64).ok()?;
        self.slots.get(at).filter(|record| record.id.1 == number)
    }

    fn write(&mut self, shard: usize, exchange: &Exchange) {
        let id = (shard, self.written);
        let at = usize::try_from(self.written % self.most.max(1) as u64).unwrap_or(0);
        self.written += 1;
        // The memory of the head that was there is used again.
        let mut head = self
            .slots
            .get_mut(at)
            .map(|old| std::mem::take(&mut old.head))
            .unwrap_or_default();
        let cut = write_head(exchange, &mut head);
        let record = Record {
            id,
            wall: exchange.wall,
            duration: exchange.moments.last_sent.unwrap_or_else(|| exchange.elapsed()),
            connection: exchange.connection.clone(),
            protocol: exchange.protocol,
            method: exchange.request.as_ref().map(|request| request.method.clone()),
            head,
            cut,
            chain: exchange.chain.clone(),
            route: exchange.route.clone(),
            cluster: exchange.cluster.clone(),
            endpoint: exchange.upstream.as_ref().map(|upstream| upstream.display.clone()),
            status: exchange.status.map(|status| status.as_u16()),
            flags: exchange.flags,
            details: exchange.details.clone(),
            attempts: exchange.attempts,
            snapshot: exchange.snapshot,
            metadata: exchange.metadata.clone(),
        };
        match self.slots.get_mut(at) {
            Some(slot) => *slot = record,
            None => self.slots.push(record),
        }
    }
}

/// Writes path, authority and fields; whether something was left out.
fn write_head(exchange: &Exchange, into: &mut Vec<u8>) -> bool {
    into.clear();
    let Some(request) = &exchange.request else { return false };
    // The client's own path, where the route has rewritten it.
    let original = request
        .headers
        .get("x-envoy-original-path")
        .and_then(|path| path.to_str().ok());
    let path = original.unwrap_or(request.path.as_str());
    let (path, query) = path.split_once('?').map_or((path, None), |(path, query)| (path, Some(query)));
    let mut cut = !put(into, &[path.as_bytes()]);
    for (nth, pair) in query.into_iter().flat_map(|query| query.split('&')).enumerate() {
        let name = pair.split('=').next().unwrap_or_default();
        let between: &[u8] = if nth == 0 { b"?" } else { b"&" };
        cut |= if is_secret(name) {
            !put(into, &[between, name.as_bytes(), b"=", HIDDEN.as_bytes()])
        } else {
            !put(into, &[between, pair.as_bytes()])
        };
    }
    cut |= !put(into, &[b"\n", request.authority.as_bytes(), b"\n"]);
    for (name, value) in &request.headers {
        let value = if value.is_sensitive() || is_secret(name.as_str()) || is_credential(value.as_bytes()) {
            HIDDEN.as_bytes()
        } else {
            value.as_bytes()
        };
        cut |= !put(into, &[name.as_str().as_bytes(), b": ", value, b"\n"]);
    }
    cut
}

/// A credential under a name that does not say so.
fn is_credential(value: &[u8]) -> bool {
    let starts = |scheme: &[u8]| {
        value
            .get(..scheme.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(scheme))
    };
    starts(b"bearer ") || starts(b"basic ") || value.starts_with(b"eyJ")
}

/// All of the parts, or none.
fn put(into: &mut Vec<u8>, parts: &[&[u8]]) -> bool {
    let fits = into.len() + parts.iter().map(|part| part.len()).sum::<usize>() <= MOST_HEAD;
    if fits {
        parts.iter().for_each(|part| into.extend_from_slice(part));
    }
    fits
}

// === impl Record ===

impl Record {
    fn lines(&self) -> impl Iterator<Item = Cow<'_, str>> {
        self.head.split(|byte| *byte == b'\n').map(String::from_utf8_lossy)
    }

    /// The path, without secrets in its query.
    pub fn path(&self) -> Option<Cow<'_, str>> {
        self.method.as_ref()?;
        self.lines().next()
    }

    /// The authority.
    pub fn authority(&self) -> Option<Cow<'_, str>> {
        self.method.as_ref()?;
        self.lines().nth(1)
    }

    /// Fields as `name: value`, without secrets.
    pub fn fields(&self) -> impl Iterator<Item = Cow<'_, str>> {
        self.lines().skip(2).filter(|line| !line.is_empty())
    }

    /// The value of a field.
    pub fn field(&self, name: &str) -> Option<String> {
        self.fields().find_map(|line| {
            let (found, value) = line.split_once(": ")?;
            (found == name).then(|| value.to_owned())
        })
    }

    /// Its name: `WORKER-NUMBER`.
    pub fn name(&self) -> String {
        format!("{}-{}", self.id.0, self.id.1)
    }

    /// Whether it goes by this name, or by this `x-request-id`.
    pub fn is(&self, id: &str) -> bool {
        self.name() == id || self.field("x-request-id").is_some_and(|own| own == id)
    }
}

#[cfg(test)]
mod tests;
