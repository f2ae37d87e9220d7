//! Rate limits: counted here, and by a service behind one of our clusters.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::large_futures,
    clippy::disallowed_methods,
    reason = "a test fails by panicking, and may look at the clock"
)]

mod rig;

use std::{any::Any, sync::Arc, time::Duration};

use bytes::{BufMut as _, Bytes, BytesMut};
use cairn_exchange::format::Template;
use cairn_filters::{
    Filter, FilterChain, GrpcService, PerRoute, RouteConfig,
    local_ratelimit::{Count, LocalLimit, LocalRateLimit, PerConnection, now},
    ratelimit::{Answer, GlobalRateLimit, OnItsRoute, Requests, Settings, Wire},
};
use cairn_policy::{
    headers::{HeaderEdit, HeaderEdits},
    matcher::HeaderName,
    rate_limit::{
        Action, BucketSettings, Buckets, CountedDescriptor, HostLimits, RateLimit, RateLimits, TokenBucket, Unit, Value,
        headers::{Limit, Status},
    },
    route::{Forward, Fraction, Overrides, Route, Target},
};
use cairn_waypoint::{snapshot::HttpChain, upstream::UpstreamProtocol};
use http::{HeaderValue, Request, StatusCode};
use http_body_util::Full;
use parking_lot::Mutex;
use rig::{App, Config, Pod, Rig, echo_app, fetch, mirror, route, send};

const WEB: &str = "10.96.1.10:80";
const CLUSTER: &str = "inbound-vip|80|http|10.96.1.10";
const DB: &str = "10.96.1.30:5432";
const NONE: Fraction = Fraction {
    numerator: 0,
    denominator: 100,
};

fn an_hour(max: u32) -> BucketSettings {
    BucketSettings {
        max,
        per_fill: max,
        interval: Duration::from_secs(3600),
    }
}

fn limit(count: Count) -> LocalLimit {
    let edit = HeaderEdit::set("x-local-rate-limit", "true").unwrap();
    LocalLimit {
        enabled: Fraction::ALL,
        enforced: Fraction::ALL,
        status: StatusCode::TOO_MANY_REQUESTS,
        resource_exhausted: true,
        request_edits: HeaderEdits::new(vec![HeaderEdit::set("x-beyond", "yes").unwrap()], vec![]),
        response_edits: HeaderEdits::new(vec![edit], vec![]),
        headers: true,
        stage: 0,
        host_limits: HostLimits::Override,
        own: Vec::new(),
        count,
    }
}

fn together(max: u32, descriptors: Vec<CountedDescriptor>) -> Count {
    Count::Together(Arc::new(Buckets::new(Some(an_hour(max)), descriptors, true, 20, now())))
}

fn local(limit: LocalLimit) -> Filter {
    Filter::Other(Arc::new(LocalRateLimit { limit: Arc::new(limit) }))
}

fn by_header(name: &str, key: &str) -> RateLimit {
    RateLimit {
        actions: vec![Action::Header {
            name: HeaderName::parse(name).unwrap(),
            key: key.into(),
            skip_if_absent: false,
        }],
        ..RateLimit::default()
    }
}

fn counting(prefix: &str, limits: Vec<RateLimit>) -> Route {
    let mut forward = Forward::to(Target::Cluster(CLUSTER.into()));
    forward.rate_limits = RateLimits {
        own: limits,
        include_host: false,
    };
    route(prefix, forward)
}

fn says(filter: &str, config: RouteConfig) -> Overrides {
    let word = PerRoute {
        disabled: false,
        config: Some(config),
    };
    Overrides::from([(filter.into(), Arc::new(word) as Arc<dyn Any + Send + Sync>)])
}

async fn serve(change: impl FnOnce(&mut HttpChain)) -> (Rig, Pod) {
    let rig = Rig::start().await;
    let pod = rig.pod(10, echo_app("web")).await;
    rig.serve(Config::default().http_with(WEB, &[pod.address], change, |_| {}))
        .await;
    (rig, pod)
}

fn get(path: &str, fields: &[(&str, &str)]) -> Request<Full<Bytes>> {
    let mut request = Request::get(path).header("host", "web");
    for (name, value) in fields {
        request = request.header(*name, *value);
    }
    request.body(Full::default()).unwrap()
}

