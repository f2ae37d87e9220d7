//! What the operator, the pod and Istio say about this proxy, read once at start.
//!
//! [`Settings::new`] is a pure function of arguments, environment and pod: `cairn proxy waypoint` takes what istiod's pod template
//! gives to the image that it replaces (contract runtime §8.1–8.5), so names, defaults and paths are pilot-agent's. Settings of
//! our own start with `CAIRN_` (docs/settings.md). A value that means nothing ends the start in one sentence; what is missing at
//! run time (a token, a root, istiod) does not: that is retried, and readiness says so.

mod identity;
mod ignored;
mod istiod;
mod pod;
mod proxy_config;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use cairn_agent::{environment, shutdown::DrainSettings};
use cairn_identity::Compliance;

pub(crate) use environment::flag;
pub use environment::{Environment, SettingError};
pub use pod::{Pod, Present};
pub use proxy_config::ProxyConfig;

use crate::{
    cli::{ISTIO_VERSION, arguments::Arguments},
    config::compiler::{ADDRESSES, WORKLOADS},
    logging::LogSettings,
    proxy::DataSettings,
    recorder::{MOST_RECORDS, MOST_SNAPSHOTS, RecorderSettings},
    serve::{DenyDetail, open::OnChange},
};

/// How long start waits for endpoints, secrets and extensions once clusters and listeners are in. Envoy waits as long for secrets
/// and extensions, and without end for endpoints, which one unlucky cluster could turn into a proxy that never serves.
const WARM_TIMEOUT: Duration = Duration::from_secs(15);

/// Everything that `cairn proxy waypoint` is told.
#[derive(Debug)]
pub struct Settings {
    /// The stream to istiod, with the node.
    pub istiod: cairn_xds::Settings,
    /// Where our certificate comes from.
    pub identity: cairn_identity::Source,
    /// Ports of metrics, readiness and administration.
    pub ports: Ports,
    /// How the proxy ends.
    pub drain: DrainSettings,
    /// Threads for connections; `None` is one a core.
    pub workers: Option<usize>,
    /// What is logged.
    pub log: LogSettings,
    /// The data path.
    pub data: DataSettings,
    /// The network that we are in.
    pub network: String,
    /// The version of Istio that we claim.
    pub istio_version: String,
    /// The type by which peers are asked for.
    pub peers: &'static str,
    /// How long start waits for endpoints, secrets and extensions.
    pub warm_timeout: Duration,
    /// What is allowed of TLS, whatever istiod says.
    pub compliance: Compliance,
    /// Whether istiod is asked for roots beside those that come with the certificate.
    pub trust_anchors: bool,
    /// Names of settings that are set and have no meaning here.
    pub ignored: Vec<String>,
}

/// Where metrics, readiness and administration are served (contract runtime §8.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// Administration, for this pod only: 15000.
    pub admin: SocketAddr,
    /// Health, metrics and the end, as pilot-agent: 15020.
    pub agent: SocketAddr,
    /// Readiness: 15021.
    pub ready: SocketAddr,
    /// Metrics: 15090.
    pub metrics: SocketAddr,
}

// === impl Settings ===

impl Settings {
    /// The settings of a proxy that was started like this.
    pub fn new(arguments: &Arguments, environment: &Environment, pod: &Pod) -> Result<Self, SettingError> {
        let config = ProxyConfig::merge(
            environment.text(proxy_config::VARIABLE),
            pod.annotations.get(proxy_config::ANNOTATION).map(String::as_str),
        )?;
        // The template has put proxyMetadata of the mesh into the environment; that of the annotation is only here.
        let environment = environment.clone().with_fallback(config.metadata());
        let istio_version = environment.text_or("CAIRN_ISTIO_VERSION", ISTIO_VERSION).to_owned();
        let asked = Asked {
            arguments,
            environment: &environment,
            config: &config,
            pod,
            compliance: environment
                .parsed("COMPLIANCE_POLICY", "fips-140-2, fips-140-3 or pqc")?
                .unwrap_or_default(),
        };
        Ok(Self {
            istiod: istiod::settings(&asked, &istio_version)?,
            identity: identity::source(&asked)?,
            ports: ports(&asked)?,
            drain: drain(&asked)?,
            workers: workers(&asked)?,
            log: arguments.log_settings()?,
            data: data(arguments, &environment, &config)?,
            network: environment.text_or("ISTIO_META_NETWORK", "").to_owned(),
            istio_version,
            peers: peers(&environment)?,
            warm_timeout: environment.duration("CAIRN_WARM_TIMEOUT", WARM_TIMEOUT)?,
            compliance: asked.compliance,
            ignored: ignored::names(&asked),
            trust_anchors: environment.flag("PROXY_CONFIG_XDS_AGENT", false)?,
        })
    }
}

/// Everything that an answer may depend on.
#[derive(Clone, Copy)]
struct Asked<'a> {
    arguments: &'a Arguments,
    environment: &'a Environment,
    config: &'a ProxyConfig,
    pod: &'a Pod,
    compliance: Compliance,
}

impl Asked<'_> {
    /// The pod's own address.
    fn instance_ip(&self) -> Result<Option<IpAddr>, SettingError> {
        self.environment.parsed("INSTANCE_IP", "the pod's IP address")
    }

    fn required(&self, name: &'static str) -> Result<&str, SettingError> {
        let remedy = "istiod's pod template sets it from the pod (downward API)";
        self.environment.text(name).ok_or(SettingError::Missing { name, remedy })
    }

    fn service_account(&self) -> Result<&str, SettingError> {
        match self.environment.text("SERVICE_ACCOUNT") {
            Some(name) => Ok(name),
            None => self
                .environment
                .text("ISTIO_META_SERVICE_ACCOUNT")
                .map_or_else(|| self.required("SERVICE_ACCOUNT"), Ok),
        }
    }

    fn discovery_address(&self) -> &str {
        self.config
            .text("discoveryAddress")
            .unwrap_or("istiod.istio-system.svc:15012")
    }

    fn plaintext(&self) -> bool {
        self.config.text("controlPlaneAuthPolicy") == Some("NONE")
    }

    fn cluster_id(&self) -> &str {
        self.environment.text_or("ISTIO_META_CLUSTER_ID", "Kubernetes")
    }
}

