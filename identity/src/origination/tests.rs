//! Handshakes in memory, with servers and secrets of every kind that a DestinationRule can ask for.

use std::{collections::BTreeSet, fs, sync::Arc, time::Duration};

use cairn_proto::envoy::{
    config::core::v3::{DataSource, data_source::Specifier},
    extensions::transport_sockets::tls::v3::{CertificateValidationContext, Secret, secret::Type},
};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, IsCa, KeyIdMethod, KeyPair,
    PKCS_ECDSA_P256_SHA256, RevokedCertParams, SanType, SerialNumber,
};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    server::WebPkiClientVerifier,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};
use tokio_rustls::TlsAcceptor;

use super::{NameKind, NameMatcher, NamePattern, OriginationError, OriginationTerms, Originator, PeerName, Secrets};
use crate::{
    Identity, TlsVersion,
    generate::Authority,
    testing::{LIFE, id, root},
};

type Issuer = CertifiedIssuer<'static, KeyPair>;

fn terms() -> OriginationTerms {
    OriginationTerms {
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
    }
}

fn leaf(issuer: &Issuer, names: &[&str], serial: u64) -> (String, KeyPair) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.serial_number = Some(SerialNumber::from(serial));
    params.subject_alt_names = names.iter().map(|name| san(name)).collect();
    let now = cairn_exchange::clock::wall();
    params.not_before = (now - LIFE).into();
    params.not_after = (now + LIFE).into();
    (params.signed_by(&key, issuer).unwrap().pem(), key)
}

fn san(name: &str) -> SanType {
    if let Ok(address) = name.parse() {
        return SanType::IpAddress(address);
    }
    match name.contains("://") {
        true => SanType::URI(name.try_into().unwrap()),
        false => SanType::DnsName(name.try_into().unwrap()),
    }
}

fn server(chain: &str, key: &KeyPair, clients: Option<&Issuer>) -> ServerConfig {
    let chain = crate::credentials::certificates("chain", chain.as_bytes()).unwrap();
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .unwrap();
    let builder = match clients {
        None => builder.with_no_client_auth(),
        Some(issuer) => {
            let mut roots = RootCertStore::empty();
            roots.add(issuer.der().clone()).unwrap();
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            builder.with_client_cert_verifier(verifier.unwrap())
        }
    };
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let mut config = builder.with_single_cert(chain, key).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config
}

/// What a server saw: server name and application protocol, and whether a client showed a certificate.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    server_name: Option<String>,
    alpn: Option<Vec<u8>>,
    certificate: bool,
}

async fn shake(
    originator: &Originator,
    terms: OriginationTerms,
    peer: PeerName,
    config: ServerConfig,
) -> Result<Seen, OriginationError> {
    let (near, far) = duplex(64 * 1024);
    let accept = async {
        let mut stream = TlsAcceptor::from(Arc::new(config)).accept(far).await.ok()?;
        let mut byte = [0];
        stream.read_exact(&mut byte).await.ok()?;
        let (_, connection) = stream.get_ref();
        Some(Seen {
            server_name: connection.server_name().map(str::to_owned),
            alpn: connection.alpn_protocol().map(<[u8]>::to_vec),
            certificate: connection.peer_certificates().is_some(),
        })
    };
    let open = async {
        let address = Some([127, 0, 0, 1].into());
        let mut stream = originator
            .connect(near, &Arc::new(terms), &peer, Some(b"http/1.1"), address)
            .await?;
        let _ = stream.write_all(b"x").await;
        let _ = stream.flush().await;
        Ok::<_, OriginationError>(stream)
    };
    let (seen, opened) = tokio::time::timeout(Duration::from_secs(10), async { tokio::join!(accept, open) })
        .await
        .unwrap();
    opened.map(|_| seen.unwrap())
}

fn identity() -> Identity {
    Identity::fixed(Authority::new("td").unwrap().issue(&id("spiffe://td/ns/a/sa/b")).unwrap())
}

fn believing(issuer: &Issuer) -> Originator {
    believing_pem(&issuer.pem(), None)
}

