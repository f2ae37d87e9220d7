//! Filters as an EnvoyFilter of a real istiod puts them in: structures, extension configurations, counts that outlive changes.

use std::{path::Path, sync::Arc};

use arc_swap::ArcSwap;
use cairn_filters::{PerRoute, RouteConfig, local_ratelimit::Count};
use cairn_policy::rate_limit::Buckets;
use cairn_proto::{
    envoy::{
        config::{
            core::v3::TypedExtensionConfig,
            listener::v3::{Listener, filter::ConfigType},
            route::v3::FilterConfig,
        },
        extensions::filters::{
            http::local_ratelimit::v3::LocalRateLimit, network::http_connection_manager::v3::HttpConnectionManager,
        },
    },
    udpa, xds,
};
use prost::Message as _;
use prost_types::{Any, Struct, Value, value::Kind};

use super::{
    Compiler,
    any::{Unknown, unpack},
    compiler::{EXTENSIONS, LISTENERS},
    load::{Answer, load},
    report::Notes,
    structure::unwrapped,
};
use crate::{
    snapshot::{Chain, ChainKind, Snapshot},
    workloads::Workloads,
};

const WEB: &str = "inbound-vip|80|http|web.app.svc.cluster.local";

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

    /// The errors of an answer.
    fn apply(&mut self, answer: &Answer) -> Vec<String> {
        let applied = self
            .compiler
            .apply(&answer.type_url, answer.resources.clone(), answer.removed.clone());
        applied.errors.iter().map(ToString::to_string).collect()
    }

    fn web(&self) -> Arc<Chain> {
        self.published.load().chains.get(WEB).unwrap().clone()
    }

    /// The buckets of the limit on the default route.
    fn buckets(&self) -> Arc<Buckets> {
        let web = self.web();
        let ChainKind::Http(http) = &web.kind else {
            panic!("it is HTTP")
        };
        let route = &http.routes.hosts()[0].routes[0];
        let word = route.overrides["envoy.filters.http.local_ratelimit"].downcast_ref::<PerRoute>();
        let Some(RouteConfig::LocalRateLimit(limit)) = word.unwrap().config.as_ref() else {
            panic!("the route has a limit")
        };
        match &limit.count {
            Count::Together(buckets) => buckets.clone(),
            Count::PerConnection(_) => panic!("it counts together"),
        }
    }
}

fn capture() -> Vec<Answer> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../conformance/fixtures/xds");
    load(&fixtures.join("istio-1.31.0-20260827/26-envoyfilter-ratelimit")).unwrap()
}

fn edit_web(answer: &mut Answer, edit: impl FnOnce(&mut HttpConnectionManager)) {
    let main = answer
        .resources
        .iter_mut()
        .find(|resource| resource.name == "main_internal")
        .unwrap();
    let mut listener = Listener::decode(main.bytes.clone()).unwrap();
    let chain = listener.filter_chains.iter_mut().find(|chain| chain.name == WEB).unwrap();
    let managers = chain.filters.iter_mut().filter_map(|filter| match &mut filter.config_type {
        Some(ConfigType::TypedConfig(any)) if any.type_url.ends_with("HttpConnectionManager") => Some(any),
        _ => None,
    });
    let any = managers.last().unwrap();
    let mut manager = HttpConnectionManager::decode(any.value.as_slice()).unwrap();
    edit(&mut manager);
    any.value = manager.encode_to_vec();
    main.bytes = listener.encode_to_vec().into();
}

#[test]
fn a_chain_refuses_until_the_configuration_of_its_filter_is_there() {
    let mut bench = Bench::new();
    let answers = capture();
    for answer in answers.iter().filter(|answer| answer.type_url != EXTENSIONS) {
        let errors = bench.apply(answer);
        assert!(
            answer.type_url != LISTENERS || errors.is_empty(),
            "nothing is wrong: {errors:?}"
        );
    }
    let refusal = bench.web().refuse.clone().unwrap().reason;
    assert!(refusal.contains("not arrived"), "{refusal}");
    let extensions = answers.iter().find(|answer| answer.type_url == EXTENSIONS).unwrap();
    assert_eq!(bench.apply(extensions), Vec::<String>::new());
    assert_eq!(bench.web().refuse, None);
}

