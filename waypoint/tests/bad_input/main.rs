//! Bad input on the data path: the proxy answers as it should, tells of it once, keeps nothing, and goes on.
//!
//! * `tunnels`: who may not have one, and HTTP/2 that is none;
//! * `requests`: framing, heads and bodies that are wrong or late;
//! * `smuggling`: what two readers could read differently;
//! * `endpoints`: destinations that misbehave, and clients that leave.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::large_futures,
    clippy::disallowed_methods,
    unreachable_pub,
    reason = "a test fails by panicking, and may look at the clock"
)]

mod endpoints;
mod requests;
#[path = "../rig/mod.rs"]
mod rig;
mod smuggling;
mod tunnels;
mod wire;

use std::time::Duration;

use http::StatusCode;
use rig::{Config, Pod, Rig, echo_app, fetch};

const WEB: &str = "10.96.1.10:80";
const DB: &str = "10.96.1.20:5432";
const ANY: &str = "10.96.1.30:7000";
const PATIENCE: Duration = Duration::from_secs(10);

async fn mesh() -> (Rig, Pod) {
    let rig = Rig::start().await;
    let pod = rig.pod(10, echo_app("web")).await;
    let endpoints = [pod.address];
    rig.serve(
        Config::default()
            .http(WEB, &endpoints)
            .tcp(DB, &endpoints)
            .detect(ANY, &endpoints),
    )
    .await;
    (rig, pod)
}

/// The proxy still serves, and holds nothing.
async fn still_well(rig: &Rig) {
    assert_eq!(fetch(&mut rig.http1(WEB).await, "/").await.0, StatusCode::OK);
    rig.settled().await;
}
