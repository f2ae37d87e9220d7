//! Events in, requests out, one line a request.

use prost_types::Any;

use super::*;

const CDS: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
const EDS: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";
const LDS: &str = "type.googleapis.com/envoy.config.listener.v3.Listener";
const WDS: &str = "type.googleapis.com/istio.workload.Address";

fn state() -> State {
    let subscriptions = vec![
        Subscription::wildcard(CDS),
        Subscription::by_name(EDS),
        Subscription::wildcard(LDS),
        Subscription::wildcard(WDS),
    ];
    State::new(
        Node {
            id: "waypoint~1.2.3.4~w.app~app.svc".into(),
            ..Node::default()
        },
        subscriptions,
    )
}

fn resource(kind: &str, name: &str, version: &str) -> Resource {
    let body = Any {
        type_url: kind.into(),
        value: name.into(),
    };
    Resource {
        name: name.into(),
        version: version.into(),
        resource: Some(body),
        ..Resource::default()
    }
}

/// An answer with resources written as `name` or `name=version`.
fn response(kind: &str, nonce: &str, resources: &[&str], removed: &[&str]) -> DeltaDiscoveryResponse {
    let resources = resources.iter().map(|text| text.split_once('=').unwrap_or((text, "")));
    DeltaDiscoveryResponse {
        type_url: kind.into(),
        nonce: nonce.into(),
        resources: resources.map(|(name, version)| resource(kind, name, version)).collect(),
        removed_resources: removed.iter().map(|name| (*name).into()).collect(),
        ..DeltaDiscoveryResponse::default()
    }
}

/// A request in one line: type, names, versions, nonce, refusal, node.
fn line(request: &DeltaDiscoveryRequest) -> String {
    let mut line = TypeUrl::from(&*request.type_url).short().to_owned();
    for name in &request.resource_names_subscribe {
        line += &format!(" +{name}");
    }
    for name in &request.resource_names_unsubscribe {
        line += &format!(" -{name}");
    }
    for (name, version) in &request.initial_resource_versions {
        line += &format!(" {name}={version}");
    }
    if !request.response_nonce.is_empty() {
        line += &format!(" @{}", request.response_nonce);
    }
    if let Some(detail) = &request.error_detail {
        line += &format!(" !{} {}", detail.code, detail.message);
    }
    if request.node.is_some() {
        line += " (node)";
    }
    line
}

fn lines(requests: &[DeltaDiscoveryRequest]) -> Vec<String> {
    requests.iter().map(line).collect()
}

fn receive(state: &mut State, response: DeltaDiscoveryResponse) -> (Update, Receipt) {
    match state.receive(response, cairn_exchange::clock::now(), 1) {
        Received::Update(update, receipt) => (update, receipt),
        other => panic!("not an update: {other:?}"),
    }
}

/// Takes an answer to its verdict and returns the requests.
fn exchange(state: &mut State, response: DeltaDiscoveryResponse, verdict: Verdict) -> Vec<String> {
    let (_, receipt) = receive(state, response);
    lines(&state.settle(receipt, verdict))
}

fn removed(state: &mut State, response: DeltaDiscoveryResponse) -> Vec<String> {
    let (update, receipt) = receive(state, response);
    state.settle(receipt, Verdict::accepted());
    update.removed
}

fn wanting(names: &[&str]) -> Verdict {
    Verdict {
        error: None,
        wishes: vec![Wish::exactly(EDS, names.iter().copied())],
    }
}

#[test]
fn a_stream_begins_with_the_node_and_the_wildcards_and_no_empty_list_of_names() {
    assert_eq!(lines(&state().open()), ["Cluster (node)", "Listener", "Address"]);
}

#[test]
fn each_answer_is_acknowledged_by_its_own_nonce_even_an_empty_one() {
    let mut state = state();
    state.open();
    assert_eq!(
        exchange(&mut state, response(CDS, "n1", &["a"], &[]), Verdict::accepted()),
        ["Cluster @n1"]
    );
    assert_eq!(
        exchange(&mut state, response(WDS, "n2", &[], &[]), Verdict::accepted()),
        ["Address @n2"]
    );
    assert_eq!(
        exchange(&mut state, response(WDS, "n3", &[], &["app/foreign"]), Verdict::accepted()),
        ["Address @n3"]
    );
}

#[test]
fn a_refusal_carries_the_consumers_words_cut_where_they_are_too_long() {
    let mut state = state();
    state.open();
    let requests = exchange(
        &mut state,
        response(CDS, "n1", &["a"], &[]),
        Verdict::refused("cluster a: no name"),
    );
    assert_eq!(requests, ["Cluster @n1 !3 cluster a: no name"]);
    let (_, receipt) = receive(&mut state, response(CDS, "n2", &["a"], &[]));
    let requests = state.settle(receipt, Verdict::refused("é".repeat(WORDS_LIMIT)));
    let words = &requests[0].error_detail.as_ref().unwrap().message;
    assert!(
        words.ends_with("… (8192 more bytes)") && words.len() < WORDS_LIMIT + 40,
        "{}",
        words.len()
    );
}

