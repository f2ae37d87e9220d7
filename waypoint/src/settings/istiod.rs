//! The stream to istiod: address, trust, token, headers, node (contract xds §1.2–1.6).

use cairn_xds::{Address, Allowed, ClientCertificate, NodeBuilder, SettingsError, Tls, TlsFiles};
use serde_json::{Map, json};

use super::{Asked, SettingError, environment::wrong};

/// The token by which istiod knows us.
pub(super) const TOKEN: &str = "./var/run/secrets/tokens/istio-token";
/// The roots of istiod's own certificate.
pub(super) const ROOT: &str = "./var/run/secrets/istio/root-cert.pem";
/// The root beside mounted certificates.
pub(super) const MOUNTED_ROOT: &str = "./etc/certs/root-cert.pem";
/// The sockets of servers of secrets that may stand beside us.
const CREDENTIAL_SOCKET: &str = "./var/run/secrets/credential-uds/socket";
const FILE_CREDENTIAL_SOCKET: &str = "./var/run/secrets/credential-uds/files-socket";
/// Where distributions keep their roots.
const SYSTEM_BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// Everything about the stream.
pub(super) fn settings(asked: &Asked<'_>, istio_version: &str) -> Result<cairn_xds::Settings, SettingError> {
    let Asked { environment, .. } = asked;
    let given = asked.discovery_address();
    let address: Address = given
        .parse()
        .map_err(|error: SettingsError| SettingError::Refused(error.to_string()))?;
    let server_name = environment.text_or("ISTIOD_SAN", address.default_server_name()).to_owned();
    let tls = if asked.plaintext() {
        Tls::Plaintext
    } else {
        Tls::Verified(TlsFiles {
            roots: roots(asked)?.into(),
            server_name,
            client_certificate: client_certificate(asked)?,
            allowed: Allowed {
                provider: asked.compliance.provider(),
                versions: asked.compliance.versions(),
            },
        })
    };
    let node = node(asked, &address, istio_version)?.build();
    let mut settings = cairn_xds::Settings::new(address, tls, node);
    settings.token_file = Some(TOKEN.into());
    settings.headers = vec![("ClusterID".to_owned(), asked.cluster_id().to_owned())];
    settings.headers.extend(headers(asked, "XDS_HEADER_"));
    settings.keepalive_interval = environment.duration("GRPC_KEEPALIVE_INTERVAL", settings.keepalive_interval)?;
    settings.keepalive_timeout = environment.duration("GRPC_KEEPALIVE_TIMEOUT", settings.keepalive_timeout)?;
    Ok(settings)
}

/// Headers that variables ask for.
pub(super) fn headers(asked: &Asked<'_>, prefix: &str) -> Vec<(String, String)> {
    let named = asked.environment.prefixed(prefix).filter(|(name, _)| !name.is_empty());
    named.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// The first that applies (contract xds §1.2).
fn roots(asked: &Asked<'_>) -> Result<String, SettingError> {
    let Asked { environment, pod, .. } = asked;
    match environment.text("XDS_ROOT_CA") {
        Some("SYSTEM") => {
            let there = SYSTEM_BUNDLES.into_iter().find(|path| pod.has(path));
            let none = || {
                let remedy = "install the package ca-certificates";
                SettingError::Refused(format!(
                    "XDS_ROOT_CA=SYSTEM, but the system has no root certificates: {remedy}"
                ))
            };
            return there.map(str::to_owned).ok_or_else(none);
        }
        Some(path) => return Ok(path.to_owned()),
        None => {}
    }
    if pod.has(MOUNTED_ROOT) {
        return Ok(MOUNTED_ROOT.to_owned());
    }
    if let Some(folder) = environment.text("PROV_CERT") {
        return Ok(format!("{folder}/root-cert.pem"));
    }
    if environment.flag("FILE_MOUNTED_CERTS", false)? {
        return asked.required("ISTIO_META_TLS_CLIENT_ROOT_CERT").map(str::to_owned);
    }
    if environment.text("PILOT_CERT_PROVIDER") == Some("none") {
        let words =
            "PILOT_CERT_PROVIDER=none leaves nothing to verify istiod by: set XDS_ROOT_CA to a file with its roots, or to SYSTEM";
        return Err(SettingError::Refused(words.to_owned()));
    }
    Ok(ROOT.to_owned())
}

fn client_certificate(asked: &Asked<'_>) -> Result<Option<ClientCertificate>, SettingError> {
    let Asked { environment, .. } = asked;
    if let Some(folder) = environment.text("PROV_CERT") {
        let file = |name: &str| format!("{folder}/{name}").into();
        return Ok(Some(ClientCertificate {
            chain: file("cert-chain.pem"),
            key: file("key.pem"),
        }));
    }
    if environment.flag("FILE_MOUNTED_CERTS", false)? {
        let chain = asked.required("ISTIO_META_TLS_CLIENT_CERT_CHAIN")?.into();
        let key = asked.required("ISTIO_META_TLS_CLIENT_KEY")?.into();
        return Ok(Some(ClientCertificate { chain, key }));
    }
    Ok(None)
}

fn node(asked: &Asked<'_>, address: &Address, istio_version: &str) -> Result<NodeBuilder, SettingError> {
    let Asked {
        arguments,
        environment,
        config,
        pod,
        compliance: _,
    } = asked;
    let pod_namespace = asked.required("POD_NAMESPACE")?.to_owned();
    let instance_ip = asked.instance_ip()?.ok_or(SettingError::Missing {
        name: "INSTANCE_IP",
        remedy: "istiod's pod template sets it from the pod (downward API)",
    })?;
    let mut instance_ips = vec![instance_ip];
    instance_ips.extend(pod.addresses.iter().copied().filter(|ip| *ip != instance_ip));
    let default_domain = format!("{pod_namespace}.svc.cluster.local");
    let port = |name: &str, default| environment.port(name, default);
    let mut more = Map::new();
    if environment.flag("EXIT_ON_ZERO_ACTIVE_CONNECTIONS", false)? {
        more.insert("EXIT_ON_ZERO_ACTIVE_CONNECTIONS".to_owned(), json!("true"));
    }
    if let Some(path) = arguments.value("outlierLogPath") {
        more.insert("OUTLIER_LOG_PATH".to_owned(), json!(path));
    }
    if let Some(name) = environment.text("WORKLOAD_IDENTITY_SOCKET_FILE") {
        more.insert("WORKLOAD_IDENTITY_SOCKET_FILE".to_owned(), json!(name));
    }
    let dns_domain = arguments.value("domain").unwrap_or(&default_domain).to_owned();
    if dns_domain.contains('~') {
        return Err(wrong(
            "--domain",
            dns_domain,
            "a DNS domain such as NAMESPACE.svc.cluster.local",
        ));
    }
    Ok(NodeBuilder {
        pod_name: asked.required("POD_NAME")?.to_owned(),
        service_account: asked.service_account()?.to_owned(),
        pod_namespace,
        instance_ips,
        dns_domain,
        istio_version: istio_version.to_owned(),
        istiod_names: vec![address.default_server_name().to_owned()],
        labels: pod.labels.clone(),
        annotations: pod.annotations.clone(),
        proxy_config: config.json().clone(),
        environment: environment.all().clone(),
        status_port: port("ENVOY_STATUS_PORT", 15021)?,
        prometheus_port: port("ENVOY_PROMETHEUS_PORT", 15090)?,
        credential_socket: pod.has(CREDENTIAL_SOCKET),
        file_credential_socket: pod.has(FILE_CREDENTIAL_SOCKET),
        more,
    })
}
