//! A secret server on a Unix socket in this process.

use std::{fs, pin::Pin};

use cairn_exchange::clock;
use cairn_proto::envoy::service::{
    discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse},
    secret::v3::secret_discovery_service_server::{SecretDiscoveryService, SecretDiscoveryServiceServer},
};
use parking_lot::Mutex;
use tokio::{net::UnixListener, sync::watch, task::JoinSet};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status, transport::Server};

use super::*;
use crate::{
    Identity, Source,
    generate::Authority,
    testing::{LIFE, id},
};

const PATIENCE: Duration = Duration::from_secs(20);
const ID: &str = "spiffe://td/ns/a/sa/b";

/// What is served now, by version.
#[derive(Clone, Default)]
struct Served {
    version: u64,
    secrets: Vec<Secret>,
}

/// Serves one name a stream, and again whenever the version changes.
struct Agent {
    served: watch::Receiver<Served>,
    replies: Arc<Mutex<Vec<DiscoveryRequest>>>,
}

#[tonic::async_trait]
impl SecretDiscoveryService for Agent {
    type StreamSecretsStream = Pin<Box<dyn futures_util::Stream<Item = Result<DiscoveryResponse, Status>> + Send>>;
    type DeltaSecretsStream = tokio_stream::Empty<Result<DeltaDiscoveryResponse, Status>>;