#[test]
fn names_change_in_requests_of_their_own_that_carry_no_nonce() {
    let mut state = state();
    state.open();
    let cases: [(Verdict, &[&str]); 7] = [
        (wanting(&[]), &["Cluster @n"]),
        (wanting(&["a", "b"]), &["Cluster @n", "ClusterLoadAssignment +a +b"]),
        (wanting(&["a", "b"]), &["Cluster @n"]),
        (wanting(&["b", "c"]), &["Cluster @n", "ClusterLoadAssignment +c -a"]),
        (
            Verdict {
                error: Some("x".into()),
                ..wanting(&["b"])
            },
            &["Cluster @n !3 x", "ClusterLoadAssignment -c"],
        ),
        (wanting(&[]), &["Cluster @n", "ClusterLoadAssignment -b"]),
        (wanting(&["z"]), &["Cluster @n", "ClusterLoadAssignment +z"]),
    ];
    for (verdict, want) in cases {
        let what = format!("{verdict:?}");
        assert_eq!(exchange(&mut state, response(CDS, "n", &["a"], &[]), verdict), want, "{what}");
    }
}

#[test]
fn a_change_of_names_says_only_what_is_new() {
    let mut state = state();
    state.open();
    let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let change = |subscribe: &[&str], unsubscribe: &[&str]| Verdict {
        error: None,
        wishes: vec![Wish::Change {
            type_url: EDS.into(),
            subscribe: set(subscribe),
            unsubscribe: set(unsubscribe),
        }],
    };
    let cases: [(Verdict, &[&str]); 4] = [
        (
            change(&["a", "b"], &["never"]),
            &["Cluster @n", "ClusterLoadAssignment +a +b"],
        ),
        (change(&["a"], &["never"]), &["Cluster @n"]),
        (
            change(&["c", "a"], &["a", "b"]),
            &["Cluster @n", "ClusterLoadAssignment +c -b"],
        ),
        (change(&[], &["a", "c"]), &["Cluster @n", "ClusterLoadAssignment -a -c"]),
    ];
    for (verdict, want) in cases {
        let what = format!("{verdict:?}");
        assert_eq!(exchange(&mut state, response(CDS, "n", &[], &[]), verdict), want, "{what}");
    }
}

#[test]
fn a_wish_may_name_a_new_type_and_changes_nothing_for_a_wildcard() {
    let mut state = state();
    state.open();
    let wishes = vec![
        Wish::exactly("type.googleapis.com/x.Secret", ["s"]),
        Wish::exactly(LDS, ["l"]),
    ];
    let requests = exchange(&mut state, response(CDS, "n", &[], &[]), Verdict { error: None, wishes });
    assert_eq!(requests, ["Cluster @n", "Secret +s"]);
}

#[test]
fn a_new_stream_asks_again_for_everything_and_says_what_is_held() {
    let mut state = state();
    state.open();
    exchange(&mut state, response(CDS, "1", &["a", "b"], &[]), wanting(&["a", "b"]));
    exchange(&mut state, response(EDS, "2", &["a"], &[]), Verdict::accepted());
    exchange(&mut state, response(LDS, "3", &["main"], &[]), Verdict::accepted());
    exchange(&mut state, response(WDS, "4", &["w1=h1", "w2=h2"], &[]), Verdict::accepted());
    exchange(&mut state, response(WDS, "5", &[], &["w2"]), Verdict::accepted());
    assert_eq!(
        lines(&state.open()),
        [
            "Cluster a= b= (node)",
            "ClusterLoadAssignment +a +b a=",
            "Listener main=",
            "Address w1=h1"
        ]
    );
}

#[test]
fn what_vanished_between_streams_is_removed_by_the_first_full_answer_alone() {
    let mut state = state();
    state.open();
    exchange(&mut state, response(CDS, "1", &["a", "b", "c"], &[]), Verdict::accepted());
    assert!(
        removed(&mut state, response(CDS, "2", &["a"], &[])).is_empty(),
        "a later answer on the stream is a delta"
    );
    state.open();
    assert_eq!(
        removed(&mut state, response(CDS, "1", &["a"], &["c"])),
        ["c", "b"],
        "each name once"
    );
    state.open();
    assert_eq!(removed(&mut state, response(CDS, "1", &["a"], &[])), Vec::<String>::new());
}

