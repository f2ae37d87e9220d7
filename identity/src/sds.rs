//! Credentials from a Unix socket that serves secrets, as SPIRE's agent does at `./var/run/secrets/workload-spiffe-uds/socket`.
//!
//! Secret `default` is the certificate and its key, `ROOTCA` the trust bundle (contract xds §1.11). Each has a stream
//! of its own, since some servers answer only one name a stream. Every answer is acknowledged or refused with the reason;
//! a lost connection keeps the credentials and connects again with growing waits.

use std::{
    convert::Infallible,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use cairn_proto::{
    envoy::{
        config::core::v3::{DataSource, Node, data_source::Specifier},
        extensions::transport_sockets::tls::v3::{CertificateValidationContext, Secret, TlsCertificate, secret::Type},
        service::{
            discovery::v3::{DiscoveryRequest, DiscoveryResponse},
            secret::v3::secret_discovery_service_client::SecretDiscoveryServiceClient,
        },
    },
    google::rpc,
};
use hyper_util::rt::TokioIo;
use prost::Message as _;
use tokio::{net::UnixStream, sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Streaming,
    transport::{Channel, Endpoint, Uri},
};
use tower::service_fn;

use crate::{
    backoff::Backoff,
    credentials::{Credentials, CredentialsError, Pem},
    identity::{RevocationState, Shared},
    read::{self, ReadError},
    revocation::{self, RevocationError},
};

const CERTIFICATE: &str = "default";
const BUNDLE: &str = "ROOTCA";
const SECRET_TYPE: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";

/// To connect to the socket.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// From the connection to both secrets; attestation may take a while.
const FIRST_ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// A silent connection is asked whether it lives, and closed when no answer comes.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Requests that wait to be sent on one stream; one is enough, as each answers one response.
const REQUEST_QUEUE: usize = 4;

/// Why the socket gives no credentials.
#[derive(Debug, thiserror::Error)]
pub enum SdsError {
    /// Nobody serves it.
    #[error("connecting to the secret socket {}: {cause}; is the SPIFFE agent running, and its socket mounted?", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What happened.
        cause: String,
    },
    /// The stream ended.
    #[error("the stream of secret {name:?} from {} ended with {code:?}: {message}", path.display())]
    Ended {
        /// The socket.
        path: PathBuf,
        /// The secret's name.
        name: &'static str,
        /// gRPC's code.
        code: Code,
        /// The server's words.
        message: String,
    },
    /// The secrets did not come in time.
    #[error("{} did not serve secrets \"default\" and \"ROOTCA\" within {FIRST_ANSWER_TIMEOUT:?}; is this workload registered?", .0.display())]
    Timeout(PathBuf),
    /// Not a secret.
    #[error("secret {0:?} cannot be decoded: {1}")]
    Decode(&'static str, prost::DecodeError),
    /// A secret without what it is for.
    #[error("secret {name:?} holds no {wanted}")]
    Lacks {
        /// The secret's name.
        name: &'static str,
        /// What should be in it.
        wanted: &'static str,
    },
    /// A secret refers to a file.
    #[error("secret {0:?}: {1}")]
    File(&'static str, ReadError),
    /// The secrets do not fit together.
    #[error("the secrets \"default\" and \"ROOTCA\": {0}")]
    Credentials(#[from] CredentialsError),
    /// The revocation list is broken.
    #[error("the revocation list of secret \"ROOTCA\": {0}")]
    Revocation(#[from] RevocationError),
}

/// Connects, and connects again, for ever.
pub(crate) async fn watch(shared: Arc<Shared>, path: PathBuf) {
    let mut backoff = Backoff::new();
    let mut received = Received::default();
    loop {
        let Err(error) = session(&shared, &path, &mut received, &mut backoff).await;
        shared.failed("receiving certificates from the secret socket", &error);
        tokio::time::sleep(backoff.next()).await;
    }
}

/// One connection.
async fn session(shared: &Shared, path: &Path, received: &mut Received, backoff: &mut Backoff) -> Result<Infallible, SdsError> {
    let opened = timeout(FIRST_ANSWER_TIMEOUT, async {
        let mut client = SecretDiscoveryServiceClient::new(connect(path).await?);
        let mut certificate = Subscription::open(&mut client, CERTIFICATE, path).await?;
        let mut bundle = Subscription::open(&mut client, BUNDLE, path).await?;
        let (mut has_certificate, mut has_bundle) = (false, false);
        while !(has_certificate && has_bundle) {
            tokio::select! {
                answer = certificate.next() => has_certificate |= certificate.take(answer?, shared, received).await,
                answer = bundle.next() => has_bundle |= bundle.take(answer?, shared, received).await,
            }
        }
        Ok((certificate, bundle))
    });
    let (mut certificate, mut bundle) = opened.await.unwrap_or_else(|_| Err(SdsError::Timeout(path.to_path_buf())))?;
    backoff.reset();
    // No deadline: the next secret may be due in a day. Keepalive finds a dead connection.
    loop {
        tokio::select! {
            answer = certificate.next() => { certificate.take(answer?, shared, received).await; }
            answer = bundle.next() => { bundle.take(answer?, shared, received).await; }
        }
    }
}

async fn connect(path: &Path) -> Result<Channel, SdsError> {
    let failed = |cause: String| SdsError::Connect {
        path: path.to_path_buf(),
        cause,
    };
    let stream = timeout(CONNECT_TIMEOUT, UnixStream::connect(path))
        .await
        .map_err(|_| failed(format!("no answer within {CONNECT_TIMEOUT:?}")))?
        .map_err(|error| failed(error.to_string()))?;
    let mut stream = Some(TokioIo::new(stream));
    let connector = service_fn(move |_: Uri| {
        let stream = stream
            .take()
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotConnected, "the connection has ended"));
        async move { stream }
    });
    // The name has no meaning on a Unix socket, but HTTP/2 wants one.
    Endpoint::from_static("http://localhost")
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .connect_with_connector(connector)
        .await
        .map_err(|error| failed(error.to_string()))
}

/// One secret's stream.
struct Subscription<'a> {
    name: &'static str,
    path: &'a Path,
    requests: mpsc::Sender<DiscoveryRequest>,
    answers: Streaming<DiscoveryResponse>,
    accepted_version: String,
}

/// What has come in, over all connections.
#[derive(Default)]
struct Received {
    certificate: Option<(Vec<u8>, Vec<u8>)>,
    bundle: Option<Vec<u8>>,
    has_revocation_list: bool,
}

// === impl Subscription ===

impl<'a> Subscription<'a> {
    async fn open(
        client: &mut SecretDiscoveryServiceClient<Channel>,
        name: &'static str,
        path: &'a Path,
    ) -> Result<Self, SdsError> {
        let (requests, queue) = mpsc::channel(REQUEST_QUEUE);
        let node = Node {
            id: "cairn".to_owned(),
            ..Node::default()
        };
        let first = DiscoveryRequest {
            node: Some(node),
            ..request(name)
        };
        // Cannot fail: the queue is new and its other end is in our hands.
        let _ = requests.try_send(first);
        let answers = client
            .stream_secrets(ReceiverStream::new(queue))
            .await
            .map_err(|status| ended(path, name, &status))?;
        Ok(Self {
            name,
            path,
            requests,
            answers: answers.into_inner(),
            accepted_version: String::new(),
        })
    }

    async fn next(&mut self) -> Result<DiscoveryResponse, SdsError> {
        match self.answers.message().await {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => Err(ended(self.path, self.name, &tonic::Status::ok("the server closed it"))),
            Err(status) => Err(ended(self.path, self.name, &status)),
        }
    }

    /// Uses an answer and acknowledges or refuses it; says whether it was usable.
    async fn take(&mut self, answer: DiscoveryResponse, shared: &Shared, received: &mut Received) -> bool {
        let verdict = received.take(self.name, &answer, shared).await;
        let usable = verdict.is_ok();
        let error_detail = match verdict {
            Ok(()) => {
                self.accepted_version = answer.version_info;
                None
            }
            Err(error) => {
                shared.failed("using a secret of the secret socket", &error);
                Some(rpc::Status {
                    code: Code::InvalidArgument as i32,
                    message: error.to_string(),
                    details: Vec::new(),
                })
            }
        };
        let reply = DiscoveryRequest {
            version_info: self.accepted_version.clone(),
            response_nonce: answer.nonce,
            error_detail,
            ..request(self.name)
        };
        // A stream that has ended says so at the next answer.
        let _ = self.requests.send(reply).await;
        usable
    }
}

fn request(name: &str) -> DiscoveryRequest {
    DiscoveryRequest {
        resource_names: vec![name.to_owned()],
        type_url: SECRET_TYPE.to_owned(),
        ..DiscoveryRequest::default()
    }
}

fn ended(path: &Path, name: &'static str, status: &tonic::Status) -> SdsError {
    SdsError::Ended {
        path: path.to_path_buf(),
        name,
        code: status.code(),
        message: status.message().to_owned(),
    }
}

// === impl Received ===

impl Received {
    async fn take(&mut self, name: &'static str, answer: &DiscoveryResponse, shared: &Shared) -> Result<(), SdsError> {
        let secret = find(name, answer)?;
        let mut revocation_list = None;
        match (name, secret) {
            (
                CERTIFICATE,
                Type::TlsCertificate(TlsCertificate {
                    certificate_chain,
                    private_key,
                    ..
                }),
            ) => {
                let chain = content(name, certificate_chain, "certificate chain").await?;
                let key = content(name, private_key, "private key").await?;
                self.install(shared, Some((&chain, &key)), None)?;
                self.certificate = Some((chain, key));
            }
            (BUNDLE, Type::ValidationContext(CertificateValidationContext { trusted_ca, crl, .. })) => {
                let bundle = content(name, trusted_ca, "trust bundle (trusted_ca)").await?;
                if crl.is_some() {
                    let pem = content(name, crl, "revocation list").await?;
                    revocation_list = Some(revocation::parse(Path::new("the secret"), &pem)?);
                }
                // Before the bundle: nobody is believed in between who has been revoked.
                if revocation_list.is_some() || self.has_revocation_list {
                    self.has_revocation_list = revocation_list.is_some();
                    shared.set_revocation_lists(revocation_list.map_or(RevocationState::Off, RevocationState::Known));
                }
                self.install(shared, None, Some(&bundle))?;
                self.bundle = Some(bundle);
            }
            (CERTIFICATE, _) => {
                return Err(SdsError::Lacks {
                    name,
                    wanted: "TLS certificate (tls_certificate)",
                });
            }
            _ => {
                return Err(SdsError::Lacks {
                    name,
                    wanted: "validation context",
                });
            }
        }
        Ok(())
    }

    /// Makes credentials of what is new and what is known, when both parts are there.
    fn install(&self, shared: &Shared, pair: Option<(&Vec<u8>, &Vec<u8>)>, bundle: Option<&Vec<u8>>) -> Result<(), SdsError> {
        let known = self.certificate.as_ref().map(|(chain, key)| (chain, key));
        let (Some((chain, key)), Some(roots)) = (pair.or(known), bundle.or(self.bundle.as_ref())) else {
            return Ok(());
        };
        let pem = Pem {
            chain: chain.clone(),
            key: key.clone(),
            roots: roots.clone(),
        };
        shared.install(Credentials::from_pem(&pem, shared.wall().now())?, None);
        Ok(())
    }
}

/// The secret of that name in an answer.
fn find(name: &'static str, answer: &DiscoveryResponse) -> Result<Type, SdsError> {
    for resource in &answer.resources {
        let secret = Secret::decode(resource.value.as_ref()).map_err(|error| SdsError::Decode(name, error))?;
        if secret.name == name {
            return secret.r#type.ok_or(SdsError::Lacks { name, wanted: "content" });
        }
    }
    Err(SdsError::Lacks {
        name,
        wanted: "resource of that name",
    })
}

async fn content(name: &'static str, source: Option<DataSource>, wanted: &'static str) -> Result<Vec<u8>, SdsError> {
    match source.and_then(|source| source.specifier) {
        Some(Specifier::InlineBytes(bytes)) => Ok(bytes),
        Some(Specifier::InlineString(text)) => Ok(text.into_bytes()),
        Some(Specifier::Filename(path)) => read::file(Path::new(&path), "the secret socket's server names this file")
            .await
            .map_err(|error| SdsError::File(name, error)),
        Some(Specifier::EnvironmentVariable(_)) | None => Err(SdsError::Lacks { name, wanted }),
    }
}

#[cfg(test)]
mod tests;
