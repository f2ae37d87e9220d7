//! The handshake with an application.

use std::{collections::HashMap, io, net::IpAddr, sync::Arc, time::Duration};

use parking_lot::Mutex;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, Error, InvalidMessage,
    client::Resumption,
    pki_types::{CertificateRevocationListDer, ServerName},
    sign::{CertifiedKey, SingleCertAndKey},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use webpki::OwnedCertRevocationList;

use super::{
    OriginationTerms,
    secrets::{Material, Roots, Secrets},
    verify::Verifier,
};
use crate::{
    Identity,
    config::{self, ConfigError},
};

/// The secrets that are the workload's own.
const OWN_CERTIFICATE: &str = "default";
const OWN_ROOTS: &str = "ROOTCA";
/// How long an application whose certificate is not believed may take to read that.
const FAREWELL: Duration = Duration::from_secs(1);
/// Configurations kept; one more forgets all of them, which costs each its next handshake a little.
const MAX_CONFIGS: usize = 4096;

/// A stream to an application.
pub type OriginatedStream<S> = TlsStream<S>;

/// Opens TLS to applications.
pub struct Originator {
    identity: Identity,
    secrets: Secrets,
    configs: Mutex<HashMap<Demand, Built>>,
}

/// Whom a connection is for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct PeerName {
    /// Sent instead of the terms' own server name.
    pub server_name: Option<Arc<str>>,
    /// Has to be in the certificate.
    pub verify: Option<Arc<str>>,
}

/// What a configuration is made for.
#[derive(PartialEq, Eq, Hash)]
struct Demand {
    terms: Arc<OriginationTerms>,
    alpn: Vec<Vec<u8>>,
    verify: Option<Arc<str>>,
}

/// A configuration and what it was made of.
struct Built {
    of: Materials,
    config: Arc<ClientConfig>,
}

/// Secrets of one configuration.
#[derive(Clone)]
struct Materials {
    certificate: Option<Arc<CertifiedKey>>,
    roots: Option<Arc<Roots>>,
    revoked: Option<Arc<[CertificateRevocationListDer<'static>]>>,
}

/// Why there is no TLS to an application. Its words are those that Envoy has for `upstream_transport_failure_reason`.
#[derive(Debug, thiserror::Error)]
pub enum OriginationError {
    /// A secret has not come, or cannot be used.
    #[error("TLS_error:_Secret_is_not_supplied_by_SDS")]
    Secret(Arc<str>),
    /// A secret is of another kind than what it is named for.
    #[error("TLS_error:_Secret_{0}_is_of_another_kind")]
    Kind(Arc<str>),
    /// Not a name that can be sent.
    #[error("TLS_error:_{0:?}_cannot_be_sent_as_a_server_name")]
    ServerName(Arc<str>),
    /// The terms cannot be met.
    #[error("TLS_error:_{0}")]
    Terms(#[from] ConfigError),
    /// Refused by one side.
    #[error("TLS_error:|{}:TLS_error_end", in_envoys_words(.0))]
    Handshake(Error),
    /// The connection ended.
    #[error("{0}")]
    Io(io::Error),
}

// === impl Originator ===

impl Originator {
    /// One that shows and believes what `secrets` has.
    pub fn new(identity: Identity, secrets: Secrets) -> Self {
        Self {
            identity,
            secrets,
            configs: Mutex::default(),
        }
    }

    /// The secrets.
    pub fn secrets(&self) -> &Secrets {
        &self.secrets
    }

    /// Makes the handshake on `io`. `speak` is offered as application protocol where the terms leave it open; `address` is where `io`
    /// leads. There is no deadline here: the caller's connect timeout covers it.
    pub async fn connect<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
        &self,
        io: S,
        terms: &Arc<OriginationTerms>,
        peer: &PeerName,
        speak: Option<&[u8]>,
        address: Option<IpAddr>,
    ) -> Result<OriginatedStream<S>, OriginationError> {
        let name = match peer.server_name.as_ref().or(terms.server_name.as_ref()) {
            Some(name) => ServerName::try_from(name.to_string()).map_err(|_| OriginationError::ServerName(name.clone()))?,
            // rustls sends no address as a server name, and wants some name to remember sessions by.
            None => address.map_or_else(config::server_name, |address| ServerName::IpAddress(address.into())),
        };
        let config = loop {
            match self.config(terms, peer, speak) {
                Err(OriginationError::Secret(name)) if self.secrets.expect(&name).await => {}
                config => break config?,
            }
        };
        let shaken = TlsConnector::from(config).connect(name, io).into_fallible().await;
        shaken.map_err(
            |(error, io)| match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
                Some(tls) => {
                    let tls = tls.clone();
                    tokio::spawn(timeout(FAREWELL, farewell(io)));
                    OriginationError::Handshake(tls)
                }
                None => OriginationError::Io(error),
            },
        )
    }

