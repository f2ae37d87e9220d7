//! A connection to the authority: TCP, then TLS with the roots that lie in the file now.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig,
    pki_types::{InvalidDnsNameError, ServerName},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use super::CaSettings;
use crate::{
    Compliance,
    credentials::{self, CredentialsError},
    read::{self, ReadError},
};

/// As [`CaSettings::root_file`]: the roots of the operating system (`CA_ROOT_CA=SYSTEM`).
pub const SYSTEM_ROOTS: &str = "SYSTEM";

/// One attempt to connect, TLS included (contract xds §1.2).
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The authority's name when its address is a local one.
const ISTIOD: &str = "istiod.istio-system.svc";
const ROOT_REMEDY: &str =
    "it should hold the roots of istiod's own certificate (ConfigMap istio-ca-root-cert in the pod's namespace)";
/// Where distributions keep their roots.
const SYSTEM_BUNDLES: [&str; 5] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// Why there is no connection to the authority.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The address is none.
    #[error("the CA address {0:?} is not host:port; set CA_ADDR, for example istiod.istio-system.svc:15012")]
    Address(String),
    /// The server name is none.
    #[error("the CA's server name {0:?} is no host name: {1}")]
    ServerName(String, InvalidDnsNameError),
    /// The roots could not be read.
    #[error("the CA's root certificates: {0}")]
    Roots(#[from] ReadError),
    /// The roots are no roots.
    #[error("the CA's root certificates in {}: {source}", path.display())]
    BadRoots {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: CredentialsError,
    },
    /// No TLS configuration could be made.
    #[error("TLS for the connection to the CA: {0}")]
    Tls(#[from] rustls::Error),
    /// Nobody there, or not who we look for.
    #[error("connecting to the CA at {address}: {source}")]
    Connect {
        /// Where.
        address: String,
        /// What happened.
        source: io::Error,
    },
    /// Too slow.
    #[error("connecting to the CA at {0} took longer than {CONNECT_TIMEOUT:?}")]
    Timeout(String),
    /// Connected, but it does not speak HTTP/2.
    #[error("the CA at {address} does not speak HTTP/2: {source}")]
    Http {
        /// Where.
        address: String,
        /// What happened.
        source: tonic::transport::Error,
    },
}

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// Connects; what comes back sends one request after another on one connection.
pub(super) async fn connect(settings: &CaSettings) -> Result<Channel, ConnectError> {
    let target = Target::of(settings)?;
    let address = || target.address.clone();
    timeout(CONNECT_TIMEOUT, async {
        let io = open(settings, &target).await?;
        let mut io = Some(TokioIo::new(io));
        // The connection is made already; tonic asks for it once, and would ask again only to reconnect.
        let connector = service_fn(move |_: Uri| {
            let io = io
                .take()
                .ok_or_else(|| io::Error::new(io::ErrorKind::NotConnected, "the connection to the CA has ended"));
            async move { io }
        });
        let endpoint = Endpoint::from(target.uri.clone());
        endpoint
            .connect_with_connector(connector)
            .await
            .map_err(|source| ConnectError::Http {
                address: address(),
                source,
            })
    })
    .await
    .unwrap_or_else(|_| Err(ConnectError::Timeout(address())))
}

async fn open(settings: &CaSettings, target: &Target) -> Result<Box<dyn Io>, ConnectError> {
    let failed = |source| ConnectError::Connect {
        address: target.address.clone(),
        source,
    };
    // Before the connection: a missing file is the cause that the user can mend, whether or not somebody listens.
    let tls = match &target.server_name {
        Some(name) => Some((name.clone(), tls_config(&settings.root_file, settings.compliance).await?)),
        None => None,
    };
    let tcp = TcpStream::connect(&target.address).await.map_err(failed)?;
    tcp.set_nodelay(true).map_err(failed)?;
    Ok(match tls {
        Some((name, config)) => Box::new(
            TlsConnector::from(Arc::new(config))
                .connect(name, tcp)
                .await
                .map_err(failed)?,
        ),
        None => Box::new(tcp),
    })
}

/// TLS 1.2 or later, with an ordinary check of the server's name.
async fn tls_config(root_file: &Path, compliance: Compliance) -> Result<ClientConfig, ConnectError> {
    let (path, pem) = roots(root_file).await?;
    let roots = credentials::certificates(credentials::ROOTS, &pem)
        .and_then(|roots| credentials::trust_anchors(&roots))
        .map_err(|source| ConnectError::BadRoots { path, source })?;
    let mut config = ClientConfig::builder_with_provider(compliance.provider())
        .with_protocol_versions(&compliance.versions())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

async fn roots(root_file: &Path) -> Result<(PathBuf, Vec<u8>), ConnectError> {
    if root_file != Path::new(SYSTEM_ROOTS) {
        return Ok((root_file.to_path_buf(), read::file(root_file, ROOT_REMEDY).await?));
    }
    let remedy = "CA_ROOT_CA=SYSTEM needs the operating system's root certificates: install the package ca-certificates";
    Ok(system_bundle(remedy).await?)
}

/// The operating system's root certificates, and where they were.
pub(crate) async fn system_bundle(remedy: &'static str) -> Result<(PathBuf, Vec<u8>), ReadError> {
    for path in SYSTEM_BUNDLES {
        if let Ok(pem) = read::file(Path::new(path), "").await {
            return Ok((path.into(), pem));
        }
    }
    Err(ReadError::Missing {
        path: SYSTEM_BUNDLES[0].into(),
        remedy,
    })
}

/// Where to connect and whom to expect.
struct Target {
    address: String,
    /// None for plaintext.
    server_name: Option<ServerName<'static>>,
    uri: Uri,
}

// === impl Target ===

impl Target {
    fn of(settings: &CaSettings) -> Result<Self, ConnectError> {
        let bad = || ConnectError::Address(settings.address.clone());
        let (address, plaintext) = match settings.address.split_once("://") {
            Some(("http", address)) => (address, true),
            Some(("https", address)) => (address, settings.plaintext),
            Some(_) => return Err(bad()),
            None => (settings.address.as_str(), settings.plaintext),
        };
        let scheme = if plaintext { "http" } else { "https" };
        let uri: Uri = format!("{scheme}://{address}").parse().map_err(|_| bad())?;
        let (Some(host), Some(_)) = (uri.host(), uri.port_u16()) else {
            return Err(bad());
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() {
            return Err(bad());
        }
        let name = match &settings.server_name {
            Some(name) => name.as_str(),
            None if host == "localhost" => ISTIOD,
            None => host,
        };
        let server_name = match plaintext {
            true => None,
            false => Some(
                ServerName::try_from(name)
                    .map_err(|error| ConnectError::ServerName(name.to_owned(), error))?
                    .to_owned(),
            ),
        };
        Ok(Self {
            address: address.to_owned(),
            server_name,
            uri,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(address: &str) -> Result<(String, Option<String>), ConnectError> {
        let settings = CaSettings::new(address, "spiffe://td/ns/a/sa/b".parse().unwrap());
        let target = Target::of(&settings)?;
        Ok((target.address, target.server_name.map(|name| name.to_str().into_owned())))
    }

    #[test]
    fn the_server_name_is_the_host_of_the_address() {
        for (address, dialled, name) in [
            (
                "istiod.istio-system.svc:15012",
                "istiod.istio-system.svc:15012",
                Some("istiod.istio-system.svc"),
            ),
            (
                "https://istiod-1-31.istio-system.svc:15012",
                "istiod-1-31.istio-system.svc:15012",
                Some("istiod-1-31.istio-system.svc"),
            ),
            ("localhost:15012", "localhost:15012", Some(ISTIOD)),
            ("127.0.0.1:15012", "127.0.0.1:15012", Some("127.0.0.1")),
            ("[::1]:15012", "[::1]:15012", Some("::1")),
            ("http://istiod:15010", "istiod:15010", None),
        ] {
            assert_eq!(
                target(address).unwrap(),
                (dialled.to_owned(), name.map(str::to_owned)),
                "{address}"
            );
        }
    }

    #[test]
    fn an_address_without_port_is_refused_with_an_example() {
        for address in ["", "istiod", "ftp://istiod:1", "istiod:port", ":15012"] {
            let error = target(address).unwrap_err().to_string();
            assert!(error.contains("CA_ADDR") && error.contains(address), "{error}");
        }
    }
}
