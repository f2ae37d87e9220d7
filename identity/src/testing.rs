//! What several tests need: an authority that speaks gRPC, and handshakes in memory.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use cairn_exchange::{SpiffeId, clock};
use cairn_proto::istio::v1::auth::{
    IstioCertificateRequest, IstioCertificateResponse,
    istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer},
};
use parking_lot::Mutex;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, DnType, IsCa, KeyPair,
    KeyUsagePurpose, PublicKey, SignatureAlgorithm,
};
use rustls::{
    ClientConfig, HandshakeKind, ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, copy_bidirectional, duplex},
    net::TcpListener,
    sync::mpsc,
    task::JoinSet,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, transport::Server};

use crate::generate;

pub(crate) const LIFE: Duration = Duration::from_secs(3600);

pub(crate) fn id(text: &str) -> SpiffeId {
    text.parse().unwrap()
}

/// A root of any key type.
pub(crate) fn root(name: &str, algorithm: &'static SignatureAlgorithm) -> CertifiedIssuer<'static, KeyPair> {
    CertifiedIssuer::self_signed(ca_params(name), KeyPair::generate_for(algorithm).unwrap()).unwrap()
}

pub(crate) fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

/// A leaf for any public key, PEM.
pub(crate) fn sign(issuer: &CertifiedIssuer<'static, KeyPair>, id: &SpiffeId, key: &PublicKey) -> String {
    generate::leaf_params(id, clock::wall(), LIFE)
        .unwrap()
        .signed_by(key, issuer)
        .unwrap()
        .pem()
}

/// What a request brought.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) metadata: tonic::metadata::MetadataMap,
    pub(crate) message: IstioCertificateRequest,
}

impl Asked {
    pub(crate) fn csr(&self) -> CertificateSigningRequestParams {
        CertificateSigningRequestParams::from_pem(&self.message.csr).unwrap()
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.metadata
            .get(name)
            .map(|value| value.to_str().unwrap())
            .unwrap_or_default()
    }
}

type Answer = dyn Fn(&Asked) -> Result<Vec<String>, Status> + Send + Sync;

/// An authority on a loopback address, with the TLS certificate of `istiod.istio-system.svc`.
pub(crate) struct CaServer {
    pub(crate) address: SocketAddr,
    /// What clients must believe in order to connect.
    pub(crate) tls_root: String,
    pub(crate) asked: Arc<Mutex<Vec<Asked>>>,
    _tasks: JoinSet<()>,
}

struct Service {
    answer: Arc<Answer>,
    asked: Arc<Mutex<Vec<Asked>>>,
}

#[tonic::async_trait]
impl IstioCertificateService for Service {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let (metadata, _, message) = request.into_parts();
        let asked = Asked { metadata, message };
        self.asked.lock().push(asked.clone());
        Ok(Response::new(IstioCertificateResponse {
            cert_chain: (self.answer)(&asked)?,
        }))
    }
}

impl CaServer {
    pub(crate) async fn start(answer: impl Fn(&Asked) -> Result<Vec<String>, Status> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self::start_on(listener, answer)
    }

    pub(crate) fn start_on(
        listener: TcpListener,
        answer: impl Fn(&Asked) -> Result<Vec<String>, Status> + Send + Sync + 'static,
    ) -> Self {
        let address = listener.local_addr().unwrap();
        let tls_root = root("istiod", &rcgen::PKCS_ECDSA_P256_SHA256);
        let acceptor = TlsAcceptor::from(Arc::new(dns_server(&tls_root, "istiod.istio-system.svc")));
        let (connections, incoming) = mpsc::channel(4);
        let asked = Arc::new(Mutex::new(Vec::new()));
        let service = Service {
            answer: Arc::new(answer),
            asked: asked.clone(),
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                if let Ok(tls) = acceptor.accept(tcp).await {
                    connections.send(Ok::<_, std::io::Error>(bridge(tls))).await.unwrap();
                }
            }
        });
        tasks.spawn(async move {
            let server = Server::builder().add_service(IstioCertificateServiceServer::new(service));
            server.serve_with_incoming(ReceiverStream::new(incoming)).await.unwrap();
        });
        Self {
            address,
            tls_root: tls_root.pem(),
            asked,
            _tasks: tasks,
        }
    }
}

/// tonic's server takes streams of types that it knows.
fn bridge(mut io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> DuplexStream {
    let (mut near, far) = duplex(64 << 10);
    tokio::spawn(async move { copy_bidirectional(&mut io, &mut near).await });
    far
}

fn dns_server(issuer: &CertifiedIssuer<'static, KeyPair>, name: &str) -> ServerConfig {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let leaf = CertificateParams::new(vec![name.to_owned()])
        .unwrap()
        .signed_by(&key, issuer)
        .unwrap();
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key));
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![leaf.into()], key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}

/// What a handshake came to, seen from the server.
pub(crate) struct Shaken {
    pub(crate) peer: SpiffeId,
    pub(crate) resumed: bool,
    pub(crate) alpn: Option<Vec<u8>>,
}

/// A handshake in memory and one byte each way; errors are (server's, client's).
pub(crate) async fn handshake(
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
) -> Result<Shaken, (Option<String>, Option<String>)> {
    let (near, far) = duplex(64 << 10);
    let accepted = async {
        let mut tls = TlsAcceptor::from(server).accept(far).await?;
        tls.write_all(b"x").await?;
        tls.flush().await?;
        tls.read_u8().await?;
        Ok::<_, std::io::Error>(tls)
    };
    let connected = async {
        let mut tls = TlsConnector::from(client).connect(crate::server_name(), near).await?;
        tls.write_all(b"x").await?;
        tls.flush().await?;
        tls.read_u8().await?;
        Ok::<_, std::io::Error>(tls)
    };
    // The client's half stays until the server has read.
    let (server, client) = tokio::join!(accepted, connected);
    match (server, client) {
        (Ok(server), Ok(_client)) => {
            let connection = server.get_ref().1;
            Ok(Shaken {
                peer: crate::peer_id(connection.peer_certificates().unwrap_or_default()).unwrap(),
                resumed: connection.handshake_kind() == Some(HandshakeKind::Resumed),
                alpn: connection.alpn_protocol().map(<[u8]>::to_vec),
            })
        }
        (server, client) => Err((server.err().map(|e| e.to_string()), client.err().map(|e| e.to_string()))),
    }
}
