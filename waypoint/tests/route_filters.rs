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
use cairn_exchange::{Exchange, format::Template};
use cairn_filters::{
    Filter, FilterChain, HttpFilter, PerRoute, Placed, RouteConfig, Scope, Slot, Verdict,
    buffer::Buffer,
    fault::Fault,
    grpc_web::GrpcWeb,
    header_mutation::{HeaderMutation, Mutations},
    set_filter_state::{Object, SetFilterState},
};
use cairn_policy::{
    cors::CorsPolicy,
    fault::{Abort, Aborted, Delay, Faults, Rate},
    headers::{HeaderEdit, HeaderEdits, Mutation},
    matcher::StringMatcher,
    route::{
        Forward, Fraction, Overrides, Route, RouteAction, RouteTable, Target, VirtualHost, WeightedCluster, WeightedClusters,
    },
};
use cairn_waypoint::{snapshot::HttpChain, upstream::UpstreamProtocol};
use http::{HeaderValue, Request, StatusCode, uri::PathAndQuery};
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

#[tokio::test]
async fn a_browser_that_speaks_grpc_web_reaches_a_grpc_backend_and_sees_its_trailers_in_the_body() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, grpc_echo()).await;
    let config = Config::default().http_with(
        WEB,
        &[pod.address],
        |http| http.filters = FilterChain::new(vec![Filter::Other(Arc::new(GrpcWeb))]),
        |cluster| cluster.protocol = UpstreamProtocol::Http2,
    );
    rig.serve(config).await;
    let mut client = rig.http1(WEB).await;
    let message = b"\0\0\0\0\x05hello";
    let trailers = b"\x80\0\0\0\x0fgrpc-status:0\r\n";
    // (content type, accept, body, content type of the answer, its body)
    for (content_type, accept, body, answered, expected) in [
        (
            "application/grpc-web+proto",
            "*/*",
            message.to_vec(),
            "application/grpc-web+proto",
            [&message[..], trailers].concat(),
        ),
        (
            "application/grpc-web-text",
            "application/grpc-web-text",
            b"AAAAAAVoZWxsbw==".to_vec(),
            "application/grpc-web-text+proto",
            b"AAAAAAVoZWxsbw==gAAAAA9ncnBjLXN0YXR1czowDQo=".to_vec(),
        ),
    ] {
        let request = Request::post("/echo")
            .header("host", "web")
            .header("content-type", content_type)
            .header("accept", accept)
            .body(Full::from(body))
            .unwrap();
        let (status, headers, body) = send(&mut client, request).await;
        assert_eq!(
            (status, headers["content-type"].to_str().unwrap()),
            (StatusCode::OK, answered)
        );
        assert_eq!(body, expected, "{content_type}");
    }
}

#[tokio::test]
async fn a_grpc_web_text_that_is_no_base64_is_a_bad_request() {
    let rig = Rig::start().await;
    let reads_all: rig::App = Arc::new(|stream, _| {
        Box::pin(async move {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                tokio::spawn(async move {
                    let mut body = request.into_body();
                    while let Some(data) = body.data().await {
                        let Ok(data) = data else { return };
                        body.flow_control().release_capacity(data.len()).unwrap();
                    }
                    respond.send_response(http::Response::new(()), true).unwrap();
                });
            }
        })
    });
    let pod = rig.pod(10, reads_all).await;
    let config = Config::default().http_with(
        WEB,
        &[pod.address],
        |http| http.filters = FilterChain::new(vec![Filter::Other(Arc::new(GrpcWeb))]),
        |cluster| cluster.protocol = UpstreamProtocol::Http2,
    );
    rig.serve(config).await;
    for (body, status) in [("AAAAAAVoZWxsbw==", 200), ("AAAA!!!!", 400), ("AAA", 400)] {
        let mut client = rig.http1(WEB).await;
        let request = Request::post("/echo")
            .header("host", "web")
            .header("content-type", "application/grpc-web-text")
            .body(Full::from(body))
            .unwrap();
        let (answered, _, text) = send(&mut client, request).await;
        assert_eq!(answered.as_u16(), status, "{body}");
        if status == 400 {
            assert_eq!(text, "Bad gRPC-web request, invalid base64 data.");
        }
    }
    let told = rig.told(3).await;
    assert_eq!((told.attempts, told.details.as_str()), (1, "grpc_base_64_decode_failed"));
}

/// Sends gRPC messages back, with a good status behind them.
fn grpc_echo() -> rig::App {
    Arc::new(|stream, _| {
        Box::pin(async move {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                tokio::spawn(async move {
                    assert_eq!(request.headers()["content-type"], "application/grpc");
                    assert!(!request.headers().contains_key("content-length"));
                    let answer = http::Response::builder().header("content-type", "application/grpc");
                    let mut stream = respond.send_response(answer.body(()).unwrap(), false).unwrap();
                    let mut body = request.into_body();
                    while let Some(data) = body.data().await {
                        stream.send_data(data.unwrap(), false).unwrap();
                    }
                    let trailers = [("grpc-status".parse().unwrap(), HeaderValue::from_static("0"))];
                    stream.send_trailers(trailers.into_iter().collect()).unwrap();
                });
            }
        })
    })
}

