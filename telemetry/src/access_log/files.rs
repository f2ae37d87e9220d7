//! The files that access logs go to: a queue and a writer for each path of the process.
//!
//! A line is appended to a bounded queue in memory and counted as dropped when that is full; no request ever waits for a disk.
//! The queue has several parts, chosen by thread, so that busy threads do not meet at one lock; lines of one thread keep their order.
//! The writer takes everything that waits when there is enough for a good write, and at least every [`FLUSH_INTERVAL`].

use std::{
    cell::Cell,
    collections::HashMap,
    fs::OpenOptions,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    runtime::Handle,
    sync::{Notify, mpsc, oneshot},
};

use crate::{Counter, Registry};

/// Most bytes of lines that wait for a file; as many again may be on their way to the disk.
pub const QUEUE_BYTES: usize = 4 * 1024 * 1024;
/// The writer is woken when so many bytes wait in a part of the queue.
pub const FLUSH_BYTES: usize = 64 * 1024;
/// Lines wait at most so long for others.
pub const FLUSH_INTERVAL: Duration = Duration::from_secs(1);

/// Parts of a queue.
const PARTS: usize = 8;
const PART_BYTES: usize = QUEUE_BYTES / PARTS;
/// Most files that the process logs to; configuration that names more is refused.
pub const MAX_FILES: usize = 64;
/// Requests to flush that may wait.
const COMMANDS: usize = 16;

/// All log files of the process; clones share them.
#[derive(Clone, Debug)]
pub struct LogFiles {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    runtime: Handle,
    registry: Registry,
    files: Mutex<HashMap<PathBuf, LogFile>>,
}

/// The queue to one file; cheap to clone.
#[derive(Clone, Debug)]
pub struct LogFile {
    queue: Arc<Queue>,
    commands: mpsc::Sender<oneshot::Sender<()>>,
}

/// A file cannot be logged to.
#[derive(Debug, thiserror::Error)]
#[error("the access log {path} cannot be opened for appending: {source}")]
pub struct LogFileError {
    /// The file.
    pub path: PathBuf,
    /// What the operating system says.
    pub source: io::Error,
}

#[derive(Debug)]
struct Queue {
    parts: [Mutex<Vec<u8>>; PARTS],
    enough: Notify,
    reopen: AtomicBool,
    dropped: Counter,
    failed: Counter,
}

/// The open file.
struct Output {
    path: PathBuf,
    writer: Box<dyn Write + Send>,
    /// Whether the last write failed, so that a full disk is told once.
    failing: bool,
}

// === impl LogFiles ===

impl LogFiles {
    /// Files whose writers run on `runtime`, which should not be the one that serves requests.
    pub fn new(runtime: Handle, registry: &Registry) -> Self {
        Self {
            inner: Arc::new(Inner {
                runtime,
                registry: registry.clone(),
                files: Mutex::default(),
            }),
        }
    }

    /// The queue to a file, which is opened when it is the first. `/dev/stdout` and `/dev/stderr` are the process's own.
    pub fn open(&self, path: impl AsRef<Path>) -> Result<LogFile, LogFileError> {
        let path = path.as_ref();
        let mut files = self.inner.files.lock();
        if let Some(file) = files.get(path) {
            return Ok(file.clone());
        }
        let opened = if files.len() < MAX_FILES {
            open(path)
        } else {
            Err(io::Error::other(format!(
                "there are {MAX_FILES} log files already, which is the limit"
            )))
        };
        let writer = opened.map_err(|source| LogFileError {
            path: path.to_owned(),
            source,
        })?;
        let file = self.start(path, writer);
        files.insert(path.to_owned(), file.clone());
        Ok(file)
    }

    /// Opens all files anew before the next write: for whoever has moved them away.
    pub fn reopen(&self) {
        for file in self.inner.files.lock().values() {
            file.queue.reopen.store(true, Relaxed);
        }
    }

    /// Writes what waits, for all files; gives up after `deadline` and says whether everything was written.
    pub async fn flush(&self, deadline: Duration) -> bool {
        let files: Vec<LogFile> = self.inner.files.lock().values().cloned().collect();
        let all = async {
            for file in &files {
                file.flush().await;
            }
        };
        tokio::time::timeout(deadline, all).await.is_ok()
    }