    fn config(
        &self,
        terms: &Arc<OriginationTerms>,
        peer: &PeerName,
        speak: Option<&[u8]>,
    ) -> Result<Arc<ClientConfig>, OriginationError> {
        let materials = self.materials(terms)?;
        let demand = Demand {
            terms: terms.clone(),
            alpn: match terms.alpn.as_slice() {
                [] => speak.map(<[u8]>::to_vec).into_iter().collect(),
                named => named.to_vec(),
            },
            verify: peer.verify.clone(),
        };
        if let Some(built) = self.configs.lock().get(&demand)
            && built.of.same(&materials)
        {
            return Ok(built.config.clone());
        }
        let config = Arc::new(build(&demand, &materials)?);
        let mut configs = self.configs.lock();
        if configs.len() >= MAX_CONFIGS {
            configs.clear();
        }
        configs.insert(
            demand,
            Built {
                of: materials,
                config: config.clone(),
            },
        );
        Ok(config)
    }

    fn materials(&self, terms: &OriginationTerms) -> Result<Materials, OriginationError> {
        let missing = |name: &Arc<str>| OriginationError::Secret(name.clone());
        let own = |name: &Arc<str>| {
            self.identity
                .unavailable()
                .is_none()
                .then(|| self.identity.current())
                .flatten()
                .ok_or_else(|| missing(name))
        };
        let certificate = match &terms.certificate {
            None => None,
            Some(name) if &**name == OWN_CERTIFICATE => Some(own(name)?.certified()),
            Some(name) => match self.secrets.get(name) {
                Some(Material::Certificate(certificate)) => Some(certificate),
                Some(_) => return Err(OriginationError::Kind(name.clone())),
                None => return Err(missing(name)),
            },
        };
        let roots = match &terms.roots {
            None => None,
            Some(name) if &**name == OWN_ROOTS => {
                let own = own(name)?;
                Some(Arc::new(Roots {
                    store: own.anchors(&[]).map_err(ConfigError::ExtraRoots)?,
                    certificates: own.roots().to_vec(),
                    revoked: self.identity.revocation_lists(),
                }))
            }
            Some(name) => match self.secrets.get(name) {
                Some(Material::Roots(roots)) => Some(roots),
                Some(_) => return Err(OriginationError::Kind(name.clone())),
                None => return Err(missing(name)),
            },
        };
        let revoked = match &terms.revocation {
            None => None,
            Some(name) => match self.secrets.get(name) {
                Some(Material::Revoked(lists)) => Some(lists),
                Some(_) => return Err(OriginationError::Kind(name.clone())),
                None => return Err(missing(name)),
            },
        };
        Ok(Materials {
            certificate,
            roots,
            revoked,
        })
    }
}

impl std::fmt::Debug for Originator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Originator").finish_non_exhaustive()
    }
}

/// Lets the other side read our alert, which tells it why, before the connection goes.
async fn farewell(mut io: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    io.shutdown().await?;
    let mut rest = [0; 512];
    while io.read(&mut rest).await? > 0 {}
    Ok(())
}

// === impl Materials ===

impl Materials {
    fn same(&self, other: &Self) -> bool {
        fn same<T: ?Sized>(one: Option<&Arc<T>>, other: Option<&Arc<T>>) -> bool {
            match (one, other) {
                (Some(one), Some(other)) => Arc::ptr_eq(one, other),
                (None, None) => true,
                _ => false,
            }
        }
        // Our own roots are wrapped anew at each look; what is inside tells.
        let same_roots = match (&self.roots, &other.roots) {
            (Some(one), Some(other)) => Arc::ptr_eq(&one.store, &other.store) && Arc::ptr_eq(&one.revoked, &other.revoked),
            (None, None) => true,
            _ => false,
        };
        same_roots
            && same(self.certificate.as_ref(), other.certificate.as_ref())
            && same(self.revoked.as_ref(), other.revoked.as_ref())
    }
}