#[test]
fn a_chain_serves_as_before_while_a_new_extension_is_awaited() {
    let mut bench = Bench::new();
    let mut answers = capture();
    for answer in &answers {
        bench.apply(answer);
    }
    let before = bench.web();
    let listeners = answers.iter_mut().find(|answer| answer.type_url == LISTENERS).unwrap();
    edit_web(listeners, |manager| {
        let discovered = manager
            .http_filters
            .iter_mut()
            .find(|filter| filter.name == "discovered-buffer");
        discovered.unwrap().name = "another-buffer".into();
    });
    assert_eq!(bench.apply(listeners), Vec::<String>::new());
    assert!(Arc::ptr_eq(&before, &bench.web()), "the old one serves");
    let extensions = answers.iter_mut().find(|answer| answer.type_url == EXTENSIONS).unwrap();
    let resource = &mut extensions.resources[0];
    let mut config = TypedExtensionConfig::decode(resource.bytes.clone()).unwrap();
    config.name = "another-buffer".into();
    resource.name = config.name.clone();
    resource.bytes = config.encode_to_vec().into();
    bench.apply(extensions);
    assert!(!Arc::ptr_eq(&before, &bench.web()));
    assert_eq!(bench.web().refuse, None);
}

#[test]
fn counts_outlive_other_changes_of_their_chain_and_go_with_their_own() {
    let mut bench = Bench::new();
    let mut answers = capture();
    for answer in &answers {
        bench.apply(answer);
    }
    let (chain, buckets) = (bench.web(), bench.buckets());
    let listeners = answers.iter_mut().find(|answer| answer.type_url == LISTENERS).unwrap();
    edit_web(listeners, |manager| manager.server_name = "other".into());
    bench.apply(listeners);
    assert!(!Arc::ptr_eq(&chain, &bench.web()), "the chain is another");
    assert!(Arc::ptr_eq(&buckets, &bench.buckets()), "its counts are the same");
    edit_web(listeners, |manager| {
        use cairn_proto::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::RouteSpecifier;
        let Some(RouteSpecifier::RouteConfig(table)) = &mut manager.route_specifier else {
            panic!("it has routes")
        };
        let config = &mut table.virtual_hosts[0].routes[0].typed_per_filter_config;
        let any = config.get_mut("envoy.filters.http.local_ratelimit").unwrap();
        let mut limit = LocalRateLimit::decode(any.value.as_slice()).unwrap();
        limit.token_bucket.as_mut().unwrap().max_tokens += 1;
        any.value = limit.encode_to_vec();
    });
    bench.apply(listeners);
    assert!(!Arc::ptr_eq(&buckets, &bench.buckets()), "another limit counts anew");
}

#[test]
fn a_structure_is_read_as_the_message_that_it_stands_for() {
    const LIMIT: &str = "type.googleapis.com/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit";
    let text = |text: &str| Value {
        kind: Some(Kind::StringValue(text.into())),
    };
    let number = Value {
        kind: Some(Kind::NumberValue(3.0)),
    };
    let structure = |fields: Vec<(&str, Value)>| Struct {
        fields: fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
    };
    let nested = |value| Value {
        kind: Some(Kind::StructValue(value)),
    };
    let bucket = structure(vec![("max_tokens", number), ("fill_interval", text("1.5s"))]);
    let value = structure(vec![("stat_prefix", text("x")), ("token_bucket", nested(bucket))]);
    let wrap = |package: &str, value: Struct| {
        let bytes = match package {
            "udpa" => udpa::r#type::v1::TypedStruct {
                type_url: LIMIT.into(),
                value: Some(value),
            }
            .encode_to_vec(),
            _ => xds::r#type::v3::TypedStruct {
                type_url: LIMIT.into(),
                value: Some(value),
            }
            .encode_to_vec(),
        };
        let kind = if package == "udpa" { "udpa.type.v1" } else { "xds.type.v3" };
        Any {
            type_url: format!("type.googleapis.com/{kind}.TypedStruct"),
            value: bytes,
        }
    };
    for package in ["udpa", "xds"] {
        let mut notes = Notes::of("test");
        let any = wrap(package, value.clone());
        let limit: LocalRateLimit = unpack(&unwrapped(&any, &mut notes).unwrap(), Unknown::Refuses, &mut notes).unwrap();
        let bucket = limit.token_bucket.unwrap();
        assert_eq!((limit.stat_prefix.as_str(), bucket.max_tokens), ("x", 3));
        let interval = bucket.fill_interval.unwrap();
        assert_eq!((interval.seconds, interval.nanos), (1, 500_000_000));
        let unknown = wrap(package, structure(vec![("no_such_field", text("x"))]));
        let error = unwrapped(&unknown, &mut notes).unwrap_err();
        assert!(error.what.contains("no_such_field"), "{error}");
    }
}