fn believing_pem(roots: &str, crl: Option<String>) -> Originator {
    let secrets = Secrets::default();
    let inline = |text: String| DataSource {
        specifier: Some(Specifier::InlineString(text)),
        watched_directory: None,
    };
    let context = CertificateValidationContext {
        trusted_ca: Some(inline(roots.to_owned())),
        crl: crl.map(inline),
        ..CertificateValidationContext::default()
    };
    let secret = Secret {
        name: "roots".into(),
        r#type: Some(Type::ValidationContext(context)),
    };
    secrets.deliver("roots", secret).unwrap();
    Originator::new(identity(), secrets)
}

fn exact(name: &str) -> NameMatcher {
    NameMatcher {
        kind: None,
        pattern: NamePattern::Exact(name.into()),
        ignore_case: false,
    }
}

#[tokio::test]
async fn one_of_the_names_has_to_be_in_the_certificate() {
    let issuer = root("outside", &PKCS_ECDSA_P256_SHA256);
    let originator = believing(&issuer);
    for (names, wanted, believed) in [
        (&["web.example.com"][..], vec![], true),
        (&["web.example.com"], vec![exact("web.example.com")], true),
        (&["*.example.com"], vec![exact("web.example.com")], true),
        (&["other.example.com"], vec![exact("a.b"), exact("other.example.com")], true),
        (&["other.example.com", "10.0.0.1"], vec![exact("web.example.com")], false),
        (
            &["spiffe://td/ns/a/sa/b"],
            vec![NameMatcher {
                kind: Some(NameKind::Uri),
                pattern: NamePattern::Prefix("spiffe://td/".into()),
                ignore_case: false,
            }],
            true,
        ),
    ] {
        let (chain, key) = leaf(&issuer, names, 1);
        let terms = OriginationTerms {
            names: wanted,
            ..terms()
        };
        let seen = shake(&originator, terms, PeerName::default(), server(&chain, &key, None)).await;
        match seen {
            Ok(seen) => {
                assert!(believed, "{names:?}");
                let expected = Seen {
                    server_name: Some("web.example.com".into()),
                    alpn: Some(b"http/1.1".to_vec()),
                    certificate: false,
                };
                assert_eq!(seen, expected);
            }
            Err(error) => {
                assert!(!believed, "{names:?}: {error}");
                // Envoy's words, byte for byte (golden 28 `subject-names-do-not-match`).
                assert_eq!(
                    error.to_string(),
                    "TLS_error:|268435581:SSL_routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED:verify_cert_failed:_SAN_matcher,_certificate_SANs_are_[other.example.com,_10.0.0.1]:TLS_error_end"
                );
            }
        }
    }
}

#[tokio::test]
async fn the_name_of_the_request_replaces_the_server_name_and_is_verified() {
    let issuer = root("outside", &PKCS_ECDSA_P256_SHA256);
    let originator = believing(&issuer);
    let (chain, key) = leaf(&issuer, &["a.example.com", "10.0.0.1"], 1);
    for (host, believed) in [("a.example.com", true), ("b.example.com", false)] {
        let peer = PeerName {
            server_name: Some(host.into()),
            verify: Some(host.into()),
        };
        let terms = OriginationTerms {
            server_name: None,
            ..terms()
        };
        let seen = shake(&originator, terms, peer, server(&chain, &key, None)).await;
        assert_eq!(seen.is_ok(), believed, "{host}: {seen:?}");
        if let Ok(seen) = seen {
            assert_eq!(seen.server_name.as_deref(), Some(host));
        }
    }
    // An address is no server name, but may be verified.
    let peer = PeerName {
        server_name: None,
        verify: Some("10.0.0.1".into()),
    };
    let terms = OriginationTerms {
        server_name: None,
        ..terms()
    };
    let seen = shake(&originator, terms, peer, server(&chain, &key, None)).await.unwrap();
    assert_eq!(seen.server_name, None);
}

