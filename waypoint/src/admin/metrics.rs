//! Our own metrics beside Istio's: how the proxy fares, for dashboards and alerts.
//!
//! Values are read when they are shown; nothing is counted twice.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::SystemTime,
};

use cairn_exchange::clock;
use cairn_telemetry::Registry;
use cairn_xds::{StatusSnapshot, TypeStatus, TypeUrl};

use crate::{
    config::{
        Effect, Store,
        compiler::{ADDRESSES, CLUSTERS, ENDPOINTS, EXTENSIONS, LISTENERS, PROXY_CONFIG, SECRETS, WORKLOADS},
    },
    proxy::{Live, Proxy},
    serve::Mirrors,
};

/// The types of resources, by the short names that Istio's metrics use.
const TYPES: [(&str, &str); 8] = [
    ("cds", CLUSTERS),
    ("eds", ENDPOINTS),
    ("lds", LISTENERS),
    ("ecds", EXTENSIONS),
    ("sds", SECRETS),
    ("wads", ADDRESSES),
    ("wds", WORKLOADS),
    ("pcds", PROXY_CONFIG),
];

/// What is under way, the configuration, and the certificate.
pub fn register(registry: &Registry, proxy: &Arc<Proxy>, store: &Arc<Store>) {
    live(registry, proxy);
    mirrors(registry, proxy);
    configuration(registry, proxy, store);
    certificate(registry, proxy);
}

fn live(registry: &Registry, proxy: &Arc<Proxy>) {
    type Field = fn(&Live) -> &AtomicU64;
    let gauges: [(&'static str, &'static str, Field); 3] = [
        ("cairn_tunnels", "Tunnel connections from clients.", |live| &live.tunnels),
        ("cairn_streams", "CONNECT streams in tunnels.", |live| &live.streams),
        ("cairn_exchanges", "Requests and TCP connections under way.", |live| {
            &live.exchanges
        }),
    ];
    for (name, help, field) in gauges {
        let proxy = proxy.clone();
        registry.gauge_fn(name, help, &[], move || field(&proxy.live).load(Relaxed) as f64);
    }
    let counters: [(&'static str, &'static str, Field); 2] = [
        ("cairn_refused_connects_total", "CONNECTs that were refused.", |live| {
            &live.refused
        }),
        (
            "cairn_failed_handshakes_total",
            "TLS handshakes of clients that failed.",
            |live| &live.handshakes_failed,
        ),
    ];
    for (name, help, field) in counters {
        let proxy = proxy.clone();
        registry.counter_fn(name, help, &[], move || field(&proxy.live).load(Relaxed) as f64);
    }
}

fn mirrors(registry: &Registry, proxy: &Arc<Proxy>) {
    type Field = fn(&Mirrors) -> &AtomicU64;
    let counters: [(&'static str, &'static str, Field); 4] = [
        (
            "cairn_mirrored_requests_total",
            "Copies of requests that were sent to mirrors.",
            |mirrors| &mirrors.begun,
        ),
        (
            "cairn_mirrors_skipped_total",
            "Copies that were not made: too many under way, or no such cluster.",
            |mirrors| &mirrors.skipped,
        ),
        (
            "cairn_mirrors_cut_total",
            "Copies that were cut because their mirror was too far behind.",
            |mirrors| &mirrors.bodies.cut,
        ),
        ("cairn_mirrors_failed_total", "Copies that got no whole answer.", |mirrors| {
            &mirrors.failed
        }),
    ];
    for (name, help, field) in counters {
        let proxy = proxy.clone();
        registry.counter_fn(name, help, &[], move || field(&proxy.mirrors).load(Relaxed) as f64);
    }
}

