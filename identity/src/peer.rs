//! Whose certificate is this: the one URI SAN of a leaf.
//!
//! An X.509 SVID has exactly one URI SAN (SPIFFE X509-SVID §2); a certificate with none or with several is nobody's.

use std::{fmt, sync::Arc, time::SystemTime};

use cairn_exchange::{InvalidSpiffeId, SpiffeId, clock};
use rustls::{CertificateError, OtherError, pki_types::CertificateDer};
use x509_parser::{
    extensions::{GeneralName, ParsedExtension},
    prelude::{FromDer as _, X509Certificate},
};

/// Why a peer's certificate does not say who the peer is, or says somebody that is not believed.
#[derive(Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// The handshake had no certificate of the peer.
    #[error("the peer presented no certificate")]
    NoCertificate,
    /// Not an X.509 certificate.
    #[error("the peer's certificate cannot be parsed: {0}")]
    Unreadable(String),
    /// No URI SAN, so no SPIFFE ID.
    #[error("the certificate of {subject:?} has no URI SAN, so the peer has no SPIFFE identity")]
    NoUri {
        /// The certificate's subject.
        subject: String,
    },
    /// More than one URI SAN.
    #[error("the certificate has {0} URI SANs; a SPIFFE certificate has exactly one")]
    SeveralUris(usize),
    /// The URI SAN is not a SPIFFE ID.
    #[error("the certificate's URI SAN is no identity: {0}")]
    Invalid(#[from] InvalidSpiffeId),
    /// The identity is not one of those that were asked for.
    #[error("peer identity {id} is not of trust domain(s) {}", .wanted.join(", "))]
    NotTrusted {
        /// Who the peer is.
        id: SpiffeId,
        /// The prefixes of which one should have matched.
        wanted: Vec<String>,
    },
    /// The certificate has expired since it was verified: a resumed session, or a connection that waited long.
    #[error("the certificate of {id} expired at {not_after}")]
    Expired {
        /// Who the peer was.
        id: SpiffeId,
        /// When the certificate expired.
        not_after: String,
    },
}

/// What we need to know of a leaf.
#[derive(Clone, Debug)]
pub(crate) struct Leaf {
    pub(crate) id: SpiffeId,
    /// Lower-case hexadecimal, as `openssl x509 -serial` prints it but for the case.
    pub(crate) serial: String,
    pub(crate) not_before: SystemTime,
    pub(crate) not_after: SystemTime,
}

