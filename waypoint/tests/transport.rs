//! What is put between the waypoint and an application: TLS and PROXY headers, inside of the tunnel; and hosts that requests name.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::large_futures,
    clippy::disallowed_methods,
    reason = "a test fails by panicking, and may look at the clock"
)]

mod rig;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use cairn_identity::{NameMatcher, NamePattern, OriginationTerms, TlsVersion};
use cairn_policy::{
    matcher::StringMatcher,
    rbac::{Action, Condition, Filters, Policy, Rbac, Rules, Text},
};
use cairn_proto::envoy::{
    config::core::v3::{DataSource, data_source::Specifier},
    extensions::transport_sockets::tls::v3::{CertificateValidationContext, Secret, secret::Type},
};
use cairn_waypoint::{
    snapshot::TcpChain,
    upstream::{
        ClusterSettings, Discovery, NamesByHost, ProxyHeader, TransportTerms,
        dns::{Cadence, Family, HostCacheTerms},
    },
};
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rcgen::{CertifiedKey, KeyPair};
use rig::{App, Config, Rig, mirror, send, tunnels};
use rustls::{ClientConfig, RootCertStore, ServerConfig, crypto::aws_lc_rs, pki_types::PrivateKeyDer};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::{TlsAcceptor, TlsConnector};

const WEB: &str = "10.96.1.10:80";
const RAW: &str = "10.96.1.10:9000";

/// An application behind TLS.
struct Secure {
    certificate: CertifiedKey<KeyPair>,
    handshakes: Arc<AtomicU32>,
}

impl Secure {
    fn new(names: &[&str]) -> Self {
        Self {
            certificate: rcgen::generate_simple_self_signed(names.iter().map(ToString::to_string).collect::<Vec<_>>()).unwrap(),
            handshakes: Arc::default(),
        }
    }

    fn acceptor(&self) -> TlsAcceptor {
        let key = PrivateKeyDer::try_from(self.certificate.signing_key.serialize_der()).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![self.certificate.cert.der().clone()], key);
        let mut config = config.unwrap();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        TlsAcceptor::from(Arc::new(config))
    }

    /// Answers requests with what was asked for in TLS.
    fn http(&self) -> App {
        let (acceptor, handshakes) = (self.acceptor(), self.handshakes.clone());
        Arc::new(move |stream, _| {
            let (acceptor, handshakes) = (acceptor.clone(), handshakes.clone());
            Box::pin(async move {
                let Ok(stream) = acceptor.accept(stream).await else { return };
                handshakes.fetch_add(1, Ordering::Relaxed);
                let (_, session) = stream.get_ref();
                let alpn = String::from_utf8_lossy(session.alpn_protocol().unwrap_or_default()).into_owned();
                let told = format!("{} {alpn}", session.server_name().unwrap_or("-"));
                let service = service_fn(move |_| {
                    let told = told.clone();
                    async move { Ok::<_, std::convert::Infallible>(Response::new(Full::<Bytes>::from(told))) }
                });
                let _ = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            })
        })
    }

    /// Sends bytes back.
    fn mirror(&self) -> App {
        let acceptor = self.acceptor();
        Arc::new(move |stream, _| {
            let acceptor = acceptor.clone();
            Box::pin(async move {
                let Ok(stream) = acceptor.accept(stream).await else { return };
                let (mut read, mut write) = tokio::io::split(stream);
                let _ = tokio::io::copy(&mut read, &mut write).await;
                let _ = write.shutdown().await;
            })
        })
    }

    /// Has the rig believe this application under the name `roots`.
    fn believed_by(&self, rig: &Rig) {
        let context = CertificateValidationContext {
            trusted_ca: Some(DataSource {
                specifier: Some(Specifier::InlineString(self.certificate.cert.pem())),
                watched_directory: None,
            }),
            ..CertificateValidationContext::default()
        };
        let secret = Secret {
            name: "roots".into(),
            r#type: Some(Type::ValidationContext(context)),
        };
        rig.engine.sources.secrets.deliver("roots", secret).unwrap();
    }
}

fn terms(change: impl FnOnce(&mut OriginationTerms)) -> TransportTerms {
    let mut terms = OriginationTerms {
        certificate: None,
        roots: Some("roots".into()),
        revocation: None,
        revocation_of_leaf_only: false,
        names: Vec::new(),
        server_name: Some("web.example.com".into()),
        min_version: TlsVersion::V1_2,
        max_version: TlsVersion::V1_3,
        cipher_suites: Vec::new(),
        curves: Vec::new(),
        alpn: Vec::new(),
    };
    change(&mut terms);
    TransportTerms::Tls(Arc::new(terms))
}