fn configuration(registry: &Registry, proxy: &Arc<Proxy>, store: &Arc<Store>) {
    let snapshot = proxy.snapshot.clone();
    registry.gauge_fn(
        "cairn_config_version",
        "Number of the configuration in use.",
        &[],
        move || snapshot.load().version as f64,
    );
    let waiting = store.clone();
    let help = "Clusters and chains that wait for something that istiod has not sent, or are used without it.";
    registry.gauge_fn("cairn_config_waiting", help, &[], move || waiting.pending().len() as f64);
    let effects = [
        ("refused", Effect::Refused),
        ("route_refused", Effect::RouteRefused),
        ("ignored", Effect::Ignored),
    ];
    for (word, effect) in effects {
        let store = store.clone();
        let help = "Items of istiod's configuration that are not supported.";
        registry.gauge_fn("cairn_unsupported_items", help, &[("effect", word)], move || {
            store.unsupported().iter().filter(|item| item.effect == effect).count() as f64
        });
    }
}

fn certificate(registry: &Registry, proxy: &Arc<Proxy>) {
    let labels = [("resource_name", "default")];
    let help = "Time until the workload certificate expires, in seconds; less than zero when it has.";
    let of = proxy.clone();
    registry.gauge_fn("istio_agent_cert_expiry_seconds", help, &labels, move || {
        of.identity
            .status()
            .expiry
            .map_or(f64::NAN, |expiry| until(expiry, clock::wall()))
    });
    let of = proxy.clone();
    let help = "Attempts to get a certificate or revocation list that failed.";
    registry.counter_fn("cairn_certificate_failures_total", help, &[], move || {
        of.identity.status().failures as f64
    });
}

/// Seconds from `now` to `then`; negative in the past.
fn until(then: SystemTime, now: SystemTime) -> f64 {
    match then.duration_since(now) {
        Ok(left) => left.as_secs_f64(),
        Err(past) => -past.duration().as_secs_f64(),
    }
}

/// The stream to istiod; beside our names those of Envoy and pilot-agent that dashboards read.
pub fn register_istiod(registry: &Registry, status: &cairn_xds::Status) {
    type Read = fn(&StatusSnapshot) -> f64;
    type ReadType = fn(&TypeStatus) -> u64;
    let connected: Read = |status| f64::from(u8::from(status.connected_since.is_some()));
    for name in ["cairn_xds_connected", "envoy_control_plane_connected_state"] {
        let status = status.clone();
        registry.gauge_fn(name, "Whether the stream to istiod is open.", &[], move || {
            connected(&status.snapshot())
        });
    }
    let counters: [(&'static str, &'static str, Read); 2] = [
        ("cairn_xds_streams_total", "Streams that istiod accepted.", |status| {
            status.streams as f64
        }),
        (
            "cairn_xds_failed_attempts_total",
            "Attempts that led to no stream.",
            |status| status.failed_attempts as f64,
        ),
    ];
    for (name, help, read) in counters {
        let status = status.clone();
        registry.counter_fn(name, help, &[], move || read(&status.snapshot()));
    }
    let by_type: [(&'static str, &'static str, ReadType); 3] = [
        ("cairn_xds_acks_total", "Answers of istiod that were accepted.", |kind| {
            kind.acked
        }),
        ("cairn_xds_nacks_total", "Answers of istiod that were refused.", |kind| {
            kind.nacked
        }),
        ("cairn_xds_bytes_total", "Bytes of istiod's answers.", |kind| kind.bytes),
    ];
    for (name, help, read) in by_type {
        for (short, url) in TYPES {
            let read_type = of_type(status, url, read);
            registry.counter_fn(name, help, &[("type", short)], read_type);
        }
    }
    for (name, url) in [
        ("envoy_cluster_manager_cds_update_success", CLUSTERS),
        ("envoy_listener_manager_lds_update_success", LISTENERS),
    ] {
        registry.counter_fn(name, "", &[], of_type(status, url, |kind| kind.acked));
    }
}

fn of_type(status: &cairn_xds::Status, url: &str, read: fn(&TypeStatus) -> u64) -> impl Fn() -> f64 + Send + Sync + 'static {
    let (status, url) = (status.clone(), TypeUrl::from(url));
    move || status.snapshot().types.get(&url).map_or(0, read) as f64
}
