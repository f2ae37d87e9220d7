//! Architecture rule 3: what is malformed keeps its last good version, what is not supported refuses or is left out, and both are told.

use cairn_proto::{
    envoy::{
        config::{
            accesslog::v3::{AccessLog, access_log},
            core::v3::{
                HeaderValue, HeaderValueOption, SubstitutionFormatString, TypedExtensionConfig,
                substitution_format_string::Format,
            },
        },
        extensions::{
            access_loggers::file::v3::{FileAccessLog, file_access_log::AccessLogFormat},
            filters::network::http_connection_manager::v3::{Rds, ScopedRoutes, http_connection_manager::RouteSpecifier},
        },
    },
    xds::{
        core::v3::TypedExtensionConfig as XdsExtension,
        r#type::matcher::v3::{
            IpMatcher, Matcher,
            matcher::{MatcherType, OnMatch, matcher_tree::TreeType, on_match},
        },
    },
};

use super::{super::report::Effect, *};

#[test]
fn a_broken_chain_keeps_its_last_good_version_and_the_others_apply() {
    let answers = capture("08-httproute-traffic");
    let mut bench = Bench::with(&answers);
    let before = bench.snapshot();
    let mut listeners = of(&answers, LISTENERS).clone();
    let names: Vec<_> = before
        .chains
        .sorted()
        .iter()
        .map(|(name, _)| (*name).clone())
        .filter(|name| name.contains("|http|"))
        .collect();
    let [broken, changed] = [&names[0], &names[1]];
    edit_listener(&mut listeners, "main_internal", |listener| {
        edit_manager(chain_mut(listener, broken), |manager| manager.route_specifier = None);
        edit_manager(chain_mut(listener, changed), |manager| manager.server_name = "changed".into());
    });
    let applied = bench.apply(&listeners);
    let nack = applied.nack().unwrap();
    assert!(
        nack.starts_with(&format!("main_internal, chain {broken}, filters[0].route_config: is missing")),
        "{nack}"
    );
    assert_eq!(applied.errors.len(), 1);
    let after = bench.snapshot();
    assert!(Arc::ptr_eq(
        before.chains.get(broken).unwrap(),
        after.chains.get(broken).unwrap()
    ));
    assert!(!Arc::ptr_eq(
        before.chains.get(changed).unwrap(),
        after.chains.get(changed).unwrap()
    ));
    let stored = bench.compiler.store().resource(LISTENERS, "main_internal").unwrap();
    assert_eq!(stored.error.unwrap().0, nack);
    // Sent again, it is refused again; mended, it is accepted.
    assert_eq!(bench.apply(&listeners).nack().unwrap(), nack);
    assert_eq!(bench.apply(of(&answers, LISTENERS)).nack(), None);
    assert!(
        bench
            .compiler
            .store()
            .resource(LISTENERS, "main_internal")
            .unwrap()
            .error
            .is_none()
    );
}

#[test]
fn an_unknown_filter_refuses_its_chain_alone() {
    let answers = capture("01-http-basic");
    let mut bench = Bench::with(&answers);
    let mut listeners = of(&answers, LISTENERS).clone();
    edit_listener(&mut listeners, "main_internal", |listener| {
        edit_manager(chain_mut(listener, WEB), |manager| {
            let mut filter = manager.http_filters[0].clone();
            filter.name = "mystery".into();
            use cairn_proto::envoy::extensions::filters::network::http_connection_manager::v3::http_filter::ConfigType;
            filter.config_type = Some(ConfigType::TypedConfig(prost_types::Any {
                type_url: "type.googleapis.com/example.Mystery".into(),
                value: vec![1, 2, 3],
            }));
            manager.http_filters.insert(0, filter);
        });
    });
    let applied = bench.apply(&listeners);
    let nack = applied.nack().unwrap();
    assert!(
        nack.contains("http_filters[0]: filter mystery (example.Mystery) is not supported yet"),
        "{nack}"
    );
    let snapshot = bench.snapshot();
    let chain = snapshot.chains.get(WEB).unwrap();
    assert!(chain.refuse.as_ref().unwrap().reason.contains("mystery"));
    assert!(snapshot.chains.get("direct-http").unwrap().refuse.is_none());
    assert_eq!(bench.compiler.unsupported().len(), 1);
}

