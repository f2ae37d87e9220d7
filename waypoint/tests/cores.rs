//! The streams of one tunnel use all cores: the tunnel's own task frames and encrypts, each stream's work is a task of its own.
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

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use cairn_exchange::Exchange;
use cairn_filters::{Filter, FilterChain, HttpFilter, Scope, Slot, Verdict};
use outside::Outside;
use rig::{Config, Rig};

const WEB: &str = "10.96.1.10:80";
const WORKERS: usize = 2;

/// What the other tests run as a process of its own; by itself it has nothing to do.
#[test]
fn the_other_side() {
    outside::play();
}

/// A filter that computes for a while.
#[derive(Debug)]
struct Costly;

impl HttpFilter for Costly {
    fn name(&self) -> &str {
        "costly"
    }

    fn decode_head(&self, _: &mut Slot, _: &mut Exchange, _: &Scope<'_>) -> Verdict {
        let until = Instant::now() + Duration::from_micros(100);
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        Verdict::Continue
    }
}

#[test]
fn one_tunnel_keeps_every_worker_busy() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .enable_all()
        .build()
        .unwrap();
    let (rig, mut outside) = runtime.block_on(async {
        let rig = Rig::start().await;
        let outside = Outside::start(&rig);
        let filters = FilterChain::new(vec![Filter::Other(Arc::new(Costly))]);
        rig.serve(Config::default().http_with(WEB, &[outside.web], |http| http.filters = filters, |_| {}))
            .await;
        (rig, outside)
    });
    let metrics = runtime.metrics();
    let busy = || -> Vec<Duration> {
        (0..WORKERS)
            .map(|worker| metrics.worker_total_busy_duration(worker))
            .collect()
    };
    let before = busy();
    outside.ask(&format!("load {WEB} 100 2000"));
    let shares: Vec<f64> = busy()
        .iter()
        .zip(&before)
        .map(|(after, before)| (*after - *before).as_secs_f64())
        .collect();
    let total: f64 = shares.iter().sum();
    eprintln!("busy: {shares:?} s, {} requests", rig.told.lock().len());
    assert!(total > 0.5, "the load was too small to tell: {total} s");
    let least = shares.iter().copied().fold(f64::MAX, f64::min) / total;
    assert!(least >= 0.3, "the less busy worker did {:.0} % of the work", least * 100.0);
    let _inside = runtime.enter();
    drop(rig);
}
