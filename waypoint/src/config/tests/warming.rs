//! What waits for what, and until when.

use std::time::Duration;

use super::*;

#[test]
fn a_chain_waits_for_the_endpoints_of_its_clusters() {
    let answers = capture("01-http-basic");
    let mut bench = Bench::new();
    let applied = bench.apply(of(&answers, CLUSTERS));
    assert_eq!(applied.wants.get(ENDPOINTS).unwrap().iter().collect::<Vec<_>>(), [WEB]);
    bench.apply(of(&answers, LISTENERS));
    let snapshot = bench.snapshot();
    assert!(snapshot.clusters.get(WEB).is_none() && snapshot.chains.get(WEB).is_none() && snapshot.matcher.is_none());
    assert!(snapshot.chains.get("direct-http").is_some(), "others do not wait");
    assert!(
        bench.compiler.missing()[0].starts_with("endpoints (EDS) of inbound-vip|80"),
        "{:?}",
        bench.compiler.missing()
    );
    assert!(bench.apply(of(&answers, ENDPOINTS)).published.is_some());
    let snapshot = bench.snapshot();
    assert!(matches!(snapshot.serves(&facts("10.96.1.10:80", None)), Serves::Http(_)));
    assert!(snapshot.clusters.get(WEB).unwrap().state.endpoints.load().known);
    assert_eq!(bench.compiler.missing(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_secret_that_never_comes_does_not_keep_the_proxy_from_being_ready() {
    let mut bench = Bench::new();
    let answers = capture("16-destinationrule-tls");
    for answer in answers
        .iter()
        .filter(|answer| answer.type_url != crate::config::compiler::SECRETS)
    {
        bench.apply(answer);
    }
    assert_eq!(
        bench.compiler.missing(),
        ["secrets (SDS): kubernetes://client-cred, kubernetes://client-cred-cacert"]
    );
    tokio::time::advance(Duration::from_secs(15)).await;
    assert_eq!(bench.compiler.missing(), [""; 0]);
}

const NEW: &str = "inbound-vip|80|http/v2|web";

/// Sends a new cluster, and the chain of `web` with every route to it, before its endpoints have come.
fn send_new_cluster(bench: &mut Bench, answers: &[Answer]) {
    let mut clusters = of(answers, CLUSTERS).clone();
    let mut new = resource(&mut clusters, WEB).clone();
    new.name = NEW.into();
    rename_service(&mut new, NEW);
    clusters.resources.push(new);
    let wants = bench.apply(&clusters).wants;
    assert!(wants.get(ENDPOINTS).unwrap().contains(NEW));
    let mut listeners = of(answers, LISTENERS).clone();
    edit_listener(&mut listeners, "main_internal", |listener| {
        edit_manager(chain_mut(listener, WEB), |manager| route_to(manager, NEW));
    });
    bench.apply(&listeners);
}

/// Gives a cluster another name for its endpoints.
fn rename_service(cluster: &mut Resource, service: &str) {
    let mut message = EnvoyCluster::decode(cluster.bytes.clone()).unwrap();
    message.name.clone_from(&cluster.name);
    message.eds_cluster_config.as_mut().unwrap().service_name = service.into();
    cluster.bytes = message.encode_to_vec().into();
}

fn endpoints(name: &str, bytes: Vec<u8>) -> Vec<Resource> {
    vec![Resource {
        name: name.into(),
        version: String::new(),
        type_url: ENDPOINTS.into(),
        bytes: bytes.into(),
    }]
}

fn pending(bench: &Bench) -> Vec<(String, Option<String>, bool)> {
    let list = bench.compiler.store().pending();
    list.iter()
        .map(|item| (item.resource.clone(), item.chain.clone(), item.overdue))
        .collect()
}

#[test]
fn a_changed_chain_that_waits_leaves_the_old_one_serving() {
    let answers = capture("01-http-basic");
    let mut bench = Bench::with(&answers);
    let before = bench.snapshot().chains.get(WEB).unwrap().clone();
    send_new_cluster(&mut bench, &answers);
    assert!(Arc::ptr_eq(&before, bench.snapshot().chains.get(WEB).unwrap()));
    assert_eq!(
        pending(&bench),
        [(NEW.into(), None, false), ("main_internal".into(), Some(WEB.into()), false)]
    );
    let empty = ClusterLoadAssignment {
        cluster_name: NEW.into(),
        ..Default::default()
    };
    bench.compiler.apply(ENDPOINTS, endpoints(NEW, empty.encode_to_vec()), vec![]);
    assert!(!Arc::ptr_eq(&before, bench.snapshot().chains.get(WEB).unwrap()));
    assert_eq!(pending(&bench), []);
}

#[tokio::test(start_paused = true)]
async fn a_chain_that_has_waited_long_enough_is_used_without_the_endpoints() {
    let answers = capture("01-http-basic");
    let mut bench = Bench::with(&answers);
    let before = bench.snapshot().chains.get(WEB).unwrap().clone();
    send_new_cluster(&mut bench, &answers);
    // Another push does not put the deadline off.
    tokio::time::advance(Duration::from_secs(10)).await;
    send_again(&mut bench);
    tokio::time::advance(Duration::from_millis(4_999)).await;
    assert_eq!(bench.compiler.overdue(), None);
    tokio::time::advance(Duration::from_millis(1)).await;
    assert_eq!(bench.compiler.due(), Some(cairn_exchange::clock::now()));
    assert!(bench.compiler.overdue().is_some());
    let snapshot = bench.snapshot();
    assert!(!Arc::ptr_eq(&before, snapshot.chains.get(WEB).unwrap()));
    assert_eq!(snapshot.clusters.get(NEW).unwrap().state.endpoints.load().iter().count(), 0);
    assert_eq!(
        (pending(&bench), bench.compiler.due()),
        (vec![(NEW.into(), None, true)], None)
    );
    // Late is better than never.
    let mut known = of(&answers, ENDPOINTS).clone();
    let mut message = ClusterLoadAssignment::decode(resource(&mut known, WEB).bytes.clone()).unwrap();
    message.cluster_name = NEW.into();
    bench
        .compiler
        .apply(ENDPOINTS, endpoints(NEW, message.encode_to_vec()), vec![]);
    assert_eq!(snapshot.clusters.get(NEW).unwrap().state.endpoints.load().iter().count(), 2);
    assert_eq!(pending(&bench), []);
}

/// Sends the new cluster in another version.
fn send_again(bench: &mut Bench) {
    let stored = bench.compiler.store().resource(CLUSTERS, NEW).unwrap();
    let mut message = EnvoyCluster::decode(stored.bytes).unwrap();
    message.connect_timeout = Some(prost_types::Duration { seconds: 7, nanos: 0 });
    let cluster = Resource {
        name: NEW.into(),
        version: String::new(),
        type_url: CLUSTERS.into(),
        bytes: message.encode_to_vec().into(),
    };
    assert_eq!(bench.compiler.apply(CLUSTERS, vec![cluster], vec![]).errors, []);
}

#[tokio::test(start_paused = true)]
async fn at_start_the_matcher_does_not_wait_for_ever_either() {
    let answers = capture("01-http-basic");
    let mut bench = Bench::new();
    bench.apply(of(&answers, CLUSTERS));
    bench.apply(of(&answers, LISTENERS));
    assert!(bench.snapshot().matcher.is_none());
    tokio::time::advance(Duration::from_secs(15)).await;
    assert!(bench.compiler.overdue().is_some());
    assert!(matches!(
        bench.snapshot().serves(&facts("10.96.1.10:80", None)),
        Serves::Http(_)
    ));
    assert_eq!(bench.compiler.missing(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn endpoints_of_another_name_do_not_stay_in_a_cluster() {
    let answers = capture("01-http-basic");
    let mut bench = Bench::with(&answers);
    let mut clusters = of(&answers, CLUSTERS).clone();
    rename_service(resource(&mut clusters, WEB), "elsewhere");
    bench.apply(&clusters);
    let count = |bench: &Bench| {
        let snapshot = bench.snapshot();
        snapshot.clusters.get(WEB).unwrap().state.endpoints.load().iter().count()
    };
    assert_eq!(count(&bench), 2, "the version before serves meanwhile");
    tokio::time::advance(Duration::from_secs(15)).await;
    bench.compiler.overdue();
    assert_eq!(count(&bench), 0);
}

#[test]
fn a_malformed_first_answer_about_endpoints_blocks_nothing() {
    let answers = capture("01-http-basic");
    let mut bench = Bench::with(&answers);
    let before = bench.snapshot().chains.get(WEB).unwrap().clone();
    send_new_cluster(&mut bench, &answers);
    let applied = bench.compiler.apply(ENDPOINTS, endpoints(NEW, vec![0xff]), vec![]);
    assert!(applied.nack().unwrap().starts_with(NEW), "{:?}", applied.nack());
    let snapshot = bench.snapshot();
    assert!(!Arc::ptr_eq(&before, snapshot.chains.get(WEB).unwrap()));
    assert_eq!(snapshot.clusters.get(NEW).unwrap().state.endpoints.load().iter().count(), 0);
}

/// Sends every request of a manager to one cluster.
fn route_to(manager: &mut HttpConnectionManager, cluster: &str) {
    use cairn_proto::envoy::{
        config::route::v3::{route::Action, route_action::ClusterSpecifier},
        extensions::filters::network::http_connection_manager::v3::http_connection_manager::RouteSpecifier,
    };
    let Some(RouteSpecifier::RouteConfig(config)) = &mut manager.route_specifier else {
        panic!("no routes")
    };
    for route in &mut config.virtual_hosts[0].routes {
        let Some(Action::Route(action)) = &mut route.action else {
            panic!("no forwarding")
        };
        action.cluster_specifier = Some(ClusterSpecifier::Cluster(cluster.into()));
    }
}

#[test]
fn a_route_to_an_unknown_cluster_is_no_reason_to_wait() {
    let answers = capture("01-http-basic");
    let mut bench = Bench::with(&answers);
    let mut listeners = of(&answers, LISTENERS).clone();
    edit_listener(&mut listeners, "main_internal", |listener| {
        edit_manager(chain_mut(listener, WEB), |manager| route_to(manager, "UnknownService"));
    });
    let applied = bench.apply(&listeners);
    assert!(applied.published.is_some() && applied.errors.is_empty());
    let snapshot = bench.snapshot();
    assert!(snapshot.clusters.get("UnknownService").is_none());
    assert!(matches!(snapshot.serves(&facts("10.96.1.10:80", None)), Serves::Http(_)));
}

#[test]
fn a_removed_cluster_stays_while_a_chain_names_it() {
    let answers = capture("01-http-basic");
    let mut bench = Bench::with(&answers);
    let applied = bench
        .compiler
        .apply(CLUSTERS, vec![], vec![WEB.into(), "never-heard-of".into()]);
    assert_eq!(applied.published, None);
    assert!(bench.snapshot().clusters.get(WEB).is_some());
    // The push goes on: the listener comes without the service.
    let mut listeners = of(&answers, LISTENERS).clone();
    edit_listener(&mut listeners, "main_internal", |listener| {
        listener.filter_chains.retain(|chain| chain.name != WEB);
        let matcher = listener.filter_chain_matcher.as_mut().unwrap();
        strip_ranges(matcher);
    });
    let applied = bench.apply(&listeners);
    let snapshot = bench.snapshot();
    assert!(snapshot.clusters.get(WEB).is_none() && snapshot.chains.get(WEB).is_none());
    assert!(matches!(snapshot.serves(&facts("10.96.1.10:80", None)), Serves::Nobody(_)));
    assert!(applied.wants.get(ENDPOINTS).unwrap().is_empty());
}

/// Leaves no service in a matcher.
fn strip_ranges(matcher: &mut cairn_proto::xds::r#type::matcher::v3::Matcher) {
    use cairn_proto::xds::r#type::matcher::v3::{
        IpMatcher,
        matcher::{MatcherType, matcher_tree::TreeType},
    };
    let Some(MatcherType::MatcherTree(tree)) = &mut matcher.matcher_type else {
        panic!("no tree")
    };
    let Some(TreeType::CustomMatch(custom)) = &mut tree.tree_type else {
        panic!("no ranges")
    };
    custom.typed_config.as_mut().unwrap().value = IpMatcher::default().encode_to_vec();
}

#[test]
fn a_chain_stays_while_the_matcher_leads_to_it() {
    let answers = capture("01-http-basic");
    let mut bench = Bench::with(&answers);
    let mut listeners = of(&answers, LISTENERS).clone();
    edit_listener(&mut listeners, "main_internal", |listener| {
        listener.filter_chains.retain(|chain| chain.name != WEB)
    });
    bench.apply(&listeners);
    assert!(matches!(
        bench.snapshot().serves(&facts("10.96.1.10:80", None)),
        Serves::Http(_)
    ));
}
