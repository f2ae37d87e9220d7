//! Settings from maps of variables: what istiod's template gives, what each variable changes, what is refused.

use cairn_identity::Source;
use cairn_xds::Tls;

use super::*;

/// As istiod's pod template sets them (contract runtime §8.2).
const TEMPLATE: [(&str, &str); 16] = [
    ("ISTIO_META_SERVICE_ACCOUNT", "waypoint"),
    ("ISTIO_META_NODE_NAME", "node-1"),
    ("PILOT_CERT_PROVIDER", "istiod"),
    ("CA_ADDR", "istiod.istio-system.svc:15012"),
    ("POD_NAME", "waypoint-7c9-abc"),
    ("POD_NAMESPACE", "app"),
    ("INSTANCE_IP", "10.244.1.7"),
    ("SERVICE_ACCOUNT", "waypoint"),
    ("HOST_IP", "192.168.0.2"),
    ("ISTIO_CPU_LIMIT", "2"),
    ("PROXY_CONFIG", "{}\n"),
    ("ISTIO_META_CLUSTER_ID", "Kubernetes"),
    ("ISTIO_META_INTERCEPTION_MODE", "REDIRECT"),
    ("ISTIO_META_WORKLOAD_NAME", "waypoint"),
    ("ISTIO_META_MESH_ID", "cluster.local"),
    ("TRUST_DOMAIN", "cluster.local"),
];

/// Variables over those of the template.
type Variables<'a> = &'a [(&'a str, &'a str)];

fn with(variables: Variables<'_>, pod: &Pod) -> Result<Settings, SettingError> {
    let arguments = Arguments::parse(&["waypoint", "--domain", "app.svc.cluster.local", "--proxyLogLevel", "warning"]).unwrap();
    let environment = TEMPLATE.iter().chain(variables).copied().collect();
    Settings::new(&arguments, &environment, pod)
}

fn settings(variables: Variables<'_>) -> Settings {
    with(variables, &Pod::default()).unwrap()
}

fn pod_with(files: &[&str]) -> Pod {
    Pod {
        present: Present::Only(files.iter().map(|path| (*path).to_owned()).collect()),
        ..Pod::default()
    }
}

fn authority(settings: &Settings) -> &cairn_identity::CaSettings {
    match &settings.identity {
        Source::CertificateAuthority(settings) => settings,
        other => panic!("{other:?}"),
    }
}

fn roots(settings: &Settings) -> String {
    match &settings.istiod.tls {
        Tls::Verified(files) => files.roots.display().to_string(),
        Tls::Plaintext => "plaintext".to_owned(),
    }
}

#[test]
fn the_templates_environment_needs_nothing_else() {
    let settings = settings(&[]);
    assert_eq!(settings.istiod.address.to_string(), "istiod.istio-system.svc:15012");
    assert_eq!(
        settings.istiod.node.id,
        "waypoint~10.244.1.7~waypoint-7c9-abc.app~app.svc.cluster.local"
    );
    assert_eq!(settings.istiod.node.cluster, "waypoint.app");
    assert_eq!(settings.istiod.headers, [("ClusterID".to_owned(), "Kubernetes".to_owned())]);
    assert_eq!(
        settings.istiod.token_file.as_deref(),
        Some("./var/run/secrets/tokens/istio-token".as_ref())
    );
    assert_eq!(roots(&settings), "./var/run/secrets/istio/root-cert.pem");
    let ca = authority(&settings);
    assert_eq!(ca.id.as_str(), "spiffe://cluster.local/ns/app/sa/waypoint");
    assert_eq!(
        (ca.address.as_str(), ca.plaintext, ca.ttl.as_secs()),
        ("istiod.istio-system.svc:15012", false, 86_400)
    );
    assert_eq!(
        settings.ports,
        Ports {
            admin: "127.0.0.1:15000".parse().unwrap(),
            agent: "0.0.0.0:15020".parse().unwrap(),
            ready: "0.0.0.0:15021".parse().unwrap(),
            metrics: "0.0.0.0:15090".parse().unwrap(),
        }
    );
    assert_eq!(settings.drain, DrainSettings::default());
    assert_eq!(settings.workers, Some(2));
    assert_eq!(
        (settings.istio_version.as_str(), settings.network.as_str(), settings.peers),
        (ISTIO_VERSION, "", ADDRESSES)
    );
}

