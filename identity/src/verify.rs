//! Whether a peer is believed: the chain to the trust bundle, and then the identity in it.
//!
//! webpki decides about the chain (signatures, dates, key usage, revocation) and nothing here weakens that. Host names play no
//! part: a SPIFFE certificate has none. What is added is the demand for a URI SAN with one of the trusted prefixes
//! (contract xds §2.2, §5.8: the prefixes are OR-ed).
//!
//! With revocation lists every certificate below the root must be covered by one that has not expired, as Envoy demands.

use std::{sync::Arc, time::SystemTime};

use rustls::{
    CertRevocationListError, CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore,
    SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, CertificateRevocationListDer, ServerName, UnixTime},
    server::{
        VerifierBuilderError, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use webpki::{CertRevocationList, EndEntityCert, ExpirationPolicy, KeyUsage, OwnedCertRevocationList, RevocationOptionsBuilder};

use crate::{
    credentials::Credentials,
    peer::{Leaf, PeerError},
};

/// The identities that are believed.
#[derive(Clone, Debug)]
struct Prefixes(Arc<[String]>);

/// Believes clients whose chain rustls' own verifier accepts and whose identity is wanted.
#[derive(Debug)]
struct ClientVerifier {
    chain: Arc<dyn ClientCertVerifier>,
    prefixes: Prefixes,
}

/// Believes servers in the same way; rustls' own verifier for servers cannot leave out the host name.
#[derive(Debug)]
struct ServerVerifier {
    roots: Arc<RootCertStore>,
    revoked: Vec<CertRevocationList<'static>>,
    algorithms: WebPkiSupportedAlgorithms,
    prefixes: Prefixes,
}

/// Verifies the clients of a server; without `required` a client may come without a certificate.
pub(crate) fn of_clients(
    roots: Arc<RootCertStore>,
    revocation_lists: &[CertificateRevocationListDer<'static>],
    provider: Arc<CryptoProvider>,
    prefixes: &[String],
    required: bool,
) -> Result<Arc<dyn ClientCertVerifier>, VerifierBuilderError> {
    let mut builder = WebPkiClientVerifier::builder_with_provider(roots, provider);
    if !revocation_lists.is_empty() {
        builder = builder
            .with_crls(revocation_lists.iter().cloned())
            .enforce_revocation_expiration();
    }
    if !required {
        builder = builder.allow_unauthenticated();
    }
    Ok(Arc::new(ClientVerifier {
        chain: builder.build()?,
        prefixes: Prefixes(prefixes.into()),
    }))
}

/// A root of another mesh can have the name of ours; then its signature is what fails. The peer is told what it has to mend: it is not
/// known here who issued its certificate.
fn unknown_issuer(error: Error) -> Error {
    match error {
        Error::InvalidCertificate(CertificateError::BadSignature) => CertificateError::UnknownIssuer.into(),
        other => other,
    }
}

/// Verifies the servers of a client.
pub(crate) fn of_servers(
    roots: Arc<RootCertStore>,
    revocation_lists: &[CertificateRevocationListDer<'static>],
    provider: &CryptoProvider,
    prefixes: &[String],
) -> Result<Arc<dyn ServerCertVerifier>, webpki::Error> {
    let revoked = revocation_lists
        .iter()
        .map(|list| OwnedCertRevocationList::from_der(list).map(Into::into));
    Ok(Arc::new(ServerVerifier {
        roots,
        revoked: revoked.collect::<Result<_, _>>()?,
        algorithms: provider.signature_verification_algorithms,
        prefixes: Prefixes(prefixes.into()),
    }))
}

/// Whether peers that believe what we believe will believe us.
pub(crate) fn own_chain(credentials: &Credentials, now: SystemTime) -> Result<(), Error> {
    let [end_entity, intermediates @ ..] = credentials.chain() else {
        return Err(CertificateError::BadEncoding.into());
    };
    let now = UnixTime::since_unix_epoch(now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default());
    let roots = credentials.anchors(&[]).map_err(|error| Error::General(error.to_string()))?;
    let algorithms = aws_lc_rs::default_provider().signature_verification_algorithms.all;
    let leaf = EndEntityCert::try_from(end_entity).map_err(chain_error)?;
    leaf.verify_for_usage(
        algorithms,
        &roots.roots,
        intermediates,
        now,
        KeyUsage::server_auth(),
        None,
        None,
    )
    .map_err(chain_error)?;
    Ok(())
}

// === impl Prefixes ===

impl Prefixes {
    fn check(&self, leaf: &CertificateDer<'_>) -> Result<(), PeerError> {
        if self.0.is_empty() {
            return Ok(());
        }
        let id = Leaf::read(leaf)?.id;
        if self.0.iter().any(|prefix| id.as_str().starts_with(prefix.as_str())) {
            return Ok(());
        }
        Err(PeerError::NotTrusted {
            id,
            wanted: self.0.to_vec(),
        })
    }
}

// === impl ClientVerifier ===

impl ClientCertVerifier for ClientVerifier {
    fn offer_client_auth(&self) -> bool {
        self.chain.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.chain.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self
            .chain
            .verify_client_cert(end_entity, intermediates, now)
            .map_err(unknown_issuer)?;
        self.prefixes.check(end_entity)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

// === impl ServerVerifier ===

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let revoked: Vec<&CertRevocationList<'_>> = self.revoked.iter().collect();
        let revocation = RevocationOptionsBuilder::new(&revoked)
            .ok()
            .map(|builder| builder.with_expiration_policy(ExpirationPolicy::Enforce).build());
        let leaf = EndEntityCert::try_from(end_entity).map_err(chain_error)?;
        leaf.verify_for_usage(
            self.algorithms.all,
            &self.roots.roots,
            intermediates,
            now,
            KeyUsage::server_auth(),
            revocation,
            None,
        )
        .map_err(chain_error)?;
        self.prefixes.check(end_entity)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// The error with which rustls sends the fitting alert.
pub(crate) fn chain_error(error: webpki::Error) -> Error {
    use webpki::Error as Webpki;
    let reason = match error {
        Webpki::CertNotValidYet { time, not_before } => CertificateError::NotValidYetContext { time, not_before },
        Webpki::CertExpired { time, not_after } => CertificateError::ExpiredContext { time, not_after },
        Webpki::UnknownIssuer => CertificateError::UnknownIssuer,
        Webpki::CertRevoked => CertificateError::Revoked,
        Webpki::UnknownRevocationStatus => CertificateError::UnknownRevocationStatus,
        Webpki::CrlExpired { time, next_update } => CertificateError::ExpiredRevocationListContext { time, next_update },
        Webpki::InvalidSignatureForPublicKey => CertificateError::BadSignature,
        Webpki::BadDer | Webpki::BadDerTime | Webpki::TrailingData(_) => CertificateError::BadEncoding,
        Webpki::RequiredEkuNotFoundContext(_) => CertificateError::InvalidPurpose,
        Webpki::InvalidCrlSignatureForPublicKey => return CertRevocationListError::BadSignature.into(),
        other => CertificateError::Other(OtherError(Arc::new(other))),
    };
    Error::InvalidCertificate(reason)
}

#[cfg(test)]
mod tests;