fn build(demand: &Demand, materials: &Materials) -> Result<ClientConfig, ConfigError> {
    let Demand { terms, alpn, verify } = demand;
    let provider = Arc::new(config::provider(&terms.cipher_suites, &terms.curves)?);
    let lists = materials
        .roots
        .iter()
        .flat_map(|roots| roots.revoked.iter())
        .chain(materials.revoked.iter().flat_map(|lists| lists.iter()));
    let revoked = lists
        .map(|list| OwnedCertRevocationList::from_der(list).map(Into::into))
        .collect::<Result<_, _>>()
        .map_err(ConfigError::Revocation)?;
    let verifier = Verifier {
        roots: materials.roots.clone(),
        revoked,
        leaf_only: terms.revocation_of_leaf_only,
        names: terms.names.clone(),
        host: verify.clone(),
        algorithms: provider.signature_verification_algorithms,
    };
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&config::versions(terms.min_version, terms.max_version)?)
        .map_err(|source| config::nothing(&terms.cipher_suites, &terms.curves, source))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match &materials.certificate {
        None => builder.with_no_client_auth(),
        Some(certificate) => builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(certificate.clone()))),
    };
    config.alpn_protocols.clone_from(alpn);
    // Nobody is asked for a certificate again when a session is resumed; connections are kept and shared, so that little is won by it.
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// As BoringSSL and Envoy word it: `CODE:SSL routines:OPENSSL_internal:REASON:details`, with underscores as in a log.
fn in_envoys_words(error: &Error) -> String {
    let (code, reason, details) = match error {
        Error::InvalidCertificate(reason) => (268_435_581, "CERTIFICATE_VERIFY_FAILED", Some(certificate(reason))),
        Error::InvalidMessage(InvalidMessage::InvalidContentType | InvalidMessage::UnknownProtocolVersion) => {
            (268_435_703, "WRONG_VERSION_NUMBER", None)
        }
        Error::AlertReceived(alert) => match alert {
            AlertDescription::HandshakeFailure => (268_436_496, "SSLV3_ALERT_HANDSHAKE_FAILURE", None),
            AlertDescription::BadCertificate => (268_436_498, "SSLV3_ALERT_BAD_CERTIFICATE", None),
            AlertDescription::CertificateUnknown => (268_436_502, "SSLV3_ALERT_CERTIFICATE_UNKNOWN", None),
            AlertDescription::CertificateExpired => (268_436_501, "SSLV3_ALERT_CERTIFICATE_EXPIRED", None),
            AlertDescription::UnknownCA => (268_436_504, "TLSV1_ALERT_UNKNOWN_CA", None),
            AlertDescription::ProtocolVersion => (268_436_526, "TLSV1_ALERT_PROTOCOL_VERSION", None),
            AlertDescription::UnrecognisedName => (268_436_568, "TLSV1_UNRECOGNIZED_NAME", None),
            AlertDescription::CertificateRequired => (268_436_572, "TLSV1_CERTIFICATE_REQUIRED", None),
            AlertDescription::NoApplicationProtocol => (268_436_576, "TLSV1_ALERT_NO_APPLICATION_PROTOCOL", None),
            other => return format!("{}", Error::AlertReceived(*other)).replace(' ', "_"),
        },
        other => return other.to_string().replace(' ', "_"),
    };
    let details = details.map(|details| format!(":{details}")).unwrap_or_default();
    format!("{code}:SSL routines:OPENSSL_internal:{reason}{details}").replace(' ', "_")
}

fn certificate(reason: &CertificateError) -> String {
    let chain = |text: &str| format!("verify cert failed: X509_verify_cert: certificate verification error at depth 0: {text}");
    match reason {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => chain("certificate has expired"),
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => chain("certificate is not yet valid"),
        CertificateError::UnknownIssuer => chain("unable to get local issuer certificate"),
        CertificateError::BadSignature => chain("certificate signature failure"),
        CertificateError::Revoked => chain("certificate revoked"),
        CertificateError::UnknownRevocationStatus => chain("unable to get certificate CRL"),
        CertificateError::ExpiredRevocationList | CertificateError::ExpiredRevocationListContext { .. } => {
            chain("CRL has expired")
        }
        CertificateError::InvalidPurpose => chain("unsupported certificate purpose"),
        CertificateError::Other(other) => other.0.to_string(),
        other => other.to_string(),
    }
}
