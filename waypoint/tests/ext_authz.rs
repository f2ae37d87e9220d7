//! External authorization: authorizers that allow, deny, hang, close and talk nonsense, over gRPC and HTTP, of requests and connections.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::large_futures,
    clippy::disallowed_methods,
    reason = "a test fails by panicking, and may look at the clock"
)]

mod rig;

use std::{any::Any, collections::BTreeMap, sync::Arc, time::Duration};

use bytes::{BufMut as _, Bytes, BytesMut};
use cairn_filters::{
    Filter, FilterChain, GrpcService, PerRoute, RouteConfig,
    ext_authz::{
        Authorizer, BodyHere, BodyTold, ExtAuthz, OnItsRoute, Settings,
        answer::{Allowed, Answer, Decision, Denied, Edit, How},
        http::{AskedAt, Goes, HttpAuthorizer},
        network::OfConnections,
        question::{Question, Told, Wire},
    },
};
use cairn_policy::{
    headers::{HeaderEdit, HeaderEdits},
    matcher::{MetadataMatcher, StringMatch, StringMatcher, ValueMatcher},
    rbac::{Action, Condition, Policy, Rbac, Rules, Shadow},
    route::{Forward, Fraction, Overrides, Route, Target},
};
use cairn_waypoint::upstream::UpstreamProtocol;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use parking_lot::Mutex;
use rig::{App, Config, Pod, Rig, fetch, mirror, send};

const WEB: &str = "10.96.1.10:80";
const CLUSTER: &str = "inbound-vip|80|http|10.96.1.10";
const DB: &str = "10.96.1.30:5432";
const FILTER: &str = "envoy.filters.http.ext_authz";
/// How long an authorizer has.
const PATIENCE: Duration = Duration::from_millis(300);
const NONE: Fraction = Fraction {
    numerator: 0,
    denominator: 100,
};

/// What an authorizer was asked, as text.
type Asked = Arc<Mutex<Vec<String>>>;

/// What the request's `x-say` asks the authorizer to do; connections say it by the port that they want.
fn wish(question: &Question<'_>) -> String {
    let said = question.headers().into_iter().find(|(name, _)| *name == "x-say");
    said.map_or_else(String::new, |(_, value)| String::from_utf8_lossy(&value).into_owned())
}

/// Messages as text: a question is `wish|path|principal|context|partial|body`, an answer the wish.
const WIRE: Wire = Wire {
    method: "/test.Authorizer/Check",
    question: |question| {
        let connection = &question.exchange.connection;
        let peer = connection.peer.as_ref().map_or("-", |peer| peer.as_str());
        let context: Vec<_> = question.context.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let path = question.request.as_ref().map_or("-", |request| request.head.path.as_str());
        let body = question.request.as_ref().and_then(|request| request.body);
        let told = body.map_or_else(
            || "-".to_owned(),
            |body| format!("{}{}", body.bytes.len(), if body.partial { "+" } else { "" }),
        );
        format!("{}|{path}|{peer}|{}|{told}", wish(question), context.join(",")).into()
    },
    answer: |bytes| {
        let text = String::from_utf8(bytes.to_vec()).map_err(|error| error.to_string())?;
        let edit = |name: &str, value: &str| Edit::new(name, value, How::Set);
        let allowed = |allowed: Allowed| Decision::Allowed(Box::new(allowed));
        let denied = |status: u16| Denied {
            status: StatusCode::from_u16(status).unwrap(),
            headers: vec![
                edit("x-why", "because"),
                edit("content-type", "text/html"),
                edit("content-length", "1"),
            ],
            body: "<b>no</b>".into(),
        };
        let decision = match text.as_str() {
            "" | "allow" => allowed(Allowed {
                request: vec![edit("x-user", "ann"), edit(":path", "/edited?a=1")],
                remove: vec!["x-secret".into()],
                set_parameters: vec![("b".into(), "2".into())],
                response: vec![edit("x-from-authz", "yes")],
                ..Allowed::default()
            }),
            "deny" => Decision::Denied(denied(401)),
            "fails-in-words" => Decision::Failed(denied(503)),
            "crlf" => allowed(Allowed {
                request: vec![edit("x-user", "ann\r\nx-admin: 1")],
                ..Allowed::default()
            }),
            "crlf-in-answer" => allowed(Allowed {
                response: vec![edit("x-user", "ann\r\nset-cookie: a=b")],
                ..Allowed::default()
            }),
            "pseudo" => allowed(Allowed {
                request: vec![edit(":status", "200")],
                ..Allowed::default()
            }),
            "crlf-in-denial" => Decision::Denied(Denied {
                headers: vec![edit("x-why", "a\r\nb")],
                ..denied(401)
            }),
            other => return Err(format!("{other} is nonsense")),
        };
        let notes = vec![("who".to_owned(), serde_json::Value::from("ann"))];
        Ok(Answer { decision, notes })
    },
};

