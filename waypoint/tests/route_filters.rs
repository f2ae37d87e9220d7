//! Filters by what routes say of them: faults, cross-origin sharing, turned off and on, and the level that counts.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::large_futures,
    clippy::disallowed_methods,
    reason = "a test fails by panicking, and may look at the clock"
)]

mod rig;

use std::{
    any::Any,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use cairn_filters::{Filter, FilterChain, PerRoute, Placed, RouteConfig, fault::Fault};
use cairn_policy::{
    cors::CorsPolicy,
    fault::{Abort, Aborted, Delay, Faults, Rate},
    matcher::StringMatcher,
    route::{
        Forward, Fraction, Overrides, Route, RouteAction, RouteTable, Target, VirtualHost, WeightedCluster, WeightedClusters,
    },
};
use cairn_waypoint::snapshot::HttpChain;
use http::{HeaderValue, Request, StatusCode};
use http_body_util::Full;
use rig::{Config, Pod, Rig, echo_app, fetch, route, send};

const WEB: &str = "10.96.1.10:80";
const CLUSTER: &str = "inbound-vip|80|http|10.96.1.10";
const FAULT: &str = "envoy.filters.http.fault";
const CORS: &str = "envoy.filters.http.cors";

fn says(filter: &str, config: RouteConfig) -> Overrides {
    let word = PerRoute {
        disabled: false,
        config: Some(config),
    };
    one(filter, word)
}

fn one(filter: &str, word: PerRoute) -> Overrides {
    Overrides::from([(filter.into(), Arc::new(word) as Arc<dyn Any + Send + Sync>)])
}

fn faults(faults: Faults) -> Overrides {
    says(FAULT, RouteConfig::Fault(Arc::new(faults)))
}

fn aborts(status: u16) -> Faults {
    Faults {
        abort: Some(Abort {
            fixed: Some(Aborted::Http(StatusCode::from_u16(status).unwrap())),
            share: Fraction::ALL,
        }),
        ..Faults::default()
    }
}

fn at(prefix: &str, overrides: Overrides) -> Route {
    Route {
        overrides,
        ..route(prefix, Forward::to(Target::Cluster(CLUSTER.into())))
    }
}

fn fault_filter() -> Filter {
    Filter::Fault(Arc::new(Fault::default()))
}

async fn serve(change: impl FnOnce(&mut HttpChain)) -> (Rig, Pod) {
    let rig = Rig::start().await;
    let pod = rig.pod(10, echo_app("web")).await;
    rig.serve(Config::default().http_with(WEB, &[pod.address], change, |_| {}))
        .await;
    (rig, pod)
}

#[tokio::test]
async fn a_fault_is_put_in_where_it_stands_and_nowhere_else() {
    let delay = Faults {
        delay: Some(Delay {
            fixed: Some(Duration::from_millis(60)),
            share: Fraction::ALL,
        }),
        ..Faults::default()
    };
    let both = Faults {
        delay: delay.delay.clone(),
        ..aborts(418)
    };
    let grpc = Faults {
        abort: Some(Abort {
            fixed: Some(Aborted::Grpc(14)),
            share: Fraction::ALL,
        }),
        ..Faults::default()
    };
    let (rig, _pod) = serve(|http| {
        http.filters = FilterChain::new(vec![fault_filter()]);
        http.routes = rig::routes(vec![
            at("/delay", faults(delay)),
            at("/abort", faults(aborts(418))),
            at("/both", faults(both)),
            at("/grpc", faults(grpc)),
            at("/", Overrides::new()),
        ]);
    })
    .await;
    let mut client = rig.http1(WEB).await;
    for (count, (path, status, flags, details, slow)) in [
        ("/delay", 200, "DI", "via_upstream", true),
        ("/abort", 418, "FI", "fault_filter_abort", false),
        ("/both", 418, "DI,FI", "fault_filter_abort", true),
        ("/grpc", 200, "FI", "fault_filter_abort", false),
        ("/", 200, "-", "via_upstream", false),
    ]
    .into_iter()
    .enumerate()
    {
        let start = Instant::now();
        let (answer, _, body) = fetch(&mut client, path).await;
        assert_eq!(answer.as_u16(), status, "{path}");
        assert!(!slow || start.elapsed() >= Duration::from_millis(60), "{path}");
        if details == "fault_filter_abort" {
            assert_eq!(&body[..], b"fault filter abort");
        }
        let told = rig.told(count + 1).await;
        assert_eq!((told.flags.as_str(), told.details.as_str()), (flags, details), "{path}");
    }
    let grpc = Request::post("/grpc")
        .header("host", "web")
        .header("content-type", "application/grpc")
        .body(Full::default())
        .unwrap();
    let (status, headers, body) = send(&mut client, grpc).await;
    assert_eq!((status, body.len()), (StatusCode::OK, 0));
    assert_eq!(headers["grpc-status"], "14");
    assert_eq!(headers["grpc-message"], "fault filter abort");
}

#[tokio::test]
async fn the_most_specific_level_counts_and_may_turn_a_filter_off_or_on() {
    let off = PerRoute {
        disabled: true,
        config: None,
    };
    let weighted = WeightedClusters::new(vec![WeightedCluster {
        overrides: faults(aborts(403)),
        ..WeightedCluster::new(CLUSTER, 1)
    }])
    .unwrap();
    let weighted = Route {
        overrides: faults(aborts(402)),
        ..route("/weighted", Forward::to(Target::Weighted(weighted)))
    };
    let answers = Route {
        action: RouteAction::DirectResponse(cairn_policy::route::DirectResponse {
            status: StatusCode::ACCEPTED,
            body: Bytes::new(),
        }),
        ..at("/direct", Overrides::new())
    };
    let (rig, _pod) = serve(|http| {
        http.filters = FilterChain::of(vec![
            Placed::from(fault_filter()),
            // A second one by another name, turned off but where a route turns it on.
            Placed {
                name: "second".into(),
                filter: Filter::Fault(Arc::new(Fault {
                    faults: Arc::new(aborts(499)),
                    ..Fault::default()
                })),
                off: true,
            },
        ]);
        let mut second_on = one(FAULT, off.clone());
        second_on.extend(one("second", PerRoute::default()));
        let routes = vec![
            weighted,
            at("/route", faults(aborts(402))),
            at("/off", one(FAULT, off)),
            at("/second", second_on),
            answers,
            at("/", Overrides::new()),
        ];
        let host = VirtualHost {
            overrides: faults(aborts(401)),
            ..VirtualHost::any("h", routes.into_iter().map(Arc::new).collect())
        };
        http.routes = RouteTable::new("t", vec![Arc::new(host)]).unwrap();
        http.routes.overrides = faults(aborts(400));
    })
    .await;
    let mut client = rig.http1(WEB).await;
    for (path, status) in [
        ("/weighted", 403),
        ("/route", 402),
        ("/off", 200),
        ("/second", 499),
        ("/direct", 401),
        ("/", 401),
    ] {
        assert_eq!(fetch(&mut client, path).await.0.as_u16(), status, "{path}");
    }
}

#[tokio::test]
async fn no_more_faults_than_allowed_are_under_way_at_once() {
    let one_at_a_time = Faults {
        delay: Some(Delay {
            fixed: Some(Duration::from_secs(3600)),
            share: Fraction::ALL,
        }),
        max_active: Some(1),
        ..Faults::default()
    };
    let active = Arc::new(AtomicU64::new(0));
    let filter = Fault {
        active: active.clone(),
        ..Fault::default()
    };
    let (rig, _pod) = serve(|http| {
        http.filters = FilterChain::new(vec![Filter::Fault(Arc::new(filter))]);
        http.routes = rig::routes(vec![at("/", faults(one_at_a_time))]);
    })
    .await;
    let until = async |count| {
        while active.load(Ordering::SeqCst) != count {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let mut held = rig.http1(WEB).await;
    let mut other = rig.http1(WEB).await;
    let waits = tokio::spawn(async move { fetch(&mut held, "/").await });
    until(1).await;
    assert_eq!(fetch(&mut other, "/").await.0, StatusCode::OK);
    // The one that waited goes away, and makes room.
    waits.abort();
    assert!(waits.await.is_err());
    until(0).await;
    let again = tokio::time::timeout(Duration::from_millis(100), fetch(&mut other, "/")).await;
    assert!(again.is_err(), "the next one is held up");
}

#[tokio::test]
async fn an_answer_is_slowed_down_to_its_rate() {
    let slow = Faults {
        rate: Some(Rate {
            fixed: Some(16),
            share: Fraction::ALL,
        }),
        ..Faults::default()
    };
    let rig = Rig::start().await;
    let app = rig::http_app(|_| async { http::Response::new(Full::from(vec![b'x'; 4096])) });
    let pod = rig.pod(10, app).await;
    let config = Config::default().http_with(
        WEB,
        &[pod.address],
        |http| {
            http.filters = FilterChain::new(vec![fault_filter()]);
            http.routes = rig::routes(vec![at("/", faults(slow))]);
        },
        |_| {},
    );
    rig.serve(config).await;
    let mut client = rig.http1(WEB).await;
    let start = Instant::now();
    let (status, headers, body) = fetch(&mut client, "/").await;
    assert_eq!((status, body.len()), (StatusCode::OK, 4096));
    assert_eq!(headers["content-length"], "4096");
    // Four slices of a sixteenth of a second, of which the first goes at once.
    assert!(start.elapsed() >= Duration::from_millis(180), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_preflight_is_answered_and_an_answer_says_who_may_read_it() {
    let policy = Arc::new(CorsPolicy {
        allow_origins: vec![StringMatcher::exact("https://a.example")],
        allow_methods: Some(HeaderValue::from_static("GET,PUT")),
        expose_headers: Some(HeaderValue::from_static("x-c")),
        max_age: Some(HeaderValue::from_static("600")),
        forward_other_preflights: Some(false),
        ..CorsPolicy::default()
    });
    let old = Forward {
        cors: Some(policy.clone()),
        ..Forward::to(Target::Cluster(CLUSTER.into()))
    };
    let (rig, pod) = serve(|http| {
        http.filters = FilterChain::new(vec![Filter::Cors, fault_filter()]);
        let here = says(CORS, RouteConfig::Cors(policy));
        let mut fails = here.clone();
        fails.extend(faults(aborts(503)));
        http.routes = rig::routes(vec![
            at("/cors", here),
            at("/fails", fails),
            route("/old", old),
            at("/", Overrides::new()),
        ]);
    })
    .await;
    let mut client = rig.http1(WEB).await;
    let ask = |method: &str, path: &str, origin: &str| {
        Request::builder()
            .method(method)
            .uri(path)
            .header("host", "web")
            .header("origin", origin)
            .header("access-control-request-method", "PUT")
            .body(Full::default())
            .unwrap()
    };
    let mine = "https://a.example";
    // (method, path, origin, status, told origin, told max-age, arrivals at the pod)
    for (method, path, origin, status, told, max_age, arrives) in [
        ("OPTIONS", "/cors", mine, 200, true, true, false),
        ("OPTIONS", "/old", mine, 200, true, true, false),
        ("OPTIONS", "/cors", "https://b", 200, false, true, false),
        ("GET", "/cors", mine, 200, true, false, true),
        ("GET", "/old", mine, 200, true, false, true),
        ("GET", "/cors", "https://b", 200, false, false, true),
        ("GET", "/fails", mine, 503, true, false, false),
        ("OPTIONS", "/", mine, 200, false, false, true),
    ] {
        let what = format!("{method} {path} {origin}");
        let (answer, headers, body) = send(&mut client, ask(method, path, origin)).await;
        assert_eq!(answer.as_u16(), status, "{what}");
        let allowed = headers.get("access-control-allow-origin").is_some_and(|told| *told == origin);
        assert_eq!(allowed, told, "{what}");
        assert_eq!(headers.contains_key("access-control-max-age"), max_age, "{what}");
        assert_eq!(headers.contains_key("access-control-expose-headers"), told, "{what}");
        let from_pod = body.windows(3).any(|window| window == b"web");
        assert_eq!(from_pod, arrives, "{what}");
    }
    drop(pod);
}
