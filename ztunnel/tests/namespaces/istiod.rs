//! What istiod is to a node's proxy: delta ADS and a certificate authority, in this process.

use std::{collections::BTreeMap, pin::Pin, sync::Arc, time::Duration};

use cairn_exchange::{SpiffeId, clock};
use cairn_identity::{Credentials, Pem};
use cairn_proto::{
    envoy::service::discovery::v3::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource,
        aggregated_discovery_service_server::{AggregatedDiscoveryService, AggregatedDiscoveryServiceServer},
    },
    istio::v1::auth::{
        IstioCertificateRequest, IstioCertificateResponse,
        istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer},
    },
};
use parking_lot::Mutex;
use prost_types::{Any, value::Kind};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, IsCa, KeyPair, KeyUsagePurpose,
    SanType,
};
use tokio::{
    sync::{broadcast, mpsc},
    task::JoinHandle,
};
use tokio_stream::{
    Stream, StreamExt as _,
    wrappers::{ReceiverStream, TcpListenerStream},
};
use tonic::{Request, Response, Status, Streaming, transport::Server};

/// How long certificates live.
const LIFE: Duration = Duration::from_secs(3600);

type Resources = BTreeMap<(String, String), Vec<u8>>;

#[derive(Clone)]
pub struct Istiod {
    shared: Arc<Shared>,
}

struct Shared {
    resources: Mutex<Resources>,
    pushes: broadcast::Sender<DeltaDiscoveryResponse>,
    root: CertifiedIssuer<'static, KeyPair>,
    asked: Mutex<Vec<String>>,
    refused: Mutex<Vec<String>>,
    nacks: Mutex<Vec<String>>,
    resumed: Mutex<Vec<usize>>,
    server: Mutex<Option<JoinHandle<()>>>,
}