#[tokio::test]
async fn strangers_are_believed_only_when_nobody_is_verified() {
    let (issuer, other) = (
        root("outside", &PKCS_ECDSA_P256_SHA256),
        root("other", &PKCS_ECDSA_P256_SHA256),
    );
    let originator = believing(&issuer);
    let (chain, key) = leaf(&other, &["web.example.com"], 1);
    let error = shake(&originator, terms(), PeerName::default(), server(&chain, &key, None))
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("unable_to_get_local_issuer_certificate"), "{error}");
    let insecure = OriginationTerms { roots: None, ..terms() };
    shake(&originator, insecure, PeerName::default(), server(&chain, &key, None))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_certificate_that_is_itself_a_root_is_believed() {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(["web.example.com".to_owned()]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let own = params.self_signed(&key).unwrap().pem();
    let originator = believing_pem(&own, None);
    shake(&originator, terms(), PeerName::default(), server(&own, &key, None))
        .await
        .unwrap();
    // But no other of that authority, under another name.
    let terms = OriginationTerms {
        names: vec![exact("else.example.com")],
        ..terms()
    };
    shake(&originator, terms, PeerName::default(), server(&own, &key, None))
        .await
        .unwrap_err();
}

#[tokio::test]
async fn revoked_certificates_are_not_believed() {
    let issuer = root("outside", &PKCS_ECDSA_P256_SHA256);
    let now = cairn_exchange::clock::wall();
    let list = CertificateRevocationListParams {
        this_update: now.into(),
        next_update: (now + LIFE).into(),
        crl_number: SerialNumber::from(1),
        issuing_distribution_point: None,
        revoked_certs: vec![RevokedCertParams {
            serial_number: SerialNumber::from(7),
            revocation_time: now.into(),
            reason_code: None,
            invalidity_date: None,
        }],
        key_identifier_method: KeyIdMethod::Sha256,
    };
    let list = list.signed_by(&issuer).unwrap().pem().unwrap();
    let originator = believing_pem(&issuer.pem(), Some(list.clone()));
    for (serial, believed) in [(6, true), (7, false)] {
        let (chain, key) = leaf(&issuer, &["web.example.com"], serial);
        let seen = shake(&originator, terms(), PeerName::default(), server(&chain, &key, None)).await;
        assert_eq!(seen.is_ok(), believed, "{serial}: {seen:?}");
    }
    // As a file beside roots that came otherwise.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("crl.pem");
    fs::write(&path, list).unwrap();
    let originator = believing(&issuer);
    let name = Secrets::revocation_file(path.to_str().unwrap());
    let with_file = OriginationTerms {
        revocation: Some(name.as_str().into()),
        ..terms()
    };
    let (chain, key) = leaf(&issuer, &["web.example.com"], 7);
    let error = shake(
        &originator,
        with_file.clone(),
        PeerName::default(),
        server(&chain, &key, None),
    )
    .await;
    assert!(
        matches!(error, Err(OriginationError::Secret(_))),
        "before the file was read nobody is believed: {error:?}"
    );
    originator.secrets().want(&BTreeSet::from(["roots".to_owned(), name.clone()]));
    originator.secrets().read_now().await;
    let error = shake(&originator, with_file, PeerName::default(), server(&chain, &key, None))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("certificate_revoked"), "{error}");
}

