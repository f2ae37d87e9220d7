//! What the operator and the pod say, read once at start.
//!
//! [`Settings::new`] is a pure function of the environment. Names and defaults are those of the image that this one can stand in for
//! (contract ztunnel §2), so that its unmodified chart starts it; settings of our own begin with `CAIRN_` (docs/settings.md). A value that
//! means nothing ends the start in one sentence; what is missing at run time (a token, a root, istiod) is retried, and readiness says so.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use cairn_agent::{
    environment::{Environment, SettingError, wrong},
    shutdown::DrainSettings,
};
use cairn_exchange::SpiffeId;
use cairn_hbone::{KeepaliveSettings, ServerSettings, StreamLimits};
use cairn_identity::{CaSettings, SYSTEM_ROOTS};
use cairn_proto::envoy::config::core::v3::Node;
use cairn_xds::{Address, Allowed, SettingsError, Tls, TlsFiles};
use serde::Deserialize;

use crate::{node::NodeSettings, pod::PodInfo, sockets::MARK, telemetry::LogFormat};

/// The newest version of Istio that we are tested with, which the proxy claims.
pub const ISTIO_VERSION: &str = "1.31.0";
const TOKEN: &str = "./var/run/secrets/tokens/istio-token";
const ROOT: &str = "./var/run/secrets/istio/root-cert.pem";
const ZDS_SOCKET: &str = "/var/run/ztunnel/ztunnel.sock";
const ISTIOD: &str = "https://localhost:15012";
const SYSTEM_BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";
const TRUST_DOMAIN: &str = "cluster.local";
/// Streams that one tunnel carries.
const MAX_STREAMS: u32 = 100;
/// Streams that a tunnel to us may carry.
const SERVER_STREAMS: u32 = 200;

/// Everything that `cairn-ztunnel proxy ztunnel` is told.
#[derive(Debug)]
pub struct Settings {
    /// Whom it serves.
    pub mode: Mode,
    /// The stream to istiod; none with an empty `XDS_ADDRESS`.
    pub istiod: Option<cairn_xds::Settings>,
    /// The certificate authority, without the identity to ask for.
    pub authority: Box<CaSettings>,
    /// Settings of the data path.
    pub node: NodeSettings,
    /// The network that the node is in.
    pub network: Arc<str>,
    /// The trust domain of pods that workload discovery does not name.
    pub trust_domain: String,
    /// Whether applications see their client's address.
    pub keep_source: Option<bool>,
    /// The mark of our packets.
    pub mark: Option<u32>,
    /// Threads for connections.
    pub workers: usize,
    /// Ports.
    pub ports: AdminPorts,
    /// How it ends.
    pub drain: DrainSettings,
    /// How lines look.
    pub log_format: LogFormat,
    /// Whether connections are told of when they begin, too.
    pub log_opened: bool,
    /// What is logged (`RUST_LOG`).
    pub log_filter: String,
    /// The domain of the cluster's services.
    pub dns_domain: String,
}

/// Whom it serves.
#[derive(Debug)]
pub enum Mode {
    /// The pods of a node, as istio-cni names them over this socket.
    Shared {
        /// The socket.
        zds: PathBuf,
    },
    /// One workload, in the network namespace of this process.
    Dedicated {
        /// Who it is.
        workload: PodInfo,
    },
}

/// Ports for people and their tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdminPorts {
    /// Administration.
    pub admin: SocketAddr,
    /// Metrics.
    pub metrics: SocketAddr,
    /// Readiness.
    pub ready: SocketAddr,
}

/// What of `PROXY_CONFIG` means something here.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ProxyConfig {
    proxy_admin_port: Option<u16>,
    status_port: Option<u16>,
    concurrency: Option<usize>,
    discovery_address: Option<String>,
    termination_drain_duration: Option<String>,
}

// === impl Settings ===

