//! Load: the request sets of the rig, as tasks that run until they are told to stop.
//!
//! A [`Work`] says what is sent: requests in streams of long-lived tunnels
//! (closed loop, or open at a fixed rate), bytes in TCP streams, or cold
//! connections with one request each. An [`Entry`] says into what: a waypoint's
//! HBONE port, or the bare relay, which gets the same requests on as many plain
//! connections as the waypoint gets streams.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Result;
use rustls::ClientConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::client::{Http1, Http2};
use crate::destination::{BLOCK_SIZE, SINK, SOURCE};
use crate::mesh::{HTTP_AUTHORITY, TCP_AUTHORITY};
use crate::tally::{Schedule, Tally};
use crate::tunnel::{Channel, Tunnel, dial};

/// Cold connections come from this many addresses, so that none runs out of ports.
const SOURCES: u64 = 200;

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// Keep-alive requests on `tunnels` × `streams` channels.
    Requests {
        tunnels: usize,
        streams: usize,
        inner: Inner,
        pace: Pace,
    },
    /// Bytes both ways: on each tunnel, half of its streams up and half down.
    Bytes { tunnels: usize, streams: usize },
    /// A connection, a stream and a request at a time, by `workers` at once.
    Cold { workers: usize },
}

/// The protocol inside a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Inner {
    Http1,
    /// HTTP/2, with so many requests at once on each stream.
    Http2 {
        concurrent: usize,
    },
}

/// When the next request is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    /// As soon as the last one is answered.
    Closed,
    /// So many a second, whatever the answers do.
    Rate(u32),
}

/// Where load goes in.
#[derive(Clone)]
pub(crate) enum Entry {
    Waypoint { address: SocketAddr, tls: Arc<ClientConfig> },
    Relay(SocketAddr),
}

/// A tunnel, or where there is none, the place that plain connections go to.
#[derive(Clone)]
pub(crate) enum Line {
    Tunnel(Tunnel),
    Plain(SocketAddr, Option<SocketAddr>),
}

// === impl Entry ===

impl Entry {
    pub(crate) async fn line(&self, source: Option<SocketAddr>) -> Result<Line> {
        Ok(match self {
            Self::Waypoint { address, tls } => Line::Tunnel(Tunnel::connect(*address, tls, source).await?),
            Self::Relay(address) => Line::Plain(*address, source),
        })
    }
}

// === impl Line ===

impl Line {
    pub(crate) async fn open(&self, authority: &str) -> Result<Channel> {
        match self {
            Self::Tunnel(tunnel) => tunnel.open(authority).await,
            Self::Plain(address, source) => Ok(Channel::Plain(dial(*address, *source).await?)),
        }
    }
}

// === impl Work ===

impl Work {
    /// Opens every channel, then starts the tasks that use them.
    pub(crate) async fn start(self, entry: &Entry, tally: &Arc<Tally>, sunk: &Arc<AtomicU64>) -> Result<JoinSet<()>> {
        let mut tasks = JoinSet::new();
        match self {
            Self::Requests {
                tunnels,
                streams,
                inner,
                pace,
            } => {
                let channels = open(entry, tunnels, streams, HTTP_AUTHORITY).await?;
                start_requests(&mut tasks, channels, inner, pace, tally).await?;
            }
            Self::Bytes { tunnels, streams } => {
                let channels = open(entry, tunnels, streams, TCP_AUTHORITY).await?;
                for (index, channel) in channels.into_iter().enumerate() {
                    if index % 2 == 0 {
                        spawn(&mut tasks, tally, download(channel, Arc::clone(tally)));
                    } else {
                        spawn(&mut tasks, tally, upload(channel, Arc::clone(tally)));
                    }
                }
                tasks.spawn(copy_sunk(Arc::clone(tally), Arc::clone(sunk)));
            }
            Self::Cold { workers } => {
                let next = Arc::new(AtomicU64::new(0));
                for _ in 0..workers {
                    let work = cold(entry.clone(), Arc::clone(&next), Arc::clone(tally));
                    spawn(&mut tasks, tally, work);
                }
            }
        }
        Ok(tasks)
    }
}

/// Runs `work` as a task; its failure goes into the tally, unless the run is over.
fn spawn<W>(tasks: &mut JoinSet<()>, tally: &Arc<Tally>, work: W)
where
    W: Future<Output = Result<()>> + Send + 'static,
{
    let tally = Arc::clone(tally);
    tasks.spawn(async move {
        if let Err(error) = work.await
            && !tally.is_stopped()
        {
            tally.fail(&error);
        }
    });
}