/// A gRPC authorizer behind a tunnel.
fn authorizer(asked: Asked) -> App {
    Arc::new(move |stream, _| {
        let asked = asked.clone();
        Box::pin(async move {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                let asked = asked.clone();
                tokio::spawn(async move {
                    let mut body = request.into_body();
                    let mut bytes = BytesMut::new();
                    while let Some(data) = body.data().await {
                        let data = data.unwrap();
                        let _ = body.flow_control().release_capacity(data.len());
                        bytes.extend_from_slice(&data);
                    }
                    let question = String::from_utf8(bytes[5..].to_vec()).unwrap();
                    asked.lock().push(question.clone());
                    let wish = question.split('|').next().unwrap().to_owned();
                    match wish.as_str() {
                        "hang" => std::future::pending::<()>().await,
                        "close" => return respond.send_reset(h2::Reason::INTERNAL_ERROR),
                        _ => {}
                    }
                    let status = if wish == "http-500" { 500 } else { 200 };
                    let head = Response::builder().status(status).header("content-type", "application/grpc");
                    let mut stream = respond.send_response(head.body(()).unwrap(), false).unwrap();
                    if wish != "fails" {
                        let mut frame = BytesMut::new();
                        frame.put_u8(0);
                        frame.put_u32(wish.len() as u32);
                        frame.put_slice(wish.as_bytes());
                        stream.send_data(frame.freeze(), false).unwrap();
                    }
                    let status = if wish == "fails" { "13" } else { "0" };
                    let trailers = [("grpc-status".parse().unwrap(), HeaderValue::from_static(status))];
                    stream.send_trailers(trailers.into_iter().collect()).unwrap();
                });
            }
        })
    })
}

fn service() -> Arc<GrpcService> {
    Arc::new(GrpcService {
        cluster: "authz".into(),
        authority: HeaderValue::from_static("authz"),
        timeout: Some(PATIENCE),
        metadata: Vec::new(),
        max_answer: 1024,
        skip_envoy_headers: false,
    })
}

fn settings() -> Settings {
    Settings {
        authorizer: Authorizer::Grpc(service(), WIRE),
        allow_on_failure: false,
        tell_failure: true,
        status_on_error: StatusCode::SERVICE_UNAVAILABLE,
        body: None,
        reroutes: false,
        enabled: Fraction::ALL,
        enabled_by: None,
        deny_others: false,
        told: Told::default(),
        notes: true,
        max_denial: None,
    }
}

fn filter(settings: Settings) -> Filter {
    Filter::Other(Arc::new(ExtAuthz {
        settings: Arc::new(settings),
    }))
}

/// A backend that answers with what it was sent.
fn backend() -> App {
    rig::http_app(|request| async move {
        let fields = [
            "x-user",
            "x-role",
            "x-secret",
            "x-envoy-auth-failure-mode-allowed",
            "content-length",
        ];
        let fields = fields.into_iter().filter_map(|name| {
            let values: Vec<_> = request
                .headers()
                .get_all(name)
                .iter()
                .map(|value| value.to_str().unwrap())
                .collect();
            (!values.is_empty()).then(|| format!(" {name}={}", values.join(",")))
        });
        let head = format!("{} {}{}", request.method(), request.uri(), fields.collect::<String>());
        let body = request.into_body().collect().await.unwrap().to_bytes();
        Response::new(Full::from(format!("{head} body={}", body.len())))
    })
}

struct Mesh {
    rig: Rig,
    asked: Asked,
    _pods: Vec<Pod>,
}

