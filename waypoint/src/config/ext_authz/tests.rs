//! What of the filter's settings is read, refused and listed.

use cairn_proto::envoy::{
    config::core::v3::{
        HeaderValue, RuntimeFractionalPercent,
        grpc_service::{EnvoyGrpc, TargetSpecifier},
    },
    r#type::{
        matcher::v3::{StringMatcher as EnvoyString, string_matcher::MatchPattern},
        v3::FractionalPercent,
    },
};

use super::*;

fn service() -> EnvoyService {
    EnvoyService {
        target_specifier: Some(TargetSpecifier::EnvoyGrpc(EnvoyGrpc {
            cluster_name: "outbound|9000||authz".into(),
            ..EnvoyGrpc::default()
        })),
        ..EnvoyService::default()
    }
}

fn over_grpc() -> EnvoyFilter {
    EnvoyFilter {
        services: Some(Services::GrpcService(service())),
        ..EnvoyFilter::default()
    }
}

fn http_service() -> HttpService {
    HttpService {
        server_uri: Some(HttpUri {
            uri: "http://authz".into(),
            timeout: Some(prost_types::Duration { seconds: 1, nanos: 0 }),
            http_upstream_type: Some(HttpUpstreamType::Cluster("outbound|8000||authz".into())),
        }),
        ..HttpService::default()
    }
}

fn over_http_with(edit: impl FnOnce(&mut HttpService)) -> EnvoyFilter {
    let mut service = http_service();
    edit(&mut service);
    EnvoyFilter {
        services: Some(Services::HttpService(service)),
        ..EnvoyFilter::default()
    }
}

fn list(name: &str) -> ListStringMatcher {
    ListStringMatcher {
        patterns: vec![EnvoyString {
            match_pattern: Some(MatchPattern::Exact(name.into())),
            ignore_case: true,
        }],
    }
}

/// What comes of a filter: "good", "listed", "refused", or what is malformed.
fn outcome<T>(compile: impl FnOnce(&mut Context, &mut Notes) -> Result<T, Malformed>) -> String {
    let mut notes = Notes::of("x");
    match compile(&mut Context::default(), &mut notes) {
        Err(malformed) => malformed.to_string(),
        Ok(_) if notes.refusal().is_some() => "refused".into(),
        Ok(_) if notes.into_list().is_empty() => "good".into(),
        Ok(_) => "listed".into(),
    }
}

#[test]
fn what_decides_and_is_not_done_refuses_and_what_has_no_meaning_is_told() {
    type Edit = fn(&mut EnvoyFilter);
    let cases: &[(Edit, &str)] = &[
        (|_| {}, "good"),
        (|filter| filter.services = None, "services: is missing"),
        (|filter| filter.shadow_mode = true, "refused"),
        (
            |filter| filter.decoder_header_mutation_rules = Some(Default::default()),
            "refused",
        ),
        (
            |filter| filter.route_metadata_context_namespaces = vec!["x".into()],
            "refused",
        ),
        (|filter| filter.bootstrap_metadata_labels_key = "x".into(), "refused"),
        (|filter| filter.include_peer_certificate = true, "listed"),
        (|filter| filter.emit_filter_state_stats = true, "listed"),
        (|filter| filter.validate_mutations = true, "good"),
        (
            |filter| filter.with_request_body = Some(BufferSettings::default()),
            "with_request_body.max_request_bytes: is zero",
        ),
        (
            |filter| filter.status_on_error = Some(HttpStatus { code: 7 }),
            "status_on_error: 7 is no status of an answer",
        ),
    ];
    for (edit, expected) in cases {
        let mut filter = over_grpc();
        edit(&mut filter);
        assert_eq!(outcome(|context, notes| http(filter, context, notes)), *expected);
    }
    type EditService = fn(&mut HttpService);
    let cases: &[(EditService, &str)] = &[
        (|_| {}, "good"),
        (|service| service.server_uri = None, "http_service.server_uri: is missing"),
        (
            |service| service.path_prefix = "check".into(),
            "http_service.path_prefix: does not begin with `/`",
        ),
        (
            |service| service.path_override = "/a b".into(),
            "http_service.path_override: is no path",
        ),
        (
            |service| {
                service.path_prefix = "/a".into();
                service.path_override = "/b".into();
            },
            "http_service.path_override: stands beside `path_prefix`",
        ),
        (|service| service.retry_policy = Some(Default::default()), "listed"),
    ];
    for (edit, expected) in cases {
        let filter = over_http_with(edit);
        assert_eq!(outcome(|context, notes| http(filter, context, notes)), *expected);
    }
    let nobody = NetworkFilter::default();
    assert_eq!(
        outcome(|context, notes| network(nobody, context, notes)),
        "grpc_service: is missing"
    );
}