#[test]
fn a_field_newer_than_we_are_refuses_what_it_stands_in() {
    let answers = capture("01-http-basic");
    // Field 4000, a number, inside of the connection manager; field 4001 inside of a cluster.
    let newer = |field: u32| {
        let mut bytes = Vec::new();
        prost::encoding::encode_key(field, prost::encoding::WireType::Varint, &mut bytes);
        prost::encoding::encode_varint(1, &mut bytes);
        bytes
    };
    let mut listeners = of(&answers, LISTENERS).clone();
    edit_listener(&mut listeners, "main_internal", |listener| {
        let Some(ConfigType::TypedConfig(any)) = &mut chain_mut(listener, WEB).filters[0].config_type else {
            panic!()
        };
        any.value.extend(newer(4000));
    });
    let mut clusters = of(&answers, CLUSTERS).clone();
    let cluster = resource(&mut clusters, WEB);
    cluster.bytes = [cluster.bytes.to_vec(), newer(4001)].concat().into();

    let mut bench = Bench::new();
    let nack = bench.apply(&clusters).nack().unwrap();
    assert!(nack.contains("field 4001 is newer than this proxy"), "{nack}");
    bench.apply(of(&answers, ENDPOINTS));
    let nack = bench.apply(&listeners).nack().unwrap();
    assert!(nack.contains("filters[0]: field 4000 is newer than this proxy"), "{nack}");
    let snapshot = bench.snapshot();
    assert!(snapshot.chains.get(WEB).unwrap().refuse.is_some());
    assert!(matches!(
        snapshot.clusters.get(WEB).unwrap().settings.transport,
        TransportTerms::Unsupported(_)
    ));
}

#[test]
fn an_empty_message_is_not_an_absent_field() {
    // On TCP ports istiod drops ALLOW rules that it cannot express: `rules: {}` is left, which denies everything.
    let answers = capture("20-authz");
    let bench = Bench::with(&answers);
    let snapshot = bench.snapshot();
    let main = of(&answers, LISTENERS)
        .resources
        .iter()
        .find(|resource| resource.name == "main_internal")
        .unwrap();
    let mut enforced = 0;
    for chain in Listener::decode(main.bytes.clone()).unwrap().filter_chains {
        let enforces = memchr::memmem::find(&chain.encode_to_vec(), b"rbac.v3.RBAC").is_some();
        enforced += usize::from(enforces);
        let compiled = snapshot.chains.get(&chain.name).unwrap();
        assert!(compiled.refuse.is_none(), "{}: {:?}", chain.name, compiled.refuse);
        let filters = match &compiled.kind {
            ChainKind::Http(http) => http.filters.names().filter(|name| name.ends_with("rbac")).count(),
            ChainKind::Tcp(tcp) => tcp.rbac.iter().count(),
            ChainKind::Refused { .. } => 0,
        };
        assert_eq!(filters > 0, enforces, "{}", chain.name);
    }
    assert!(enforced > 3);
    let tcp = snapshot.chains.get("inbound-vip|9000|tcp|web.app.svc.cluster.local").unwrap();
    let ChainKind::Tcp(tcp) = &tcp.kind else { panic!("no TCP") };
    let empty = tcp
        .rbac
        .iter()
        .filter_map(|filter| filter.rules.as_ref())
        .filter(|rules| rules.names().count() == 0);
    assert_eq!(
        empty.map(|rules| rules.action()).collect::<Vec<_>>(),
        [cairn_policy::rbac::Action::Allow]
    );
}

#[test]
fn a_layered_policy_stands_before_all_tunnels() {
    let bench = Bench::with(&capture("29-mesh-options"));
    let terminate = bench.snapshot().terminate.clone().unwrap();
    assert_eq!((terminate.refuse.as_ref(), terminate.rbac.iter().count()), (None, 1));
    assert_eq!(terminate.tls.uri_san_prefixes.len(), 3);
}