/// A service behind these filters, and a gRPC authorizer.
async fn mesh_with(filters: Vec<Filter>, routes: Option<Vec<Route>>) -> Mesh {
    let rig = Rig::start().await;
    let asked = Asked::default();
    let web = rig.pod(10, backend()).await;
    let authz = rig.pod(11, authorizer(asked.clone())).await;
    let config = Config::default()
        .http_with(
            WEB,
            &[web.address],
            |http| {
                http.filters = FilterChain::new(filters);
                if let Some(routes) = routes {
                    http.routes = rig::routes(routes);
                }
            },
            |_| {},
        )
        .cluster_with("authz", &[authz.address], |cluster| {
            cluster.protocol = UpstreamProtocol::Http2
        });
    rig.serve(config).await;
    Mesh {
        rig,
        asked,
        _pods: vec![web, authz],
    }
}

async fn mesh(settings: Settings) -> Mesh {
    mesh_with(vec![filter(settings)], None).await
}

fn request(path: &str, fields: &[(&str, &str)], body: &[u8]) -> Request<Full<Bytes>> {
    let method = if body.is_empty() { "GET" } else { "POST" };
    let mut request = Request::builder().method(method).uri(path).header("host", "web");
    for (name, value) in fields {
        request = request.header(*name, *value);
    }
    request.body(Full::from(body.to_vec())).unwrap()
}

async fn say(mesh: &Mesh, wish: &str) -> (StatusCode, HeaderMap, String) {
    let mut client = mesh.rig.http1(WEB).await;
    let fields = [("x-say", wish), ("x-user", "spoofed"), ("x-secret", "1")];
    let (status, headers, body) = send(&mut client, request("/a?a=0", &fields, b"")).await;
    (status, headers, String::from_utf8(body.to_vec()).unwrap())
}

#[tokio::test]
async fn an_allowed_request_goes_on_as_its_authorizer_edited_it() {
    let mesh = mesh(settings()).await;
    let (status, headers, body) = say(&mesh, "allow").await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(body, "GET /edited?a=1&b=2 x-user=ann body=0");
    assert_eq!(headers["x-from-authz"], "yes");
    assert_eq!(
        *mesh.asked.lock(),
        ["allow|/a?a=0|spiffe://cluster.local/ns/app/sa/client||-"]
    );
    assert_eq!(mesh.rig.told(1).await.flags, "-");
}

#[tokio::test]
async fn a_denied_request_is_answered_in_its_authorizers_words() {
    let mesh = mesh(settings()).await;
    let (status, headers, body) = say(&mesh, "deny").await;
    assert_eq!((status, body.as_str()), (StatusCode::UNAUTHORIZED, "<b>no</b>"));
    assert_eq!(
        (&headers["x-why"], &headers["content-length"]),
        (&HeaderValue::from_static("because"), &HeaderValue::from(9))
    );
    let types: Vec<_> = headers.get_all("content-type").iter().collect();
    assert_eq!(types, ["text/html"]);
    let told = mesh.rig.told(1).await;
    assert_eq!((told.flags.as_str(), told.details.as_str()), ("UAEX", "ext_authz_denied"));
    let mut client = mesh.rig.http1(WEB).await;
    let grpc = request("/", &[("x-say", "deny"), ("content-type", "application/grpc")], b"");
    let (status, headers, _) = send(&mut client, grpc).await;
    assert_eq!(
        (status, &headers["grpc-status"]),
        (StatusCode::OK, &HeaderValue::from_static("16"))
    );
    assert_eq!(headers["content-type"], "application/grpc");
}