#[tokio::test]
async fn certificates_from_files_are_shown_and_followed() {
    let (outside, clients) = (
        root("outside", &PKCS_ECDSA_P256_SHA256),
        root("clients", &PKCS_ECDSA_P256_SHA256),
    );
    let originator = believing(&outside);
    let folder = tempfile::tempdir().unwrap();
    let (chain_path, key_path) = (folder.path().join("client.pem"), folder.path().join("client.key"));
    let secret = format!("file-cert:{}~{}", chain_path.display(), key_path.display());
    originator
        .secrets()
        .want(&BTreeSet::from(["roots".to_owned(), secret.clone()]));
    let terms = OriginationTerms {
        certificate: Some(secret.as_str().into()),
        ..terms()
    };
    let (chain, key) = leaf(&outside, &["web.example.com"], 1);
    let try_now = || {
        shake(
            &originator,
            terms.clone(),
            PeerName::default(),
            server(&chain, &key, Some(&clients)),
        )
    };
    originator.secrets().read_now().await;
    let error = try_now().await.unwrap_err();
    assert_eq!(error.to_string(), "TLS_error:_Secret_is_not_supplied_by_SDS");

    let write = |(chain, key): (String, KeyPair)| {
        fs::write(&chain_path, chain).unwrap();
        fs::write(&key_path, key.serialize_pem()).unwrap();
    };
    let (mine, other) = (leaf(&clients, &["me"], 2), leaf(&clients, &["me"], 3));
    // A new certificate beside an old key is not taken.
    fs::write(&key_path, other.1.serialize_pem()).unwrap();
    fs::write(&chain_path, &mine.0).unwrap();
    originator.secrets().read_now().await;
    assert!(!originator.secrets().knows(&secret));
    write(mine);
    originator.secrets().read_now().await;
    assert!(try_now().await.unwrap().certificate);

    // Another authority's: the server does not believe it, which shows that the new one is used.
    write(leaf(&outside, &["me"], 4));
    originator.secrets().read_now().await;
    let (near, _far) = duplex(1024);
    drop(near);
    let seen = tokio::time::timeout(Duration::from_secs(10), async {
        let (near, far) = duplex(64 * 1024);
        let config = server(&chain, &key, Some(&clients));
        let accept = async move { TlsAcceptor::from(Arc::new(config)).accept(far).await.map(drop) };
        let terms = Arc::new(terms.clone());
        let peer = PeerName::default();
        let open = originator.connect(near, &terms, &peer, None, None);
        tokio::join!(accept, open).0
    });
    seen.await.unwrap().unwrap_err();
}

#[tokio::test]
async fn a_secret_without_use_keeps_what_was_known() {
    let issuer = root("outside", &PKCS_ECDSA_P256_SHA256);
    let originator = believing(&issuer);
    let empty = Secret {
        name: "roots".into(),
        r#type: None,
    };
    originator.secrets().deliver("roots", empty).unwrap_err();
    assert!(originator.secrets().knows("roots"));
    let error = Secrets::default().deliver("x", Secret::default()).unwrap_err().to_string();
    assert_eq!(error, "the secret holds no content");
    originator.secrets().want(&BTreeSet::new());
    assert!(!originator.secrets().knows("roots"));
}

#[tokio::test]
async fn a_connection_waits_for_a_secret_that_is_just_being_fetched() {
    let issuer = root("outside", &PKCS_ECDSA_P256_SHA256);
    let (chain, key) = leaf(&issuer, &["web.example.com"], 1);
    let originator = Originator::new(identity(), Secrets::default());
    let shaken = || shake(&originator, terms(), PeerName::default(), server(&chain, &key, None));
    let error = shaken().await.unwrap_err();
    assert!(
        matches!(error, OriginationError::Secret(_)),
        "nobody has asked for it: {error}"
    );

    originator.secrets().want(&BTreeSet::from(["roots".to_owned()]));
    let secret = |roots: Option<String>| Secret {
        name: "roots".into(),
        r#type: roots.map(|roots| {
            Type::ValidationContext(CertificateValidationContext {
                trusted_ca: Some(DataSource {
                    specifier: Some(Specifier::InlineString(roots)),
                    watched_directory: None,
                }),
                ..CertificateValidationContext::default()
            })
        }),
    };
    let arrives = async {
        tokio::task::yield_now().await;
        originator.secrets().deliver("roots", secret(Some(issuer.pem()))).unwrap();
    };
    let (shaken_late, ()) = tokio::join!(shaken(), arrives);
    shaken_late.unwrap();

    // Of another kind than it is named for, it is not waited for either.
    let as_certificate = OriginationTerms {
        certificate: Some("roots".into()),
        ..terms()
    };
    let error = shake(&originator, as_certificate, PeerName::default(), server(&chain, &key, None)).await;
    assert!(matches!(error, Err(OriginationError::Kind(_))), "{error:?}");

    // One that came and is of no use is not waited for.
    originator.secrets().want(&BTreeSet::new());
    originator.secrets().want(&BTreeSet::from(["roots".to_owned()]));
    originator.secrets().deliver("roots", secret(None)).unwrap_err();
    assert!(matches!(shaken().await, Err(OriginationError::Secret(_))));
}
