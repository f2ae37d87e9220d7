//! Where istiod is, how it is trusted, and how long it may take.
//!
//! Nothing here is read from the environment: the command line's module does that once and fills these in. Files are named, not
//! loaded: roots, client certificate and token are read again for each connection or stream, since the kubelet replaces them
//! while the proxy runs (contract xds §1.2).

use std::{fmt, path::PathBuf, str::FromStr, sync::Arc, time::Duration};

use cairn_proto::envoy::config::core::v3::Node;
use rustls::{
    SupportedProtocolVersion,
    crypto::{CryptoProvider, aws_lc_rs},
    version::{TLS12, TLS13},
};

use crate::{Backoff, SettingsError};

/// Everything that the client must be told.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where istiod listens.
    pub address: Address,
    /// How the connection is protected.
    pub tls: Tls,
    /// The bearer token, read for each stream. Never sent over a plaintext connection.
    pub token_file: Option<PathBuf>,
    /// More metadata of the call: `ClusterID`, and what `XDS_HEADER_*` asks for.
    pub headers: Vec<(String, String)>,
    /// Who the proxy is; see [`NodeBuilder`](crate::NodeBuilder).
    pub node: Node,
    /// For name resolution, TCP and TLS together.
    pub connect_timeout: Duration,
    /// After this long without a byte from istiod, it is asked for a sign of life.
    pub keepalive_interval: Duration,
    /// How long that sign may take before the connection is given up.
    pub keepalive_timeout: Duration,
    /// How long the first answer of a stream may take. Long, because a loaded istiod queues pushes and a new attempt would
    /// only add to its load; a dead one is found by the keepalive.
    pub first_answer_timeout: Duration,
    /// The largest answer that is read, in bytes.
    pub max_message: usize,
    /// The waits between attempts.
    pub backoff: Backoff,
}

/// Host and port of istiod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    host: String,
    port: u16,
}

/// How the connection to istiod is protected.
#[derive(Clone, Debug)]
pub enum Tls {
    /// Not at all (`controlPlaneAuthPolicy: NONE`).
    Plaintext,
    /// TLS 1.2 or newer; istiod must prove its name by a certificate under the roots.
    Verified(TlsFiles),
}

/// Where the material for TLS lies; read for each connection.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// PEM file of the certificates that istiod's may be issued by.
    pub roots: PathBuf,
    /// The name that istiod's certificate must carry; see [`Address::default_server_name`].
    pub server_name: String,
    /// A certificate of our own to show beside the token. One that has expired is left out.
    pub client_certificate: Option<ClientCertificate>,
    /// What is allowed of TLS.
    pub allowed: Allowed,
}

/// Cipher suites, key exchange groups and versions that may be used.
#[derive(Clone, Debug)]
pub struct Allowed {
    /// Suites and groups.
    pub provider: Arc<CryptoProvider>,
    /// Versions.
    pub versions: Vec<&'static SupportedProtocolVersion>,
}

/// PEM files of a certificate and its key.
#[derive(Clone, Debug)]
pub struct ClientCertificate {
    /// Leaf first.
    pub chain: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

// === impl Allowed ===

/// Everything that we can do.
impl Default for Allowed {
    fn default() -> Self {
        Self {
            provider: Arc::new(aws_lc_rs::default_provider()),
            versions: vec![&TLS13, &TLS12],
        }
    }
}

// === impl Settings ===

impl Settings {
    /// The defaults of pilot-agent and Envoy for everything that has one (contract xds §1.2, §1.3).
    pub fn new(address: Address, tls: Tls, node: Node) -> Self {
        Self {
            address,
            tls,
            token_file: None,
            headers: Vec::new(),
            node,
            connect_timeout: Duration::from_secs(5),
            keepalive_interval: Duration::from_secs(30),
            keepalive_timeout: Duration::from_secs(10),
            first_answer_timeout: Duration::from_secs(300),
            max_message: 200 * 1024 * 1024,
            backoff: Backoff::default(),
        }
    }
}

// === impl Address ===

impl Address {
    /// The host as a name or an IP address, without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The name to expect in istiod's certificate unless a setting says otherwise: the host, or istiod's usual name when it is
    /// reached through a local port (contract xds §1.2).
    pub fn default_server_name(&self) -> &str {
        if self.host == "localhost" {
            "istiod.istio-system.svc"
        } else {
            &self.host
        }
    }
}

impl FromStr for Address {
    type Err = SettingsError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || SettingsError::Address { text: text.to_owned() };
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(wrong)?;
        let host = match host.strip_prefix('[') {
            Some(rest) => rest
                .strip_suffix(']')
                .filter(|host| host.parse::<std::net::Ipv6Addr>().is_ok())
                .ok_or_else(wrong)?,
            None => host,
        };
        let is_v6 = host.parse::<std::net::Ipv6Addr>().is_ok();
        let is_name = !host.is_empty()
            && host
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
        if is_v6 || is_name {
            Ok(Self {
                host: host.to_owned(),
                port,
            })
        } else {
            Err(wrong())
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_host_and_a_port() {
        let cases = [
            (
                "istiod.istio-system.svc:15012",
                Some(("istiod.istio-system.svc", "istiod.istio-system.svc")),
            ),
            ("localhost:15012", Some(("localhost", "istiod.istio-system.svc"))),
            ("127.0.0.1:15010", Some(("127.0.0.1", "127.0.0.1"))),
            ("[::1]:15010", Some(("::1", "::1"))),
            ("istiod", None),
            (":15012", None),
            ("istiod:", None),
            ("istiod:0", None),
            ("istiod:70000", None),
            ("https://istiod:15012", None),
            ("[::1:15010", None),
            ("[name]:15010", None),
        ];
        for (text, want) in cases {
            let got = text.parse::<Address>().ok();
            assert_eq!(got.as_ref().map(|a| (a.host(), a.default_server_name())), want, "{text}");
            if let Some(address) = got {
                assert_eq!(address.to_string(), text);
            }
        }
    }
}