    pub(super) fn start(&self, path: &Path, writer: Box<dyn Write + Send>) -> LogFile {
        let name = path.display().to_string();
        let registry = &self.inner.registry;
        let queue = Arc::new(Queue {
            parts: Default::default(),
            enough: Notify::new(),
            reopen: AtomicBool::new(false),
            dropped: registry.counter(
                "cairn_access_log_dropped_lines_total",
                "Lines of access logs that were dropped because their file is too slow.",
                &[("path", &name)],
            ),
            failed: registry.counter(
                "cairn_access_log_failed_writes_total",
                "Writes to access logs that failed; their lines are lost.",
                &[("path", &name)],
            ),
        });
        let output = Output {
            path: path.to_owned(),
            writer,
            failing: false,
        };
        let (commands, requests) = mpsc::channel(COMMANDS);
        self.inner.runtime.spawn(write_all(Arc::clone(&queue), output, requests));
        LogFile { queue, commands }
    }
}

/// Opens a path for appending.
fn open(path: &Path) -> io::Result<Box<dyn Write + Send>> {
    Ok(match path.to_str() {
        Some("/dev/stdout") => Box::new(io::stdout()),
        Some("/dev/stderr") => Box::new(io::stderr()),
        _ => Box::new(OpenOptions::new().append(true).create(true).open(path)?),
    })
}

// === impl LogFile ===

/// The same queue.
impl PartialEq for LogFile {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.queue, &other.queue)
    }
}

impl LogFile {
    /// Appends a line to the queue, or drops it; never waits.
    pub fn push(&self, line: &[u8]) {
        if !self.queue.push(line) {
            self.queue.dropped.inc();
        }
    }

    /// How many lines were dropped.
    pub fn dropped(&self) -> u64 {
        self.queue.dropped.get()
    }

    /// Waits until everything that was pushed before is written.
    pub async fn flush(&self) {
        let (done, written) = oneshot::channel();
        if self.commands.send(done).await.is_ok() {
            // An error means that the writer is gone with its runtime, and nothing will be written any more.
            let _ = written.await;
        }
    }
}

// === impl Queue ===

impl Queue {
    fn push(&self, line: &[u8]) -> bool {
        let Some(part) = self.parts.get(own_part()) else {
            return false;
        };
        let waiting = {
            let mut part = part.lock();
            if part.len() + line.len() > PART_BYTES {
                return false;
            }
            part.extend_from_slice(line);
            part.len()
        };
        // Told once, when the threshold is passed: the writer takes everything.
        if waiting >= FLUSH_BYTES && waiting - line.len() < FLUSH_BYTES {
            self.enough.notify_one();
        }
        true
    }

    /// Takes everything that waits.
    fn take(&self, batch: &mut Vec<u8>) {
        batch.clear();
        for part in &self.parts {
            let mut part = part.lock();
            batch.extend_from_slice(&part);
            part.clear();
            part.shrink_to(FLUSH_BYTES);
        }
    }
}

/// The part of every queue that this thread appends to.
fn own_part() -> usize {
    static THREADS: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static OWN: Cell<Option<usize>> = const { Cell::new(None) };
    }
    OWN.get().unwrap_or_else(|| {
        let own = THREADS.fetch_add(1, Relaxed) % PARTS;
        OWN.set(Some(own));
        own
    })
}

/// Writes to one file until nobody can push any more.
async fn write_all(queue: Arc<Queue>, mut output: Output, mut requests: mpsc::Receiver<oneshot::Sender<()>>) {
    let mut batch = Vec::new();
    loop {
        let request = tokio::select! {
            () = queue.enough.notified() => None,
            () = tokio::time::sleep(FLUSH_INTERVAL) => None,
            request = requests.recv() => match request {
                Some(done) => Some(done),
                None => return,
            },
        };
        queue.take(&mut batch);
        let reopen = queue.reopen.swap(false, Relaxed);
        if reopen || !batch.is_empty() {
            let written = tokio::task::spawn_blocking(move || {
                let error = output.write(&batch, reopen).err();
                (output, batch, error)
            });
            let Ok((returned, emptied, error)) = written.await else {
                tracing::error!("the writer of an access log has ended with its runtime");
                return;
            };
            (output, batch) = (returned, emptied);
            batch.shrink_to(FLUSH_BYTES);
            output.note(error, &queue.failed);
        }
        if let Some(done) = request {
            // Whoever asked may have stopped waiting.
            let _ = done.send(());
        }
    }
}

// === impl Output ===

impl Output {
    fn write(&mut self, batch: &[u8], reopen: bool) -> io::Result<()> {
        if reopen {
            self.writer = open(&self.path)?;
        }
        self.writer.write_all(batch)?;
        self.writer.flush()
    }

    fn note(&mut self, error: Option<io::Error>, failed: &Counter) {
        let failing = error.is_some();
        if let Some(error) = error {
            failed.inc();
            if !self.failing {
                tracing::warn!(path = %self.path.display(), %error, "an access log cannot be written; its lines are lost until it can");
            }
        } else if self.failing {
            tracing::info!(path = %self.path.display(), "an access log can be written again");
        }
        self.failing = failing;
    }
}