#[tokio::test]
async fn without_an_answer_requests_are_refused_or_pass_marked_as_the_setting_says() {
    for allow_on_failure in [false, true] {
        let mesh = mesh(Settings {
            allow_on_failure,
            ..settings()
        })
        .await;
        for (count, wish) in ["hang", "close", "nonsense", "fails", "http-500", "fails-in-words"]
            .into_iter()
            .enumerate()
        {
            let began = tokio::time::Instant::now();
            let (status, headers, body) = say(&mesh, wish).await;
            assert!(began.elapsed() < PATIENCE * 20, "{wish} took {:?}", began.elapsed());
            let told = mesh.rig.told(count + 1).await;
            if allow_on_failure {
                assert_eq!(status, StatusCode::OK, "{wish}");
                assert!(
                    body.contains("x-user=spoofed") && body.contains("x-envoy-auth-failure-mode-allowed=true"),
                    "{wish}: {body}"
                );
                assert_eq!(told.flags, "-", "{wish}");
            } else {
                assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{wish}");
                assert_eq!(
                    (told.flags.as_str(), told.details.as_str()),
                    ("UAEX", "ext_authz_error"),
                    "{wish}"
                );
                assert_eq!(headers.contains_key("x-why"), wish == "fails-in-words", "{wish}");
            }
        }
    }
}

#[tokio::test]
async fn an_answer_that_cannot_be_carried_out_refuses_even_where_failures_pass() {
    let mesh = mesh(Settings {
        allow_on_failure: true,
        ..settings()
    })
    .await;
    for (count, wish) in ["crlf", "crlf-in-answer", "pseudo", "crlf-in-denial"].into_iter().enumerate() {
        let (status, headers, body) = say(&mesh, wish).await;
        assert_eq!((status, body.as_str()), (StatusCode::INTERNAL_SERVER_ERROR, ""), "{wish}");
        assert!(
            !headers.contains_key("set-cookie") && !headers.contains_key("x-why"),
            "{wish}"
        );
        let told = mesh.rig.told(count + 1).await;
        assert_eq!(
            (told.flags.as_str(), told.details.as_str()),
            ("UAEX", "ext_authz_invalid"),
            "{wish}"
        );
    }
}

#[tokio::test]
async fn the_beginning_of_a_long_body_is_told_and_all_of_it_goes_on() {
    const LONG: usize = 1024 * 1024;
    let told = |partial| BodyTold {
        limit: 4096,
        partial,
        as_bytes: true,
    };
    for partial in [true, false] {
        let mesh = mesh(Settings {
            body: Some(told(partial)),
            ..settings()
        })
        .await;
        for (length, expected) in [
            (0, Some("-")),
            (10, Some("10")),
            (4096, Some("4096")),
            (LONG, partial.then_some("4096+")),
        ] {
            let mut client = mesh.rig.http1(WEB).await;
            let (status, _, body) = send(&mut client, request("/", &[], &vec![b'x'; length])).await;
            let Some(expected) = expected else {
                assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
                continue;
            };
            assert_eq!(status, StatusCode::OK, "{length}");
            assert!(body.ends_with(format!(" body={length}").as_bytes()), "{length}: {body:?}");
            let asked = mesh.asked.lock().last().cloned().unwrap();
            assert!(asked.ends_with(&format!("|{expected}")), "{length}: {asked}");
        }
    }
}

#[tokio::test]
async fn a_denied_request_with_a_long_body_is_answered_before_the_rest_of_it_came() {
    let mesh = mesh(Settings {
        body: Some(BodyTold {
            limit: 100,
            partial: true,
            as_bytes: true,
        }),
        ..settings()
    })
    .await;
    let mut stream = mesh.rig.open(WEB).await.unwrap().stream;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let head = "POST / HTTP/1.1\r\nhost: web\r\nx-say: deny\r\ncontent-length: 1000000\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(&[b'x'; 500]).await.unwrap();
    let mut answer = vec![0; 12];
    let read = tokio::time::timeout(Duration::from_secs(10), stream.read_exact(&mut answer));
    read.await.unwrap().unwrap();
    assert_eq!(answer, b"HTTP/1.1 401");
}

fn word(config: OnItsRoute) -> Overrides {
    let word = PerRoute {
        disabled: false,
        config: Some(RouteConfig::ExtAuthz(Arc::new(config))),
    };
    Overrides::from([(FILTER.into(), Arc::new(word) as Arc<dyn Any + Send + Sync>)])
}

fn route_with(prefix: &str, config: Option<OnItsRoute>) -> Route {
    let mut route = rig::route(prefix, Forward::to(Target::Cluster(CLUSTER.into())));
    if let Some(config) = config {
        route.overrides = word(config);
    }
    route
}