#[test]
fn a_versioned_resource_that_a_new_stream_does_not_repeat_is_kept() {
    let mut state = state();
    state.open();
    exchange(
        &mut state,
        response(WDS, "1", &["w1=h1", "w2=h2", "w3"], &[]),
        Verdict::accepted(),
    );
    state.open();
    assert_eq!(removed(&mut state, response(WDS, "1", &[], &["w2"])), ["w2", "w3"]);
    assert_eq!(lines(&state.open())[2], "Address w1=h1");
}

#[test]
fn names_that_are_asked_for_never_vanish_unless_the_server_says_so() {
    let mut state = state();
    state.open();
    exchange(&mut state, response(CDS, "1", &["a", "b"], &[]), wanting(&["a", "b"]));
    exchange(&mut state, response(EDS, "2", &["a", "b"], &[]), Verdict::accepted());
    state.open();
    assert!(removed(&mut state, response(EDS, "1", &["a"], &[])).is_empty());
    assert_eq!(removed(&mut state, response(EDS, "2", &[], &["b"])), ["b"]);
    assert_eq!(
        lines(&state.open())[1],
        "ClusterLoadAssignment +a +b a=",
        "still wanted, no longer held"
    );
}

#[test]
fn a_refused_resource_is_held_without_its_version() {
    let mut state = state();
    state.open();
    exchange(&mut state, response(WDS, "1", &["w1=h1", "w2=h2"], &[]), Verdict::accepted());
    exchange(
        &mut state,
        response(WDS, "2", &["w1=h9", "w3=h3"], &["w2"]),
        Verdict::refused("no"),
    );
    assert_eq!(lines(&state.open())[2], "Address w1= w2= w3=");
}

#[test]
fn what_is_no_longer_wanted_or_never_was_is_not_announced() {
    let mut state = state();
    state.open();
    exchange(&mut state, response(CDS, "1", &["a", "b"], &[]), wanting(&["a", "b"]));
    exchange(&mut state, response(EDS, "2", &["a", "b", "stray"], &[]), Verdict::accepted());
    exchange(&mut state, response(CDS, "3", &["a"], &[]), wanting(&["a"]));
    assert_eq!(lines(&state.open())[1], "ClusterLoadAssignment +a a=");
}

#[test]
fn versions_that_would_not_fit_a_request_are_left_out_and_the_answer_is_complete() {
    let mut state = state();
    state.names_limit = 8;
    state.open();
    exchange(
        &mut state,
        response(WDS, "1", &["name1=v1", "name2=v2"], &[]),
        Verdict::accepted(),
    );
    assert_eq!(lines(&state.open())[2], "Address");
    assert_eq!(removed(&mut state, response(WDS, "1", &["name1=v1"], &[])), ["name2"]);
}

#[test]
fn long_lists_of_names_are_split_into_several_requests() {
    let mut state = state();
    state.names_limit = 8;
    state.open();
    let requests = exchange(
        &mut state,
        response(CDS, "1", &[], &[]),
        wanting(&["aaaa", "bbbb", "cccc", "a-very-long-name"]),
    );
    assert_eq!(
        requests,
        [
            "Cluster @1",
            "ClusterLoadAssignment +a-very-long-name",
            "ClusterLoadAssignment +aaaa +bbbb",
            "ClusterLoadAssignment +cccc"
        ]
    );
    assert_eq!(lines(&state.open()).len(), 6);
}

#[test]
fn an_answer_of_a_type_that_this_stream_did_not_ask_for_is_not_acknowledged() {
    let mut state = state();
    state.open();
    for kind in [EDS, "type.googleapis.com/envoy.config.route.v3.RouteConfiguration", ""] {
        let got = state.receive(response(kind, "n", &["x"], &[]), cairn_exchange::clock::now(), 1);
        assert!(matches!(got, Received::Unrequested), "{kind}: {got:?}");
    }
}

#[test]
fn what_envoy_would_refuse_unseen_is_refused_and_changes_nothing() {
    let bodiless = Resource {
        name: "a".into(),
        version: "v".into(),
        ..Resource::default()
    };
    let cases = [
        (response(CDS, "n", &["a", "a"], &[]), "a: the name is there twice"),
        (response(CDS, "n", &["a"], &["a"]), "a: the name is both sent and removed"),
        (
            DeltaDiscoveryResponse {
                resources: vec![bodiless],
                ..response(CDS, "n", &[], &[])
            },
            "a: the resource has no content",
        ),
        (
            DeltaDiscoveryResponse {
                resources: vec![resource("type.googleapis.com/x.Y", "a", "")],
                ..response(CDS, "n", &[], &[])
            },
            "a: its type is \"type.googleapis.com/x.Y\" in an answer of type \"type.googleapis.com/envoy.config.cluster.v3.Cluster\"",
        ),
    ];
    for (answer, want) in cases {
        let mut state = state();
        state.open();
        match state.receive(answer, cairn_exchange::clock::now(), 1) {
            Received::Malformed { request, .. } => assert_eq!(line(&request), format!("Cluster @n !3 {want}")),
            other => panic!("{want}: {other:?}"),
        }
        assert_eq!(lines(&state.open())[0], "Cluster (node)", "{want}");
    }
}