#[test]
fn settings_are_read_as_envoy_reads_them() {
    let mut context = Context::default();
    let filter = http(over_grpc(), &mut context, &mut Notes::of("x")).unwrap().unwrap();
    let settings = &filter.settings;
    let Authorizer::Grpc(grpc, _) = &settings.authorizer else {
        panic!("{:?}", settings.authorizer)
    };
    assert_eq!(grpc.timeout, Some(Duration::from_millis(200)));
    assert_eq!(settings.status_on_error, StatusCode::FORBIDDEN);
    assert!(settings.told.allowed.is_none() && settings.notes && !settings.allow_on_failure);
    assert!(
        context.clusters.contains("outbound|9000||authz"),
        "the chain waits for its cluster"
    );

    let share = FractionalPercent {
        numerator: 0,
        denominator: 0,
    };
    let filter = EnvoyFilter {
        filter_enabled: Some(RuntimeFractionalPercent {
            default_value: Some(share),
            runtime_key: String::new(),
        }),
        deny_at_disable: Some(RuntimeFeatureFlag {
            default_value: Some(true),
            runtime_key: "x".into(),
        }),
        allowed_headers: Some(list("x-a")),
        ..over_http_with(|service| {
            service.authorization_request = Some(AuthorizationRequest {
                headers_to_add: vec![HeaderValue {
                    key: "x-mesh".into(),
                    value: "yes".into(),
                    raw_value: Vec::new(),
                }],
                ..AuthorizationRequest::default()
            });
            service.authorization_response = Some(AuthorizationResponse {
                allowed_client_headers: Some(list("x-why")),
                ..AuthorizationResponse::default()
            });
        })
    };
    let filter = http(filter, &mut context, &mut Notes::of("x")).unwrap().unwrap();
    assert!(filter.settings.deny_others && !filter.settings.enabled.contains(0));
    assert_eq!(filter.settings.told.allowed.as_ref().map(Vec::len), Some(1));
    let Authorizer::Http(over_http) = &filter.settings.authorizer else {
        panic!("it speaks HTTP")
    };
    assert_eq!(over_http.path, AskedAt::Under("".into()));
    assert_eq!(
        (over_http.add.additions().len(), over_http.goes.client.as_ref().map(Vec::len)),
        (1, Some(1))
    );
    let unnamed = http(over_http_with(|_| {}), &mut context, &mut Notes::of("x"))
        .unwrap()
        .unwrap();
    assert_eq!(
        unnamed.settings.told.allowed.as_ref().map(Vec::len),
        Some(0),
        "nothing but what is named"
    );
}

#[test]
fn a_route_turns_it_off_or_says_what_else_is_told() {
    let read = |said| {
        on_route(
            ExtAuthzPerRoute { r#override: said },
            &mut Context::default(),
            &mut Notes::of("x"),
        )
    };
    assert!(read(Some(Override::Disabled(true))).unwrap().unwrap().disabled);
    assert!(read(Some(Override::Disabled(false))).is_err() && read(None).is_err());
    let settings = |settings| read(Some(Override::CheckSettings(settings)));
    let told = || BufferSettings {
        max_request_bytes: 10,
        ..BufferSettings::default()
    };
    let here = settings(CheckSettings {
        context_extensions: [("k".to_owned(), "v".to_owned())].into_iter().collect(),
        with_request_body: Some(told()),
        service_override: Some(ServiceOverride::HttpService(http_service())),
        ..CheckSettings::default()
    });
    let here = here.unwrap().unwrap();
    assert_eq!(here.context, [("k".into(), "v".into())]);
    assert!(matches!(here.body, Some(BodyHere::Told(BodyTold { limit: 10, .. }))));
    assert_eq!(here.authorizer.unwrap().cluster(), "outbound|8000||authz");
    let untold = settings(CheckSettings {
        disable_request_body_buffering: true,
        ..CheckSettings::default()
    });
    assert_eq!(untold.unwrap().unwrap().body, Some(BodyHere::Untold));
    let contrary = settings(CheckSettings {
        disable_request_body_buffering: true,
        with_request_body: Some(told()),
        ..CheckSettings::default()
    });
    assert!(contrary.is_err());
}