impl Istiod {
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let root = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let shared = Shared {
            resources: Mutex::default(),
            pushes: broadcast::channel(64).0,
            root,
            asked: Mutex::default(),
            refused: Mutex::default(),
            nacks: Mutex::default(),
            resumed: Mutex::default(),
            server: Mutex::default(),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    pub fn serve(&self, listener: std::net::TcpListener) {
        listener.set_nonblocking(true).unwrap();
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        let router = Server::builder()
            .add_service(AggregatedDiscoveryServiceServer::new(self.clone()))
            .add_service(IstioCertificateServiceServer::new(self.clone()));
        let server = tokio::spawn(async move {
            let _ = router.serve_with_incoming(TcpListenerStream::new(listener)).await;
        });
        *self.shared.server.lock() = Some(server);
    }

    /// Changes and removes resources of one type, in one push.
    pub fn push(&self, type_url: &str, changed: Vec<(String, Vec<u8>)>, removed: &[&str]) {
        let mut resources = self.shared.resources.lock();
        for (name, bytes) in &changed {
            resources.insert((type_url.to_owned(), name.clone()), bytes.clone());
        }
        for name in removed {
            resources.remove(&(type_url.to_owned(), (*name).to_owned()));
        }
        let response = response(type_url, changed, removed);
        // Nobody is connected yet.
        let _ = self.shared.pushes.send(response);
    }

    /// Identities that certificates were asked for.
    pub fn asked(&self) -> Vec<String> {
        self.shared.asked.lock().clone()
    }

    /// Asks for this identity are refused from now on.
    pub fn refuse(&self, id: &str) {
        self.shared.refused.lock().push(id.to_owned());
    }

    pub fn nacks(&self) -> Vec<String> {
        self.shared.nacks.lock().clone()
    }

    /// Credentials for somebody in this process.
    pub fn credentials(&self, id: &str) -> Credentials {
        let id: SpiffeId = id.parse().unwrap();
        let key = KeyPair::generate().unwrap();
        let leaf = leaf(&id).signed_by(&key, &self.shared.root).unwrap();
        let pem = Pem {
            chain: leaf.pem().into_bytes(),
            key: key.serialize_pem().into_bytes(),
            roots: self.shared.root.pem().into_bytes(),
        };
        Credentials::from_pem(&pem, clock::wall()).unwrap()
    }
}

fn leaf(id: &SpiffeId) -> CertificateParams {
    let mut params = CertificateParams::default();
    let now = clock::wall();
    params.not_before = (now - Duration::from_secs(60)).into();
    params.not_after = (now + LIFE).into();
    params.subject_alt_names = vec![SanType::URI(id.as_str().try_into().unwrap())];
    params
}

fn response(type_url: &str, changed: Vec<(String, Vec<u8>)>, removed: &[&str]) -> DeltaDiscoveryResponse {
    let resource = |(name, value): (String, Vec<u8>)| Resource {
        name,
        version: format!("{}", value.len()),
        resource: Some(Any {
            type_url: type_url.to_owned(),
            value,
        }),
        ..Resource::default()
    };
    DeltaDiscoveryResponse {
        type_url: type_url.to_owned(),
        nonce: fastrand::u64(..).to_string(),
        resources: changed.into_iter().map(resource).collect(),
        removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
        ..DeltaDiscoveryResponse::default()
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Istiod {
    type StreamAggregatedResourcesStream = Answers<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = Answers<DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        _: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented("delta only"))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let mut requests = request.into_inner();
        let (answers, stream) = mpsc::channel(64);
        let shared = self.shared.clone();
        tokio::spawn(async move {
            let mut pushes = shared.pushes.subscribe();
            let mut known: Vec<String> = Vec::new();
            loop {
                tokio::select! {
                    request = requests.next() => {
                        let Some(Ok(request)) = request else { return };
                        if let Some(error) = request.error_detail {
                            shared.nacks.lock().push(error.message);
                        }
                        if !known.contains(&request.type_url) {
                            known.push(request.type_url.clone());
                            shared.resumed.lock().push(request.initial_resource_versions.len());
                            let all = shared.resources.lock().iter()
                                .filter(|((of, _), _)| *of == request.type_url)
                                .map(|((_, name), bytes)| (name.clone(), bytes.clone()))
                                .collect();
                            let _ = answers.send(Ok(response(&request.type_url, all, &[]))).await;
                        }
                    }
                    push = pushes.recv() => {
                        let Ok(push) = push else { return };
                        if known.contains(&push.type_url) && answers.send(Ok(push)).await.is_err() {
                            return;
                        }
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

#[tonic::async_trait]
impl IstioCertificateService for Istiod {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let message = request.into_inner();
        let csr = CertificateSigningRequestParams::from_pem(&message.csr).unwrap();
        let Some(SanType::URI(uri)) = csr.params.subject_alt_names.first() else {
            return Err(Status::invalid_argument("no identity"));
        };
        let impersonated =
            message
                .metadata
                .and_then(|metadata| match metadata.fields.get("ImpersonatedIdentity")?.kind.clone()? {
                    Kind::StringValue(id) => Some(id),
                    _ => None,
                });
        let asked = match &impersonated {
            Some(id) => format!("impersonated {id}"),
            None => uri.as_str().to_owned(),
        };
        self.shared.asked.lock().push(asked);
        if self.shared.refused.lock().iter().any(|id| id == uri.as_str()) {
            return Err(Status::permission_denied("not on this node"));
        }
        let id: SpiffeId = uri.as_str().parse().unwrap();
        let signed = leaf(&id).signed_by(&csr.public_key, &self.shared.root).unwrap();
        Ok(Response::new(IstioCertificateResponse {
            cert_chain: vec![signed.pem(), self.shared.root.pem()],
        }))
    }
}

impl Istiod {
    /// It is gone.
    pub fn stop(&self) {
        if let Some(server) = self.shared.server.lock().take() {
            server.abort();
        }
    }
}
