//! Over TCP and TLS on loopback, with files that change.

use std::{path::Path, sync::Arc, time::Duration};

use cairn_proto::envoy::config::core::v3::Node;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::{RootCertStore, ServerConfig, pki_types::PrivateKeyDer, server::WebPkiClientVerifier};
use tempfile::TempDir;
use tokio::{
    io::{DuplexStream, copy_bidirectional, duplex},
    net::TcpListener,
    sync::{mpsc, oneshot},
    time::timeout,
};
use tokio_rustls::TlsAcceptor;

use super::server::{CDS, Heard, Opened, Recorder, response, serve};
use crate::{Backoff, Client, ClientCertificate, Settings, Subscription, Tls, TlsFiles, Verdict};

/// Long enough for a loaded machine; nothing waits for it unless something is broken.
const PATIENCE: Duration = Duration::from_secs(60);

type Ca = CertifiedIssuer<'static, KeyPair>;

fn authority(name: &str) -> Ca {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(DnType::OrganizationName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// A certificate for `name` and its key, both PEM.
fn issue(ca: &Ca, name: &str, expired: bool) -> (rcgen::Certificate, KeyPair) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
    if expired {
        params.not_before = rcgen::date_time_ymd(2001, 1, 1);
        params.not_after = rcgen::date_time_ymd(2002, 1, 1);
    }
    (params.signed_by(&key, ca).unwrap(), key)
}

/// An istiod whose certificate is issued by `ca`; says on the last channel whether a client certificate came.
async fn istiod(ca: &Ca, clients: &Ca) -> (u16, mpsc::UnboundedReceiver<Opened>, mpsc::UnboundedReceiver<bool>) {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let (certificate, key) = issue(ca, "istiod.istio-system.svc", false);
    let mut roots = RootCertStore::empty();
    roots.add(clients.der().clone()).unwrap();
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .allow_unauthenticated()
        .build()
        .unwrap();
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        )
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (connect, streams) = serve(None);
    let (certified, certificates) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let Ok(mut stream) = acceptor.accept(stream).await else {
                continue;
            };
            let _ = certified.send(stream.get_ref().1.peer_certificates().is_some());
            let (mut near, far): (DuplexStream, DuplexStream) = duplex(1 << 16);
            connect.send(far).await.unwrap();
            tokio::spawn(async move {
                let _ = copy_bidirectional(&mut stream, &mut near).await;
            });
        }
    });
    (port, streams, certificates)
}

fn settings(port: u16, directory: &Path) -> Settings {
    let tls = TlsFiles {
        roots: directory.join("root-cert.pem"),
        server_name: "istiod.istio-system.svc".into(),
        client_certificate: None,
        allowed: Default::default(),
    };
    let node = Node {
        id: "waypoint~10.0.0.1~w.app~app.svc".into(),
        ..Node::default()
    };
    Settings {
        token_file: Some(directory.join("istio-token")),
        headers: vec![("ClusterID".into(), "Kubernetes".into())],
        backoff: Backoff {
            base: Duration::from_millis(2),
            cap: Duration::from_millis(20),
        },
        ..Settings::new(format!("127.0.0.1:{port}").parse().unwrap(), Tls::Verified(tls), node)
    }
}

fn start(settings: Settings) -> (crate::Status, Heard, oneshot::Sender<()>) {
    let (told, heard) = mpsc::unbounded_channel();
    let consumer = Recorder {
        told,
        decide: |_: &_| Verdict::accepted(),
    };
    let client = Client::new(settings, vec![Subscription::wildcard(CDS)], consumer).unwrap();
    let status = client.status();
    let (stop, stopped) = oneshot::channel::<()>();
    tokio::spawn(client.run(async {
        let _ = stopped.await;
    }));
    (status, Heard(heard), stop)
}

async fn opened(streams: &mut mpsc::UnboundedReceiver<Opened>) -> Opened {
    timeout(PATIENCE, streams.recv()).await.expect("a stream in time").unwrap()
}

async fn failed(status: &crate::Status, words: &[&str]) {
    let fits = |error: &str| words.iter().all(|word| error.contains(word));
    let wished = status.until(|now| now.last_error.as_deref().is_some_and(fits));
    if timeout(PATIENCE, wished).await.is_err() {
        panic!("wanted {words:?}, have {:?}", status.snapshot());
    }
}

fn bearer(stream: &Opened) -> &str {
    stream.metadata.get("authorization").unwrap().to_str().unwrap()
}