#[test]
fn a_heartbeat_of_a_held_version_is_not_a_change() {
    let mut state = state();
    state.open();
    exchange(&mut state, response(WDS, "1", &["w=h"], &[]), Verdict::accepted());
    let heartbeat = Resource {
        name: "w".into(),
        version: "h".into(),
        ..Resource::default()
    };
    let (update, _) = receive(
        &mut state,
        DeltaDiscoveryResponse {
            resources: vec![heartbeat],
            ..response(WDS, "2", &[], &[])
        },
    );
    assert!(update.changed.is_empty() && update.removed.is_empty());
}

/// A server by the protocol, or one that knows nothing of what earlier streams held.
struct Server {
    resources: BTreeMap<String, u8>,
    versioned: bool,
    remembers: bool,
    sent: BTreeMap<String, u8>,
}

impl Server {
    fn change(&mut self, random: &mut fastrand::Rng) {
        let name = format!("r{}", random.u8(0..6));
        if random.bool() {
            self.resources.remove(&name)
        } else {
            self.resources.insert(name, random.u8(..))
        };
    }

    fn begin(&mut self, request: &DeltaDiscoveryRequest) -> DeltaDiscoveryResponse {
        let held = &request.initial_resource_versions;
        self.sent = self.resources.clone();
        let changed = self
            .resources
            .iter()
            .filter(|(name, content)| !self.versioned || held.get(*name).is_none_or(|version| *version != content.to_string()));
        let gone = held
            .keys()
            .filter(|name| self.remembers && !self.resources.contains_key(*name));
        self.response(
            changed.map(|(name, content)| (name.clone(), *content)).collect(),
            gone.cloned().collect(),
        )
    }

    fn push(&mut self) -> DeltaDiscoveryResponse {
        let changed = self
            .resources
            .iter()
            .filter(|(name, content)| self.sent.get(*name) != Some(content));
        let changed = changed.map(|(name, content)| (name.clone(), *content)).collect();
        let gone = self
            .sent
            .keys()
            .filter(|name| !self.resources.contains_key(*name))
            .cloned()
            .collect();
        self.sent = self.resources.clone();
        self.response(changed, gone)
    }

    fn response(&self, changed: Vec<(String, u8)>, gone: Vec<String>) -> DeltaDiscoveryResponse {
        let resource = |(name, content): (String, u8)| {
            let version = if self.versioned { content.to_string() } else { String::new() };
            let body = Any {
                type_url: CDS.into(),
                value: vec![content],
            };
            Resource {
                name,
                version,
                resource: Some(body),
                ..Resource::default()
            }
        };
        let resources = changed.into_iter().map(resource).collect();
        DeltaDiscoveryResponse {
            resources,
            removed_resources: gone,
            ..response(CDS, "n", &[], &[])
        }
    }
}

#[test]
fn whatever_happens_to_streams_the_consumer_ends_with_what_the_server_has() {
    for seed in 0..2000 {
        let mut random = fastrand::Rng::with_seed(seed);
        let (versioned, remembers) = [(true, true), (false, true), (false, false)][random.usize(0..3)];
        let mut server = Server {
            resources: BTreeMap::new(),
            versioned,
            remembers,
            sent: BTreeMap::new(),
        };
        let mut state = state();
        let mut consumer = BTreeMap::new();
        let mut open = false;
        for step in 0..40 {
            (0..random.u8(0..4)).for_each(|_| server.change(&mut random));
            let answer = if open { server.push() } else { server.begin(&state.open()[0]) };
            // Some answers are lost together with their stream.
            open = random.u8(0..4) > 0;
            if !open && random.bool() {
                continue;
            }
            let (update, receipt) = receive(&mut state, answer);
            consumer.extend(update.changed.iter().map(|c| (c.name.clone(), c.bytes[0])));
            consumer.retain(|name, _| !update.removed.contains(name));
            let refused = random.u8(0..4) == 0;
            state.settle(
                receipt,
                if refused {
                    Verdict::refused("no")
                } else {
                    Verdict::accepted()
                },
            );
            assert_eq!(
                consumer, server.resources,
                "seed {seed} step {step} versioned {versioned} remembers {remembers}"
            );
        }
    }
}
