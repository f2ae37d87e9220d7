//! Identities of the rig: one CA and a certificate each for the client, the
//! waypoint and the destination, with SPIFFE names as a mesh has them.
//!
//! The waypoint's files are written to a folder under the names that Istio's
//! agent uses, for every proxy to read. The client checks signatures but not
//! names and chains: it only ever dials the proxy that the rig itself started,
//! and each cycle it saves leaves more of its core for load. Client and
//! destination never resume sessions, so that a cold connection is cold.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
    SanType,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};

/// The trust domain of the captures.
const TRUST_DOMAIN: &str = "cluster.local";
/// Who sends requests; a policy of the mesh names it.
pub(crate) const CLIENT: &str = "spiffe://cluster.local/ns/app/sa/client";
const WAYPOINT: &str = "spiffe://cluster.local/ns/app/sa/waypoint";
/// The captured cluster demands a destination of namespace `app`.
const DESTINATION: &str = "spiffe://cluster.local/ns/app/sa/web";

const H2: &[u8] = b"h2";

/// TLS for both ends of the rig, and the folder with the proxies' files.
pub(crate) struct Certificates {
    /// `cert-chain.pem`, `key.pem` and `root-cert.pem` of the waypoint.
    pub(crate) folder: PathBuf,
    pub(crate) client: Arc<ClientConfig>,
    pub(crate) destination: Arc<ServerConfig>,
}

impl Certificates {
    /// Makes a CA and three identities; writes the waypoint's files to `folder`.
    pub(crate) fn generate(folder: &Path) -> Result<Self> {
        let authority = authority()?;
        let waypoint = Leaf::issue(WAYPOINT, &authority)?;
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
        let root = authority.pem();
        let chain = format!("{}{root}", waypoint.pem);
        for (name, text) in [
            ("cert-chain.pem", &chain),
            ("key.pem", &waypoint.key.serialize_pem()),
            ("root-cert.pem", &root),
        ] {
            let path = folder.join(name);
            std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }

        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(authority.der().clone())?;
        Ok(Self {
            folder: folder.to_owned(),
            client: Arc::new(client_config(&provider, Leaf::issue(CLIENT, &authority)?)?),
            destination: Arc::new(server_config(&provider, roots, Leaf::issue(DESTINATION, &authority)?)?),
        })
    }
}

fn authority() -> Result<CertifiedIssuer<'static, KeyPair>> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.distinguished_name.push(DnType::OrganizationName, TRUST_DOMAIN);
    Ok(CertifiedIssuer::self_signed(params, KeyPair::generate()?)?)
}

struct Leaf {
    certificate: CertificateDer<'static>,
    pem: String,
    key: KeyPair,
}

impl Leaf {
    fn issue(uri: &str, authority: &CertifiedIssuer<'static, KeyPair>) -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(uri.try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, authority)?;
        Ok(Self {
            pem: certificate.pem(),
            certificate: certificate.der().clone(),
            key,
        })
    }

    fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key.serialize_der()).into()
    }
}

fn client_config(provider: &Arc<CryptoProvider>, leaf: Leaf) -> Result<ClientConfig> {
    let verifier = SignatureOnly(provider.signature_verification_algorithms);
    let key = leaf.private_key();
    let mut config = ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_auth_cert(vec![leaf.certificate], key)?;
    config.alpn_protocols = vec![H2.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

fn server_config(provider: &Arc<CryptoProvider>, roots: RootCertStore, leaf: Leaf) -> Result<ServerConfig> {
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider)).build()?;
    let key = leaf.private_key();
    let mut config = ServerConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![leaf.certificate], key)?;
    config.alpn_protocols = vec![H2.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// Checks that the peer holds the key of its certificate, and nothing more.
#[derive(Debug)]
struct SignatureOnly(WebPkiSupportedAlgorithms);

impl ServerCertVerifier for SignatureOnly {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signature, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}