#[tokio::test]
async fn the_token_is_read_anew_for_each_stream_and_its_absence_is_named() {
    let directory = TempDir::new().unwrap();
    let (ca, token) = (authority("cluster.local"), directory.path().join("istio-token"));
    std::fs::write(directory.path().join("root-cert.pem"), ca.pem()).unwrap();
    let (port, mut streams, _) = istiod(&ca, &ca).await;
    let (status, mut heard, _stop) = start(settings(port, directory.path()));
    failed(&status, &["the token for istiod", token.to_str().unwrap()]).await;
    std::fs::write(&token, " \n").unwrap();
    failed(&status, &[token.to_str().unwrap(), "it is empty"]).await;
    std::fs::write(&token, "one\n").unwrap();
    let stream = opened(&mut streams).await;
    assert_eq!(bearer(&stream), "Bearer one");
    assert_eq!(stream.metadata.get("clusterid").unwrap(), "Kubernetes");
    stream.answer(response(CDS, "n1", &["a"], &[]));
    timeout(PATIENCE, heard.applied()).await.unwrap();
    std::fs::write(&token, "two").unwrap();
    drop(stream);
    assert_eq!(bearer(&opened(&mut streams).await), "Bearer two");
}

#[tokio::test]
async fn an_istiod_under_another_root_is_refused_until_the_root_file_has_it() {
    let directory = TempDir::new().unwrap();
    let (ca, other) = (authority("cluster.local"), authority("elsewhere"));
    let roots = directory.path().join("root-cert.pem");
    std::fs::write(directory.path().join("istio-token"), "t").unwrap();
    let (port, mut streams, _) = istiod(&ca, &ca).await;
    let (status, _heard, _stop) = start(settings(port, directory.path()));
    failed(&status, &["the root certificates for istiod", roots.to_str().unwrap()]).await;
    std::fs::write(&roots, "no certificate").unwrap();
    failed(&status, &["there is no PEM certificate in it"]).await;
    std::fs::write(&roots, other.pem()).unwrap();
    failed(
        &status,
        &[
            "did not prove to be",
            "istiod.istio-system.svc",
            "UnknownIssuer",
            roots.to_str().unwrap(),
        ],
    )
    .await;
    assert!(streams.try_recv().is_err());
    std::fs::write(&roots, format!("{}{}", other.pem(), ca.pem())).unwrap();
    opened(&mut streams).await;
}

#[tokio::test]
async fn a_certificate_of_another_name_is_refused() {
    let directory = TempDir::new().unwrap();
    let ca = authority("cluster.local");
    std::fs::write(directory.path().join("root-cert.pem"), ca.pem()).unwrap();
    std::fs::write(directory.path().join("istio-token"), "t").unwrap();
    let (port, _streams, _) = istiod(&ca, &ca).await;
    let mut settings = settings(port, directory.path());
    if let Tls::Verified(files) = &mut settings.tls {
        files.server_name = "istiod-canary.istio-system.svc".into();
    }
    let (status, _heard, _stop) = start(settings);
    failed(&status, &["did not prove to be \"istiod-canary.istio-system.svc\""]).await;
}

#[tokio::test]
async fn a_client_certificate_is_shown_unless_it_has_expired() {
    let directory = TempDir::new().unwrap();
    let ca = authority("cluster.local");
    let (chain, key) = (directory.path().join("cert-chain.pem"), directory.path().join("key.pem"));
    std::fs::write(directory.path().join("root-cert.pem"), ca.pem()).unwrap();
    std::fs::write(directory.path().join("istio-token"), "t").unwrap();
    for expired in [false, true] {
        let (certificate, pair) = issue(&ca, "waypoint", expired);
        std::fs::write(&chain, certificate.pem()).unwrap();
        std::fs::write(&key, pair.serialize_pem()).unwrap();
        let (port, mut streams, mut certificates) = istiod(&ca, &ca).await;
        let mut settings = settings(port, directory.path());
        if let Tls::Verified(files) = &mut settings.tls {
            files.client_certificate = Some(ClientCertificate {
                chain: chain.clone(),
                key: key.clone(),
            });
        }
        let (_status, _heard, _stop) = start(settings);
        assert_eq!(timeout(PATIENCE, certificates.recv()).await.unwrap(), Some(!expired));
        assert_eq!(bearer(&opened(&mut streams).await), "Bearer t");
    }
}

#[tokio::test]
async fn an_absent_istiod_is_named() {
    let directory = TempDir::new().unwrap();
    let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let mut settings = settings(port, directory.path());
    (settings.tls, settings.token_file) = (Tls::Plaintext, None);
    let (status, _heard, _stop) = start(settings);
    failed(&status, &[&format!("no connection to 127.0.0.1:{port}"), "refused"]).await;
}