#[test]
fn a_tunnel_listener_with_something_else_in_it_refuses_its_tunnels() {
    let answers = capture("01-http-basic");
    let mut bench = Bench::with(&answers);
    let mut listeners = of(&answers, LISTENERS).clone();
    edit_listener(&mut listeners, "connect_originate", |listener| {
        let Some(ConfigType::TypedConfig(any)) = &mut listener.filter_chains[0].filters[0].config_type else {
            panic!()
        };
        let mut proxy = TcpProxy::decode(any.value.as_slice()).unwrap();
        proxy.tunneling_config.as_mut().unwrap().hostname = "elsewhere.example.com:443".into();
        any.value = proxy.encode_to_vec();
    });
    let nack = bench.apply(&listeners).nack().unwrap();
    assert!(
        nack.contains("connect_originate") && nack.contains("elsewhere.example.com:443"),
        "{nack}"
    );
    let tunnels = bench.snapshot().clusters.get("connect_originate").unwrap().clone();
    assert!(tunnels.settings.tunnel.is_none());
    assert_eq!(bench.apply(of(&answers, LISTENERS)).nack(), None);
    assert!(
        bench
            .snapshot()
            .clusters
            .get("connect_originate")
            .unwrap()
            .settings
            .tunnel
            .is_some()
    );
}

fn any(type_url: &str, value: Vec<u8>) -> prost_types::Any {
    prost_types::Any {
        type_url: format!("type.googleapis.com/{type_url}"),
        value,
    }
}

fn log(text: &str) -> AccessLog {
    let formatter = TypedExtensionConfig {
        name: "mine".into(),
        typed_config: Some(any("example.Formatter", vec![])),
    };
    let format = SubstitutionFormatString {
        formatters: vec![formatter],
        format: Some(Format::TextFormat(text.into())),
        ..Default::default()
    };
    let file = FileAccessLog {
        path: "/dev/null".into(),
        access_log_format: Some(AccessLogFormat::LogFormat(format)),
    };
    AccessLog {
        name: "log".into(),
        filter: None,
        config_type: Some(access_log::ConfigType::TypedConfig(any(
            "envoy.extensions.access_loggers.file.v3.FileAccessLog",
            file.encode_to_vec(),
        ))),
    }
}

/// Sends the chain of `web` with its connection manager changed.
fn send_web(bench: &mut Bench, answers: &[Answer], edit: impl FnOnce(&mut HttpConnectionManager)) -> super::super::Applied {
    let mut listeners = of(answers, LISTENERS).clone();
    edit_listener(&mut listeners, "main_internal", |listener| {
        edit_manager(chain_mut(listener, WEB), edit);
    });
    bench.apply(&listeners)
}

#[test]
fn a_log_with_operators_that_are_not_known_is_written_and_told() {
    let answers = capture("01-http-basic");
    let mut bench = Bench::with(&answers);
    let before = bench.snapshot().chains.get(WEB).unwrap().clone();
    let applied = send_web(&mut bench, &answers, |manager| {
        manager.access_log = vec![log("%MINE(x)% %DOWNSTREAM_PEER_SERIAL% %PROTOCOL%\n")];
    });
    assert_eq!(applied.nack(), None);
    let snapshot = bench.snapshot();
    let chain = snapshot.chains.get(WEB).unwrap();
    assert!(!Arc::ptr_eq(&before, chain) && chain.refuse.is_none());
    let told: Vec<_> = bench
        .compiler
        .unsupported()
        .iter()
        .map(|item| (item.what.clone(), item.effect))
        .collect();
    assert_eq!(
        told,
        [
            ("%DOWNSTREAM_PEER_SERIAL% has no value here".to_owned(), Effect::Ignored),
            ("%MINE(x)% has no value here".to_owned(), Effect::Ignored),
            ("formatter mine (example.Formatter) is not known".to_owned(), Effect::Ignored),
        ]
    );
    // What is wrong in itself, Envoy does not take either.
    let nack = send_web(&mut bench, &answers, |manager| manager.access_log = vec![log("%REQ()%")]).nack();
    assert!(nack.unwrap().contains("REQ needs a parameter"));
}