async fn open(entry: &Entry, tunnels: usize, streams: usize, authority: &str) -> Result<Vec<Channel>> {
    let mut channels = Vec::with_capacity(tunnels * streams);
    for _ in 0..tunnels {
        let line = entry.line(None).await?;
        for _ in 0..streams {
            channels.push(line.open(authority).await?);
        }
    }
    Ok(channels)
}

async fn start_requests(
    tasks: &mut JoinSet<()>,
    channels: Vec<Channel>,
    inner: Inner,
    pace: Pace,
    tally: &Arc<Tally>,
) -> Result<()> {
    let schedule = match pace {
        Pace::Closed => None,
        Pace::Rate(rate) => Some(Schedule::start(rate, tally)?),
    };
    for channel in channels {
        match inner {
            Inner::Http1 => {
                let (tally_of_task, schedule) = (Arc::clone(tally), schedule.clone());
                spawn(tasks, tally, async move {
                    let mut http = Http1::new(channel);
                    while let Some(start) = begin(schedule.as_deref(), &tally_of_task).await {
                        http.get().await?;
                        tally_of_task.succeed(start);
                    }
                    http.close().await
                });
            }
            Inner::Http2 { concurrent } => {
                let http = Http2::start(channel).await?;
                for _ in 0..concurrent {
                    let (tally_of_task, schedule) = (Arc::clone(tally), schedule.clone());
                    let mut http = http.clone();
                    spawn(tasks, tally, async move {
                        while let Some(start) = begin(schedule.as_deref(), &tally_of_task).await {
                            http.get().await?;
                            tally_of_task.succeed(start);
                        }
                        Ok(())
                    });
                }
            }
        }
    }
    Ok(())
}

/// The time at which the next request begins, or none when the run is over.
async fn begin(schedule: Option<&Schedule>, tally: &Tally) -> Option<Instant> {
    match schedule {
        Some(schedule) => schedule.next(tally).await,
        None => (!tally.is_stopped()).then(Instant::now),
    }
}

async fn download(mut channel: Channel, tally: Arc<Tally>) -> Result<()> {
    channel.write_all(SOURCE).await?;
    let mut block = vec![0; BLOCK_SIZE];
    while !tally.is_stopped() {
        let size = channel.read(&mut block).await?;
        anyhow::ensure!(size > 0, "a download ended before its time");
        tally.add_bytes(size);
    }
    Ok(())
}

async fn upload(mut channel: Channel, tally: Arc<Tally>) -> Result<()> {
    channel.write_all(SINK).await?;
    let block = vec![0; BLOCK_SIZE];
    while !tally.is_stopped() {
        channel.write_all(&block).await?;
    }
    Ok(channel.shutdown().await?)
}

/// Uploaded bytes count when the destination has them.
async fn copy_sunk(tally: Arc<Tally>, sunk: Arc<AtomicU64>) {
    let mut before = sunk.load(Ordering::Relaxed);
    let mut tick = tokio::time::interval(std::time::Duration::from_millis(5));
    while !tally.is_stopped() {
        tick.tick().await;
        let now = sunk.load(Ordering::Relaxed);
        tally.add_bytes(usize::try_from(now - before).unwrap_or(usize::MAX));
        before = now;
    }
}

async fn cold(entry: Entry, next: Arc<AtomicU64>, tally: Arc<Tally>) -> Result<()> {
    while !tally.is_stopped() {
        let start = Instant::now();
        let number = next.fetch_add(1, Ordering::Relaxed);
        let http = answered_cold(&entry, Some(source(number))).await?;
        tally.succeed(start);
        http.close().await?;
    }
    Ok(())
}

/// A connection, a stream and one request, ended in order.
pub(crate) async fn one_cold(entry: &Entry, source: Option<SocketAddr>) -> Result<()> {
    answered_cold(entry, source).await?.close().await
}

async fn answered_cold(entry: &Entry, source: Option<SocketAddr>) -> Result<Http1> {
    let line = entry.line(source).await?;
    let mut http = Http1::new(line.open(HTTP_AUTHORITY).await?);
    http.get().await?;
    Ok(http)
}

/// The source address of the `number`th cold connection.
fn source(number: u64) -> SocketAddr {
    let host = u8::try_from(number % SOURCES).unwrap_or(0) + 1;
    SocketAddr::from((Ipv4Addr::new(127, 0, 2, host), 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cold_connections_take_turns_among_loopback_addresses() {
        assert_eq!(source(0).to_string(), "127.0.2.1:0");
        assert_eq!(source(SOURCES - 1).to_string(), "127.0.2.200:0");
        assert_eq!(source(SOURCES), source(0));
    }
}
