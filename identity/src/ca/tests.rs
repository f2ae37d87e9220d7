//! The whole way to a certificate, against an authority in this process.

use std::{fs, sync::Arc, time::Duration};

use rcgen::{CertifiedIssuer, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_RSA_SHA256, PublicKeyData as _, SanType};
use tempfile::TempDir;
use tokio::{net::TcpListener, time::timeout};
use tonic::Status;

use super::*;
use crate::{
    ClientTerms, Identity, ServerTerms, Source, WallClock,
    testing::{Asked, CaServer, handshake, id, root, sign},
};

const ID: &str = "spiffe://cluster.local/ns/app/sa/waypoint";
const PATIENCE: Duration = Duration::from_secs(20);

/// An authority, the files that a pod would have, and settings that point at them.
struct Lab {
    files: TempDir,
    ca: CaServer,
    settings: CaSettings,
}

impl Lab {
    async fn start(answer: impl Fn(&Asked) -> Result<Vec<String>, Status> + Send + Sync + 'static) -> Self {
        let ca = CaServer::start(answer).await;
        let files = tempfile::tempdir().unwrap();
        fs::write(files.path().join("root-cert.pem"), &ca.tls_root).unwrap();
        fs::write(files.path().join("istio-token"), "first-token\n").unwrap();
        let settings = CaSettings {
            root_file: files.path().join("root-cert.pem"),
            token_file: files.path().join("istio-token"),
            ..CaSettings::new(format!("localhost:{}", ca.address.port()), id(ID))
        };
        Self { files, ca, settings }
    }

    async fn issue(&self) -> Result<crate::Credentials, IssueError> {
        issue(&self.settings, &WallClock::default()).await
    }

    fn set_token(&self, token: &str) {
        fs::write(self.files.path().join("istio-token"), token).unwrap();
    }
}

/// Signs whatever is asked.
fn honest(root: CertifiedIssuer<'static, KeyPair>) -> impl Fn(&Asked) -> Result<Vec<String>, Status> + Send + Sync {
    move |asked| Ok(vec![sign(&root, &id(ID), &asked.csr().public_key), root.pem()])
}

#[tokio::test]
async fn a_certificate_is_asked_for_as_istiod_expects() {
    let mut lab = Lab::start(honest(root("mesh", &PKCS_ECDSA_P256_SHA256))).await;
    lab.settings.cluster_id = "cluster-7".to_owned();
    lab.settings.cert_signer = Some("clusterissuers/istio".to_owned());
    lab.settings.headers = vec![("X-Tenant".to_owned(), "blue".to_owned())];
    let credentials = lab.issue().await.unwrap();
    assert_eq!(credentials.id(), &id(ID));
    assert_eq!((credentials.chain().len(), credentials.roots().len()), (1, 1));

    let asked = lab.ca.asked.lock()[0].clone();
    assert_eq!(asked.header("authorization"), "Bearer first-token");
    assert_eq!((asked.header("clusterid"), asked.header("x-tenant")), ("cluster-7", "blue"));
    assert_eq!(asked.message.validity_duration, 24 * 3600);
    let signer = &asked.message.metadata.as_ref().unwrap().fields["CertSigner"];
    assert_eq!(signer, &cert_signer_value("clusterissuers/istio"));
    let csr = asked.csr();
    assert_eq!(csr.params.subject_alt_names, [SanType::URI(ID.try_into().unwrap())]);
    assert_eq!(csr.params.distinguished_name.iter().count(), 0, "the subject is empty");
    assert!(csr.public_key.algorithm() == &PKCS_ECDSA_P256_SHA256);
}

fn cert_signer_value(text: &str) -> prost_types::Value {
    prost_types::Value {
        kind: Some(prost_types::value::Kind::StringValue(text.to_owned())),
    }
}

#[tokio::test]
async fn every_request_has_a_new_key_and_the_token_of_the_moment() {
    let lab = Lab::start(honest(root("mesh", &PKCS_ECDSA_P256_SHA256))).await;
    lab.issue().await.unwrap();
    lab.set_token("second-token");
    lab.issue().await.unwrap();
    let asked = lab.ca.asked.lock();
    assert_eq!(asked[1].header("authorization"), "Bearer second-token");
    assert_ne!(asked[0].csr().public_key.der_bytes(), asked[1].csr().public_key.der_bytes());
}

