//! Real handshakes between identities of several authorities and trust domains.

use rcgen::{
    CertificateRevocationListParams, CertifiedIssuer, CrlIssuingDistributionPoint, KeyIdMethod, KeyPair, PKCS_ECDSA_P256_SHA256,
    RevokedCertParams, SerialNumber,
};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

use super::*;
use crate::{
    ClientTerms, Credentials, ServerTerms, TlsVersion, config, generate,
    testing::{LIFE, Shaken, handshake, id, root},
};

const SERVER: &str = "spiffe://cluster.local/ns/app/sa/waypoint";
const CLIENT: &str = "spiffe://cluster.local/ns/app/sa/client";

type Issuer = CertifiedIssuer<'static, KeyPair>;

/// Credentials of `who` with whatever `change` makes of the certificate; believes `roots`.
fn credentials(issuer: &Issuer, who: &str, roots: &[&Issuer], change: impl FnOnce(&mut rcgen::CertificateParams)) -> Credentials {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let now = cairn_exchange::clock::wall();
    let mut params = generate::leaf_params(&id(who), now, LIFE).unwrap();
    change(&mut params);
    let leaf = params.signed_by(&key, issuer).unwrap();
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key));
    let roots = roots.iter().map(|root| root.der().clone()).collect();
    Credentials::new(vec![leaf.into()], key, roots, now).unwrap()
}

fn plain(issuer: &Issuer, who: &str, roots: &[&Issuer]) -> Credentials {
    credentials(issuer, who, roots, |_| {})
}

fn mesh() -> Issuer {
    root("mesh", &PKCS_ECDSA_P256_SHA256)
}

async fn shake(
    server: (&Credentials, &ServerTerms),
    client: (&Credentials, &ClientTerms),
) -> Result<Shaken, (Option<String>, Option<String>)> {
    shake_with(server, client, &[]).await
}