impl Settings {
    /// What the environment says, on a machine with so many cores.
    pub fn new(environment: &Environment, cores: usize) -> Result<Self, SettingError> {
        refuse_unsupported(environment)?;
        let config = proxy_config(environment)?;
        let cluster = environment.text_or("CLUSTER_ID", "Kubernetes").to_owned();
        let workers = match environment.parsed::<usize>("ZTUNNEL_WORKER_THREADS", "a number of threads")? {
            Some(workers) => workers.max(1),
            None => config
                .concurrency
                .filter(|workers| *workers > 0)
                .unwrap_or((cores / 4).max(2)),
        };
        let max_streams = environment
            .parsed("POOL_MAX_STREAMS_PER_CONNECTION", "a number of streams")?
            .unwrap_or(MAX_STREAMS);
        let keepalive = KeepaliveSettings::default();
        let server = ServerSettings {
            streams: StreamLimits {
                floor: SERVER_STREAMS,
                ..StreamLimits::default()
            },
            keepalive,
            ..ServerSettings::default()
        };
        let mut pool = NodeSettings::pool(workers, max_streams);
        pool.windows = server.windows.clone();
        let trust_domain = environment.text_or("TRUST_DOMAIN", TRUST_DOMAIN).to_owned();
        let mode = mode(environment, &trust_domain)?;
        let shared = matches!(mode, Mode::Shared { .. });
        let log_format = match environment.text("LOG_FORMAT") {
            None | Some("plain") => LogFormat::Plain,
            Some("json") => LogFormat::Json,
            Some(other) => return Err(wrong("LOG_FORMAT", other, "plain or json")),
        };
        Ok(Self {
            istiod: istiod(environment, &config, &cluster)?,
            authority: Box::new(authority(environment, &cluster, shared)?),
            network: environment.text_or("NETWORK", "").into(),
            keep_source: environment
                .text("ENABLE_ORIG_SRC")
                .map(|value| cairn_agent::environment::flag("ENABLE_ORIG_SRC", value))
                .transpose()?,
            mark: match environment.parsed("PACKET_MARK", "a mark, as 1337")? {
                None if shared => Some(MARK),
                mark => mark,
            },
            ports: AdminPorts {
                admin: SocketAddr::new(Ipv4Addr::LOCALHOST.into(), config.proxy_admin_port.unwrap_or(15000)),
                metrics: everywhere(config.status_port.unwrap_or(15020)),
                ready: everywhere(15021),
            },
            drain: drain(environment, &config)?,
            log_opened: environment.flag("CAIRN_LOG_OPENED", false)?,
            log_filter: environment.text_or("RUST_LOG", "info").to_owned(),
            dns_domain: environment.text_or("DNS_DOMAIN", "cluster.local").to_owned(),
            node: NodeSettings {
                cluster: cluster.into(),
                node: environment.text_or("NODE_NAME", "").into(),
                dns: environment.flag("DNS_PROXY", shared)?,
                socks5: environment.flag("UNSTABLE_ENABLE_SOCKS5", false)?,
                server,
                pool,
            },
            mode,
            trust_domain,
            workers,
            log_format,
        })
    }
}

/// What decides about trust or about where the configuration comes from, and is not done: no start is better than one that ignores it.
fn refuse_unsupported(environment: &Environment) -> Result<(), SettingError> {
    const REFUSED: [(&str, &str); 5] = [
        ("LOCAL_XDS_PATH", "configuration from a file"),
        ("XDS_ON_DEMAND", "discovery on demand"),
        ("CRL_PATH", "certificate revocation"),
        ("COMPLIANCE_POLICY", "a compliance policy"),
        ("TLS12_ENABLED", "TLS 1.2"),
    ];
    let set = |name: &str| environment.text(name).is_some_and(|value| value != "false" && value != "0");
    match REFUSED.iter().find(|(name, _)| set(name)) {
        None => Ok(()),
        Some((name, what)) => Err(SettingError::Refused(format!(
            "{name} is set, and {what} is not done by this proxy yet; leave it out"
        ))),
    }
}

fn everywhere(port: u16) -> SocketAddr {
    // Both families where there are both; the caller falls back to IPv4.
    SocketAddr::new(std::net::Ipv6Addr::UNSPECIFIED.into(), port)
}

fn proxy_config(environment: &Environment) -> Result<ProxyConfig, SettingError> {
    let Some(text) = environment.text("PROXY_CONFIG") else {
        return Ok(ProxyConfig::default());
    };
    serde_saphyr::from_str(text).map_err(|error| SettingError::Unreadable {
        name: "PROXY_CONFIG".to_owned(),
        form: "YAML",
        reason: error.to_string(),
    })
}