#[tokio::test]
async fn rsa_roots_several_roots_and_intermediates_in_one_entry_are_taken() {
    let mesh = root("rsa mesh", &PKCS_RSA_SHA256);
    let other = root("next mesh", &PKCS_ECDSA_P256_SHA256).pem();
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let intermediate = CertifiedIssuer::signed_by(crate::testing::ca_params("intermediate"), key, &mesh).unwrap();
    let lab = Lab::start(move |asked: &Asked| {
        let leaf = sign(&intermediate, &id(ID), &asked.csr().public_key);
        Ok(vec![
            format!("{leaf}{}", intermediate.pem()),
            mesh.pem(),
            format!("{}{other}", mesh.pem()),
        ])
    })
    .await;
    let credentials = lab.issue().await.unwrap();
    assert_eq!(
        credentials.chain().len(),
        2,
        "leaf and intermediate; the root need not be sent"
    );
    assert_eq!(credentials.roots().len(), 2);
    let identity = Identity::fixed(credentials);
    let server = identity
        .server_config(&ServerTerms::hbone(["spiffe://cluster.local/"]))
        .unwrap();
    let client = identity
        .client_config(&ClientTerms::hbone(["spiffe://cluster.local/"]))
        .unwrap();
    assert_eq!(handshake(server, client).await.ok().unwrap().peer, id(ID));
}

#[tokio::test]
async fn an_unusable_answer_says_what_is_wrong_with_it() {
    type Answers = Box<dyn Fn(&Asked) -> Result<Vec<String>, Status> + Send + Sync>;
    let mesh = Arc::new(root("mesh", &PKCS_ECDSA_P256_SHA256));
    let stranger = rcgen::SubjectPublicKeyInfo::from_der(&KeyPair::generate().unwrap().subject_public_key_info()).unwrap();
    let leaf = {
        let mesh = mesh.clone();
        move |asked: &Asked, who: &str| sign(&mesh, &id(who), &asked.csr().public_key)
    };
    let root_pem = mesh.pem();
    let with_root = {
        let root_pem = root_pem.clone();
        move |leaf: String| Ok(vec![leaf, root_pem.clone()])
    };
    let cases: Vec<(&str, Answers)> = vec![
        ("0 certificate entries", Box::new(|_| Ok(vec![]))),
        (
            "1 certificate entries",
            Box::new({
                let leaf = leaf.clone();
                move |asked| Ok(vec![leaf(asked, ID)])
            }),
        ),
        (
            "certificate chain holds no certificate",
            Box::new({
                let with_root = with_root.clone();
                move |_| with_root("garbage".to_owned())
            }),
        ),
        (
            "cannot be parsed",
            Box::new({
                let with_root = with_root.clone();
                move |_| with_root("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".to_owned())
            }),
        ),
        (
            "trust bundle holds no certificate",
            Box::new({
                let leaf = leaf.clone();
                move |asked| Ok(vec![leaf(asked, ID), String::new()])
            }),
        ),
        (
            "is not the key of the certificate",
            Box::new({
                let (mesh, with_root) = (mesh.clone(), with_root.clone());
                move |_| {
                    let params = crate::generate::leaf_params(&id(ID), cairn_exchange::clock::wall(), PATIENCE).unwrap();
                    with_root(params.signed_by(&stranger, &*mesh).unwrap().pem())
                }
            }),
        ),
        (
            "a certificate for spiffe://cluster.local/ns/app/sa/other where spiffe://cluster.local/ns/app/sa/waypoint was asked for",
            Box::new({
                let (leaf, with_root) = (leaf.clone(), with_root.clone());
                move |asked| with_root(leaf(asked, "spiffe://cluster.local/ns/app/sa/other"))
            }),
        ),
        (
            "expired at",
            Box::new({
                let (mesh, with_root) = (mesh.clone(), with_root.clone());
                move |asked| {
                    let past = cairn_exchange::clock::wall() - 2 * PATIENCE;
                    let params = crate::generate::leaf_params(&id(ID), past, PATIENCE).unwrap();
                    with_root(params.signed_by(&asked.csr().public_key, &*mesh).unwrap().pem())
                }
            }),
        ),
        (
            "has no URI SAN",
            Box::new({
                let (mesh, with_root) = (mesh.clone(), with_root.clone());
                move |asked| {
                    let params = rcgen::CertificateParams::new(vec!["waypoint.app".to_owned()]).unwrap();
                    with_root(params.signed_by(&asked.csr().public_key, &*mesh).unwrap().pem())
                }
            }),
        ),
        (
            "answered Unavailable: not ready",
            Box::new(|_| Err(Status::unavailable("not ready"))),
        ),
        (
            "refused the token",
            Box::new(|_| Err(Status::unauthenticated("token expired"))),
        ),
    ];
    for (expected, answer) in cases {
        let lab = Lab::start(answer).await;
        let error = lab.issue().await.unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?} should contain {expected:?}");
        assert!(error.contains("localhost:"), "{error:?} should say whose answer it was");
    }
}