    async fn stream_secrets(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamSecretsStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests
            .message()
            .await?
            .ok_or_else(|| Status::invalid_argument("no request"))?;
        let [name] = first.resource_names.as_slice() else {
            return Err(Status::invalid_argument("one name a stream"));
        };
        assert_eq!((first.type_url.as_str(), first.node.is_some()), (SECRET_TYPE, true));
        let (name, replies, mut served) = (name.clone(), self.replies.clone(), self.served.clone());
        let (answers, stream) = mpsc::channel(1);
        tokio::spawn(async move {
            while served.has_changed().is_ok() {
                let Served { version, secrets } = served.borrow_and_update().clone();
                let found = secrets.into_iter().find(|secret| secret.name == name);
                if let Some(secret) = found {
                    let resource = prost_types::Any {
                        type_url: SECRET_TYPE.into(),
                        value: secret.encode_to_vec(),
                    };
                    let answer = DiscoveryResponse {
                        version_info: version.to_string(),
                        nonce: format!("{name}-{version}"),
                        type_url: SECRET_TYPE.into(),
                        resources: vec![resource],
                        ..DiscoveryResponse::default()
                    };
                    answers.send(Ok(answer)).await.ok()?;
                    let reply = requests.message().await.ok()??;
                    replies.lock().push(reply);
                }
                served.changed().await.ok()?;
            }
            Some(())
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn delta_secrets(
        &self,
        _: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaSecretsStream>, Status> {
        Err(Status::unimplemented("state of the world only"))
    }

    async fn fetch_secrets(&self, _: Request<DiscoveryRequest>) -> Result<Response<DiscoveryResponse>, Status> {
        Err(Status::unimplemented("streams only"))
    }
}

fn serve(path: &Path, served: &watch::Sender<Served>, replies: &Arc<Mutex<Vec<DiscoveryRequest>>>) -> JoinSet<()> {
    let agent = Agent {
        served: served.subscribe(),
        replies: replies.clone(),
    };
    let incoming = UnixListenerStream::new(UnixListener::bind(path).unwrap());
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let server = Server::builder().add_service(SecretDiscoveryServiceServer::new(agent));
        server.serve_with_incoming(incoming).await.unwrap();
    });
    tasks
}

fn source(bytes: Vec<u8>) -> Option<DataSource> {
    Some(DataSource {
        specifier: Some(Specifier::InlineBytes(bytes)),
        watched_directory: None,
    })
}

fn pair(pem: &Pem) -> Secret {
    let certificate = TlsCertificate {
        certificate_chain: source(pem.chain.clone()),
        private_key: source(pem.key.clone()),
        ..TlsCertificate::default()
    };
    Secret {
        name: CERTIFICATE.to_owned(),
        r#type: Some(Type::TlsCertificate(certificate)),
    }
}

fn bundle(roots: impl Into<Vec<u8>>) -> Secret {
    let context = CertificateValidationContext {
        trusted_ca: source(roots.into()),
        ..CertificateValidationContext::default()
    };
    Secret {
        name: BUNDLE.to_owned(),
        r#type: Some(Type::ValidationContext(context)),
    }
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let wait = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(PATIENCE, wait)
        .await
        .unwrap_or_else(|_| panic!("waited in vain for: {what}"));
}

#[tokio::test]
async fn secrets_are_used_updated_refused_with_words_and_kept_over_a_reconnect() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let identity = Identity::start(Source::SdsSocket { path: path.clone() });
    until("a complaint about the socket", || identity.status().failures > 0).await;
    let why = identity.unavailable().unwrap().to_string();
    assert!(
        why.contains("connecting to the secret socket") && why.contains("is the SPIFFE agent running"),
        "{why}"
    );

    let authority = Authority::new("td").unwrap();
    let pem = || authority.issue_pem(&id(ID), clock::wall(), LIFE).unwrap();
    let first = pem();
    let served = watch::Sender::new(Served {
        version: 1,
        secrets: vec![pair(&first), bundle(first.roots.clone())],
    });
    let replies = Arc::new(Mutex::new(Vec::new()));
    let agent = serve(&path, &served, &replies);
    timeout(PATIENCE, identity.ready()).await.unwrap();
    assert_eq!(identity.current().unwrap().id(), &id(ID));
    until("both acknowledgements", || replies.lock().len() == 2).await;
    for reply in replies.lock().drain(..) {
        assert_eq!((reply.version_info.as_str(), reply.error_detail), ("1", None));
        assert!(reply.response_nonce.ends_with("-1"), "{}", reply.response_nonce);
    }

    // A new certificate and a bundle of two roots.
    let generation = identity.status().generation;
    let serial = identity.status().serial;
    let two_roots = format!("{}{}", authority.root_pem(), Authority::new("next").unwrap().root_pem());
    served.send_replace(Served {
        version: 2,
        secrets: vec![pair(&pem()), bundle(two_roots)],
    });
    until("both updates", || identity.status().generation == generation + 2).await;
    assert_ne!(identity.status().serial, serial);
    assert_eq!(identity.current().unwrap().roots().len(), 2);
    until("both acknowledgements", || replies.lock().len() == 2).await;
    replies.lock().clear();

    // A chain beside a key of another pair, and a bundle of nothing: refused, and the old ones stay.
    let serial = identity.status().serial;
    let torn = Pem {
        key: first.key.clone(),
        ..pem()
    };
    served.send_replace(Served {
        version: 3,
        secrets: vec![pair(&torn), bundle("nothing")],
    });
    until("both refusals", || replies.lock().len() == 2).await;
    for reply in replies.lock().drain(..) {
        let detail = reply.error_detail.expect("a refusal has words").message;
        let expected = if reply.resource_names == [CERTIFICATE] {
            "is not the key of the certificate"
        } else {
            "holds no certificate"
        };
        assert!(detail.contains(expected), "{detail}");
        assert_eq!(reply.version_info, "2", "the version in use");
    }
    assert_eq!(identity.status().serial, serial);
    assert_eq!(identity.current().unwrap().roots().len(), 2);

    // The agent restarts.
    drop((agent, served));
    until("a complaint about the lost stream", || {
        identity
            .status()
            .last_error
            .is_some_and(|error| error.contains("the stream of secret") || error.contains("connecting"))
    })
    .await;
    assert_eq!(identity.status().serial, serial);
    fs::remove_file(&path).unwrap();
    let last = pem();
    let served = watch::Sender::new(Served {
        version: 4,
        secrets: vec![pair(&last), bundle(last.roots.clone())],
    });
    let _agent = serve(&path, &served, &replies);
    until("the certificate of the restarted agent", || {
        identity.status().serial != serial
    })
    .await;
    until("its bundle", || identity.current().unwrap().roots().len() == 1).await;
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_does_not_know_us_is_named_after_a_while() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let served = watch::Sender::new(Served::default());
    let _agent = serve(&path, &served, &Arc::default());
    let identity = Identity::start(Source::SdsSocket { path });
    while identity.status().failures == 0 {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let error = identity.status().last_error.unwrap();
    assert!(
        error.contains("did not serve secrets \"default\" and \"ROOTCA\" within 30s; is this workload registered?"),
        "{error}"
    );
}