fn mode(environment: &Environment, trust_domain: &str) -> Result<Mode, SettingError> {
    match environment.text_or("PROXY_MODE", "shared") {
        "shared" => Ok(Mode::Shared {
            zds: environment.text_or("INPOD_UDS", ZDS_SOCKET).into(),
        }),
        "dedicated" => {
            let text = environment.text("PROXY_WORKLOAD_INFO").ok_or(SettingError::Missing {
                name: "PROXY_WORKLOAD_INFO",
                remedy: "with PROXY_MODE=dedicated it names the workload as NAMESPACE/NAME/SERVICEACCOUNT",
            })?;
            let parts: Vec<_> = text.split('/').collect();
            let [namespace, name, service_account] = parts[..] else {
                return Err(wrong("PROXY_WORKLOAD_INFO", text, "NAMESPACE/NAME/SERVICEACCOUNT"));
            };
            Ok(Mode::Dedicated {
                workload: PodInfo {
                    name: name.to_owned(),
                    namespace: namespace.to_owned(),
                    service_account: service_account.to_owned(),
                    trust_domain: trust_domain.to_owned(),
                },
            })
        }
        other => Err(wrong("PROXY_MODE", other, "shared or dedicated")),
    }
}

fn istiod(environment: &Environment, config: &ProxyConfig, cluster: &str) -> Result<Option<cairn_xds::Settings>, SettingError> {
    let default = config.discovery_address.as_deref().unwrap_or(ISTIOD);
    let given = environment.all().get("XDS_ADDRESS").map_or(default, String::as_str);
    if given.is_empty() {
        return Ok(None);
    }
    let (address, plaintext) = match given.split_once("://") {
        Some(("http", address)) => (address, true),
        Some(("https", address)) => (address, false),
        None => (given, false),
        Some(_) => {
            return Err(wrong(
                "XDS_ADDRESS",
                given,
                "https://HOST:PORT, or http://HOST:PORT without TLS",
            ));
        }
    };
    let refused = |error: SettingsError| SettingError::Refused(error.to_string());
    let address: Address = address.parse().map_err(refused)?;
    let tls = if plaintext {
        Tls::Plaintext
    } else {
        let name = environment
            .text_or("ALT_XDS_HOSTNAME", address.default_server_name())
            .to_owned();
        Tls::Verified(TlsFiles {
            roots: match environment.text("XDS_ROOT_CA") {
                Some(SYSTEM_ROOTS) => SYSTEM_BUNDLE.into(),
                other => other.unwrap_or(ROOT).into(),
            },
            server_name: name,
            client_certificate: None,
            allowed: Allowed::default(),
        })
    };
    let mut settings = cairn_xds::Settings::new(address, tls, node(environment, cluster)?);
    settings.token_file = Some(token(environment));
    settings.headers = vec![("clusterid".to_owned(), cluster.to_owned())];
    let more = environment.prefixed("XDS_HEADER_").filter(|(name, _)| !name.is_empty());
    settings
        .headers
        .extend(more.map(|(name, value)| (name.to_owned(), value.to_owned())));
    Ok(Some(settings))
}

fn token(environment: &Environment) -> PathBuf {
    environment.text_or("AUTH_TOKEN", TOKEN).into()
}

fn authority(environment: &Environment, cluster: &str, impersonate: bool) -> Result<CaSettings, SettingError> {
    // Replaced by each identity that is asked for.
    let nobody =
        SpiffeId::workload("cluster.local", "default", "default").map_err(|error| SettingError::Refused(error.to_string()))?;
    let given = environment
        .text("CA_ADDRESS")
        .or_else(|| environment.text("XDS_ADDRESS"))
        .unwrap_or(ISTIOD);
    let mut settings = CaSettings::new(given, nobody);
    settings.server_name = environment.text("ALT_CA_HOSTNAME").map(str::to_owned);
    settings.root_file = environment.text_or("CA_ROOT_CA", ROOT).into();
    settings.token_file = token(environment);
    settings.cluster_id = cluster.to_owned();
    settings.impersonate = impersonate;
    settings.ttl = environment.duration("SECRET_TTL", settings.ttl)?;
    let headers = environment.prefixed("CA_HEADER_").filter(|(name, _)| !name.is_empty());
    settings.headers = headers.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    Ok(settings)
}

fn drain(environment: &Environment, config: &ProxyConfig) -> Result<DrainSettings, SettingError> {
    let grace = environment
        .parsed::<u64>("TERMINATION_GRACE_PERIOD_SECONDS", "a number of seconds")?
        .map(|seconds| Duration::from_secs(seconds.saturating_sub(5).max(1)));
    let configured = config.termination_drain_duration.as_deref();
    let configured = configured
        .map(|text| cairn_agent::environment::duration("terminationDrainDuration", text))
        .transpose()?;
    let default = configured.or(grace).unwrap_or(Duration::from_secs(5));
    Ok(DrainSettings {
        termination: environment.duration("CONNECTION_TERMINATION_DEADLINE", default)?,
        minimum: Duration::ZERO,
        // The engine sets the limit: an instance that has nothing left to do need not wait.
        until_idle: true,
    })
}