#[test]
fn routes_that_are_kept_elsewhere_refuse_the_chain() {
    let answers = capture("01-http-basic");
    for (specifier, words) in [
        (RouteSpecifier::Rds(Rds::default()), "rds: routes by RDS are not supported"),
        (
            RouteSpecifier::ScopedRoutes(ScopedRoutes::default()),
            "scoped_routes: is not supported",
        ),
    ] {
        let mut bench = Bench::with(&answers);
        let applied = send_web(&mut bench, &answers, |manager| manager.route_specifier = Some(specifier));
        assert!(applied.nack().unwrap().contains(words), "{:?}", applied.nack());
        let snapshot = bench.snapshot();
        let refuse = &snapshot.chains.get(WEB).unwrap().refuse;
        assert!(refuse.as_ref().unwrap().reason.contains(words), "{refuse:?}");
        assert!(snapshot.chains.get("direct-http").unwrap().refuse.is_none());
    }
}

/// Changes what follows each range of addresses of a matcher.
fn edit_ranges(matcher: &mut Matcher, edit: impl FnOnce(&mut IpMatcher)) {
    let Some(MatcherType::MatcherTree(tree)) = &mut matcher.matcher_type else {
        panic!("no tree")
    };
    let Some(TreeType::CustomMatch(custom)) = &mut tree.tree_type else {
        panic!("no ranges")
    };
    let any = custom.typed_config.as_mut().unwrap();
    let mut ranges = IpMatcher::decode(any.value.as_slice()).unwrap();
    edit(&mut ranges);
    any.value = ranges.encode_to_vec();
}

#[test]
fn what_the_matcher_cannot_do_refuses_what_it_decides_and_nothing_else() {
    let answers = capture("08-httproute-traffic");
    let bench = Bench::with(&answers);
    let addresses = served(&bench);
    assert!(addresses.len() > 1, "{addresses:?}");
    let strange = XdsExtension {
        name: "strange".into(),
        typed_config: Some(any("example.Strange", vec![])),
    };
    type Edit = fn(&mut OnMatch, XdsExtension);
    let cases: [(&str, Edit); 3] = [
        ("action: example.Strange is not supported", |next, strange| {
            next.on_match = Some(on_match::OnMatch::Action(strange));
        }),
        ("input: example.Strange is not supported", |next, strange| {
            let Some(on_match::OnMatch::Matcher(matcher)) = &mut next.on_match else {
                panic!("no matcher")
            };
            let Some(MatcherType::MatcherTree(tree)) = &mut matcher.matcher_type else {
                panic!("no tree")
            };
            tree.input = Some(strange);
        }),
        ("keep_matching: is not supported", |next, _| next.keep_matching = true),
    ];
    for (words, edit) in cases {
        let mut bench = Bench::with(&answers);
        let mut listeners = of(&answers, LISTENERS).clone();
        let mut hit = String::new();
        edit_listener(&mut listeners, "main_internal", |listener| {
            edit_ranges(listener.filter_chain_matcher.as_mut().unwrap(), |ranges| {
                let of = ranges
                    .range_matchers
                    .iter_mut()
                    .find(|of| addresses.contains(&of.ranges[0].address_prefix))
                    .unwrap();
                hit.clone_from(&of.ranges[0].address_prefix);
                edit(of.on_match.as_mut().unwrap(), strange.clone());
            });
        });
        let nack = bench.apply(&listeners).nack().unwrap();
        assert!(nack.contains(words), "{nack}");
        let left = served(&bench);
        let want: Vec<_> = addresses.iter().filter(|address| **address != hit).cloned().collect();
        assert_eq!(left, want, "{words}");
    }
}

