//! Every captured scenario of every version, and what happens between answers.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use cairn_proto::envoy::{
    config::{
        cluster::v3::Cluster as EnvoyCluster,
        endpoint::v3::ClusterLoadAssignment,
        listener::v3::{Filter, FilterChain, Listener, filter::ConfigType},
    },
    extensions::filters::network::{http_connection_manager::v3::HttpConnectionManager, tcp_proxy::v3::TcpProxy},
};
use proptest::prelude::*;
use prost::Message as _;

use super::{
    Compiler, Resource,
    compiler::{CLUSTERS, ENDPOINTS, LISTENERS},
    load::{Answer, load},
    show::show,
};
use crate::{
    snapshot::{
        ChainKind, Serves, Snapshot,
        matcher::{Facts, Spoken},
    },
    upstream::TransportTerms,
    workloads::Workloads,
};

mod policies;
mod unsupported;
mod warming;

const NEWEST: &str = "istio-1.31.0-20260827";

/// A compiler with what it publishes.
struct Bench {
    compiler: Compiler,
    published: Arc<ArcSwap<Snapshot>>,
}

impl Bench {
    fn new() -> Self {
        let workloads = Arc::new(Workloads::new(""));
        let published = Arc::new(ArcSwap::from_pointee(Snapshot::empty(workloads.clone())));
        Self {
            compiler: Compiler::new(workloads, published.clone(), None),
            published,
        }
    }

    fn with(answers: &[Answer]) -> Self {
        let mut bench = Self::new();
        for answer in answers {
            bench.apply(answer);
        }
        bench
    }

    fn apply(&mut self, answer: &Answer) -> super::Applied {
        self.compiler
            .apply(&answer.type_url, answer.resources.clone(), answer.removed.clone())
    }

    fn snapshot(&self) -> Arc<Snapshot> {
        self.published.load_full()
    }
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../conformance/fixtures/xds")
}

fn capture(scenario: &str) -> Vec<Answer> {
    load(&fixtures().join(NEWEST).join(scenario)).unwrap()
}

fn of<'a>(answers: &'a [Answer], type_url: &str) -> &'a Answer {
    answers.iter().find(|answer| answer.type_url == type_url).unwrap()
}

fn resource<'a>(answer: &'a mut Answer, name: &str) -> &'a mut Resource {
    answer.resources.iter_mut().find(|resource| resource.name == name).unwrap()
}

/// Changes a listener of an answer.
fn edit_listener(answer: &mut Answer, name: &str, edit: impl FnOnce(&mut Listener)) {
    let resource = resource(answer, name);
    let mut listener = Listener::decode(resource.bytes.clone()).unwrap();
    edit(&mut listener);
    resource.bytes = listener.encode_to_vec().into();
}

/// Changes the connection manager of a chain.
fn edit_manager(chain: &mut FilterChain, edit: impl FnOnce(&mut HttpConnectionManager)) {
    for Filter { config_type, .. } in &mut chain.filters {
        let Some(ConfigType::TypedConfig(any)) = config_type else {
            continue;
        };
        if any.type_url.ends_with("HttpConnectionManager") {
            let mut manager = HttpConnectionManager::decode(any.value.as_slice()).unwrap();
            edit(&mut manager);
            any.value = manager.encode_to_vec();
            return;
        }
    }
    panic!("{} has no connection manager", chain.name);
}

fn chain_mut<'a>(listener: &'a mut Listener, name: &str) -> &'a mut FilterChain {
    listener.filter_chains.iter_mut().find(|chain| chain.name == name).unwrap()
}

fn facts(authority: &str, spoken: Option<Spoken>) -> Facts<'_> {
    let address: Option<std::net::SocketAddr> = authority.parse().ok();
    Facts {
        destination_ip: address.map(|address| address.ip()),
        destination_port: address.map(|address| address.port()),
        source_ip: [10, 244, 0, 200].into(),
        authority,
        source: None,
        spoken,
    }
}

const WEB: &str = "inbound-vip|80|http|web.app.svc.cluster.local";