#[test]
fn ports_and_times_are_those_of_proxy_config_and_environment() {
    let config = r#"{"proxyAdminPort": 25000, "statusPort": 25020, "terminationDrainDuration": "45s",
                     "proxyMetadata": {"EXIT_ON_ZERO_ACTIVE_CONNECTIONS": "true"}}"#;
    let settings = settings(&[
        ("PROXY_CONFIG", config),
        ("ENVOY_STATUS_PORT", "25021"),
        ("ENVOY_PROMETHEUS_PORT", "25090"),
        ("METRICS_LOCALHOST_ACCESS_ONLY", "true"),
        ("MINIMUM_DRAIN_DURATION", "1m"),
        ("CAIRN_LISTEN", "127.0.0.1:25008"),
        ("CAIRN_DETECT_TIMEOUT", "10ms"),
        ("CAIRN_WARM_TIMEOUT", "1s"),
        ("CAIRN_ISTIO_VERSION", "1.27.9"),
        ("CAIRN_WORKLOAD_TYPE", "workload"),
        ("ISTIO_META_NETWORK", "net-1"),
    ]);
    let Ports {
        admin,
        agent,
        ready,
        metrics,
    } = settings.ports;
    assert_eq!([admin, agent, ready].map(|address| address.port()), [25000, 25020, 25021]);
    assert_eq!(metrics, "127.0.0.1:25090".parse().unwrap());
    let drain = DrainSettings {
        termination: Duration::from_secs(45),
        minimum: Duration::from_secs(60),
        until_idle: true,
    };
    assert_eq!(settings.drain, drain);
    assert_eq!(settings.data.listen, Some("127.0.0.1:25008".parse().unwrap()));
    assert_eq!(settings.data.detect_timeout, Duration::from_millis(10));
    assert_eq!(settings.warm_timeout, Duration::from_secs(1));
    assert_eq!(
        (settings.istio_version.as_str(), settings.peers, settings.network.as_str()),
        ("1.27.9", WORKLOADS, "net-1")
    );
}