/// What the default route says of a filter after its configuration was set to this, and the errors of that.
fn said(filter: &str, any: Any) -> (Option<PerRoute>, Vec<String>) {
    use cairn_proto::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::RouteSpecifier;
    let mut bench = Bench::new();
    let mut answers = capture();
    for answer in &answers {
        bench.apply(answer);
    }
    let listeners = answers.iter_mut().find(|answer| answer.type_url == LISTENERS).unwrap();
    edit_web(listeners, |manager| {
        let Some(RouteSpecifier::RouteConfig(table)) = &mut manager.route_specifier else {
            panic!("it has routes")
        };
        let route = &mut table.virtual_hosts[0].routes[0];
        route.typed_per_filter_config = [(filter.to_owned(), any)].into();
    });
    let errors = bench.apply(listeners);
    let web = bench.web();
    let ChainKind::Http(http) = &web.kind else {
        panic!("it is HTTP")
    };
    let word = http.routes.hosts()[0].routes[0].overrides.get(filter).cloned();
    (word.map(|word| word.downcast_ref::<PerRoute>().unwrap().clone()), errors)
}

#[test]
fn a_route_may_turn_a_filter_off_or_on_and_has_to_say_something() {
    const LIMIT: &str = "envoy.filters.http.local_ratelimit";
    let config = |config: Option<Any>, disabled| {
        let message = FilterConfig {
            config,
            is_optional: false,
            disabled,
        };
        Any {
            type_url: "type.googleapis.com/envoy.config.route.v3.FilterConfig".into(),
            value: message.encode_to_vec(),
        }
    };
    let (off, errors) = said(LIMIT, config(None, true));
    assert!(off.is_some_and(|word| word.disabled && word.config.is_none()) && errors.is_empty());
    let (on, errors) = said(LIMIT, config(Some(Any::default()), false));
    assert!(on.is_some_and(|word| !word.disabled && word.config.is_none()) && errors.is_empty());
    let fault = Any {
        type_url: "type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault".into(),
        value: Vec::new(),
    };
    let (wrapped, errors) = said("envoy.filters.http.fault", config(Some(fault), false));
    assert!(matches!(wrapped.unwrap().config, Some(RouteConfig::Fault(_))) && errors.is_empty());
    let (absent, errors) = said("no.such.filter", config(None, true));
    assert!(absent.is_none() && errors.is_empty(), "{errors:?}");
    let (before, errors) = said(LIMIT, config(None, false));
    assert!(
        matches!(before.unwrap().config, Some(RouteConfig::LocalRateLimit(_))),
        "the last good chain stays"
    );
    assert!(
        errors.concat().contains("neither turns the filter off nor configures it"),
        "{errors:?}"
    );
    let unknown = Any {
        type_url: "type.googleapis.com/envoy.extensions.filters.http.lua.v3.LuaPerRoute".into(),
        value: Vec::new(),
    };
    let (_, errors) = said(LIMIT, unknown);
    assert!(errors.concat().contains("LuaPerRoute is not supported"), "{errors:?}");
}