fn named(name: &str) -> NameMatcher {
    NameMatcher {
        kind: None,
        pattern: NamePattern::Exact(name.into()),
        ignore_case: false,
    }
}

fn get(host: &str) -> Request<Full<Bytes>> {
    Request::get("/").header("host", host).body(Full::default()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_inside_of_the_tunnel_reaches_the_application_that_is_believed() {
    let rig = Rig::start().await;
    let app = Secure::new(&["web.example.com"]);
    app.believed_by(&rig);
    let pod = rig.pod(20, app.http()).await;
    let with = |transport: TransportTerms| {
        Config::default().http_with(WEB, &[pod.address], |_| {}, |cluster| cluster.transport = transport)
    };
    rig.serve(with(terms(|terms| terms.names.push(named("web.example.com")))))
        .await;
    let mut client = rig.http1(WEB).await;
    for _ in 0..3 {
        let (status, _, body) = send(&mut client, get("web")).await;
        assert_eq!((status, &body[..]), (StatusCode::OK, &b"web.example.com http/1.1"[..]));
    }
    assert_eq!(app.handshakes.load(Ordering::Relaxed), 1, "the connection is kept");

    rig.publish(with(terms(|terms| terms.names.push(named("else.example.com")))));
    let (status, _, body) = send(&mut client, get("web")).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(
        &body[..],
        b"upstream connect error or disconnect/reset before headers. retried and the latest reset reason: remote connection failure"
    );
    let told = rig.told(4).await;
    assert_eq!(told.flags, "UF,URX");
    assert_eq!(
        told.details,
        "upstream_reset_before_response_started{remote_connection_failure|TLS_error:|268435581:SSL_routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED:verify_cert_failed:_SAN_matcher,_certificate_SANs_are_[web.example.com]:TLS_error_end}"
    );

    rig.publish(with(terms(|terms| terms.roots = Some("nobody-sent-this".into()))));
    let (status, _, _) = send(&mut client, get("web")).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(rig.told(5).await.details.contains("Secret_is_not_supplied_by_SDS"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_host_of_a_request_is_the_server_name_and_its_connections_are_its_own() {
    let rig = Rig::start().await;
    let app = Secure::new(&["a.example.com", "b.example.com"]);
    app.believed_by(&rig);
    let pod = rig.pod(20, app.http()).await;
    let config = Config::default().http_with(
        WEB,
        &[pod.address],
        |_| {},
        |cluster| {
            cluster.transport = terms(|terms| terms.server_name = None);
            cluster.names_by_host = NamesByHost {
                server_name: true,
                verify: true,
            };
        },
    );
    rig.serve(config).await;
    let mut client = rig.http1(WEB).await;
    for (host, status, told) in [
        ("a.example.com", StatusCode::OK, "a.example.com http/1.1"),
        ("b.example.com:8443", StatusCode::OK, "b.example.com http/1.1"),
        ("a.example.com", StatusCode::OK, "a.example.com http/1.1"),
    ] {
        let (found, _, body) = send(&mut client, get(host)).await;
        assert_eq!((found, &*String::from_utf8_lossy(&body)), (status, told));
    }
    assert_eq!(app.handshakes.load(Ordering::Relaxed), 2);
    let (status, _, _) = send(&mut client, get("c.example.com")).await;
    assert_eq!(
        status,
        StatusCode::SERVICE_UNAVAILABLE,
        "its certificate does not name this host"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_pass_through_tls_in_both_directions_to_their_end() {
    let rig = Rig::start().await;
    let app = Secure::new(&["web.example.com"]);
    app.believed_by(&rig);
    let pod = rig.pod(20, app.mirror()).await;
    let config = Config::default().tcp_with(
        RAW,
        tunnels(&[pod.address]),
        |_| {},
        |cluster| cluster.transport = terms(|_| {}),
    );
    rig.serve(config).await;
    let mut stream = rig.open(RAW).await.unwrap().stream;
    let sent: Vec<u8> = (0..300_000u32).map(|number| number as u8).collect();
    let expected = sent.clone();
    let (mut read, mut write) = tokio::io::split(&mut stream);
    let send = async {
        write.write_all(&sent).await.unwrap();
        write.shutdown().await.unwrap();
    };
    let receive = async {
        let mut received = Vec::new();
        read.read_to_end(&mut received).await.unwrap();
        received
    };
    let both = async { tokio::join!(send, receive).1 };
    let received = tokio::time::timeout(Duration::from_secs(20), both).await.unwrap();
    assert!(received == expected, "{} bytes came back", received.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_header_tells_who_asks_and_for_what() {
    let rig = Rig::start().await;
    let pod = rig.pod(20, mirror()).await;
    let proxied = |header: ProxyHeader| {
        let change = move |cluster: &mut ClusterSettings| {
            cluster.transport = TransportTerms::Proxied(header, Box::new(TransportTerms::Raw));
        };
        Config::default().tcp_with(RAW, tunnels(&[pod.address]), |_| {}, change)
    };
    rig.serve(proxied(ProxyHeader::V1)).await;
    let mut stream = rig.open(RAW).await.unwrap().stream;
    stream.write_all(b"and so on").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut echoed = String::new();
    stream.read_to_string(&mut echoed).await.unwrap();
    assert!(
        echoed.starts_with("PROXY TCP4 127.0.0.1 10.96.1.10 ") && echoed.ends_with(" 9000\r\nand so on"),
        "{echoed:?}"
    );
    rig.publish(proxied(ProxyHeader::V2 { values: Vec::new() }));
    let mut stream = rig.open(RAW).await.unwrap().stream;
    let mut header = [0; 28];
    stream.read_exact(&mut header).await.unwrap();
    assert_eq!(&header[..16], b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c");
    assert_eq!(
        (&header[16..24], &header[26..]),
        (&[127, 0, 0, 1, 10, 96, 1, 10][..], &[0x23, 0x28][..])
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_goes_to_the_host_that_it_names() {
    let rig = Rig::start().await;
    let listener = tokio::net::TcpListener::bind((rig.ip(30), 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let service =
                service_fn(|_| async { Ok::<_, std::convert::Infallible>(Response::new(Full::<Bytes>::from("there"))) });
            tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service));
        }
    });
    let cache = HostCacheTerms {
        family: Family::V4Only,
        cadence: Cadence::default(),
        host_ttl: Duration::from_secs(300),
        max_hosts: 16,
        query_timeout: Duration::from_secs(5),
        port: address.port(),
    };
    let config = Config::default().http_with(
        WEB,
        &[],
        |_| {},
        |cluster| cluster.discovery = Discovery::DynamicForwardProxy(cache),
    );
    rig.serve(config).await;
    let mut client = rig.http1(WEB).await;
    // The text of an address needs no server to be looked up.
    for host in [address.ip().to_string(), address.to_string()] {
        let (status, _, body) = send(&mut client, get(&host)).await;
        assert_eq!((status, &body[..]), (StatusCode::OK, &b"there"[..]), "{host}");
    }
    server.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn policies_see_the_server_name_that_a_client_asks_for() {
    let rig = Rig::start().await;
    let app = Secure::new(&["good.example.com", "evil.example.com"]);
    let pod = rig.pod(20, app.http()).await;
    let denied = Policy {
        permissions: vec![Condition::Text(Text::ServerName, StringMatcher::exact("evil.example.com"))],
        principals: vec![Condition::Always],
        condition: None,
    };
    let filter = Rbac {
        rules: Some(Rules::new(Action::Deny, [("p".to_owned(), denied)].into())),
        shadow: None,
    };
    let judged = |tcp: &mut TcpChain| {
        tcp.rbac = Filters::from_iter([filter]);
        tcp.server_name.judged = true;
    };
    rig.serve(Config::default().tcp_with(RAW, tunnels(&[pod.address]), judged, |_| {}))
        .await;
    let mut roots = RootCertStore::empty();
    roots.add(app.certificate.cert.der().clone()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = TlsConnector::from(Arc::new(config));
    for (name, allowed) in [
        ("good.example.com", true),
        ("evil.example.com", false),
        ("EVIL.example.com", false),
    ] {
        let stream = rig.open(RAW).await.unwrap().stream;
        let shaken = connector.connect(name.try_into().unwrap(), stream).await;
        assert_eq!(shaken.is_ok(), allowed, "{name}");
    }
    assert_eq!(
        pod.connects.load(Ordering::Relaxed),
        1,
        "who is denied is never seen by the application"
    );
    // Bytes that are no TLS name nobody: the policy lets them pass, and they arrive as they were sent.
    let mut plain = rig.open(RAW).await.unwrap().stream;
    plain.write_all(b"plain\n").await.unwrap();
    let arrived = async {
        while pod.connects.load(Ordering::Relaxed) < 2 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), arrived).await.unwrap();
}