/// Who the peer is whose certificates a handshake gave, leaf first.
///
/// rustls has verified the chain and its dates in a full handshake; it does not look again when a session is resumed, so the
/// leaf's end is checked here again.
pub fn peer_id(certs: &[CertificateDer<'_>]) -> Result<SpiffeId, PeerError> {
    peer_id_at(certs, clock::wall())
}

pub(crate) fn peer_id_at(certs: &[CertificateDer<'_>], now: SystemTime) -> Result<SpiffeId, PeerError> {
    let leaf = Leaf::read(certs.first().ok_or(PeerError::NoCertificate)?)?;
    if now > leaf.not_after {
        return Err(PeerError::Expired {
            id: leaf.id,
            not_after: date(leaf.not_after),
        });
    }
    Ok(leaf.id)
}

// === impl Leaf ===

impl Leaf {
    pub(crate) fn read(der: &CertificateDer<'_>) -> Result<Self, PeerError> {
        let (_, certificate) = X509Certificate::from_der(der).map_err(|error| PeerError::Unreadable(error.to_string()))?;
        let mut uris = certificate
            .extensions()
            .iter()
            .filter_map(|extension| match extension.parsed_extension() {
                ParsedExtension::SubjectAlternativeName(names) => Some(&names.general_names),
                _ => None,
            })
            .flatten()
            .filter_map(|name| match name {
                GeneralName::URI(uri) => Some(*uri),
                _ => None,
            });
        let Some(uri) = uris.next() else {
            return Err(PeerError::NoUri {
                subject: certificate.subject().to_string(),
            });
        };
        match uris.count() {
            0 => {}
            more => return Err(PeerError::SeveralUris(more + 1)),
        }
        let time = |time: x509_parser::time::ASN1Time| SystemTime::from(time.to_datetime());
        Ok(Self {
            id: uri.parse()?,
            serial: hexadecimal(certificate.raw_serial()),
            not_before: time(certificate.validity().not_before),
            not_after: time(certificate.validity().not_after),
        })
    }
}

/// Without the zero byte that DER puts before a high bit, as other tools print it.
fn hexadecimal(serial: &[u8]) -> String {
    let digits = serial.strip_prefix(&[0]).filter(|rest| !rest.is_empty()).unwrap_or(serial);
    digits.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The serial number of a chain's leaf, as it stands there; nothing where there is no leaf.
pub(crate) fn serial(chain: &[CertificateDer<'_>]) -> Vec<u8> {
    let leaf = chain.first().and_then(|leaf| X509Certificate::from_der(leaf).ok());
    leaf.map(|(_, certificate)| certificate.raw_serial().to_vec())
        .unwrap_or_default()
}

/// Whether subject and issuer are the same.
pub(crate) fn self_issued(der: &CertificateDer<'_>) -> bool {
    X509Certificate::from_der(der).is_ok_and(|(_, certificate)| certificate.subject().as_raw() == certificate.issuer().as_raw())
}

/// RFC 3339, to the second, for error texts.
pub(crate) fn date(at: SystemTime) -> String {
    time::OffsetDateTime::from(at)
        .replace_nanosecond(0)
        .unwrap_or(time::OffsetDateTime::UNIX_EPOCH)
        .to_string()
}

// === impl PeerError ===

/// rustls prints the cause of a refused certificate by `Debug`, so a person reads this in the log.
impl fmt::Debug for PeerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<PeerError> for rustls::Error {
    fn from(error: PeerError) -> Self {
        Self::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rcgen::{CertificateParams, KeyPair, SanType};

    use super::*;

    fn certificate(names: &[&str]) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.subject_alt_names = names
            .iter()
            .map(|name| match name.contains("://") {
                true => SanType::URI((*name).try_into().unwrap()),
                false => SanType::DnsName((*name).try_into().unwrap()),
            })
            .collect();
        params.not_after = (clock::wall() + Duration::from_secs(60)).into();
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().into()
    }

    #[test]
    fn a_peer_is_its_one_uri_san() {
        let one = "spiffe://td/ns/a/sa/b";
        assert_eq!(peer_id(&[certificate(&["host.example", one])]).unwrap().as_str(), one);
        for (names, expected) in [
            (&["host.example"][..], "has no URI SAN"),
            (&[], "has no URI SAN"),
            (&[one, "spiffe://td/ns/a/sa/c"], "has 2 URI SANs"),
            (&["https://td/ns/a/sa/b"], "does not start with spiffe://"),
            (&["spiffe:///x"], "the trust domain is empty"),
        ] {
            let error = peer_id(&[certificate(names)]).unwrap_err().to_string();
            assert!(error.contains(expected), "{names:?}: {error}");
        }
        assert_eq!(peer_id(&[]), Err(PeerError::NoCertificate));
        assert!(matches!(peer_id(&[vec![48, 3, 1].into()]), Err(PeerError::Unreadable(_))));
    }

    #[test]
    fn a_certificate_that_has_expired_since_its_handshake_is_nobodys() {
        let certs = [certificate(&["spiffe://td/ns/a/sa/b"])];
        assert!(peer_id_at(&certs, clock::wall()).is_ok());
        let error = peer_id_at(&certs, clock::wall() + Duration::from_secs(61)).unwrap_err();
        assert!(matches!(&error, PeerError::Expired { .. }), "{error}");
    }
}