/// Who the proxy is to istiod.
fn node(environment: &Environment, cluster: &str) -> Result<Node, SettingError> {
    let text = |name: &str| environment.text_or(name, "").to_owned();
    let (name, namespace) = (text("POD_NAME"), text("POD_NAMESPACE"));
    let ip: IpAddr = environment
        .parsed("INSTANCE_IP", "an IP address")?
        .unwrap_or(Ipv4Addr::UNSPECIFIED.into());
    let mut metadata: BTreeMap<String, String> = environment
        .prefixed("ISTIO_META_")
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let own = [
        ("NAME", name.clone()),
        ("NAMESPACE", namespace.clone()),
        ("INSTANCE_IPS", ip.to_string()),
        ("NODE_NAME", text("NODE_NAME")),
        ("SERVICE_ACCOUNT", text("SERVICE_ACCOUNT")),
        ("CLUSTER_ID", cluster.to_owned()),
        ("ISTIO_VERSION", ISTIO_VERSION.to_owned()),
    ];
    for (key, value) in own.into_iter().filter(|(_, value)| !value.is_empty()) {
        metadata.entry(key.to_owned()).or_insert(value);
    }
    let fields = metadata.into_iter().map(|(key, value)| {
        let kind = Some(prost_types::value::Kind::StringValue(value));
        (key, prost_types::Value { kind })
    });
    Ok(Node {
        id: format!("ztunnel~{ip}~{name}.{namespace}~{namespace}.svc.cluster.local"),
        metadata: Some(prost_types::Struct {
            fields: fields.collect(),
        }),
        ..Node::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Result<Settings, String> {
        Settings::new(&variables.iter().copied().collect(), 16).map_err(|error| error.to_string())
    }

    #[test]
    fn the_charts_environment_makes_a_node_proxy() {
        let settings = settings(&[
            ("CA_ADDRESS", "istiod.istio-system.svc:15012"),
            ("XDS_ADDRESS", "istiod.istio-system.svc:15012"),
            ("POD_NAME", "ztunnel-abcde"),
            ("POD_NAMESPACE", "istio-system"),
            ("NODE_NAME", "node-1"),
            ("INSTANCE_IP", "10.0.0.7"),
            ("SERVICE_ACCOUNT", "ztunnel"),
            ("CLUSTER_ID", "c1"),
            ("ISTIO_META_ENABLE_HBONE", "true"),
            ("TERMINATION_GRACE_PERIOD_SECONDS", "30"),
        ])
        .unwrap();
        let istiod = settings.istiod.unwrap();
        assert_eq!(
            istiod.node.id,
            "ztunnel~10.0.0.7~ztunnel-abcde.istio-system~istio-system.svc.cluster.local"
        );
        assert!(matches!(&istiod.tls, Tls::Verified(files) if files.server_name == "istiod.istio-system.svc"));
        assert!(matches!(&settings.mode, Mode::Shared { zds } if zds.ends_with("ztunnel.sock")));
        assert!(settings.authority.impersonate && settings.node.dns);
        assert_eq!(
            (settings.mark, settings.workers, settings.drain.termination.as_secs()),
            (Some(1337), 4, 25)
        );
    }

    #[test]
    fn an_empty_address_means_no_istiod_and_nonsense_is_one_sentence() {
        let dedicated = [("PROXY_MODE", "dedicated"), ("PROXY_WORKLOAD_INFO", "app/web/sa")];
        let with = |more: (&'static str, &'static str)| settings(&[dedicated[0], dedicated[1], more]);
        let settings = with(("XDS_ADDRESS", "")).unwrap();
        assert!(settings.istiod.is_none() && settings.mark.is_none() && !settings.authority.impersonate);
        assert!(matches!(&settings.mode, Mode::Dedicated { workload } if workload.service_account == "sa"));
        for (name, value, words) in [
            ("PROXY_MODE", "sidecar", "shared or dedicated"),
            ("PROXY_WORKLOAD_INFO", "app/web", "NAMESPACE/NAME/SERVICEACCOUNT"),
            ("XDS_ADDRESS", "ftp://x:1", "https://HOST:PORT"),
            ("LOG_FORMAT", "xml", "plain or json"),
            ("PROXY_CONFIG", "[", "PROXY_CONFIG"),
            ("PACKET_MARK", "x", "a mark"),
            ("CRL_PATH", "/crl.pem", "certificate revocation is not done"),
        ] {
            let error = with((name, value)).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }
}
