//! A small certificate authority in memory: identities for a demo, a replay, or a test.
//!
//! It is not for production: its key lives in this process and ends with it. Keys are ECDSA P-256, certificates look like
//! istiod's (empty subject, critical URI SAN, both key usages).

use std::time::{Duration, SystemTime};

use cairn_exchange::{SpiffeId, clock};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, RevokedCertParams, SanType,
    SerialNumber,
};

use crate::{
    credentials::{Credentials, CredentialsError, Pem},
    peer,
};

/// The life of the root, and of what [`Authority::issue`] issues.
const LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// The life of a revocation list.
const LIST_LIFE: Duration = Duration::from_secs(3600);
/// Certificates begin this much before now, for clocks that are behind.
const BACKDATE: Duration = Duration::from_secs(120);

/// A generated root and its key.
pub struct Authority {
    root: CertifiedIssuer<'static, KeyPair>,
}

/// Why nothing could be generated.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// The key or certificate could not be made.
    #[error("generating a certificate for {0} failed: {1}")]
    Generate(String, rcgen::Error),
    /// It was made but is not usable.
    #[error("the generated certificate is not usable: {0}")]
    Unusable(#[from] CredentialsError),
}

// === impl Authority ===

impl Authority {
    /// A new root; `name` is its organisation, such as the trust domain.
    pub fn new(name: &str) -> Result<Self, GenerateError> {
        let failed = |error| GenerateError::Generate(name.to_owned(), error);
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
        Ok(Self {
            root: CertifiedIssuer::self_signed(root_params(name), key).map_err(failed)?,
        })
    }

    /// Credentials for `id` that live as long as the root.
    pub fn issue(&self, id: &SpiffeId) -> Result<Credentials, GenerateError> {
        let now = clock::wall();
        Ok(Credentials::from_pem(&self.issue_pem(id, now, LIFE)?, now)?)
    }

    /// Credentials for `id` that end `life` after `now`.
    pub fn issue_for(&self, id: &SpiffeId, now: SystemTime, life: Duration) -> Result<Credentials, GenerateError> {
        Ok(Credentials::from_pem(&self.issue_pem(id, now, life)?, now)?)
    }

    /// As [`Authority::issue_for`], as the texts of files.
    pub fn issue_pem(&self, id: &SpiffeId, now: SystemTime, life: Duration) -> Result<Pem, GenerateError> {
        let failed = |error| GenerateError::Generate(id.to_string(), error);
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
        let params = leaf_params(id, now, life).map_err(failed)?;
        let leaf = params.signed_by(&key, &self.root).map_err(failed)?;
        Ok(Pem {
            chain: leaf.pem().into_bytes(),
            key: key.serialize_pem().into_bytes(),
            roots: self.root_pem().into_bytes(),
        })
    }

    /// A revocation list of these certificates as the text of a file; it is good for an hour.
    pub fn revocation_list(&self, revoked: &[&Credentials]) -> Result<String, GenerateError> {
        let now = clock::wall();
        let failed = |error| GenerateError::Generate("a revocation list".to_owned(), error);
        let revoked_certs = revoked.iter().map(|credentials| RevokedCertParams {
            serial_number: SerialNumber::from(peer::serial(credentials.chain())),
            revocation_time: now.into(),
            reason_code: None,
            invalidity_date: None,
        });
        let list = CertificateRevocationListParams {
            this_update: (now - BACKDATE).into(),
            next_update: (now + LIST_LIFE).into(),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked_certs.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.root).and_then(|list| list.pem()).map_err(failed)
    }

    /// The root certificate as the text of a file.
    pub fn root_pem(&self) -> String {
        self.root.pem()
    }
}

fn root_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    let now = clock::wall();
    params.not_before = (now - BACKDATE).into();
    params.not_after = (now + LIFE + BACKDATE).into();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::CrlSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    params
}

/// A leaf as istiod makes it.
pub(crate) fn leaf_params(id: &SpiffeId, now: SystemTime, life: Duration) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.not_before = (now - BACKDATE).into();
    params.not_after = (now + life).into();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(id.as_str().try_into()?)];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}
