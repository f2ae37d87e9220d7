//! What the proxy holds for connections that do nothing: the slope of allocated bytes over many of them, by the allocator's own count.
//! Clients and pods are another process.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::large_futures,
    clippy::disallowed_methods,
    reason = "a test fails by panicking, and may look at the clock"
)]

#[path = "rig/outside.rs"]
mod outside;
mod rig;

use std::sync::atomic::Ordering;

use outside::{Outside, until};
use rig::{Config, Rig};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const WEB: &str = "10.96.1.10:80";
const DB: &str = "10.96.1.20:5432";
const ANY: &str = "10.96.1.30:7000";
const KIB: usize = 1024;
/// All tests count the same memory.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
/// Connections begun before the first look: what is made once is made then.
const WARM: usize = 300;

/// What the other tests run as a process of its own; by itself it has nothing to do.
#[test]
fn the_other_side() {
    outside::play();
}

fn allocated() -> usize {
    tikv_jemalloc_ctl::epoch::advance().unwrap();
    tikv_jemalloc_ctl::stats::allocated::read().unwrap()
}

/// Bytes for each of `count` more connections of a kind.
async fn slope(kind: &str, authority: &str, count: usize) -> usize {
    let _alone = ALONE.lock().await;
    let rig = Rig::start().await;
    let mut outside = Outside::start(&rig);
    rig.serve(
        Config::default()
            .http(WEB, &[outside.web])
            .tcp(DB, &[outside.mirror])
            .streams(50_000),
    )
    .await;
    let live = &rig.engine.proxy.live;
    let reached = |expected: usize| {
        if kind == "tunnels" {
            live.tunnels.load(Ordering::SeqCst) >= expected as u64 && live.streams.load(Ordering::SeqCst) == 0
        } else {
            live.streams.load(Ordering::SeqCst) == expected as u64
        }
    };
    outside.ask(&format!("{kind} {authority} {WARM}"));
    until("warm", || reached(WARM)).await;
    *rig.told.lock() = Vec::new();
    let tunnels = live.tunnels.load(Ordering::SeqCst);
    let before = allocated();
    outside.ask(&format!("{kind} {authority} {count}"));
    until("begun", || reached(WARM + count)).await;
    *rig.told.lock() = Vec::new();
    let each = allocated().saturating_sub(before) / count;
    eprintln!("{kind}: {each} bytes each");
    outside.ask("drop");
    until("ended", || {
        live.streams.load(Ordering::SeqCst) == 0 && (kind != "tunnels" || live.tunnels.load(Ordering::SeqCst) <= tunnels)
    })
    .await;
    // Nothing stays but what the pool of tunnels to pods keeps.
    let left = allocated().saturating_sub(before) / count;
    eprintln!("{kind}: {left} bytes each are left at the end");
    assert!(left <= each / 4 + KIB, "{left} of {each} bytes stay");
    each
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_live_on_do_not_keep_the_configuration_that_they_began_under() {
    let _alone = ALONE.lock().await;
    let rig = Rig::start().await;
    let mut outside = Outside::start(&rig);
    let config = || {
        Config::default()
            .http(WEB, &[outside.web])
            .tcp(DB, &[outside.mirror])
            .detect(ANY, &[outside.web])
    };
    rig.serve(config()).await;
    let (first, second) = (config(), config());
    let before = std::sync::Arc::downgrade(&rig.engine.snapshot.load_full());
    for (number, kind) in [
        ("streams", WEB),
        ("tcp", DB),
        ("h1", WEB),
        ("h2", WEB),
        ("h1", ANY),
        ("h2", ANY),
    ]
    .into_iter()
    .enumerate()
    {
        outside.ask(&format!("{} {} 1", kind.0, kind.1));
        until("begun", || {
            rig.engine.proxy.live.streams.load(Ordering::SeqCst) == number as u64 + 1
        })
        .await;
    }
    rig.publish(first);
    rig.publish(second);
    // Each worker's cache of the configuration lets go with its next look.
    until("the old configuration is gone", || before.strong_count() == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_accepted_stream_without_bytes_holds_at_most_4_kib() {
    let each = slope("streams", WEB, 10_000).await;
    assert!(each <= 4 * KIB, "{each}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_tcp_connection_holds_at_most_8_kib() {
    let each = slope("tcp", DB, 4_000).await;
    assert!(each <= 8 * KIB, "{each}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_inner_http1_connection_holds_at_most_20_kib() {
    let each = slope("h1", WEB, 4_000).await;
    assert!(each <= 20 * KIB, "{each}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_inner_http2_connection_holds_at_most_48_kib() {
    let each = slope("h2", WEB, 2_000).await;
    assert!(each <= 48 * KIB, "{each}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_tunnel_holds_at_most_64_kib() {
    let each = slope("tunnels", WEB, 400).await;
    assert!(each <= 64 * KIB, "{each}");
}