#[tokio::test]
async fn requests_beyond_a_local_limit_are_denied_in_envoys_words() {
    let (rig, _pod) = serve(|http| http.filters = FilterChain::new(vec![local(limit(together(2, Vec::new())))])).await;
    let mut client = rig.http1(WEB).await;
    for left in ["1", "0"] {
        let (status, headers, _) = fetch(&mut client, "/").await;
        assert_eq!((status, headers["x-ratelimit-limit"].as_bytes()), (StatusCode::OK, &b"2"[..]));
        assert_eq!(headers["x-ratelimit-remaining"], left);
        assert!(!headers.contains_key("x-local-rate-limit"));
    }
    let (status, headers, body) = fetch(&mut client, "/").await;
    assert_eq!(
        (status, &body[..]),
        (StatusCode::TOO_MANY_REQUESTS, &b"local_rate_limited"[..])
    );
    assert_eq!(headers["x-local-rate-limit"], "true");
    assert_eq!(headers["x-ratelimit-remaining"], "0");
    let told = rig.told(3).await;
    assert_eq!((told.flags.as_str(), told.details.as_str()), ("RL", "local_rate_limited"));
    let (_, headers, _) = send(&mut client, get("/", &[("content-type", "application/grpc")])).await;
    assert_eq!(headers["grpc-status"], "8");
}

#[tokio::test]
async fn a_limit_that_is_not_enforced_marks_requests_and_lets_them_pass() {
    let rig = Rig::start().await;
    let app = rig::http_app(|request| async move {
        let beyond = request.headers().contains_key("x-beyond");
        http::Response::new(Full::from(beyond.to_string()))
    });
    let pod = rig.pod(10, app).await;
    let tried_out = LocalLimit {
        enforced: NONE,
        ..limit(together(1, Vec::new()))
    };
    let filters = FilterChain::new(vec![local(tried_out)]);
    rig.serve(Config::default().http_with(WEB, &[pod.address], |http| http.filters = filters, |_| {}))
        .await;
    let mut client = rig.http1(WEB).await;
    for beyond in ["false", "true"] {
        let (status, _, body) = fetch(&mut client, "/").await;
        assert_eq!((status, &body[..]), (StatusCode::OK, beyond.as_bytes()));
    }
}

#[tokio::test]
async fn descriptors_of_the_route_have_buckets_of_their_own() {
    let special = CountedDescriptor {
        entries: vec![("user".into(), Some("a".into()))],
        bucket: an_hour(1),
        shadow: false,
    };
    let (rig, _pod) = serve(|http| {
        http.filters = FilterChain::new(vec![local(limit(together(100, vec![special])))]);
        http.routes = rig::routes(vec![counting("/", vec![by_header("x-user", "user")])]);
    })
    .await;
    let mut client = rig.http1(WEB).await;
    for (user, status) in [("a", 200), ("a", 429), ("b", 200), ("b", 200)] {
        let (answer, ..) = send(&mut client, get("/", &[("x-user", user)])).await;
        assert_eq!(answer.as_u16(), status, "{user}");
    }
}

#[tokio::test]
async fn a_route_may_have_a_limit_of_its_own() {
    let here = Arc::new(limit(together(1, Vec::new())));
    let (rig, _pod) = serve(|http| {
        http.filters = FilterChain::new(vec![local(limit(together(3, Vec::new())))]);
        let overrides = says("envoy.filters.http.local_ratelimit", RouteConfig::LocalRateLimit(here));
        let own = Route {
            overrides,
            ..counting("/own", Vec::new())
        };
        http.routes = rig::routes(vec![own, counting("/", Vec::new())]);
    })
    .await;
    let mut client = rig.http1(WEB).await;
    for (path, status) in [("/own", 200), ("/own", 429), ("/", 200), ("/", 200), ("/", 200), ("/", 429)] {
        assert_eq!(fetch(&mut client, path).await.0.as_u16(), status, "{path}");
    }
}

#[tokio::test]
async fn each_connection_may_have_buckets_of_its_own() {
    let each = PerConnection::new(|now| Buckets::new(Some(an_hour(1)), Vec::new(), true, 20, now));
    let (rig, _pod) = serve(|http| http.filters = FilterChain::new(vec![local(limit(Count::PerConnection(each)))])).await;
    for _ in 0..2 {
        let mut client = rig.http1(WEB).await;
        assert_eq!(fetch(&mut client, "/").await.0, StatusCode::OK);
        assert_eq!(fetch(&mut client, "/").await.0, StatusCode::TOO_MANY_REQUESTS);
    }
}

#[tokio::test]
async fn connections_beyond_their_limit_are_refused() {
    let rig = Rig::start().await;
    let pod = rig.pod(11, mirror()).await;
    let bucket = Arc::new(TokenBucket::new(2, 1, Duration::from_secs(3600), now()));
    rig.serve(Config::default().tcp_with(DB, rig::tunnels(&[pod.address]), |chain| chain.limits = vec![bucket], |_| {}))
        .await;
    let mut opened = Vec::new();
    for _ in 0..2 {
        opened.push(rig.open(DB).await.unwrap());
    }
    let refused = rig.open(DB).await.err().unwrap().to_string();
    assert!(refused.contains("503"), "{refused}");
}