#[tokio::test]
async fn a_route_may_ask_nobody_or_ask_otherwise() {
    let context = OnItsRoute {
        context: vec![("route".into(), "here".into())],
        body: Some(BodyHere::Untold),
        ..OnItsRoute::default()
    };
    let off = OnItsRoute {
        disabled: true,
        ..OnItsRoute::default()
    };
    let elsewhere = OnItsRoute {
        authorizer: Some(Authorizer::Grpc(
            Arc::new(GrpcService {
                cluster: "missing".into(),
                ..(*service()).clone()
            }),
            WIRE,
        )),
        ..OnItsRoute::default()
    };
    let routes = vec![
        route_with("/off", Some(off)),
        route_with("/context", Some(context)),
        route_with("/elsewhere", Some(elsewhere)),
        route_with("/", None),
    ];
    let told = BodyTold {
        limit: 100,
        partial: true,
        as_bytes: false,
    };
    let settings = Settings {
        body: Some(told),
        ..settings()
    };
    let mesh = mesh_with(vec![filter(settings)], Some(routes)).await;
    let mut client = mesh.rig.http1(WEB).await;
    for (path, status) in [("/off", 200), ("/context", 200), ("/elsewhere", 503), ("/", 200)] {
        let (answer, ..) = send(&mut client, request(path, &[], b"body")).await;
        assert_eq!(answer.as_u16(), status, "{path}");
    }
    let peer = "spiffe://cluster.local/ns/app/sa/client";
    assert_eq!(
        *mesh.asked.lock(),
        [format!("|/context|{peer}|route=here|-"), format!("|/|{peer}||4")]
    );
}

#[tokio::test]
async fn the_route_is_chosen_again_only_where_that_is_asked_for() {
    for reroutes in [false, true] {
        let routes = || {
            let nowhere = rig::route("/edited", Forward::to(Target::Cluster("missing".into())));
            vec![nowhere, route_with("/", None)]
        };
        let mesh = mesh_with(vec![filter(Settings { reroutes, ..settings() })], Some(routes())).await;
        let mut client = mesh.rig.http1(WEB).await;
        let (status, ..) = fetch(&mut client, "/").await;
        assert_eq!(status.as_u16(), if reroutes { 503 } else { 200 });
    }
}

#[tokio::test]
async fn a_share_may_be_left_alone_or_denied() {
    for (deny_others, status) in [(false, 200), (true, 503)] {
        let mesh = mesh(Settings {
            enabled: NONE,
            deny_others,
            ..settings()
        })
        .await;
        assert_eq!(say(&mesh, "deny").await.0.as_u16(), status);
        assert!(mesh.asked.lock().is_empty());
    }
}

/// Rules that ask a provider about paths, as istiod writes them.
fn custom(provider: &str, path: &str) -> Filter {
    let policy = Policy {
        permissions: vec![Condition::Path(StringMatcher::prefix(path))],
        principals: vec![Condition::Always],
        condition: None,
    };
    let name = format!("istio-ext-authz-{provider}-ns[app]-policy[a]-rule[0]");
    let rules = Rules::new(Action::Deny, BTreeMap::from([(name, policy)]));
    Filter::Rbac(Arc::new(Rbac {
        rules: None,
        shadow: Some(Shadow::new(rules, "istio_ext_authz_")),
    }))
}

fn by_provider(namespace: &str, provider: &str) -> MetadataMatcher {
    let prefix = StringMatch::Prefix(format!("istio-ext-authz-{provider}").into());
    MetadataMatcher {
        filter: namespace.into(),
        path: ["istio_ext_authz_shadow_effective_policy_id".into()].into(),
        value: ValueMatcher::String(StringMatcher::new(prefix, false)),
        invert: false,
    }
}

