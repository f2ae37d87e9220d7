//! Objects as operators write them, on the configuration of a real istiod.

use std::{path::Path, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use cairn_exchange::{Connection, DynamicMetadata, Exchange, Protocol, RequestHead, Scheme, clock};
use cairn_filters::{NoServices, OnRoute, Run, Verdict};
use cairn_policy::route::Facts;
use http::{HeaderName, HeaderValue, Method, uri::PathAndQuery};

use crate::{
    config::{
        Compiler,
        load::{Answer, load},
    },
    snapshot::{Chain, ChainKind, Snapshot},
    workloads::Workloads,
};

const WEB: &str = "inbound-vip|80|http|web.app.svc.cluster.local";
const OTHER: &str = "inbound-vip|80|http|web-v2.app.svc.cluster.local";

struct Bench {
    compiler: Compiler,
    published: Arc<ArcSwap<Snapshot>>,
}

impl Bench {
    fn new() -> Self {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../conformance/fixtures/xds");
        let answers: Vec<Answer> = load(&fixtures.join("istio-1.31.0-20260827/08-httproute-traffic")).unwrap();
        let workloads = Arc::new(Workloads::new(""));
        let published = Arc::new(ArcSwap::from_pointee(Snapshot::empty(workloads.clone())));
        let mut compiler = Compiler::new(workloads, published.clone(), None);
        for answer in answers {
            compiler.apply(&answer.type_url, answer.resources, answer.removed);
        }
        Self { compiler, published }
    }

    fn chain(&self, name: &str) -> Arc<Chain> {
        self.published.load().chains.get(name).unwrap().clone()
    }

    /// Names of the operator's own filters in a chain.
    fn own(&self, name: &str) -> Vec<String> {
        let chain = self.chain(name);
        let ChainKind::Http(http) = &chain.kind else {
            panic!("it is HTTP")
        };
        let names = http.filters.names().map(ToString::to_string);
        names.filter(|name| name.starts_with("cairn.dev/")).collect()
    }

    fn listed(&self) -> Vec<String> {
        let all = self.compiler.unsupported();
        let own = all.iter().filter(|item| item.resource == "cairn.dev/rate-limits");
        own.map(|item| format!("{}: {}", item.field, item.what)).collect()
    }
}

#[test]
fn limits_are_put_into_the_chains_that_they_are_for_and_leave_with_the_object() {
    let mut bench = Bench::new();
    let other = bench.chain(OTHER);
    let object = "
- service: web.app.svc.cluster.local
  local: {requests: 10, per: 1m, burst: 20}
- service: web.app.svc.cluster.local
  port: 80
  by: [{header: x-user}, {path: true, key: where}]
  local: {requests: 1, per: 1s, distinct: 50}
- service: gone.app.svc.cluster.local
  local: {requests: 1, per: 1s}
";
    bench.compiler.limit(Some(object)).unwrap();
    assert_eq!(bench.own(WEB), ["cairn.dev/rate-limits[0]", "cairn.dev/rate-limits[1]"]);
    assert!(Arc::ptr_eq(&other, &bench.chain(OTHER)), "other chains stay as they are");
    assert_eq!(bench.listed(), ["[2]: there is no service gone.app.svc.cluster.local"]);
    // JSON is YAML too; a limit without a service is for all.
    bench
        .compiler
        .limit(Some(r#"[{"local": {"requests": 5, "per": "1s"}}]"#))
        .unwrap();
    assert_eq!((bench.own(WEB).len(), bench.own(OTHER).len()), (1, 1));
    bench.compiler.limit(None).unwrap();
    assert_eq!((bench.own(WEB).len(), bench.own(OTHER).len()), (0, 0));
    assert_eq!(bench.listed(), Vec::<String>::new());
}

#[test]
fn a_service_that_counts_is_a_cluster_of_its_own() {
    let mut bench = Bench::new();
    const NAME: &str = "cairn.dev/rate-limits|ratelimit.infra:8081";
    let object = "[{by: [{principal: true}], global: {service: 'ratelimit.infra:8081', domain: shop, failClosed: true}}]";
    bench.compiler.limit(Some(object)).unwrap();
    assert_eq!(bench.own(WEB).len(), 1);
    assert!(bench.published.load().clusters.get(NAME).is_some());
    bench.compiler.limit(None).unwrap();
    assert!(bench.published.load().clusters.get(NAME).is_none());
}

#[test]
fn an_object_with_anything_wrong_in_it_is_refused_and_the_last_good_one_stays() {
    let mut bench = Bench::new();
    bench.compiler.limit(Some("[{local: {requests: 5, per: 1s}}]")).unwrap();
    for (object, error) in [
        ("[{local: {requests: 5, per: 1s}, sevice: web}]", "the object: "),
        ("[{local: {requests: 5}}]", "the object: "),
        ("[{requests: 5}", "the object: "),
        ("[{service: web}]", "[0]: has to have either `local` or `global`"),
        ("[{local: {requests: 5, per: soon}}]", "[0].local.per: `soon` is no time"),
        ("[{local: {requests: 5, per: 1ms}}]", "[0]: "),
        ("[{local: {requests: 0, per: 1s}}]", "[0]: "),
        (
            "[{local: {requests: 1, per: 1s}}, {local: {requests: 1, per: 1s}, by: [{}]}]",
            "[1].by[0]: has to have one of",
        ),
        (
            "[{local: {requests: 1, per: 1s}, by: [{header: a, path: true}]}]",
            "[0].by[0]: has to have one of",
        ),
        ("[{local: {requests: 1, per: 1s}, by: [{header: 'a b'}]}]", "[0]: "),
        (
            "[{local: {requests: 1, per: 1s, distinct: 0}, by: [{path: true}]}]",
            "[0].local.distinct: ",
        ),
        ("[{local: {requests: 1, per: 1s}, status: 200}]", "[0].status: is no error"),
        ("[{global: {service: 'a:1', domain: x}}]", "[0]: `global` needs `by`"),
        (
            "[{global: {service: a, domain: x}, by: [{path: true}]}]",
            "[0].global.service: `a` is no host:port",
        ),
        ("[{local: {requests: 1, per: 1s}, by: [{cel: 'request.('}]}]", "[0]: "),
        ("[{global: {service: 'a:1', domain: ''}, by: [{path: true}]}]", "[0]: "),
    ] {
        let refused = bench.compiler.limit(Some(object)).unwrap_err().to_string();
        assert!(refused.starts_with(error), "{object}: {refused}");
        assert_eq!(bench.own(WEB), ["cairn.dev/rate-limits[0]"], "{object}");
        let listed = bench.listed().concat();
        assert!(listed.ends_with("the last good object stays"), "{listed}");
    }
    bench.compiler.limit(Some("[{local: {requests: 5, per: 1s}}]")).unwrap();
    assert_eq!(bench.listed(), Vec::<String>::new());
}

#[test]
fn a_limit_of_one_route_counts_there_alone() {
    let mut bench = Bench::new();
    let chain = bench.chain(WEB);
    let ChainKind::Http(http) = &chain.kind else {
        panic!("it is HTTP")
    };
    let mut names = http.routes.hosts()[0].routes.iter().filter_map(|route| route.name.clone());
    let name = names.next_back().unwrap();
    let object = format!("[{{route: '{name}', local: {{requests: 5, per: 1s}}}}]");
    bench.compiler.limit(Some(&object)).unwrap();
    assert_eq!(bench.own(WEB).len(), 1);
    let chain = bench.chain(WEB);
    let ChainKind::Http(http) = &chain.kind else {
        panic!("it is HTTP")
    };
    for route in &http.routes.hosts()[0].routes {
        let on = route.overrides.contains_key("cairn.dev/rate-limits[0]");
        assert_eq!(on, route.name.as_ref() == Some(&name), "{:?}", route.name);
    }
    assert_eq!(bench.own(OTHER).len(), 0, "no such route there");
}

/// What the filters of a chain say to a request of this user: the status of a denial.
fn asked(chain: &Chain, user: Option<&'static str>) -> Option<u16> {
    let ChainKind::Http(http) = &chain.kind else {
        panic!("it is HTTP")
    };
    let connection = Connection {
        id: 1,
        authority: "10.96.1.10:80".into(),
        local_address: "10.96.1.10:80".parse().ok(),
        service_port: 80,
        remote_address: "10.244.0.9:41000".parse().unwrap(),
        peer: None,
        local: None,
        source: None,
        requested_server_name: None,
        opened: clock::now(),
    };
    let mut exchange = Exchange::begin(Protocol::Http11, Arc::new(connection), chain.name.clone(), 1);
    exchange.request = Some(RequestHead {
        method: Method::GET,
        path: PathAndQuery::from_static("/a?b"),
        authority: HeaderValue::from_static("web"),
        scheme: Scheme::Http,
        headers: user
            .map(|user| (HeaderName::from_static("x-user"), HeaderValue::from_static(user)))
            .into_iter()
            .collect(),
    });
    let head = exchange.request.clone().unwrap();
    let facts = Facts {
        random: 0,
        metadata: DynamicMetadata::NONE,
    };
    let route = OnRoute::new(http.routes.find(&head, facts), None);
    let mut run = Run::default();
    match http.filters.decode_head(&mut run, &mut exchange, &route, &NoServices) {
        Verdict::Continue => None,
        Verdict::Reply(reply) => Some(reply.status.as_u16()),
        Verdict::Stop(_) => panic!("nobody is asked"),
    }
}

#[tokio::test(start_paused = true)]
async fn requests_that_are_told_apart_count_apart() {
    for by in ["{header: x-user}", "{cel: \"request.headers['x-user']\"}"] {
        let mut bench = Bench::new();
        let object = format!("[{{by: [{by}], local: {{requests: 1, per: 1m, burst: 2}}, status: 420}}]");
        bench.compiler.limit(Some(&object)).unwrap();
        let web = bench.chain(WEB);
        for (user, answer) in [
            ("ann", None),
            ("ann", None),
            ("ann", Some(420)),
            ("ben", None),
            ("ann", Some(420)),
        ] {
            assert_eq!(asked(&web, Some(user)), answer, "{by} {user}");
        }
        // Another service has a count of its own, and a change of the object that leaves a limit as it is leaves its counts.
        assert_eq!(asked(&bench.chain(OTHER), Some("ann")), None, "{by}");
        let more = format!("{}, {{local: {{requests: 100, per: 1s}}}}]", object.trim_end_matches(']'));
        bench.compiler.limit(Some(&more)).unwrap();
        assert_eq!(asked(&bench.chain(WEB), Some("ann")), Some(420), "{by}");
        tokio::time::advance(Duration::from_secs(60)).await;
        assert_eq!(asked(&bench.chain(WEB), Some("ann")), None, "{by}");
    }
}