#[test]
fn a_service_is_served_from_tunnel_to_endpoint() {
    let answers = capture("01-http-basic");
    let bench = Bench::with(&answers);
    assert_eq!(bench.compiler.missing(), [""; 0]);
    assert_eq!(bench.compiler.unsupported().len(), 0, "{:?}", bench.compiler.unsupported());
    let snapshot = bench.snapshot();
    let terminate = snapshot.terminate.clone().unwrap();
    assert_eq!(terminate.addresses, ["0.0.0.0:15008".parse().unwrap()]);
    assert_eq!(terminate.tls.uri_san_prefixes, ["spiffe://cluster.local/"]);
    assert_eq!(terminate.max_concurrent_streams, 100);
    assert_eq!(terminate.refuse, None);

    let Serves::Http(chain) = snapshot.serves(&facts("10.96.1.10:80", None)) else {
        panic!("not served")
    };
    assert_eq!((&*chain.name, chain.service_port), (WEB, 80));
    let ChainKind::Http(http) = &chain.kind else {
        panic!("no HTTP")
    };
    assert!(http.settings.websocket && http.settings.path.normalize && http.metrics);
    assert_eq!(http.settings.stream_idle_timeout, None);
    let route = &http.routes.hosts()[0].routes[0];
    let forward = route.action.forward().unwrap();
    assert_eq!(forward.clusters().map(|name| &**name).collect::<Vec<_>>(), [WEB]);
    assert_eq!(forward.timeouts.timeout, None);
    assert_eq!(forward.retry.as_ref().unwrap().retries, 2);

    let cluster = snapshot.clusters.get(WEB).unwrap();
    assert_eq!(cluster.facts.service.as_ref().unwrap().name.as_ref(), "web");
    let endpoints = cluster.state.endpoints.load();
    let shown: Vec<_> = endpoints.iter().map(|endpoint| endpoint.display.to_string()).collect();
    assert_eq!(
        shown,
        [
            "envoy://connect_originate/10.244.0.10:8080",
            "envoy://connect_originate/10.244.0.11:8080"
        ]
    );
    assert!(snapshot.clusters.get("connect_originate").unwrap().settings.tunnel.is_some());
    assert_eq!(
        snapshot
            .workloads
            .workload_at([10, 244, 0, 10].into())
            .unwrap()
            .canonical_name
            .as_ref(),
        "web"
    );
    assert!(matches!(snapshot.serves(&facts("10.96.1.10:81", None)), Serves::Nobody(_)));
}

#[test]
fn every_capture_of_every_version_compiles_to_its_golden_text() {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path("../../tests/snapshots");
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    let mut seen = 0;
    for (version, scenario, path) in captures() {
        let bench = Bench::with(&load(&path).unwrap());
        let mut text = String::new();
        for missing in bench.compiler.missing() {
            text.push_str(&format!("missing: {missing}\n"));
        }
        text.push_str(&show(&bench.snapshot(), &bench.compiler.unsupported()));
        seen += 1;
        if scenario.starts_with("40-") {
            // Too long to read: everything is served.
            let snapshot = bench.snapshot();
            let refused = snapshot.chains.iter().filter(|(_, chain)| chain.refuse.is_some()).count();
            assert_eq!((snapshot.chains.len(), refused), (300, 0));
            continue;
        }
        settings.bind(|| insta::assert_snapshot!(format!("{version}@{scenario}"), text));
    }
    assert!(seen > 60, "{seen}");
}

/// All captures: version, scenario, directory.
fn captures() -> Vec<(String, String, PathBuf)> {
    let mut found = Vec::new();
    let name = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
    let inside = |path: &Path| {
        let mut paths: Vec<_> = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        paths
    };
    for version in inside(&fixtures()) {
        for scenario in inside(&version) {
            if !scenario.is_dir() {
                continue;
            }
            let proxies: Vec<_> = inside(&scenario).into_iter().filter(|path| path.is_dir()).collect();
            if proxies.is_empty() {
                found.push((name(&version), name(&scenario), scenario));
                continue;
            }
            for proxy in proxies {
                found.push((name(&version), format!("{}-{}", name(&scenario), name(&proxy)), proxy));
            }
        }
    }
    found
}

#[test]
fn a_config_dump_means_the_same_as_the_answers_it_was_made_of() {
    let mut seen = 0;
    for (_, scenario, directory) in captures()
        .into_iter()
        .filter(|(.., directory)| directory.join("config_dump.json").exists())
    {
        seen += 1;
        let answers: Vec<_> = load(&directory)
            .unwrap()
            .into_iter()
            .filter(|answer| !answer.type_url.contains("istio.workload"))
            .collect();
        let one = Bench::with(&answers);
        let other = Bench::with(&load(&directory.join("config_dump.json")).unwrap());
        assert_eq!(
            show(&one.snapshot(), &one.compiler.unsupported()),
            show(&other.snapshot(), &other.compiler.unsupported()),
            "{scenario}"
        );
    }
    assert!(seen > 0);
}