#[tokio::test]
async fn each_provider_is_asked_about_what_its_own_rules_match() {
    let asks = |provider: &str| {
        let named = GrpcService {
            cluster: format!("authz-{provider}").into(),
            ..(*service()).clone()
        };
        filter(Settings {
            authorizer: Authorizer::Grpc(Arc::new(named), WIRE),
            enabled_by: Some(by_provider("envoy.filters.http.rbac", provider)),
            ..settings()
        })
    };
    let filters = vec![custom("a-b", "/ab"), asks("a-b"), custom("a", "/a/"), asks("a")];
    let rig = Rig::start().await;
    let (asked_a, asked_ab) = (Asked::default(), Asked::default());
    let web = rig.pod(10, rig::echo_app("web")).await;
    let a = rig.pod(11, authorizer(asked_a.clone())).await;
    let ab = rig.pod(12, authorizer(asked_ab.clone())).await;
    let mut config = Config::default().http_with(WEB, &[web.address], |http| http.filters = FilterChain::new(filters), |_| {});
    for (name, pod) in [("authz-a", &a), ("authz-a-b", &ab)] {
        config = config.cluster_with(name, &[pod.address], |cluster| cluster.protocol = UpstreamProtocol::Http2);
    }
    rig.serve(config).await;
    let mut client = rig.http1(WEB).await;
    for path in ["/ab/1", "/a/1", "/none"] {
        assert_eq!(fetch(&mut client, path).await.0, StatusCode::OK, "{path}");
    }
    let paths = |asked: &Asked| {
        let asked = asked.lock();
        asked
            .iter()
            .map(|question| question.split('|').nth(1).unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    // The name of one begins with the other's: rules of the longer one call the longer one alone.
    assert_eq!(
        (paths(&asked_ab), paths(&asked_a)),
        (vec!["/ab/1".to_owned()], vec!["/a/1".to_owned()])
    );
}

fn http_authorizer() -> HttpAuthorizer {
    let exact = |name: &str| vec![StringMatcher::exact(name)];
    HttpAuthorizer {
        cluster: "authz".into(),
        timeout: Some(PATIENCE),
        path: AskedAt::Under("/check".into()),
        add: HeaderEdits::new(vec![HeaderEdit::set("x-mesh", "yes").unwrap()], vec![]),
        goes: Goes {
            upstream: exact("x-user"),
            upstream_beside: exact("x-role"),
            client_on_success: exact("set-cookie"),
            client: Some(exact("x-why")),
            notes: exact("x-user"),
        },
        max_answer: 4096,
    }
}

/// An HTTP authorizer that does what `x-say` says.
fn http_service(asked: Asked) -> App {
    rig::http_app(move |request| {
        let asked = asked.clone();
        async move {
            let names: Vec<_> = request.headers().keys().map(|name| name.as_str()).collect();
            let seen = format!("{} {} {}", request.method(), request.uri(), names.join(","));
            let wish = request
                .headers()
                .get("x-say")
                .map_or("", |value| value.to_str().unwrap())
                .to_owned();
            let body = request.into_body().collect().await.unwrap().to_bytes();
            asked.lock().push(format!("{seen} {}", body.len()));
            if wish == "hang" {
                std::future::pending::<()>().await;
            }
            let answer = Response::builder()
                .status(wish.parse::<u16>().unwrap_or(200))
                .header("x-user", "ann")
                .header("x-role", "b")
                .header("x-other", "o")
                .header("x-why", "because")
                .header("set-cookie", "c=1")
                .header("x-envoy-auth-headers-to-remove", "x-secret");
            let length = if wish == "long" { 100_000 } else { 2 };
            answer.body(Full::from(vec![b'n'; length])).unwrap()
        }
    })
}

async fn http_mesh(body: Option<BodyTold>) -> Mesh {
    let rig = Rig::start().await;
    let asked = Asked::default();
    let web = rig.pod(10, backend()).await;
    let authz = rig.pod(11, http_service(asked.clone())).await;
    let settings = Settings {
        authorizer: Authorizer::Http(Arc::new(http_authorizer())),
        told: Told {
            allowed: Some(vec![StringMatcher::exact("x-say")]),
            ..Told::default()
        },
        body,
        ..settings()
    };
    let filters = FilterChain::new(vec![filter(settings)]);
    let config = Config::default()
        .http_with(WEB, &[web.address], |http| http.filters = filters, |_| {})
        .cluster("authz", &[authz.address]);
    rig.serve(config).await;
    Mesh {
        rig,
        asked,
        _pods: vec![web, authz],
    }
}

#[tokio::test]
async fn an_http_authorizer_allows_with_200_and_headers_go_where_they_may() {
    let mesh = http_mesh(None).await;
    let mut client = mesh.rig.http1(WEB).await;
    let fields = [
        ("x-user", "spoofed"),
        ("x-role", "a"),
        ("x-secret", "1"),
        ("authorization", "t"),
        ("cookie", "c"),
    ];
    let (status, headers, body) = send(&mut client, request("/a?q=1", &fields, b"body")).await;
    assert_eq!(
        (status, &headers["set-cookie"]),
        (StatusCode::OK, &HeaderValue::from_static("c=1"))
    );
    assert!(!headers.contains_key("x-why"));
    assert_eq!(&body[..], b"POST /a?q=1 x-user=ann x-role=a,b content-length=4 body=4");
    let asked = mesh.asked.lock().clone();
    let (line, names) = asked[0].split_at("POST /check/a?q=1 ".len());
    assert_eq!(line, "POST /check/a?q=1 ", "the body is not told");
    for (name, told) in [
        ("authorization", true),
        ("x-mesh", true),
        ("host", true),
        ("cookie", false),
        ("x-user", false),
        ("x-forwarded-for", false),
    ] {
        assert_eq!(names.split([',', ' ']).any(|other| other == name), told, "{name} in {names}");
    }
    assert!(names.ends_with(" 0"), "{names}");
}

#[tokio::test]
async fn an_http_authorizer_denies_with_what_it_says_and_fails_with_5xx() {
    let mesh = http_mesh(Some(BodyTold {
        limit: 10,
        partial: true,
        as_bytes: true,
    }))
    .await;
    let mut client = mesh.rig.http1(WEB).await;
    for (count, (wish, status, details)) in [
        ("403", 403, "ext_authz_denied"),
        ("302", 302, "ext_authz_denied"),
        ("204", 204, "ext_authz_denied"),
        ("500", 503, "ext_authz_error"),
        ("hang", 503, "ext_authz_error"),
        ("long", 503, "ext_authz_error"),
    ]
    .into_iter()
    .enumerate()
    {
        let (answer, headers, _) = send(&mut client, request("/", &[("x-say", wish)], &[b'x'; 100])).await;
        assert_eq!(answer.as_u16(), status, "{wish}");
        let denied = details == "ext_authz_denied";
        assert_eq!(
            (headers.contains_key("x-why"), headers.contains_key("x-other")),
            (denied, false),
            "{wish}"
        );
        let told = mesh.rig.told(count + 1).await;
        assert_eq!((told.flags.as_str(), told.details.as_str()), ("UAEX", details), "{wish}");
        assert!(mesh.asked.lock()[count].ends_with(" 10"), "the beginning of the body is told");
        client = mesh.rig.http1(WEB).await;
    }
}

/// Messages about connections: the authorizer does what the cluster's name says.
const ABOUT_CONNECTIONS: Wire = Wire {
    method: WIRE.method,
    question: |question| {
        let policy = question.exchange.metadata.namespace("envoy.filters.network.rbac");
        let policy = policy
            .filter(|(key, _)| key.ends_with("policy_id"))
            .map(|(_, policy)| policy.to_string());
        let peer = question.exchange.connection.peer.as_ref().map_or("-", |peer| peer.as_str());
        let wish = match question.told.namespaces.first() {
            Some(wish) => &**wish,
            None => "allow",
        };
        format!("{wish}||{peer}|{}", policy.collect::<String>()).into()
    },
    answer: WIRE.answer,
};

/// A connection to a service whose authorizer does as it is wished; what the client got, what was asked, and whether the destination was
/// connected.
async fn connect(wish: &str, allow_on_failure: bool, rbac: Vec<Rbac>) -> (Result<Vec<u8>, String>, Vec<String>, u32, rig::Told) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let rig = Rig::start().await;
    let asked = Asked::default();
    let db = rig.pod(10, mirror()).await;
    let authz = rig.pod(11, authorizer(asked.clone())).await;
    let filter = OfConnections {
        service: service(),
        wire: ABOUT_CONNECTIONS,
        allow_on_failure,
        enabled_by: (!rbac.is_empty()).then(|| by_provider("envoy.filters.network.rbac", "p")),
        told: Told {
            namespaces: vec![wish.into()],
            ..Told::default()
        },
        after: rbac.len().min(1),
    };
    let config = Config::default()
        .tcp_with(
            DB,
            rig::tunnels(&[db.address]),
            |chain| {
                chain.authorizers = vec![Arc::new(filter)];
                chain.rbac = rbac.into_iter().collect();
            },
            |_| {},
        )
        .cluster_with("authz", &[authz.address], |cluster| {
            cluster.protocol = UpstreamProtocol::Http2
        });
    rig.serve(config).await;
    let got = match rig.open(DB).await {
        Err(refused) => Err(refused.to_string()),
        Ok(opened) => {
            let mut stream = opened.stream;
            stream.write_all(b"hello").await.unwrap();
            stream.shutdown().await.unwrap();
            let mut echoed = Vec::new();
            stream.read_to_end(&mut echoed).await.unwrap();
            Ok(echoed)
        }
    };
    let told = rig.told(1).await;
    let connects = db.connects.load(std::sync::atomic::Ordering::SeqCst);
    let asked = asked.lock().clone();
    (got, asked, connects, told)
}

#[tokio::test]
async fn a_connection_is_decided_before_its_destination_is_connected() {
    for (wish, allow_on_failure, details) in [
        ("allow", false, None),
        ("deny", true, Some("ext_authz_denied")),
        ("fails", true, None),
        ("hang", true, None),
        ("close", true, None),
        ("fails", false, Some("ext_authz_error")),
        ("hang", false, Some("ext_authz_error")),
        ("close", false, Some("ext_authz_error")),
        ("nonsense", false, Some("ext_authz_error")),
    ] {
        let (got, asked, connects, told) = connect(wish, allow_on_failure, Vec::new()).await;
        assert_eq!(asked, [format!("{wish}||spiffe://cluster.local/ns/app/sa/client|")]);
        match details {
            None => {
                assert_eq!(got.as_deref(), Ok(&b"hello"[..]), "{wish}");
                assert_eq!((connects, told.flags.as_str()), (1, "-"), "{wish}");
            }
            Some(details) => {
                let refused = got.unwrap_err();
                assert!(refused.contains("403"), "{wish}: {refused}");
                assert_eq!(connects, 0, "{wish}: the destination never saw it");
                assert_eq!((told.flags.as_str(), told.details.as_str()), ("UAEX", details), "{wish}");
            }
        }
    }
}

#[tokio::test]
async fn policies_before_and_behind_the_authorizer_of_a_connection_are_held_in_order() {
    let rules = |action, name: &str, principal| {
        let policy = Policy {
            permissions: vec![Condition::Always],
            principals: vec![principal],
            condition: None,
        };
        Rules::new(action, BTreeMap::from([(name.to_owned(), policy)]))
    };
    let custom = |provider: &str| Rbac {
        rules: None,
        shadow: Some(Shadow::new(
            rules(
                Action::Deny,
                &format!("istio-ext-authz-{provider}-ns[app]-policy[a]-rule[0]"),
                Condition::Always,
            ),
            "istio_ext_authz_",
        )),
    };
    let deny = || Rbac {
        rules: Some(rules(Action::Deny, "all", Condition::Always)),
        shadow: None,
    };
    let (got, asked, _, _) = connect("allow", false, vec![custom("p")]).await;
    assert_eq!(got.as_deref(), Ok(&b"hello"[..]));
    assert!(
        asked[0].ends_with("\"istio-ext-authz-p-ns[app]-policy[a]-rule[0]\""),
        "{asked:?}"
    );
    let (got, asked, connects, told) = connect("allow", false, vec![custom("p"), deny()]).await;
    assert!(got.unwrap_err().contains("403"));
    assert_eq!((asked.len(), connects), (1, 0), "asked, and denied by what stands behind");
    assert_eq!(told.termination, "rbac_access_denied_matched_policy[all]");
    let (got, asked, ..) = connect("deny", false, vec![custom("other")]).await;
    assert_eq!(got.as_deref(), Ok(&b"hello"[..]));
    assert!(asked.is_empty(), "it is no business of that provider");
    let (got, asked, ..) = connect("allow", false, vec![deny(), custom("p")]).await;
    assert!(got.unwrap_err().contains("403"));
    assert!(asked.is_empty(), "denied before anybody was asked");
}