/// Addresses of services whose port 80 is served.
fn served(bench: &Bench) -> Vec<String> {
    let snapshot = bench.snapshot();
    (1..255)
        .map(|last| format!("10.96.1.{last}"))
        .filter(|address| !matches!(snapshot.serves(&facts(&format!("{address}:80"), None)), Serves::Nobody(_)))
        .collect()
}

#[test]
fn a_header_whose_value_is_not_known_refuses_its_route() {
    let answers = capture("01-http-basic");
    let mut bench = Bench::with(&answers);
    let applied = send_web(&mut bench, &answers, |manager| {
        let Some(RouteSpecifier::RouteConfig(config)) = &mut manager.route_specifier else {
            panic!("no routes")
        };
        config.virtual_hosts[0].routes[0].request_headers_to_add = vec![HeaderValueOption {
            header: Some(HeaderValue {
                key: "x-who".into(),
                value: "%TLS_JA3_FINGERPRINT%".into(),
                raw_value: vec![],
            }),
            ..Default::default()
        }];
    });
    let nack = applied.nack().unwrap();
    assert!(
        nack.contains("%TLS_JA3_FINGERPRINT% in the value of x-who is not known here"),
        "{nack}"
    );
    let effects: Vec<_> = bench.compiler.unsupported().iter().map(|item| item.effect).collect();
    assert_eq!(effects, [Effect::RouteRefused]);
}

#[test]
fn a_malformed_workload_is_refused_each_time_it_comes() {
    use crate::config::compiler::ADDRESSES;
    let mut bench = Bench::new();
    let broken = Resource {
        name: "Kubernetes//Pod/app/web".into(),
        version: "1".into(),
        type_url: ADDRESSES.into(),
        bytes: Bytes::from_static(&[0xff]),
    };
    let first = bench.compiler.apply(ADDRESSES, vec![broken.clone()], vec![]).nack();
    assert!(first.is_some());
    assert_eq!(bench.compiler.apply(ADDRESSES, vec![broken], vec![]).nack(), first);
}

/// Sends a listener around the chains changed, and says why it refuses its tunnels.
fn send_around(name: &str, edit: impl FnOnce(&mut FilterChain)) -> (Option<String>, Bench) {
    let answers = capture("01-http-basic");
    let mut bench = Bench::with(&answers);
    let mut listeners = of(&answers, LISTENERS).clone();
    edit_listener(&mut listeners, name, |listener| edit(&mut listener.filter_chains[0]));
    (bench.apply(&listeners).nack(), bench)
}

fn edit_route(chain: &mut FilterChain, edit: impl FnOnce(&mut cairn_proto::envoy::config::route::v3::Route)) {
    edit_manager(chain, |manager| {
        let Some(RouteSpecifier::RouteConfig(config)) = &mut manager.route_specifier else {
            panic!("no routes")
        };
        edit(&mut config.virtual_hosts[0].routes[0]);
    });
}

#[test]
fn a_route_of_tunnels_that_changes_anything_refuses_them() {
    use cairn_proto::envoy::config::route::v3::{QueryParameterMatcher, Route, RouteAction, route::Action};
    fn action(route: &mut Route) -> &mut RouteAction {
        match &mut route.action {
            Some(Action::Route(action)) => action,
            other => panic!("{other:?}"),
        }
    }
    type Edit = fn(&mut Route);
    let cases: [(&str, Edit); 4] = [
        // As an override of an authorization filter would stand there.
        ("changes nothing", |route| {
            let off = cairn_proto::envoy::config::route::v3::FilterConfig {
                disabled: true,
                ..Default::default()
            };
            let off = any("envoy.config.route.v3.FilterConfig", off.encode_to_vec());
            route.typed_per_filter_config.insert("connect_authority".into(), off);
        }),
        ("changes nothing", |route| {
            route.r#match.as_mut().unwrap().query_parameters = vec![QueryParameterMatcher {
                name: "x".into(),
                ..Default::default()
            }];
        }),
        ("changes nothing", |route| {
            route.response_headers_to_add = vec![HeaderValueOption {
                header: Some(HeaderValue {
                    key: "x-a".into(),
                    value: "b".into(),
                    raw_value: vec![],
                }),
                ..Default::default()
            }];
        }),
        ("changes nothing", |route| {
            use cairn_proto::envoy::config::route::v3::route_action::HostRewriteSpecifier;
            action(route).host_rewrite_specifier = Some(HostRewriteSpecifier::HostRewriteLiteral("elsewhere".into()));
        }),
    ];
    for (words, edit) in cases {
        let (nack, bench) = send_around("connect_terminate", |chain| edit_route(chain, edit));
        let nack = nack.unwrap();
        assert!(nack.contains(words), "{nack}");
        assert!(bench.snapshot().terminate.as_ref().unwrap().refuse.is_some(), "{nack}");
    }
}