fn ports(asked: &Asked<'_>) -> Result<Ports, SettingError> {
    let Asked { environment, config, .. } = asked;
    let only_v6 = asked.instance_ip()?.is_some_and(|ip| ip.is_ipv6());
    let local: IpAddr = if only_v6 {
        Ipv6Addr::LOCALHOST.into()
    } else {
        Ipv4Addr::LOCALHOST.into()
    };
    let any: IpAddr = if only_v6 {
        Ipv6Addr::UNSPECIFIED.into()
    } else {
        Ipv4Addr::UNSPECIFIED.into()
    };
    let metrics = if environment.flag("METRICS_LOCALHOST_ACCESS_ONLY", false)? {
        local
    } else {
        any
    };
    Ok(Ports {
        admin: SocketAddr::new(local, config.port("proxyAdminPort", 15000)?),
        agent: SocketAddr::new(any, config.port("statusPort", 15020)?),
        ready: SocketAddr::new(any, environment.port("ENVOY_STATUS_PORT", 15021)?),
        metrics: SocketAddr::new(metrics, environment.port("ENVOY_PROMETHEUS_PORT", 15090)?),
    })
}

fn drain(asked: &Asked<'_>) -> Result<DrainSettings, SettingError> {
    let defaults = DrainSettings::default();
    Ok(DrainSettings {
        termination: asked.config.duration("terminationDrainDuration", defaults.termination)?,
        minimum: asked.environment.duration("MINIMUM_DRAIN_DURATION", defaults.minimum)?,
        until_idle: asked
            .environment
            .flag("EXIT_ON_ZERO_ACTIVE_CONNECTIONS", defaults.until_idle)?,
    })
}

/// The argument, else ProxyConfig, else the CPU limit, else all cores (contract xds §1.12); 0 is all cores everywhere.
fn workers(asked: &Asked<'_>) -> Result<Option<usize>, SettingError> {
    const ACCEPTED: &str = "a number of threads, 0 for one a core,";
    let argument = asked.arguments.concurrency()?;
    let count = match argument {
        Some(count) => Some(count),
        None => match asked.config.number("concurrency", ACCEPTED)? {
            Some(count) => Some(count),
            None => asked
                .environment
                .parsed::<f64>("ISTIO_CPU_LIMIT", "a number of cores")?
                .map(|cores| cores.ceil().max(0.0) as u64),
        },
    };
    Ok(count
        .filter(|count| *count > 0)
        .map(|count| usize::try_from(count).unwrap_or(usize::MAX).min(MAX_WORKERS)))
}

/// More threads than this serve nobody.
const MAX_WORKERS: usize = 1024;

fn data(arguments: &Arguments, environment: &Environment, config: &ProxyConfig) -> Result<DataSettings, SettingError> {
    let defaults = DataSettings::default();
    Ok(DataSettings {
        listen: environment.parsed("CAIRN_LISTEN", "ADDRESS:PORT")?,
        detect_timeout: environment.duration("CAIRN_DETECT_TIMEOUT", defaults.detect_timeout)?,
        open_connections: match environment.text_or("CAIRN_OPEN_CONNECTIONS", "recheck") {
            "recheck" => OnChange::Recheck,
            "continue" => OnChange::Continue,
            "close" => OnChange::Close,
            other => {
                return Err(environment::wrong(
                    "CAIRN_OPEN_CONNECTIONS",
                    other,
                    "recheck, continue or close",
                ));
            }
        },
        service_drain: config.duration("drainDuration", defaults.service_drain)?,
        peak_ewma: environment.flag("CAIRN_PEAK_EWMA", defaults.peak_ewma)?,
        outlier_log: arguments
            .value("outlierLogPath")
            .filter(|path| !path.is_empty())
            .map(Into::into),
        recorder: recorder(environment)?,
        deny_detail: DenyDetail::parse(environment.text_or("CAIRN_DENY_DETAIL_NAMESPACES", "")),
        ..defaults
    })
}

/// How many of the last exchanges are kept, and of the configurations that they saw.
fn recorder(environment: &Environment) -> Result<RecorderSettings, SettingError> {
    let number = |name, default, least, most, accepted| match environment.text(name) {
        None => Ok(default),
        Some(value) => value
            .parse()
            .ok()
            .filter(|number| (least..=most).contains(number))
            .ok_or_else(|| environment::wrong(name, value, accepted)),
    };
    let defaults = RecorderSettings::default();
    let records = number(
        "CAIRN_EXCHANGES",
        defaults.records,
        0,
        MOST_RECORDS,
        "a number from 0 to 100000",
    )?;
    let snapshots = number(
        "CAIRN_EXCHANGES_SNAPSHOTS",
        defaults.snapshots,
        1,
        MOST_SNAPSHOTS,
        "a number from 1 to 64",
    )?;
    Ok(RecorderSettings { records, snapshots })
}

fn peers(environment: &Environment) -> Result<&'static str, SettingError> {
    match environment.text_or("CAIRN_WORKLOAD_TYPE", "address") {
        "address" => Ok(ADDRESSES),
        "workload" => Ok(WORKLOADS),
        other => Err(environment::wrong("CAIRN_WORKLOAD_TYPE", other, "address or workload")),
    }
}

#[cfg(test)]
mod tests;
