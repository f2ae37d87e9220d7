//! Tunnels over real loopback TLS.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use cairn_hbone::{Destination, OpenErrorKind, Peer, Pool, PoolSettings, ServerSettings, TcpTls, drain, serve};
use http::HeaderMap;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::aws_lc_rs::default_provider,
    pki_types::{CertificateDer, PrivateKeyDer},
    server::WebPkiClientVerifier,
};
use tokio::{net::TcpListener, time::timeout};
use tokio_rustls::TlsAcceptor;

use crate::support::{PATIENCE, behave, round_trip};

struct Ca(CertifiedIssuer<'static, KeyPair>);

impl Ca {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn roots(&self) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(self.0.der().clone()).unwrap();
        Arc::new(roots)
    }

    fn issue(&self, account: &str) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![
            SanType::URI(format!("spiffe://cluster.local/ns/app/sa/{account}").try_into().unwrap()),
            SanType::IpAddress(Ipv4Addr::LOCALHOST.into()),
        ];
        let certificate = params.signed_by(&key, &self.0).unwrap();
        (
            vec![certificate.der().clone()],
            PrivateKeyDer::Pkcs8(key.serialize_der().into()),
        )
    }

    fn server(&self, alpn: &[&[u8]]) -> Arc<ServerConfig> {
        let provider = Arc::new(default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(self.roots(), provider.clone())
            .build()
            .unwrap();
        let (chain, key) = self.issue("server");
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .unwrap();
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        Arc::new(config)
    }

    fn client(&self, with_certificate: bool) -> Arc<ClientConfig> {
        let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(self.roots());
        let mut config = if with_certificate {
            let (chain, key) = self.issue("client");
            builder.with_client_auth_cert(chain, key).unwrap()
        } else {
            builder.with_no_client_auth()
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        Arc::new(config)
    }
}

/// Accepts tunnels on a loopback port until the test ends.
async fn listen(config: Arc<ServerConfig>) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let local_address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((tcp, address)) = listener.accept().await {
            let acceptor = TlsAcceptor::from(config.clone());
            tokio::spawn(async move {
                let Ok(io) = acceptor.accept(tcp).await else { return };
                let peer = Arc::new(Peer {
                    id: None,
                    address,
                    local_address,
                    local_id: None,
                });
                let (_trigger, watch) = drain::channel();
                let _ = serve(io, peer, &ServerSettings::default(), watch, |connect| {
                    tokio::spawn(behave(connect));
                })
                .await;
            });
        }
    });
    local_address
}

/// A pool whose identities are the number of certificates that the peer sent.
fn pool(config: Arc<ClientConfig>) -> Pool {
    Pool::new(
        PoolSettings::default(),
        TcpTls::new(
            move |_| Ok(config.clone()),
            |_, chain| {
                format!("spiffe://cluster.local/chain/{}", chain.len())
                    .parse()
                    .map(Some)
                    .map_err(|error| format!("{error}"))
            },
        ),
    )
}

async fn refused(pool: &Pool, address: SocketAddr) -> (OpenErrorKind, String) {
    let destination = Destination { address, trust: 0 };
    let open = pool.open(&destination, "echo:80", HeaderMap::new());
    let error = timeout(PATIENCE, open).await.unwrap().unwrap_err();
    (error.kind(), error.to_string())
}

#[tokio::test]
async fn a_tunnel_over_mutual_tls_carries_bytes() {
    let ca = Ca::new();
    let address = listen(ca.server(&[b"h2"])).await;
    let pool = pool(ca.client(true));
    let mut opened = pool
        .open(&Destination { address, trust: 0 }, "echo:80", HeaderMap::new())
        .await
        .unwrap();
    assert_eq!(opened.peer_id.unwrap().as_str(), "spiffe://cluster.local/chain/1");
    assert_eq!(opened.local_address.ip(), address.ip());
    for size in [1, 1_000, 100_000, 3_000_000] {
        let body = vec![5; size];
        let (mut read, mut write) = tokio::io::split(&mut opened.stream);
        let back = async {
            let mut back = vec![0; size];
            tokio::io::AsyncReadExt::read_exact(&mut read, &mut back).await.unwrap();
            back
        };
        let (sent, back) = tokio::join!(
            tokio::io::AsyncWriteExt::write_all(&mut write, &body),
            timeout(PATIENCE, back)
        );
        sent.unwrap();
        assert!(back.unwrap() == body);
    }
    round_trip(&mut opened.stream, b"end").await;
}

#[tokio::test]
async fn a_client_without_certificate_is_refused_once() {
    let ca = Ca::new();
    let address = listen(ca.server(&[b"h2"])).await;
    // TLS 1.3 tells after the client's handshake is complete, so it is the connection that ends.
    let (kind, text) = refused(&pool(ca.client(false)), address).await;
    assert_eq!(kind, OpenErrorKind::Closed, "{text}");
    assert!(text.contains("CertificateRequired"), "{text}");
}

#[tokio::test]
async fn trouble_while_connecting_is_told_apart() {
    let (ca, other) = (Ca::new(), Ca::new());
    let address = listen(other.server(&[b"h2"])).await;
    let (kind, text) = refused(&pool(ca.client(true)), address).await;
    assert!(
        kind == OpenErrorKind::Tls && text.contains("invalid peer certificate"),
        "{text}"
    );

    let address = listen(ca.server(&[])).await;
    let (kind, text) = refused(&pool(ca.client(true)), address).await;
    assert!(kind == OpenErrorKind::Tls && text.contains("HTTP/2"), "{text}");

    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let (kind, text) = refused(&pool(ca.client(true)), free).await;
    assert!(kind == OpenErrorKind::ConnectFailure && text.contains("refused"), "{text}");

    let address = listen(ca.server(&[b"h2"])).await;
    let suspicious = Pool::new(
        PoolSettings::default(),
        TcpTls::new(
            move |_| Ok(ca.client(true)),
            |_, _| Err("spiffe://elsewhere is not of our mesh".into()),
        ),
    );
    let (kind, text) = refused(&suspicious, address).await;
    assert!(kind == OpenErrorKind::Tls && text.contains("elsewhere"), "{text}");

    let waiting = Pool::new(
        PoolSettings::default(),
        TcpTls::new(|_| Err("no certificate yet".into()), |_, _| Ok(None)),
    );
    let (kind, text) = refused(&waiting, address).await;
    assert!(kind == OpenErrorKind::Tls && text.contains("no certificate yet"), "{text}");
}
