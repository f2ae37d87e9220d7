//! What an authority answered: is it a certificate for our key and our identity, and a root?
//!
//! `cert_chain` has at least two entries: the leaf first, the trust bundle last, intermediates between. An entry may hold
//! several certificates, as a bundle of several roots does (contract runtime §8.3).

use std::time::SystemTime;

use cairn_exchange::SpiffeId;
use rustls::pki_types::PrivateKeyDer;

use crate::credentials::{self, Credentials, CredentialsError};

/// Why an answer is unusable.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// Leaf and root are not both there.
    #[error("it has {0} certificate entries where at least two are due, the certificate first and the root last")]
    TooFew(usize),
    /// The certificate is somebody else's.
    #[error(
        "it is a certificate for {got} where {wanted} was asked for; do TRUST_DOMAIN, POD_NAMESPACE and SERVICE_ACCOUNT fit the token?"
    )]
    OtherIdentity {
        /// Asked for.
        wanted: Box<SpiffeId>,
        /// Answered.
        got: Box<SpiffeId>,
    },
    /// The parts do not fit.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
}

/// Takes `cert_chain` apart.
pub(super) fn check(
    entries: &[String],
    key: PrivateKeyDer<'static>,
    wanted: &SpiffeId,
    now: SystemTime,
) -> Result<Credentials, AnswerError> {
    let [chain @ .., bundle] = entries else {
        return Err(AnswerError::TooFew(0));
    };
    if chain.is_empty() {
        return Err(AnswerError::TooFew(entries.len()));
    }
    let roots = credentials::certificates(credentials::ROOTS, bundle.as_bytes())?;
    let mut certificates = Vec::with_capacity(entries.len());
    for entry in chain {
        certificates.extend(credentials::certificates(credentials::CHAIN, entry.as_bytes())?);
    }
    let credentials = Credentials::new(certificates, key, roots, now)?;
    if credentials.id() != wanted {
        return Err(AnswerError::OtherIdentity {
            wanted: wanted.clone().into(),
            got: credentials.id().clone().into(),
        });
    }
    Ok(credentials)
}