#[test]
fn a_tunnel_listener_is_looked_at_in_full() {
    use cairn_proto::envoy::{
        config::{core::v3::TransportSocket, listener::v3::FilterChainMatch},
        extensions::filters::network::tcp_proxy::v3::tcp_proxy::OnDemand,
    };
    type Edit = fn(&mut FilterChain);
    fn edit_proxy(chain: &mut FilterChain, edit: impl FnOnce(&mut TcpProxy)) {
        let last = chain.filters.last_mut().unwrap();
        let Some(ConfigType::TypedConfig(any)) = &mut last.config_type else {
            panic!("no configuration")
        };
        let mut proxy = TcpProxy::decode(any.value.as_slice()).unwrap();
        edit(&mut proxy);
        any.value = proxy.encode_to_vec();
    }
    let cases: [(&str, Edit); 4] = [
        ("filter_chains[0].transport_socket", |chain| {
            chain.transport_socket = Some(TransportSocket::default());
        }),
        ("filter_chains[0].filter_chain_match", |chain| {
            chain.filter_chain_match = Some(FilterChainMatch::default());
        }),
        ("on_demand", |chain| {
            edit_proxy(chain, |proxy| proxy.on_demand = Some(OnDemand::default()));
        }),
        ("metadata_match", |chain| {
            edit_proxy(chain, |proxy| proxy.metadata_match = Some(Default::default()));
        }),
    ];
    for (words, edit) in cases {
        let (nack, bench) = send_around("connect_originate", edit);
        let nack = nack.unwrap_or_else(|| panic!("{words} was not seen"));
        assert!(nack.contains(words), "{nack}");
        let snapshot = bench.snapshot();
        assert!(
            snapshot.clusters.get("connect_originate").unwrap().settings.tunnel.is_none(),
            "{words}"
        );
    }
    // One that ends nowhere opens no tunnels: the last good one stays.
    let (nack, _) = send_around("connect_originate", |chain| {
        chain.filters.clear();
    });
    assert!(nack.unwrap().contains("open no tunnels"));
}

#[test]
fn an_endpoint_that_cannot_be_reached_is_left_out_and_the_others_serve() {
    use cairn_proto::envoy::config::{
        core::v3::{Address, Pipe, address},
        endpoint::v3::lb_endpoint::HostIdentifier,
    };
    let answers = capture("01-http-basic");
    let mut bench = Bench::with(&answers);
    let mut endpoints = of(&answers, ENDPOINTS).clone();
    let assignment = resource(&mut endpoints, WEB);
    let mut message = ClusterLoadAssignment::decode(assignment.bytes.clone()).unwrap();
    let Some(HostIdentifier::Endpoint(endpoint)) = &mut message.endpoints[0].lb_endpoints[0].host_identifier else {
        panic!("no endpoint")
    };
    endpoint.address = Some(Address {
        address: Some(address::Address::Pipe(Pipe {
            path: "/run/app.sock".into(),
            mode: 0,
        })),
    });
    assignment.bytes = message.encode_to_vec().into();
    let nack = bench.apply(&endpoints).nack().unwrap();
    assert!(nack.contains("address.pipe: is not supported"), "{nack}");
    let snapshot = bench.snapshot();
    assert_eq!(snapshot.clusters.get(WEB).unwrap().state.endpoints.load().iter().count(), 1);
}