#[tokio::test]
async fn what_is_missing_is_named_with_its_remedy() {
    let lab = Lab::start(honest(root("mesh", &PKCS_ECDSA_P256_SHA256))).await;
    let with = |change: &dyn Fn(&mut CaSettings)| {
        let mut settings = lab.settings.clone();
        change(&mut settings);
        settings
    };
    let nowhere = lab.files.path().join("nowhere");
    let empty = lab.files.path().join("empty");
    fs::write(&empty, " \n").unwrap();
    let torn = lab.files.path().join("torn");
    fs::write(&torn, "one\ntwo").unwrap();
    for (settings, expected) in [
        (
            with(&|settings| settings.token_file = nowhere.clone()),
            "nowhere does not exist; it should hold a service account token",
        ),
        (
            with(&|settings| settings.token_file = empty.clone()),
            "empty is empty; it should hold a service account token",
        ),
        (
            with(&|settings| settings.token_file = torn.clone()),
            "torn holds something else than a token",
        ),
        (
            with(&|settings| settings.token_file = lab.files.path().into()),
            "cannot be read",
        ),
        (
            with(&|settings| settings.root_file = nowhere.clone()),
            "nowhere does not exist; it should hold the roots of istiod",
        ),
        (
            with(&|settings| settings.root_file = torn.clone()),
            "torn: the trust bundle holds no certificate",
        ),
        (
            with(&|settings| settings.server_name = Some("somebody.else".into())),
            "connecting to the CA at localhost:",
        ),
        (
            with(&|settings| settings.headers = vec![("a b".into(), "c".into())]),
            "\"a b\" with value \"c\" cannot be sent",
        ),
    ] {
        let error = issue(&settings, &WallClock::default()).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?} should contain {expected:?}");
    }
    assert!(lab.ca.asked.lock().is_empty(), "nothing was sent");
}

#[tokio::test]
async fn a_token_that_appears_later_is_enough() {
    let lab = Lab::start(honest(root("mesh", &PKCS_ECDSA_P256_SHA256))).await;
    fs::remove_file(&lab.settings.token_file).unwrap();
    let identity = Identity::start(Source::CertificateAuthority(lab.settings.clone()));
    while identity.status().failures == 0 {
        tokio::task::yield_now().await;
    }
    let why = identity.unavailable().unwrap().to_string();
    assert!(
        why.contains("no workload certificate yet") && why.contains("istio-token does not exist"),
        "{why}"
    );
    assert!(
        identity
            .server_config(&ServerTerms::hbone(["spiffe://cluster.local/"]))
            .is_none()
    );

    lab.set_token("late-token");
    timeout(PATIENCE, identity.ready()).await.unwrap();
    let status = identity.status();
    assert_eq!((status.id, status.last_error, status.generation), (Some(id(ID)), None, 1));
    assert!(
        identity
            .server_config(&ServerTerms::hbone(["spiffe://cluster.local/"]))
            .is_some()
    );
}

#[tokio::test]
async fn an_authority_that_is_absent_at_the_start_is_found_later() {
    let lab = Lab::start(honest(root("mesh", &PKCS_ECDSA_P256_SHA256))).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let settings = CaSettings {
        address: format!("localhost:{}", address.port()),
        ..lab.settings.clone()
    };
    let identity = Identity::start(Source::CertificateAuthority(settings));
    while identity.status().failures == 0 {
        tokio::task::yield_now().await;
    }
    let error = identity.status().last_error.unwrap();
    assert!(error.contains("connecting to the CA at localhost:"), "{error}");

    let listener = TcpListener::bind(address).await.unwrap();
    let ca = CaServer::start_on(listener, honest(root("mesh", &PKCS_ECDSA_P256_SHA256)));
    // Its new TLS root reaches the mounted file, which is read for each connection.
    fs::write(&lab.settings.root_file, &ca.tls_root).unwrap();
    timeout(PATIENCE, identity.ready()).await.unwrap();
    assert_eq!(ca.asked.lock().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_authority_that_accepts_and_says_nothing_is_given_up() {
    let lab = Lab::start(honest(root("mesh", &PKCS_ECDSA_P256_SHA256))).await;
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = silent.local_addr().unwrap().port();
    // The kernel completes the connection; nobody ever answers the handshake.
    let settings = CaSettings {
        address: format!("localhost:{port}"),
        ..lab.settings.clone()
    };
    let error = issue(&settings, &WallClock::default()).await.unwrap_err().to_string();
    assert_eq!(error, format!("connecting to the CA at localhost:{port} took longer than 5s"));
}

#[tokio::test]
async fn a_certificate_is_put_out_where_it_is_asked_for() {
    let mut lab = Lab::start(honest(root("mesh", &PKCS_ECDSA_P256_SHA256))).await;
    let folder = tempfile::tempdir().unwrap();
    lab.settings.output = Some(folder.path().to_owned());
    let credentials = lab.issue().await.unwrap();
    let read = |name: &str| fs::read(folder.path().join(name)).unwrap();
    let pem = crate::Pem {
        chain: read("cert-chain.pem"),
        key: read("key.pem"),
        roots: read("root-cert.pem"),
    };
    let put = crate::Credentials::from_pem(&pem, cairn_exchange::clock::wall()).unwrap();
    assert_eq!((put.id(), put.serial()), (credentials.id(), credentials.serial()));
    // A folder that is not there costs no certificate.
    lab.settings.output = Some(folder.path().join("nowhere"));
    lab.issue().await.unwrap();
}