#[test]
fn the_dump_of_the_store_is_read_back_as_the_same_configuration() {
    let directory = tempfile::tempdir().unwrap();
    let answers = capture("12-virtualservice");
    let bench = Bench::with(&answers);
    let dump = super::dump::config_dump(bench.compiler.store(), serde_json::json!({ "id": "waypoint~1" }), true);
    let file = directory.path().join("dump.json");
    std::fs::write(&file, serde_json::to_string_pretty(&dump).unwrap()).unwrap();
    let read = load(&file).unwrap();
    for type_url in [CLUSTERS, ENDPOINTS] {
        let sorted = |answer: &Answer| {
            let mut messages: Vec<_> = answer
                .resources
                .iter()
                .map(|resource| (resource.name.clone(), resource.bytes.len()))
                .collect();
            messages.sort();
            messages
        };
        assert_eq!(sorted(of(&read, type_url)), sorted(of(&answers, type_url)));
    }
    let again = Bench::with(&read);
    let chains = |bench: &Bench| {
        show(&bench.snapshot(), &bench.compiler.unsupported())
            .split("\nmesh:")
            .next()
            .map(str::to_owned)
    };
    assert_eq!(chains(&again), chains(&bench));
    let sections: Vec<_> = dump["configs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|section| section["@type"].as_str().unwrap())
        .collect();
    assert_eq!(sections.len(), 7);
}

#[test]
fn private_keys_are_not_dumped() {
    let bench = Bench::with(&capture("16-destinationrule-tls"));
    let dump = super::dump::config_dump(bench.compiler.store(), serde_json::Value::Null, false).to_string();
    assert!(dump.contains("W3JlZGFjdGVkXQ=="));
    assert!(dump.contains("kubernetes://client-cred"));
    assert!(!dump.contains("LS0tLS1CRUdJTiBQUklWQVRFIEtFWS") && !dump.contains("LS0tLS1CRUdJTiBFQyBQUklWQVRFIEtFWS"));
}

#[test]
fn sending_the_same_again_changes_nothing() {
    let answers = capture("08-httproute-traffic");
    let mut bench = Bench::with(&answers);
    let before = bench.snapshot();
    for answer in &answers {
        let copy = Answer {
            resources: answer
                .resources
                .iter()
                .map(|r| Resource {
                    bytes: Bytes::copy_from_slice(&r.bytes),
                    ..r.clone()
                })
                .collect(),
            ..answer.clone()
        };
        let applied = bench.apply(&copy);
        assert_eq!(
            (applied.published, applied.errors.len(), applied.wants.len()),
            (None, 0, 0),
            "{}",
            answer.type_url
        );
    }
    assert!(Arc::ptr_eq(&before, &bench.snapshot()));
}

#[test]
fn one_changed_chain_leaves_all_others_as_they_are() {
    let answers = capture("08-httproute-traffic");
    let mut bench = Bench::with(&answers);
    // Encoded by the same hand both times: maps have an order of their own.
    let mut listeners = of(&answers, LISTENERS).clone();
    edit_listener(&mut listeners, "main_internal", |_| {});
    bench.apply(&listeners);
    let before = bench.snapshot();
    let changed = before.chains.sorted()[2].0.clone();
    edit_listener(&mut listeners, "main_internal", |listener| {
        edit_manager(chain_mut(listener, &changed), |manager| {
            manager.server_name = "changed".into()
        });
    });
    let applied = bench.apply(&listeners);
    assert_eq!((applied.published, applied.errors.len()), (Some(before.version + 1), 0));
    let after = bench.snapshot();
    for (name, chain) in before.chains.iter() {
        assert_eq!(
            Arc::ptr_eq(chain, after.chains.get(name).unwrap()),
            *name != changed,
            "{name}"
        );
    }
    assert!(Arc::ptr_eq(before.matcher.as_ref().unwrap(), after.matcher.as_ref().unwrap()));
    assert!(Arc::ptr_eq(
        before.terminate.as_ref().unwrap(),
        after.terminate.as_ref().unwrap()
    ));
}

#[test]
fn endpoints_change_without_a_new_snapshot_and_keep_their_state() {
    let answers = capture("01-http-basic");
    let mut bench = Bench::with(&answers);
    let before = bench.snapshot();
    let cluster = before.clusters.get(WEB).unwrap().clone();
    let kept = cluster.state.endpoints.load().iter().next().unwrap().state.clone();
    let mut endpoints = of(&answers, ENDPOINTS).clone();
    let assignment = resource(&mut endpoints, WEB);
    let mut message = ClusterLoadAssignment::decode(assignment.bytes.clone()).unwrap();
    message.endpoints[0].lb_endpoints.pop();
    assignment.bytes = message.encode_to_vec().into();
    assert_eq!(bench.apply(&endpoints).published, None);
    assert!(Arc::ptr_eq(&before, &bench.snapshot()));
    let now = cluster.state.endpoints.load();
    assert_eq!(now.iter().count(), 1);
    assert!(Arc::ptr_eq(&kept, &now.iter().next().unwrap().state));
}

#[test]
fn what_is_removed_is_gone_and_may_come_back() {
    let answers = capture("01-http-basic");
    let mut bench = Bench::with(&answers);
    bench
        .compiler
        .apply(LISTENERS, vec![], vec!["main_internal".into(), "connect_terminate".into()]);
    let snapshot = bench.snapshot();
    assert!(snapshot.matcher.is_none() && snapshot.terminate.is_none() && snapshot.chains.is_empty());
    assert_eq!(
        bench.compiler.missing(),
        ["the listener connect_terminate", "the listener main_internal"]
    );
    bench.apply(of(&answers, LISTENERS));
    assert!(matches!(
        bench.snapshot().serves(&facts("10.96.1.10:80", None)),
        Serves::Http(_)
    ));
}

#[test]
fn empty_answers_and_foreign_names_are_nothing() {
    let answers = capture("01-http-basic");
    let mut bench = Bench::with(&answers);
    let before = bench.snapshot();
    for answer in &answers {
        let applied = bench
            .compiler
            .apply(&answer.type_url, vec![], vec!["app/extra.app.svc.cluster.local".into()]);
        assert_eq!((applied.published, applied.errors.len()), (None, 0), "{}", answer.type_url);
    }
    assert!(Arc::ptr_eq(&before, &bench.snapshot()));
    assert_eq!(before.workloads.counts(), (4, 0));
}

#[test]
fn all_addresses_of_a_service_entry_are_served() {
    use cairn_proto::istio::workload::{Address, NetworkAddress, Service, address::Type};
    let answers = capture("17-serviceentry-static");
    let mut bench = Bench::with(&answers);
    let text = show(&bench.snapshot(), &[]);
    // One of the two addresses stands in the matcher; which one changes from capture to capture (contract seen §1).
    let known: std::net::IpAddr = ["240.240.1.1", "240.240.1.2", "10.10.10.1", "10.10.10.2"]
        .into_iter()
        .find(|ip| text.contains(&format!("address {ip}\n")))
        .map_or_else(
            || {
                text.lines()
                    .find_map(|line| line.trim().strip_prefix("address "))
                    .unwrap()
                    .split(',')
                    .next()
                    .unwrap()
                    .parse()
                    .unwrap()
            },
            |ip| ip.parse().unwrap(),
        );
    let octets = |ip: std::net::IpAddr| match ip {
        std::net::IpAddr::V4(v4) => v4.octets().to_vec(),
        std::net::IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    let network_address = |ip| NetworkAddress {
        network: String::new(),
        address: octets(ip),
        length: None,
    };
    let other: std::net::IpAddr = "203.0.113.77".parse().unwrap();
    let service = Service {
        addresses: vec![network_address(known), network_address(other)],
        ..Default::default()
    };
    let message = Address {
        r#type: Some(Type::Service(service)),
    };
    let resource = Resource {
        name: "app/vms.app.internal".into(),
        version: "1".into(),
        type_url: super::compiler::ADDRESSES.into(),
        bytes: message.encode_to_vec().into(),
    };
    bench.compiler.apply(super::compiler::ADDRESSES, vec![resource], vec![]);
    let snapshot = bench.snapshot();
    let port = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("port "))
        .unwrap()
        .split(' ')
        .next()
        .unwrap();
    assert!(!matches!(
        snapshot.serves(&facts(&format!("{other}:{port}"), None)),
        Serves::Nobody(_)
    ));
    assert!(matches!(snapshot.serves(&facts("203.0.113.78:80", None)), Serves::Nobody(_)));
}

#[test]
fn what_is_wrong_in_a_file_is_said_with_its_place() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &[u8]| {
        let path = directory.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    let error = |path: &Path| load(path).unwrap_err().to_string();
    let missing = error(&directory.path().join("nothing"));
    assert!(missing.contains("nothing") && missing.starts_with("cannot read"), "{missing}");
    assert!(error(directory.path()).contains("expected at least cds.pb and lds.pb"));
    let text = error(&file("a.json", b"{\n \"configs\": [\n}"));
    assert!(text.contains("a.json: line 3, column 1"), "{text}");
    assert!(error(&file("b.json", b"{}")).ends_with("configs: is missing: this is no config_dump"));
    let dump = r#"{"configs":[{"@type":"type.googleapis.com/envoy.admin.v3.ClustersConfigDump","dynamic_active_clusters":[{"cluster":{"nmae":"x"}}]}]}"#;
    let text = error(&file("c.json", dump.as_bytes()));
    assert!(
        text.contains("configs[0].dynamic_active_clusters[0].cluster") && text.contains("nmae"),
        "{text}"
    );
    file("cds.pb", b"\xff\xff\xff\xff\x7f");
    let text = error(directory.path());
    assert!(text.contains("cds.pb, message 1"), "{text}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn no_bytes_make_the_compiler_panic(
        scenario in prop::sample::select(vec!["01-http-basic", "12-virtualservice", "20-authz", "23-telemetry", "27-multi-network/app.waypoint"]),
        type_at in 0usize..3,
        resource_at in any::<prop::sample::Index>(),
        cut in any::<prop::sample::Index>(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        truncate in any::<bool>(),
    ) {
        let mut answers = capture(scenario);
        let answer = &mut answers[type_at];
        let index = resource_at.index(answer.resources.len());
        let resource = &mut answer.resources[index];
        let mut bytes = resource.bytes.to_vec();
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if truncate {
            bytes.truncate(cut.index(bytes.len()));
        }
        resource.bytes = bytes.into();
        let mut bench = Bench::with(&answers);
        // Whatever came of it, the good version is taken afterwards.
        for answer in capture(scenario) {
            bench.apply(&answer);
        }
        prop_assert_eq!(bench.compiler.missing(), Vec::<String>::new());
        let good = Bench::with(&capture(scenario));
        prop_assert_eq!(
            show(&bench.snapshot(), &bench.compiler.unsupported()),
            show(&good.snapshot(), &good.compiler.unsupported())
        );
    }
}

#[test]
fn one_changed_chain_among_two_thousand_services_is_quick() {
    // The chains of 200 captured services, ten times over under other names: about 10 MB.
    let answers = capture("40-many-services-200");
    let mut listeners = of(&answers, LISTENERS).clone();
    edit_listener(&mut listeners, "main_internal", |listener| {
        let chains = listener.filter_chains.clone();
        for round in 1..10 {
            listener.filter_chains.extend(chains.iter().cloned().map(|chain| FilterChain {
                name: format!("{}-{round}", chain.name),
                ..chain
            }));
        }
    });
    let bytes = resource(&mut listeners, "main_internal").bytes.len();
    assert!(bytes > 8 << 20, "{bytes}");
    let mut bench = Bench::new();
    bench.apply(of(&answers, CLUSTERS));
    bench.apply(of(&answers, ENDPOINTS));
    bench.apply(&listeners);
    let before = bench.snapshot();
    assert!(before.chains.len() > 2_900, "{}", before.chains.len());
    let mut changed = listeners.clone();
    let name = before.chains.sorted()[100].0.clone();
    edit_listener(&mut changed, "main_internal", |listener| {
        listener
            .filter_chains
            .iter_mut()
            .find(|chain| *chain.name == *name)
            .unwrap()
            .metadata = Some(Default::default());
    });
    let start = cairn_exchange::clock::now();
    bench.apply(&changed);
    let took = cairn_exchange::clock::now().saturating_duration_since(start);
    let after = bench.snapshot();
    let shared = before
        .chains
        .iter()
        .filter(|(name, chain)| after.chains.get(name).is_some_and(|other| Arc::ptr_eq(chain, other)))
        .count();
    assert_eq!(shared, before.chains.len() - 1);
    println!("one changed chain of {} in {bytes} bytes: {took:?}", before.chains.len());
    // Unoptimized builds are slower; the rig in `bench/` measures the real bound.
    assert!(took < std::time::Duration::from_secs(2), "{took:?}");
}
