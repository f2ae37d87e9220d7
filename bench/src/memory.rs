//! What idle things weigh: bytes of a stream, a connection or a tunnel that waits.
//!
//! A fresh proxy holds a tenth of the things, then all of them; the difference
//! in memory divided by the difference in number is the slope, free of what the
//! program weighs by itself. Tunnels that only carry the things are opened before
//! the first look. Two figures are taken: resident memory, and where the admin
//! port's `/memory` tells it, what the allocator has handed out.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use crate::client::{Http1, Http2};
use crate::destination::ECHO;
use crate::load::Line;
use crate::mesh::{HTTP_AUTHORITY, TCP_AUTHORITY};
use crate::proxy::Memory;
use crate::report;
use crate::rig::{Kind, Proxy, Rig};
use crate::tunnel::Channel;

/// Envoy takes 100 streams of a tunnel.
const STREAMS_PER_TUNNEL: usize = 100;
/// Things that are opened at once.
const OPENING: usize = 32;
/// The first look is at this part of the things.
const FIRST_PART: usize = 10;
/// Of the things that were weighed, every so many is used to see that it still works.
const PROVE_EVERY: usize = 10;
const PROVE_DEADLINE: Duration = Duration::from_secs(5);

/// What is idle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Idle {
    Stream,
    Tcp,
    Http1,
    Http2,
    Tunnel,
}

/// Bytes of each thing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Slope {
    pub(crate) resident: f64,
    pub(crate) allocated: Option<f64>,
}

impl Idle {
    pub(crate) const ALL: [Self; 5] = [Self::Stream, Self::Tcp, Self::Http1, Self::Http2, Self::Tunnel];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stream => "memory-stream",
            Self::Tcp => "memory-tcp",
            Self::Http1 => "memory-h1",
            Self::Http2 => "memory-h2",
            Self::Tunnel => "memory-tunnel",
        }
    }

    /// The most that one may weigh in our proxy, in bytes.
    pub(crate) fn bound(self) -> f64 {
        1024.0
            * match self {
                Self::Stream => 4.0,
                Self::Tcp => 8.0,
                Self::Http1 => 20.0,
                Self::Http2 => 48.0,
                Self::Tunnel => 64.0,
            }
    }
}

/// A thing that is kept idle.
enum Held {
    Stream(Channel),
    Tcp(Channel),
    Http1(Http1),
    Http2(Http2),
    Tunnel(Line),
}

impl Held {
    /// Fails unless the proxy still carries what it was measured for.
    async fn prove(self) -> Result<()> {
        match self {
            Self::Stream(channel) => Http1::new(channel).get().await,
            Self::Tcp(mut channel) => echo(&mut channel).await,
            Self::Http1(mut http) => http.get().await,
            Self::Http2(mut http) => http.get().await,
            Self::Tunnel(line) => {
                let mut http = Http1::new(line.open(HTTP_AUTHORITY).await?);
                http.get().await
            }
        }
    }
}

/// A byte there and back.
async fn echo(channel: &mut Channel) -> Result<()> {
    channel.write_all(b"x").await?;
    let echoed = channel.read_u8().await?;
    ensure!(echoed == b'x', "the TCP chain changed a byte");
    Ok(())
}

/// Measures `count` of each idle thing on every waypoint.
pub(crate) async fn measure(rig: &Rig, count: usize) -> Result<Vec<(Idle, Vec<(Kind, Slope)>)>> {
    let mut found = Vec::new();
    for idle in Idle::ALL {
        let mut slopes = Vec::new();
        for kind in rig.kinds() {
            if kind == Kind::Relay {
                continue;
            }
            let run = format!("{} {} × {count}", idle.name(), kind.name());
            let proxy = rig.launch(kind).await?;
            report::progress(&run);
            let slope = slope(&proxy, idle, count)
                .await
                .with_context(|| format!("{run} failed; {}", proxy.process.log_tail()));
            proxy.process.stop().await?;
            slopes.push((kind, slope?));
        }
        found.push((idle, slopes));
    }
    Ok(found)
}

async fn slope(proxy: &Proxy, idle: Idle, count: usize) -> Result<Slope> {
    let mut lines = Vec::new();
    if idle != Idle::Tunnel {
        for _ in 0..count.div_ceil(STREAMS_PER_TUNNEL) {
            lines.push(proxy.entry.line(None).await?);
        }
    }
    let first = count / FIRST_PART;
    let mut held = hold(proxy, idle, &lines, 0..first).await?;
    let before = proxy.process.settled(proxy.admin).await?;
    held.extend(hold(proxy, idle, &lines, first..count).await?);
    let after = proxy.process.settled(proxy.admin).await?;
    // What was closed behind our back would weigh nothing.
    for held in held.into_iter().step_by(PROVE_EVERY) {
        timeout(PROVE_DEADLINE, held.prove())
            .await
            .with_context(|| format!("no answer within {PROVE_DEADLINE:?}"))
            .flatten()
            .context("an idle one was closed while it was weighed")?;
    }
    Ok(difference(before, after, count - first))
}

async fn hold(proxy: &Proxy, idle: Idle, lines: &[Line], range: std::ops::Range<usize>) -> Result<Vec<Held>> {
    stream::iter(range.map(|index| {
        let line = (!lines.is_empty()).then(|| lines[index % lines.len()].clone());
        one(proxy, idle, line)
    }))
    .buffer_unordered(OPENING)
    .try_collect()
    .await
}

async fn one(proxy: &Proxy, idle: Idle, line: Option<Line>) -> Result<Held> {
    let line = match line {
        Some(line) => line,
        None => proxy.entry.line(None).await?,
    };
    Ok(match idle {
        Idle::Tunnel => Held::Tunnel(line),
        Idle::Stream => Held::Stream(line.open(HTTP_AUTHORITY).await?),
        Idle::Tcp => {
            let mut channel = line.open(TCP_AUTHORITY).await?;
            channel.write_all(ECHO).await?;
            echo(&mut channel).await?;
            Held::Tcp(channel)
        }
        Idle::Http1 => {
            let mut http = Http1::new(line.open(HTTP_AUTHORITY).await?);
            http.get().await?;
            Held::Http1(http)
        }
        Idle::Http2 => {
            let mut http = Http2::start(line.open(HTTP_AUTHORITY).await?).await?;
            http.get().await?;
            Held::Http2(http)
        }
    })
}

fn difference(before: Memory, after: Memory, count: usize) -> Slope {
    #[expect(clippy::cast_precision_loss, reason = "memory sizes and counts are far below 2^52")]
    let each = |before: u64, after: u64| (after as f64 - before as f64) / count as f64;
    Slope {
        resident: each(before.resident, after.resident),
        allocated: before
            .allocated
            .zip(after.allocated)
            .map(|(before, after)| each(before, after)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slope_is_what_each_thing_added() {
        let memory = |resident, allocated| Memory { resident, allocated };
        let slope = difference(memory(50_000_000, Some(1_000_000)), memory(59_000_000, Some(4_600_000)), 900);
        assert_eq!(
            slope,
            Slope {
                resident: 10_000.0,
                allocated: Some(4_000.0)
            }
        );
        let unknown = difference(memory(0, None), memory(900, Some(1)), 900);
        assert_eq!(unknown.allocated, None);
    }
}
