//! Asks a certificate authority for a certificate: istiod's `istio.v1.auth.IstioCertificateService`.
//!
//! Each certificate has a key of its own (ECDSA P-256), which leaves this process only as a file that the operator asked for. Each request makes a new connection:
//! certificates are asked for twice a day, and so the roots that the authority is believed by, and the token that we are
//! believed by, are always the ones that lie in their files now (contract runtime §8.3, contract xds §1.2).
//!
//! The answer is checked before it is believed: leaf first, root last, our key, the identity that was asked for.

mod answer;
mod connect;
mod output;
mod request;
mod turns;

use std::{path::PathBuf, time::Duration};

pub use answer::AnswerError;
use cairn_exchange::SpiffeId;
pub(crate) use connect::system_bundle;
pub use connect::{ConnectError, SYSTEM_ROOTS};
pub(crate) use request::issue;
pub use request::{IssueError, TokenError};
pub use turns::{Turn, Turns, Urgency};

use crate::Compliance;

/// Where and how to ask.
#[derive(Clone, Debug)]
pub struct CaSettings {
    /// `host:port`, or `http://host:port` for a plaintext connection (`CA_ADDR`).
    pub address: String,
    /// The name that the authority's certificate must have; `None`: the host of `address`, or `istiod.istio-system.svc` when
    /// that is `localhost`.
    pub server_name: Option<String>,
    /// Whether the connection is not encrypted, as with `controlPlaneAuthPolicy: NONE`.
    pub plaintext: bool,
    /// PEM file of the roots that the authority's own certificate is believed by; [`SYSTEM_ROOTS`] means those of the
    /// operating system. They are not the mesh's trust bundle: that comes with the answer.
    pub root_file: PathBuf,
    /// The file with the bearer token.
    pub token_file: PathBuf,
    /// Sent as `ClusterID`.
    pub cluster_id: String,
    /// More headers (`CA_HEADER_<NAME>`).
    pub headers: Vec<(String, String)>,
    /// Sent as `CertSigner` (`ISTIO_META_CERT_SIGNER`).
    pub cert_signer: Option<String>,
    /// What is allowed of TLS with the authority.
    pub compliance: Compliance,
    /// A folder to put each new certificate into as files, for others to read (`OUTPUT_CERTS`).
    pub output: Option<PathBuf>,
    /// How long the certificate should live (`SECRET_TTL`).
    pub ttl: Duration,
    /// Part of its life that a certificate has left when it is renewed (`SECRET_GRACE_PERIOD_RATIO`).
    pub renew_ratio: f64,
    /// By how much that part varies (`SECRET_GRACE_PERIOD_RATIO_JITTER`).
    pub renew_jitter: f64,
    /// The identity to ask for.
    pub id: SpiffeId,
    /// Whether the token is somebody else's, who may ask for this identity: a node's proxy asks for those of its pods.
    pub impersonate: bool,
    /// The turns that many identities take at asking; `None` asks at once.
    pub turns: Option<Turn>,
}

// === impl CaSettings ===

impl CaSettings {
    /// Settings as in a waypoint pod, for the identity `id` at the authority `address`.
    pub fn new(address: impl Into<String>, id: SpiffeId) -> Self {
        Self {
            address: address.into(),
            server_name: None,
            plaintext: false,
            root_file: "./var/run/secrets/istio/root-cert.pem".into(),
            token_file: "./var/run/secrets/tokens/istio-token".into(),
            cluster_id: "Kubernetes".to_owned(),
            compliance: Compliance::default(),
            output: None,
            headers: Vec::new(),
            cert_signer: None,
            ttl: Duration::from_secs(24 * 3600),
            renew_ratio: 0.5,
            renew_jitter: 0.01,
            id,
            impersonate: false,
            turns: None,
        }
    }
}

#[cfg(test)]
mod tests;
