//! A proxy under test: a process pinned on one core, and what it costs.
//!
//! CPU is the scheduler's own account in nanoseconds (`schedstat` of every
//! thread), which is user and system time without the grain of a clock tick. The
//! same file says how long the process was ready and had to wait for its core:
//! on a quiet machine next to nothing, so it tells how far to trust a run.

use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

/// How long a proxy may take to end before it is killed.
const STOP_DEADLINE: Duration = Duration::from_secs(5);
const ADMIN_DEADLINE: Duration = Duration::from_secs(5);
const MAX_ADMIN_ANSWER: u64 = 1 << 20;
const LOG_TAIL: usize = 15;
/// Between two looks at a process whose memory should come to rest.
const SETTLE_STEP: Duration = Duration::from_millis(200);
const SETTLE_STEPS: u32 = 15;

/// A started program.
pub(crate) struct Process {
    child: Child,
    pid: u32,
    log: PathBuf,
}

/// CPU that a process has used, and time for which it waited to use more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) run: Duration,
    pub(crate) wait: Duration,
}

/// Memory of a process, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Memory {
    pub(crate) resident: u64,
    /// What its allocator has handed out, if its admin page says so.
    pub(crate) allocated: Option<u64>,
}

// === impl Process ===

impl Process {
    /// Starts `program` on one core; what it prints goes to `log`.
    pub(crate) fn start(program: &Path, arguments: &[String], core: usize, log: PathBuf) -> Result<Self> {
        let output = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let child = Command::new("taskset")
            .arg("-c")
            .arg(core.to_string())
            .arg(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .kill_on_drop(true)
            .spawn()
            .context("cannot start taskset: install util-linux")?;
        let pid = child.id().context("the program ended at once")?;
        Ok(Self { child, pid, log })
    }

    /// Fails with the end of its log when the program has ended.
    pub(crate) fn check(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("it ended with {status}; {}", self.log_tail());
        }
        Ok(())
    }

    /// The last lines that it printed, for a person.
    pub(crate) fn log_tail(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(LOG_TAIL)..].join("\n  ");
        format!("the end of {}:\n  {tail}", self.log.display())
    }

    pub(crate) fn usage(&self) -> Result<Usage> {
        let folder = format!("/proc/{}/task", self.pid);
        let mut sum = Usage::default();
        let tasks = std::fs::read_dir(&folder).with_context(|| format!("cannot read {folder}: has the proxy ended?"))?;
        for task in tasks {
            // A thread may end between the listing and the reading.
            if let Ok(text) = std::fs::read_to_string(task?.path().join("schedstat")) {
                let usage = parse_schedstat(&text).with_context(|| format!("{folder}/*/schedstat says {text:?}"))?;
                sum.run += usage.run;
                sum.wait += usage.wait;
            }
        }
        Ok(sum)
    }

    pub(crate) fn resident(&self) -> Result<u64> {
        let path = format!("/proc/{}/status", self.pid);
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        parse_resident(&text).with_context(|| format!("{path} has no VmRSS"))
    }

    /// Its memory once that has come to rest.
    pub(crate) async fn settled(&self, admin: Option<SocketAddr>) -> Result<Memory> {
        let mut resident = self.resident()?;
        for _ in 0..SETTLE_STEPS {
            sleep(SETTLE_STEP).await;
            let now = self.resident()?;
            let still = now.abs_diff(resident) < resident / 1000;
            resident = now;
            if still {
                break;
            }
        }
        let allocated = match admin {
            Some(admin) => timeout(ADMIN_DEADLINE, allocated(admin)).await.unwrap_or(None),
            None => None,
        };
        Ok(Memory { resident, allocated })
    }

    /// Ends the program: by request, then by force.
    pub(crate) async fn stop(mut self) -> Result<()> {
        if let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) {
            // It may have ended by itself.
            let _ = kill_process(pid, Signal::TERM);
        }
        if timeout(STOP_DEADLINE, self.child.wait()).await.is_err() {
            self.child.kill().await?;
        }
        Ok(())
    }
}

fn parse_schedstat(text: &str) -> Option<Usage> {
    let mut numbers = text.split_ascii_whitespace().map(str::parse);
    Some(Usage {
        run: Duration::from_nanos(numbers.next()?.ok()?),
        wait: Duration::from_nanos(numbers.next()?.ok()?),
    })
}

fn parse_resident(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

/// The allocator's figure from an admin port's `/memory`, Envoy's or one like it.
async fn allocated(admin: SocketAddr) -> Option<u64> {
    let mut tcp = TcpStream::connect(admin).await.ok()?;
    tcp.write_all(b"GET /memory HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        .await
        .ok()?;
    let mut answer = String::new();
    tcp.take(MAX_ADMIN_ANSWER).read_to_string(&mut answer).await.ok()?;
    parse_allocated(&answer)
}

fn parse_allocated(answer: &str) -> Option<u64> {
    let json = answer.get(answer.find('{')?..=answer.rfind('}')?)?;
    let memory: Value = serde_json::from_str(json).ok()?;
    match memory.get("allocated")? {
        Value::String(text) => text.parse().ok(),
        Value::Number(number) => number.as_u64(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedstat_is_time_run_and_time_waited() {
        let usage = parse_schedstat("460513 17 2\n").unwrap();
        assert_eq!(usage.run, Duration::from_nanos(460_513));
        assert_eq!(usage.wait, Duration::from_nanos(17));
        assert!(parse_schedstat("").is_none());
    }

    #[test]
    fn resident_memory_is_read_in_bytes() {
        let status = "Name:\tenvoy\nVmRSS:\t   61440 kB\nRssAnon:\t 1 kB\n";
        assert_eq!(parse_resident(status), Some(61_440 * 1024));
        assert_eq!(parse_resident("Name:\tx\n"), None);
    }

    #[test]
    fn allocated_memory_may_be_text_or_a_number_and_chunked() {
        let envoy = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3f\r\n{\n \"allocated\": \"5313920\",\n \"heap_size\": \"8388608\"\n}\n\r\n0\r\n\r\n";
        assert_eq!(parse_allocated(envoy), Some(5_313_920));
        assert_eq!(parse_allocated("\r\n\r\n{\"allocated\":7}"), Some(7));
        assert_eq!(parse_allocated("HTTP/1.1 404 Not Found\r\n\r\n"), None);
    }

    #[test]
    fn a_process_that_runs_has_used_cpu_and_memory() {
        let usage = std::fs::read_to_string("/proc/self/schedstat").unwrap();
        assert!(parse_schedstat(&usage).unwrap().run > Duration::ZERO);
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        assert!(parse_resident(&status).unwrap() > 0);
    }
}