#[test]
fn the_number_of_threads_comes_from_the_nearest() {
    let cases: [(&[&str], Variables<'_>, Option<usize>); 6] = [
        (&[], &[], Some(2)),
        (&[], &[("ISTIO_CPU_LIMIT", "1.5")], Some(2)),
        (&[], &[("ISTIO_CPU_LIMIT", "")], None),
        (&[], &[("PROXY_CONFIG", r#"{"concurrency": 3}"#)], Some(3)),
        (&["--concurrency", "4"], &[("PROXY_CONFIG", r#"{"concurrency": 3}"#)], Some(4)),
        (&["--concurrency", "0"], &[], None),
    ];
    for (arguments, variables, want) in cases {
        let arguments = Arguments::parse(&[&["waypoint"], arguments].concat()).unwrap();
        let environment = TEMPLATE.iter().chain(variables).copied().collect();
        let settings = Settings::new(&arguments, &environment, &Pod::default()).unwrap();
        assert_eq!(settings.workers, want, "{arguments:?} {variables:?}");
    }
}

#[test]
fn the_first_root_that_applies_is_used_for_istiod() {
    let cases: [(Variables<'_>, &[&str], &str); 7] = [
        (
            &[("XDS_ROOT_CA", "/my/root.pem"), ("PROV_CERT", "/prov")],
            &["./etc/certs/root-cert.pem"],
            "/my/root.pem",
        ),
        (&[("XDS_ROOT_CA", "SYSTEM")], &["/etc/ssl/cert.pem"], "/etc/ssl/cert.pem"),
        (
            &[("PROV_CERT", "/prov")],
            &["./etc/certs/root-cert.pem"],
            "./etc/certs/root-cert.pem",
        ),
        (&[("PROV_CERT", "/prov")], &[], "/prov/root-cert.pem"),
        (
            &[
                ("FILE_MOUNTED_CERTS", "true"),
                ("ISTIO_META_TLS_CLIENT_ROOT_CERT", "/m/root.pem"),
                ("ISTIO_META_TLS_CLIENT_CERT_CHAIN", "/m/chain.pem"),
                ("ISTIO_META_TLS_CLIENT_KEY", "/m/key.pem"),
            ],
            &[],
            "/m/root.pem",
        ),
        (&[], &[], "./var/run/secrets/istio/root-cert.pem"),
        (
            &[(
                "PROXY_CONFIG",
                r#"{"controlPlaneAuthPolicy":"NONE","discoveryAddress":"127.0.0.1:15010"}"#,
            )],
            &[],
            "plaintext",
        ),
    ];
    for (variables, files, want) in cases {
        assert_eq!(
            roots(&with(variables, &pod_with(files)).unwrap()),
            want,
            "{variables:?} {files:?}"
        );
    }
}

#[test]
fn the_certificate_comes_from_a_socket_files_or_the_authority() {
    let spiffe = ["cert-chain.pem", "key.pem", "root-cert.pem"]
        .map(|name| format!("./var/run/secrets/workload-spiffe-credentials/{name}"));
    let spiffe: Vec<&str> = spiffe.iter().map(String::as_str).collect();
    let mounted = [
        "./etc/certs/cert-chain.pem",
        "./etc/certs/key.pem",
        "./etc/certs/root-cert.pem",
    ];
    let socket = "./var/run/secrets/workload-spiffe-uds/socket";
    let cases: [(Variables<'_>, &[&str], &str); 8] = [
        (&[], &[socket], "socket ./var/run/secrets/workload-spiffe-uds/socket"),
        (
            &[("WORKLOAD_IDENTITY_SOCKET_FILE", "spire.sock")],
            &[],
            "socket ./var/run/secrets/workload-spiffe-uds/spire.sock",
        ),
        (
            &[],
            &spiffe,
            "files ./var/run/secrets/workload-spiffe-credentials/cert-chain.pem",
        ),
        (&[], &mounted, "files ./etc/certs/cert-chain.pem"),
        (&[], &mounted[1..], "authority ./var/run/secrets/istio/root-cert.pem"),
        (&[("CA_ROOT_CA", "SYSTEM")], &[], "authority SYSTEM"),
        (
            &[("PILOT_CERT_PROVIDER", "custom")],
            &[],
            "authority ./etc/certs/root-cert.pem",
        ),
        (&[("PROV_CERT", "/prov")], &[], "authority /prov/root-cert.pem"),
    ];
    for (variables, files, want) in cases {
        let got = match with(variables, &pod_with(files)).unwrap().identity {
            Source::SdsSocket { path } => format!("socket {}", path.display()),
            Source::Files { chain, .. } => format!("files {}", chain.display()),
            Source::CertificateAuthority(settings) => format!("authority {}", settings.root_file.display()),
            other => panic!("{other:?}"),
        };
        assert_eq!(got, want, "{variables:?} {files:?}");
    }
}

#[test]
fn the_authority_is_asked_as_variables_say() {
    let settings = settings(&[
        ("CA_ADDR", "localhost:15010"),
        ("SECRET_TTL", "1h"),
        ("SECRET_GRACE_PERIOD_RATIO", "0.25"),
        ("SECRET_GRACE_PERIOD_RATIO_JITTER", "0"),
        ("ISTIOD_SAN", "istiod.example"),
        ("ISTIO_META_CERT_SIGNER", "clusterissuers.cert-manager.io/istio"),
        ("CA_HEADER_X-Tenant", "blue"),
        ("XDS_HEADER_X-Tenant", "green"),
    ]);
    let ca = authority(&settings);
    assert_eq!(
        (ca.ttl.as_secs(), ca.renew_ratio, ca.renew_jitter, ca.plaintext),
        (3600, 0.25, 0.0, true)
    );
    assert_eq!(ca.server_name.as_deref(), Some("istiod.example"));
    assert_eq!(ca.cert_signer.as_deref(), Some("clusterissuers.cert-manager.io/istio"));
    assert_eq!(ca.headers, [("X-Tenant".to_owned(), "blue".to_owned())]);
    assert!(settings.istiod.headers.contains(&("X-Tenant".to_owned(), "green".to_owned())));
    let Tls::Verified(files) = &settings.istiod.tls else {
        panic!("plaintext")
    };
    assert_eq!(files.server_name, "istiod.example");
}

#[test]
fn what_has_no_meaning_here_is_named() {
    let settings = settings(&[
        ("ECC_SIGNATURE_ALGORITHM", "ECDSA"),
        ("WORKLOAD_RSA_KEY_SIZE", "4096"),
        ("ISTIO_META_DNS_CAPTURE", "false"),
        (
            "PROXY_CONFIG",
            r#"{"concurrency":2,"privateKeyProvider":{"cryptomb":{}},"runtimeValues":null}"#,
        ),
    ]);
    assert_eq!(settings.ignored, ["WORKLOAD_RSA_KEY_SIZE", "PROXY_CONFIG.privateKeyProvider"]);
    assert_eq!(self::settings(&[]).ignored, [""; 0]);
}

#[test]
fn a_compliance_policy_holds_for_every_connection() {
    let settings = settings(&[
        ("COMPLIANCE_POLICY", "pqc"),
        ("PROXY_CONFIG_XDS_AGENT", "true"),
        ("OUTPUT_CERTS", "/etc/istio/proxy"),
    ]);
    assert_eq!((settings.compliance, settings.trust_anchors), (Compliance::PostQuantum, true));
    let ca = authority(&settings);
    assert_eq!(
        (ca.compliance, ca.output.as_deref()),
        (Compliance::PostQuantum, Some("/etc/istio/proxy".as_ref()))
    );
    let Tls::Verified(files) = &settings.istiod.tls else {
        panic!("plaintext")
    };
    assert_eq!((files.allowed.versions.len(), files.allowed.provider.kx_groups.len()), (1, 1));
    assert_eq!(self::settings(&[]).compliance, Compliance::Any);
}

#[test]
fn the_pods_annotation_and_addresses_count() {
    let pod = Pod {
        labels: Some([("app".to_owned(), "shop".to_owned())].into()),
        annotations: [(
            "proxy.istio.io/config".to_owned(),
            "terminationDrainDuration: 20s\n".to_owned(),
        )]
        .into(),
        addresses: vec!["10.244.1.7".parse().unwrap(), "fd00::7".parse().unwrap()],
        ..Pod::default()
    };
    let settings = with(&[("PROXY_CONFIG", r#"{"terminationDrainDuration":"10s"}"#)], &pod).unwrap();
    assert_eq!(settings.drain.termination, Duration::from_secs(20));
    assert_eq!(settings.istiod.node.cluster, "shop.app");
    let metadata = settings.istiod.node.metadata.unwrap();
    let text = |key: &str| match &metadata.fields.get(key).unwrap().kind {
        Some(prost_types::value::Kind::StringValue(text)) => text.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(text("INSTANCE_IPS"), "10.244.1.7,fd00::7");
    assert_eq!(text("ISTIO_VERSION"), ISTIO_VERSION);
    let only_v6 = with(&[("INSTANCE_IP", "fd00::7")], &Pod::default()).unwrap();
    assert_eq!(
        (only_v6.ports.admin.to_string(), only_v6.ports.agent.to_string()),
        ("[::1]:15000".into(), "[::]:15020".into())
    );
}

#[test]
fn what_means_nothing_is_refused_in_one_sentence() {
    let cases = [
        (
            "INSTANCE_IP",
            "here",
            "INSTANCE_IP=\"here\" cannot be used: the pod's IP address is expected",
        ),
        ("INSTANCE_IP", "", "INSTANCE_IP is not set: istiod's pod template sets it"),
        ("POD_NAME", "", "POD_NAME is not set"),
        ("POD_NAMESPACE", "", "POD_NAMESPACE is not set"),
        ("PROXY_CONFIG", "{", "PROXY_CONFIG cannot be read as JSON or YAML"),
        (
            "PROXY_CONFIG",
            r#"{"discoveryAddress":"istiod"}"#,
            "the discovery address \"istiod\" is not HOST:PORT",
        ),
        (
            "ENVOY_STATUS_PORT",
            "high",
            "ENVOY_STATUS_PORT=\"high\" cannot be used: a port",
        ),
        (
            "CAIRN_EXCHANGES",
            "100001",
            "CAIRN_EXCHANGES=\"100001\" cannot be used: a number from 0 to 100000",
        ),
        (
            "CAIRN_EXCHANGES_SNAPSHOTS",
            "0",
            "CAIRN_EXCHANGES_SNAPSHOTS=\"0\" cannot be used: a number from 1 to 64",
        ),
        (
            "MINIMUM_DRAIN_DURATION",
            "5",
            "MINIMUM_DRAIN_DURATION=\"5\" cannot be used: a time such as",
        ),
        (
            "EXIT_ON_ZERO_ACTIVE_CONNECTIONS",
            "si",
            "EXIT_ON_ZERO_ACTIVE_CONNECTIONS=\"si\" cannot be used: true or false",
        ),
        ("SECRET_TTL", "0s", "SECRET_TTL=\"0s\" cannot be used"),
        (
            "SECRET_GRACE_PERIOD_RATIO",
            "2",
            "SECRET_GRACE_PERIOD_RATIO=\"2\" cannot be used: a number from 0 to 1",
        ),
        (
            "ISTIO_CPU_LIMIT",
            "lots",
            "ISTIO_CPU_LIMIT=\"lots\" cannot be used: a number of cores",
        ),
        (
            "TRUST_DOMAIN",
            "no/slash",
            "TRUST_DOMAIN=\"no/slash\" cannot be used: a name without slashes",
        ),
        (
            "TRUST_DOMAIN",
            "No Domain",
            "TRUST_DOMAIN, POD_NAMESPACE and SERVICE_ACCOUNT make no identity",
        ),
        (
            "PILOT_CERT_PROVIDER",
            "none",
            "PILOT_CERT_PROVIDER=none leaves nothing to verify istiod by",
        ),
        ("FILE_MOUNTED_CERTS", "true", "ISTIO_META_TLS_CLIENT_ROOT_CERT is not set"),
        (
            "XDS_ROOT_CA",
            "SYSTEM",
            "XDS_ROOT_CA=SYSTEM, but the system has no root certificates",
        ),
        (
            "WORKLOAD_IDENTITY_SOCKET_FILE",
            "../x",
            "WORKLOAD_IDENTITY_SOCKET_FILE=\"../x\" cannot be used",
        ),
        (
            "CAIRN_WORKLOAD_TYPE",
            "pods",
            "CAIRN_WORKLOAD_TYPE=\"pods\" cannot be used: address or workload",
        ),
        (
            "COMPLIANCE_POLICY",
            "fips",
            "COMPLIANCE_POLICY=\"fips\" cannot be used: fips-140-2, fips-140-3 or pqc is expected",
        ),
        ("CAIRN_LISTEN", "15008", "CAIRN_LISTEN=\"15008\" cannot be used: ADDRESS:PORT"),
    ];
    for (name, value, want) in cases {
        let error = with(&[(name, value)], &Pod::default()).expect_err(name).to_string();
        assert!(error.starts_with(want) && !error.contains('\n'), "{error}");
    }
}