/// What a rate limit service was asked, and what it says.
type Asked = Arc<Mutex<Vec<String>>>;

/// A service behind a tunnel: the last entry of the question says what becomes of the request.
fn service(asked: Asked) -> App {
    Arc::new(move |stream, _| {
        let asked = asked.clone();
        Box::pin(async move {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                let asked = asked.clone();
                tokio::spawn(async move {
                    let head = request.headers();
                    assert_eq!(request.uri().path(), "/test.Limits/Ask");
                    assert_eq!(head["content-type"], "application/grpc");
                    assert_eq!(head["te"], "trailers");
                    assert_eq!(head["grpc-timeout"], "2000m");
                    let mut body = request.into_body();
                    let mut bytes = BytesMut::new();
                    while let Some(data) = body.data().await {
                        bytes.extend_from_slice(&data.unwrap());
                    }
                    let question = String::from_utf8(bytes[5..].to_vec()).unwrap();
                    asked.lock().push(question.clone());
                    if question.ends_with("silent") {
                        std::future::pending::<()>().await;
                    }
                    let answer = http::Response::builder().header("content-type", "application/grpc");
                    let mut stream = respond.send_response(answer.body(()).unwrap(), false).unwrap();
                    let failing = question.ends_with("fails");
                    if !failing {
                        let mut frame = BytesMut::new();
                        frame.put_u8(0);
                        frame.put_u32(question.len() as u32);
                        frame.put_slice(question.as_bytes());
                        stream.send_data(frame.freeze(), false).unwrap();
                    }
                    let status = if failing { "13" } else { "0" };
                    let trailers = [("grpc-status".parse().unwrap(), HeaderValue::from_static(status))];
                    stream.send_trailers(trailers.into_iter().collect()).unwrap();
                });
            }
        })
    })
}

/// Messages as text: what is asked comes back as the answer.
const WIRE: Wire = Wire {
    method: "/test.Limits/Ask",
    question: |domain, descriptors| {
        let entries = descriptors.iter().flat_map(|descriptor| &descriptor.entries);
        let words: Vec<_> = entries.map(|(key, value)| format!("{key}={value}")).collect();
        format!("{domain} {}", words.join(" ")).into()
    },
    answer: |bytes| {
        let text = String::from_utf8(bytes.to_vec()).map_err(|error| error.to_string())?;
        if text.ends_with("nonsense") {
            return Err("is nonsense".into());
        }
        let over = text.ends_with("over");
        Ok(Answer {
            over,
            statuses: vec![Status {
                limit: Some(Limit {
                    name: String::new(),
                    requests: 10,
                    unit: Unit::Minute,
                }),
                remaining: 7,
                until_reset: Duration::from_secs(30),
            }],
            response_headers: vec![("x-from-service".parse().unwrap(), HeaderValue::from_static("yes"))],
            request_headers: vec![("x-for-backend".parse().unwrap(), HeaderValue::from_static("yes"))],
            body: if over { "too many\n".into() } else { Bytes::new() },
        })
    },
};

fn settings() -> Settings {
    Settings {
        domain: "waypoint".into(),
        stage: 0,
        own: Vec::new(),
        requests: Requests::Both,
        enabled: Fraction::ALL,
        enforced: Fraction::ALL,
        deny_on_failure: Fraction::ALL,
        status: StatusCode::TOO_MANY_REQUESTS,
        status_on_error: StatusCode::INTERNAL_SERVER_ERROR,
        resource_exhausted: false,
        headers: true,
        tell_limited: true,
        response_edits: HeaderEdits::default(),
        service: Arc::new(GrpcService {
            cluster: "limits".into(),
            authority: HeaderValue::from_static("limits"),
            timeout: Some(Duration::from_secs(2)),
            metadata: Vec::new(),
            max_answer: 1024,
            skip_envoy_headers: false,
        }),
        wire: WIRE,
    }
}

/// A waypoint whose requests are counted by a service, and what the service was asked.
async fn counted(settings: Settings, routes: Vec<Route>) -> (Rig, Vec<Pod>, Asked) {
    let rig = Rig::start().await;
    let asked = Asked::default();
    let app = rig::http_app(|request| async move {
        let added = request.headers().contains_key("x-for-backend");
        http::Response::new(Full::from(added.to_string()))
    });
    let web = rig.pod(10, app).await;
    let limits = rig.pod(11, service(asked.clone())).await;
    let filter = Filter::Other(Arc::new(GlobalRateLimit {
        settings: Arc::new(settings),
    }));
    let config = Config::default()
        .http_with(
            WEB,
            &[web.address],
            |http| {
                http.filters = FilterChain::new(vec![filter]);
                http.routes = rig::routes(routes);
                http.settings.incoming.internal = ["10.0.0.0/8".parse().unwrap()].into_iter().collect();
            },
            |_| {},
        )
        .cluster_with("limits", &[limits.address], |cluster| {
            cluster.protocol = UpstreamProtocol::Http2
        });
    rig.serve(config).await;
    (rig, vec![web, limits], asked)
}