#[tokio::test]
async fn edits_of_all_levels_are_made_and_the_order_says_who_wins() {
    let set = |value: &str| {
        let edits = HeaderEdits::new(vec![HeaderEdit::set("x-level", value).unwrap()], vec![]);
        Arc::new(Mutations {
            response: vec![Mutation::Edit(edits)],
            ..Mutations::default()
        })
    };
    for (most_specific_wins, expected) in [(true, "route"), (false, "host")] {
        let (rig, _pod) = serve(|http| {
            http.filters = FilterChain::new(vec![Filter::HeaderMutation(Arc::new(HeaderMutation {
                mutations: set("chain"),
                most_specific_wins,
            }))]);
            let says = |value: &str| says("envoy.filters.http.header_mutation", RouteConfig::HeaderMutation(set(value)));
            let host = VirtualHost {
                overrides: says("host"),
                ..VirtualHost::any("h", vec![Arc::new(at("/", says("route")))])
            };
            http.routes = RouteTable::new("t", vec![Arc::new(host)]).unwrap();
        })
        .await;
        let mut client = rig.http1(WEB).await;
        let (_, headers, _) = fetch(&mut client, "/").await;
        assert_eq!(headers["x-level"], expected);
    }
}

#[tokio::test]
async fn a_request_is_held_until_its_body_is_whole_and_no_longer_than_allowed() {
    let longer = says("envoy.filters.http.buffer", RouteConfig::Buffer(Some(100)));
    let off = says("envoy.filters.http.buffer", RouteConfig::Buffer(None));
    let (rig, _pod) = serve(|http| {
        http.filters = FilterChain::new(vec![Filter::Other(Arc::new(Buffer { limit: 10 }))]);
        http.routes = rig::routes(vec![at("/longer", longer), at("/off", off), at("/", Overrides::new())]);
    })
    .await;
    for (path, length, status) in [
        ("/", 10, 200),
        ("/", 11, 413),
        ("/longer", 100, 200),
        ("/longer", 101, 413),
        ("/off", 5000, 200),
    ] {
        let mut client = rig.http1(WEB).await;
        let request = Request::post(path)
            .header("host", "web")
            .body(Full::from(vec![b'x'; length]))
            .unwrap();
        let (answer, _, body) = send(&mut client, request).await;
        assert_eq!(answer.as_u16(), status, "{path} {length}");
        if status == 200 {
            assert_eq!(body, format!("web {path} {length}"));
        }
    }
}

/// Sends requests to another route, and says so.
#[derive(Debug)]
struct Elsewhere;

impl HttpFilter for Elsewhere {
    fn name(&self) -> &str {
        "elsewhere"
    }

    fn decode_head(&self, _: &mut Slot, exchange: &mut Exchange, _: &Scope<'_>) -> Verdict {
        if let Some(head) = &mut exchange.request {
            let again = head.headers.remove("x-again").is_some();
            head.path = PathAndQuery::from_static("/elsewhere");
            exchange.reroute = again;
        }
        Verdict::Continue
    }
}

#[tokio::test]
async fn a_route_stays_unless_a_filter_asks_for_another_and_that_one_decides_behind_it() {
    let (rig, _pod) = serve(|http| {
        http.filters = FilterChain::new(vec![Filter::Other(Arc::new(Elsewhere)), fault_filter()]);
        http.routes = rig::routes(vec![at("/elsewhere", faults(aborts(418))), at("/", Overrides::new())]);
    })
    .await;
    let mut client = rig.http1(WEB).await;
    for (again, status) in [(false, 200), (true, 418)] {
        let mut request = Request::get("/here").header("host", "web");
        if again {
            request = request.header("x-again", "yes");
        }
        let (answer, ..) = send(&mut client, request.body(Full::default()).unwrap()).await;
        assert_eq!(answer.as_u16(), status, "{again}");
    }
}

#[tokio::test]
async fn an_object_of_filter_state_is_there_for_formats_behind_it() {
    let object = |key: &str, format: &str, skip_if_empty| Object {
        key: key.into(),
        format: Template::parse(format).unwrap(),
        skip_if_empty,
        read_only: false,
    };
    let edit = |name: &str, key: &str| HeaderEdit::set(name, &format!("%FILTER_STATE({key}:PLAIN)%")).unwrap();
    let edits = HeaderEdits::new(vec![edit("x-user", "user"), edit("x-none", "none")], vec![]);
    let (rig, _pod) = serve(|http| {
        http.filters = FilterChain::new(vec![
            Filter::Other(Arc::new(SetFilterState {
                objects: vec![object("user", "u-%REQ(x-id)%", false), object("none", "%REQ(x-no)%", true)],
                clear_route_cache: false,
            })),
            Filter::HeaderMutation(Arc::new(HeaderMutation {
                mutations: Arc::new(Mutations {
                    response: vec![Mutation::Edit(edits)],
                    ..Mutations::default()
                }),
                most_specific_wins: false,
            })),
        ]);
    })
    .await;
    let mut client = rig.http1(WEB).await;
    let request = Request::get("/").header("host", "web").header("x-id", "7");
    let (_, headers, _) = send(&mut client, request.body(Full::default()).unwrap()).await;
    assert_eq!(headers["x-user"], "u-7");
    assert!(!headers.contains_key("x-none"));
}