async fn shake_with(
    server: (&Credentials, &ServerTerms),
    client: (&Credentials, &ClientTerms),
    revoked: &[CertificateRevocationListDer<'static>],
) -> Result<Shaken, (Option<String>, Option<String>)> {
    let server = config::server(server.0, revoked, server.1).unwrap();
    let client = config::client(client.0, revoked, client.1).unwrap();
    handshake(Arc::new(server), Arc::new(client)).await
}

fn refused_by_server(result: Result<Shaken, (Option<String>, Option<String>)>) -> String {
    result
        .err()
        .expect("the handshake should fail")
        .0
        .expect("the server should refuse")
}

fn refused_by_client(result: Result<Shaken, (Option<String>, Option<String>)>) -> String {
    result
        .err()
        .expect("the handshake should fail")
        .1
        .expect("the client should refuse")
}

const LOCAL: [&str; 1] = ["spiffe://cluster.local/"];
const ANYBODY: [&str; 0] = [];

#[tokio::test]
async fn peers_of_one_trust_domain_shake_hands_with_h2() {
    let mesh = mesh();
    let (server, client) = (plain(&mesh, SERVER, &[&mesh]), plain(&mesh, CLIENT, &[&mesh]));
    let shaken = shake((&server, &ServerTerms::hbone(LOCAL)), (&client, &ClientTerms::hbone(LOCAL)))
        .await
        .ok()
        .unwrap();
    assert_eq!(
        (shaken.peer, shaken.alpn.as_deref(), shaken.resumed),
        (id(CLIENT), Some(&b"h2"[..]), false)
    );
}

#[tokio::test]
async fn an_alias_is_believed_and_another_trust_domain_is_refused_by_name() {
    let mesh = mesh();
    let server = plain(&mesh, SERVER, &[&mesh]);
    let aliases = ServerTerms::hbone(["spiffe://cluster.local/", "spiffe://old.example/"]);
    let alias = plain(&mesh, "spiffe://old.example/ns/app/sa/client", &[&mesh]);
    let other = plain(&mesh, "spiffe://other.example/ns/app/sa/client", &[&mesh]);
    // A prefix without its slash would believe this one.
    let longer = plain(&mesh, "spiffe://cluster.local.evil/ns/app/sa/client", &[&mesh]);
    let terms = ClientTerms::hbone(LOCAL);
    assert_eq!(
        shake((&server, &aliases), (&alias, &terms)).await.ok().unwrap().peer,
        id("spiffe://old.example/ns/app/sa/client")
    );
    for (client, name) in [
        (other, "spiffe://other.example/ns/app/sa/client"),
        (longer, "spiffe://cluster.local.evil/ns/app/sa/client"),
    ] {
        let error = refused_by_server(shake((&server, &aliases), (&client, &terms)).await);
        let expected = format!("peer identity {name} is not of trust domain(s) spiffe://cluster.local/, spiffe://old.example/");
        assert!(error.contains(&expected), "{error}");
    }
}

#[tokio::test]
async fn a_server_of_another_trust_domain_is_refused_by_name() {
    let mesh = mesh();
    let server = plain(&mesh, "spiffe://other.example/ns/app/sa/server", &[&mesh]);
    let client = plain(&mesh, CLIENT, &[&mesh]);
    let any = ServerTerms::hbone(ANYBODY);
    let narrow = ClientTerms::hbone(["spiffe://a.example/", "spiffe://cluster.local/"]);
    let error = refused_by_client(shake((&server, &any), (&client, &narrow)).await);
    assert!(
        error.contains("peer identity spiffe://other.example/ns/app/sa/server is not of trust domain(s) spiffe://a.example/"),
        "{error}"
    );
    let wide = ClientTerms::hbone(["spiffe://a.example/", "spiffe://other.example/"]);
    assert!(shake((&server, &any), (&client, &wide)).await.is_ok());
}

#[tokio::test]
async fn chains_that_do_not_lead_to_the_bundle_are_refused_on_both_sides() {
    let (mesh, stranger) = (mesh(), root("stranger", &PKCS_ECDSA_P256_SHA256));
    let any = (ServerTerms::hbone(ANYBODY), ClientTerms::hbone(ANYBODY));
    // Same identities, other authority: without host names and prefixes the chain is all there is.
    let server = plain(&mesh, SERVER, &[&mesh]);
    let false_client = plain(&stranger, CLIENT, &[&mesh]);
    let error = refused_by_server(shake((&server, &any.0), (&false_client, &any.1)).await);
    assert!(error.contains("UnknownIssuer"), "{error}");
    let false_server = plain(&stranger, SERVER, &[&stranger, &mesh]);
    let client = plain(&mesh, CLIENT, &[&mesh]);
    let error = refused_by_client(shake((&false_server, &any.0), (&client, &any.1)).await);
    assert!(error.contains("UnknownIssuer"), "{error}");
    // With both roots, as during a rotation of the authority, both sides believe.
    let (server, client) = (
        plain(&mesh, SERVER, &[&mesh, &stranger]),
        plain(&stranger, CLIENT, &[&stranger, &mesh]),
    );
    assert!(shake((&server, &any.0), (&client, &any.1)).await.is_ok());
    // Extra roots do the same for terms.
    let server = plain(&mesh, SERVER, &[&mesh]);
    let extra = ServerTerms {
        extra_roots: vec![stranger.der().clone()],
        ..any.0
    };
    assert!(shake((&server, &extra), (&client, &any.1)).await.is_ok());
}

#[tokio::test]
async fn a_certificate_for_other_purposes_or_with_another_end_is_refused() {
    let mesh = mesh();
    let good = plain(&mesh, CLIENT, &[&mesh]);
    let any = (ServerTerms::hbone(ANYBODY), ClientTerms::hbone(ANYBODY));
    let only_client = |params: &mut rcgen::CertificateParams| {
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    };
    let server = credentials(&mesh, SERVER, &[&mesh], only_client);
    let error = refused_by_client(shake((&server, &any.0), (&good, &any.1)).await);
    assert!(error.to_lowercase().contains("purpose"), "{error}");
    let future = |params: &mut rcgen::CertificateParams| params.not_before = (cairn_exchange::clock::wall() + LIFE / 2).into();
    let server = credentials(&mesh, SERVER, &[&mesh], future);
    let error = refused_by_client(shake((&server, &any.0), (&good, &any.1)).await);
    assert!(error.contains("not valid yet"), "{error}");
}

#[tokio::test]
async fn a_client_without_certificate_is_refused_unless_the_terms_allow_it() {
    let mesh = mesh();
    let server = plain(&mesh, SERVER, &[&mesh]);
    let nobody = || {
        let mut config = config::client(&server, &[], &ClientTerms::hbone(LOCAL)).unwrap();
        config.client_auth_cert_resolver = Arc::new(NoCertificate);
        Arc::new(config)
    };
    let strict = config::server(&server, &[], &ServerTerms::hbone(LOCAL)).unwrap();
    let error = refused_by_server(handshake(Arc::new(strict), nobody()).await);
    assert!(error.contains("peer sent no certificates"), "{error}");
    let lax = ServerTerms {
        require_client_certificate: false,
        ..ServerTerms::hbone(LOCAL)
    };
    let lax = Arc::new(config::server(&server, &[], &lax).unwrap());
    let (near, far) = tokio::io::duplex(64 << 10);
    let connector = tokio_rustls::TlsConnector::from(nobody());
    let acceptor = tokio_rustls::TlsAcceptor::from(lax);
    let (accepted, connected) = tokio::join!(acceptor.accept(far), connector.connect(crate::server_name(), near));
    assert!(accepted.unwrap().get_ref().1.peer_certificates().is_none());
    connected.unwrap();
}

#[derive(Debug)]
struct NoCertificate;

impl rustls::client::ResolvesClientCert for NoCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

#[tokio::test]
async fn versions_and_curves_are_those_of_the_terms() {
    let mesh = mesh();
    let (server, client) = (plain(&mesh, SERVER, &[&mesh]), plain(&mesh, CLIENT, &[&mesh]));
    let tls12 = ClientTerms {
        min_version: TlsVersion::V1_2,
        max_version: TlsVersion::V1_2,
        ..ClientTerms::hbone(LOCAL)
    };
    let error = refused_by_server(shake((&server, &ServerTerms::hbone(LOCAL)), (&client, &tls12)).await);
    assert!(error.contains("Tls12NotOfferedOrEnabled"), "{error}");
    let both = ServerTerms {
        min_version: TlsVersion::V1_2,
        ..ServerTerms::hbone(LOCAL)
    };
    assert!(shake((&server, &both), (&client, &tls12)).await.is_ok());
    let p256 = ServerTerms {
        curves: vec!["P-256".into()],
        ..ServerTerms::hbone(LOCAL)
    };
    let pqc = ClientTerms {
        curves: vec!["X25519MLKEM768".into()],
        ..ClientTerms::hbone(LOCAL)
    };
    assert!(shake((&server, &p256), (&client, &pqc)).await.is_err());
    let pqc_server = ServerTerms {
        curves: vec!["X25519MLKEM768".into()],
        ..ServerTerms::hbone(LOCAL)
    };
    assert!(shake((&server, &pqc_server), (&client, &pqc)).await.is_ok());
}

#[test]
fn terms_that_allow_nothing_are_refused_and_not_a_panic() {
    let mesh = mesh();
    let us = plain(&mesh, SERVER, &[&mesh]);
    for (terms, expected) in [
        (
            ServerTerms {
                curves: vec!["P-521".into()],
                ..ServerTerms::hbone(LOCAL)
            },
            "P-521",
        ),
        (
            ServerTerms {
                cipher_suites: vec!["TLS_NULL".into()],
                ..ServerTerms::hbone(LOCAL)
            },
            "TLS_NULL",
        ),
        (
            ServerTerms {
                max_version: TlsVersion::V1_2,
                ..ServerTerms::hbone(LOCAL)
            },
            "allow no version",
        ),
        (
            ServerTerms {
                extra_roots: vec![vec![1, 2, 3].into()],
                ..ServerTerms::hbone(LOCAL)
            },
            "additional roots",
        ),
    ] {
        let error = config::server(&us, &[], &terms).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

fn revocation_list(
    issuer: &Issuer,
    revoked: &[&str],
    next_update: std::time::SystemTime,
) -> CertificateRevocationListDer<'static> {
    let now = cairn_exchange::clock::wall();
    let serial = |text: &&str| {
        SerialNumber::from(
            (0..text.len())
                .step_by(2)
                .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
                .collect::<Vec<_>>(),
        )
    };
    CertificateRevocationListParams {
        this_update: (now - LIFE).into(),
        next_update: next_update.into(),
        crl_number: SerialNumber::from(1),
        issuing_distribution_point: None::<CrlIssuingDistributionPoint>,
        revoked_certs: revoked
            .iter()
            .map(|text| RevokedCertParams {
                serial_number: serial(text),
                revocation_time: now.into(),
                reason_code: None,
                invalidity_date: None,
            })
            .collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    }
    .signed_by(issuer)
    .unwrap()
    .into()
}

#[tokio::test]
async fn revoked_certificates_and_expired_lists_are_refused_on_both_sides() {
    let mesh = mesh();
    let (server, client) = (plain(&mesh, SERVER, &[&mesh]), plain(&mesh, CLIENT, &[&mesh]));
    let terms = (ServerTerms::hbone(LOCAL), ClientTerms::hbone(LOCAL));
    let shake = async |list| shake_with((&server, &terms.0), (&client, &terms.1), &[list]).await;
    let later = cairn_exchange::clock::wall() + LIFE;
    assert!(
        shake(revocation_list(&mesh, &["01"], later)).await.is_ok(),
        "somebody else is revoked"
    );
    let error = refused_by_server(shake(revocation_list(&mesh, &[client.serial()], later)).await);
    assert!(error.to_lowercase().contains("revoked"), "{error}");
    let error = refused_by_client(shake(revocation_list(&mesh, &[server.serial()], later)).await);
    assert!(error.to_lowercase().contains("revoked"), "{error}");
    // An expired list says nothing of today; each side alone refuses.
    let past = [revocation_list(&mesh, &["01"], cairn_exchange::clock::wall() - LIFE / 2)];
    let with = |for_server: &[_], for_client: &[_]| {
        let server = config::server(&server, for_server, &terms.0).unwrap();
        let client = config::client(&client, for_client, &terms.1).unwrap();
        handshake(Arc::new(server), Arc::new(client))
    };
    for error in [
        refused_by_server(with(&past, &[]).await),
        refused_by_client(with(&[], &past).await),
    ] {
        assert!(error.contains("revocation list expired"), "{error}");
    }
}

#[test]
fn our_own_chain_is_held_against_our_own_bundle() {
    let (mesh, other) = (mesh(), root("other", &PKCS_ECDSA_P256_SHA256));
    let now = cairn_exchange::clock::wall();
    assert!(own_chain(&plain(&mesh, SERVER, &[&other, &mesh]), now).is_ok());
    let error = own_chain(&plain(&mesh, SERVER, &[&other]), now).unwrap_err().to_string();
    assert!(error.contains("UnknownIssuer"), "{error}");
}