fn by_path() -> Vec<Route> {
    vec![counting(
        "/",
        vec![by_header(":path", "path"), by_header("x-second", "second")],
    )]
}

#[tokio::test]
async fn a_service_decides_over_requests_and_edits_them() {
    let (rig, _pods, asked) = counted(settings(), by_path()).await;
    let mut client = rig.http1(WEB).await;
    let (status, headers, body) = fetch(&mut client, "/fine").await;
    assert_eq!(
        (status, &body[..]),
        (StatusCode::OK, &b"true"[..]),
        "the backend saw the field"
    );
    assert_eq!(headers["x-from-service"], "yes");
    assert_eq!(headers["x-ratelimit-limit"], "10, 10;w=60");
    assert!(!headers.contains_key("x-envoy-ratelimited"));
    let (status, headers, body) = fetch(&mut client, "/over").await;
    assert_eq!((status, &body[..]), (StatusCode::TOO_MANY_REQUESTS, &b"too many\n"[..]));
    assert_eq!(headers["x-envoy-ratelimited"], "true");
    assert_eq!(headers["x-from-service"], "yes");
    let told = rig.told(2).await;
    assert_eq!((told.flags.as_str(), told.details.as_str()), ("RL", "request_rate_limited"));
    send(&mut client, get("/two", &[("x-second", "2")])).await;
    assert_eq!(
        *asked.lock(),
        ["waypoint path=/fine", "waypoint path=/over", "waypoint path=/two second=2"]
    );
}

#[tokio::test]
async fn without_an_answer_of_the_service_the_setting_decides() {
    let quick = |deny| {
        let settings = settings();
        let mut service = (*settings.service).clone();
        service.metadata = vec![("x-test".parse().unwrap(), HeaderValue::from_static("1"))];
        Settings {
            deny_on_failure: deny,
            service: Arc::new(service),
            ..settings
        }
    };
    for (deny, status, flags) in [(Fraction::ALL, 500, "RLSE"), (NONE, 200, "-")] {
        let (rig, _pods, _) = counted(quick(deny), by_path()).await;
        let mut client = rig.http1(WEB).await;
        for (count, path) in ["/fails", "/nonsense", "/silent"].into_iter().enumerate() {
            assert_eq!(fetch(&mut client, path).await.0.as_u16(), status, "{path}");
            let told = rig.told(count + 1).await;
            assert_eq!(told.flags, flags, "{path}");
        }
    }
    let nowhere = Settings {
        service: Arc::new(GrpcService {
            cluster: "missing".into(),
            ..(*settings().service).clone()
        }),
        ..settings()
    };
    let (rig, _pods, _) = counted(nowhere, by_path()).await;
    let mut client = rig.http1(WEB).await;
    assert_eq!(fetch(&mut client, "/").await.0, StatusCode::INTERNAL_SERVER_ERROR);
    let told = rig.told(1).await;
    assert_eq!(told.details, "rate_limiter_error");
}

#[tokio::test]
async fn a_route_may_count_by_other_limits_in_another_domain() {
    let generic = RateLimit {
        actions: vec![Action::Generic {
            key: "generic_key".into(),
            value: Value {
                format: Template::parse("here").unwrap(),
                otherwise: "".into(),
            },
        }],
        ..RateLimit::default()
    };
    let here = OnItsRoute {
        host_limits: HostLimits::Ignore,
        own: vec![generic],
        domain: Some("elsewhere".into()),
    };
    let own = Route {
        overrides: says("envoy.filters.http.ratelimit", RouteConfig::RateLimit(Arc::new(here))),
        ..counting("/own", vec![by_header(":path", "path")])
    };
    let (rig, _pods, asked) = counted(settings(), vec![own, counting("/", Vec::new())]).await;
    let mut client = rig.http1(WEB).await;
    for path in ["/own", "/uncounted"] {
        assert_eq!(fetch(&mut client, path).await.0, StatusCode::OK);
    }
    assert_eq!(*asked.lock(), ["elsewhere generic_key=here"]);
}

#[tokio::test]
async fn requests_from_within_or_from_without_may_be_left_alone() {
    let external = Settings {
        requests: Requests::External,
        ..settings()
    };
    let (rig, _pods, asked) = counted(external, by_path()).await;
    let mut client = rig.http1(WEB).await;
    send(&mut client, get("/in", &[("x-forwarded-for", "10.0.0.1")])).await;
    send(&mut client, get("/out", &[("x-forwarded-for", "203.0.113.1")])).await;
    assert_eq!(*asked.lock(), ["waypoint path=/out"]);
}
