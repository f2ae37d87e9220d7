//! Whether an application's certificate is believed.

use std::{fmt, sync::Arc};

use rustls::{
    CertificateError, DigitallySignedStruct, Error, OtherError, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use webpki::{CertRevocationList, EndEntityCert, ExpirationPolicy, KeyUsage, RevocationCheckDepth, RevocationOptionsBuilder};
use x509_parser::{certificate::X509Certificate, prelude::FromDer as _};

use super::{
    names::{self, NameMatcher},
    secrets::Roots,
};
use crate::verify::chain_error;

/// Believes servers as a cluster's terms say.
pub(super) struct Verifier {
    /// `None` believes everybody.
    pub(super) roots: Option<Arc<Roots>>,
    pub(super) revoked: Vec<CertRevocationList<'static>>,
    pub(super) leaf_only: bool,
    pub(super) names: Vec<NameMatcher>,
    /// The name that the request demands.
    pub(super) host: Option<Arc<str>>,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
}

/// The certificate is of somebody else.
pub(super) struct WrongName {
    check: &'static str,
    found: Vec<String>,
}

// === impl Verifier ===

impl Verifier {
    fn check_chain(
        &self,
        roots: &Roots,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        let revoked: Vec<&CertRevocationList<'_>> = self.revoked.iter().collect();
        let depth = match self.leaf_only {
            true => RevocationCheckDepth::EndEntity,
            false => RevocationCheckDepth::Chain,
        };
        let revocation = RevocationOptionsBuilder::new(&revoked).ok().map(|builder| {
            builder
                .with_depth(depth)
                .with_expiration_policy(ExpirationPolicy::Enforce)
                .build()
        });
        // A certificate that is itself among the roots is believed as it is, also one that says that it is an authority: what
        // `openssl req -x509` makes.
        if revocation.is_none() && roots.certificates.iter().any(|root| root == end_entity) {
            return check_dates(end_entity, now);
        }
        let leaf = EndEntityCert::try_from(end_entity).map_err(chain_error)?;
        leaf.verify_for_usage(
            self.algorithms.all,
            &roots.store.roots,
            intermediates,
            now,
            KeyUsage::server_auth(),
            revocation,
            None,
        )
        .map_err(chain_error)?;
        Ok(())
    }
}

fn check_dates(certificate: &CertificateDer<'_>, now: UnixTime) -> Result<(), Error> {
    let (_, certificate) = X509Certificate::from_der(certificate).map_err(|_| CertificateError::BadEncoding)?;
    let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    let validity = certificate.validity();
    if now < validity.not_before.timestamp() {
        return Err(CertificateError::NotValidYet.into());
    }
    if now > validity.not_after.timestamp() {
        return Err(CertificateError::Expired.into());
    }
    Ok(())
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Some(roots) = &self.roots else {
            return Ok(ServerCertVerified::assertion());
        };
        self.check_chain(roots, end_entity, intermediates, now)?;
        if self.names.is_empty() && self.host.is_none() {
            return Ok(ServerCertVerified::assertion());
        }
        let found = names::of(end_entity);
        let wrong = |check| {
            let found = found.iter().map(|(_, name)| name.clone()).collect();
            let wrong = WrongName { check, found };
            Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(wrong))))
        };
        if let Some(host) = &self.host
            && !names::any_is_host(&found, host)
        {
            return Err(wrong("verify SAN list"));
        }
        if !self.names.is_empty() && !names::any_fits(&found, &self.names) {
            return Err(wrong("SAN matcher"));
        }
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

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier")
            .field("believes_everybody", &self.roots.is_none())
            .field("names", &self.names)
            .finish_non_exhaustive()
    }
}

// === impl WrongName ===

impl fmt::Display for WrongName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "verify cert failed: {}, certificate SANs are [{}]",
            self.check,
            self.found.join(", ")
        )
    }
}

/// rustls prints the cause of a refused certificate by `Debug`, so a person reads this in the log.
impl fmt::Debug for WrongName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for WrongName {}
