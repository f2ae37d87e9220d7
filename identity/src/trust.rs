//! Whether a client that was believed once is believed still.
//!
//! A handshake verifies a chain by the trust bundle and the revocation lists of its moment. Connections outlive both: roots are
//! replaced, certificates revoked, trust domains taken out of the list. [`ClientTrust`] is what counts now; its mark says whether that
//! is anything new, so that nobody verifies ten thousand chains because our own certificate was renewed.
//!
//! The chain is verified as of the time of its handshake: that a certificate has expired since is no distrust, and ends no connection.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
    time::SystemTime,
};

use rustls::{
    pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime},
    server::danger::ClientCertVerifier,
};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::{
    config::{self, ConfigError},
    credentials::Credentials,
    terms::ServerTerms,
    verify,
};

/// Whom connections are accepted from: the terms of a listener by one trust bundle and its revocation lists.
#[derive(Clone, Debug)]
pub struct ClientTrust {
    verifier: Arc<dyn ClientCertVerifier>,
    mark: u64,
}

/// The chain is not believed any more; the text says why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Distrusted(String);

// === impl ClientTrust ===

impl ClientTrust {
    pub(crate) fn new(
        credentials: &Credentials,
        revocation_lists: &[CertificateRevocationListDer<'static>],
        terms: &ServerTerms,
    ) -> Result<Self, ConfigError> {
        let provider = Arc::new(config::provider(&terms.cipher_suites, &terms.curves)?);
        let roots = credentials.anchors(&terms.extra_roots).map_err(ConfigError::ExtraRoots)?;
        let (prefixes, required) = (&terms.uri_san_prefixes, terms.require_client_certificate);
        let verifier = verify::of_clients(roots, revocation_lists, provider, prefixes, required)?;
        let mut hasher = DefaultHasher::new();
        mark(credentials, revocation_lists, &terms.extra_roots).hash(&mut hasher);
        (prefixes, required).hash(&mut hasher);
        Ok(Self {
            verifier,
            mark: hasher.finish(),
        })
    }

    /// Equal for equal trust.
    pub fn mark(&self) -> u64 {
        self.mark
    }

    /// Whether a chain, leaf first, that was shown `at` that time is believed now. Nobody's certificate is believed where none is
    /// demanded.
    pub fn check(&self, chain: &[CertificateDer<'_>], at: SystemTime) -> Result<(), Distrusted> {
        let Some((leaf, intermediates)) = chain.split_first() else {
            return match self.verifier.client_auth_mandatory() {
                true => Err(Distrusted("it has shown no certificate, and one is demanded now".into())),
                false => Ok(()),
            };
        };
        let at = UnixTime::since_unix_epoch(at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default());
        self.verifier
            .verify_client_cert(leaf, intermediates, at)
            .map(|_| ())
            .map_err(|error| Distrusted(error.to_string()))
    }
}

/// Equal for equal roots and revocation lists.
pub(crate) fn mark(
    credentials: &Credentials,
    revocation_lists: &[CertificateRevocationListDer<'static>],
    extra_roots: &[CertificateDer<'static>],
) -> u64 {
    let mut hasher = DefaultHasher::new();
    for root in credentials.roots().iter().chain(extra_roots) {
        root.as_ref().hash(&mut hasher);
    }
    for list in revocation_lists {
        list.as_ref().hash(&mut hasher);
    }
    hasher.finish()
}

/// The name of the root that a chain, leaf first, leads to: the issuer of its last certificate.
pub fn root_name(chain: &[CertificateDer<'_>]) -> String {
    chain
        .last()
        .and_then(|last| X509Certificate::from_der(last).ok())
        .map_or_else(|| "nobody".to_owned(), |(_, certificate)| certificate.issuer().to_string())
}

#[cfg(test)]
mod tests {
    use rcgen::PKCS_ECDSA_P256_SHA256;

    use super::*;
    use crate::{
        generate::{Authority, leaf_params},
        testing::{LIFE, id, root},
    };

    fn revoking(
        serial: Option<&[u8]>,
        issuer: &rcgen::CertifiedIssuer<'static, rcgen::KeyPair>,
    ) -> CertificateRevocationListDer<'static> {
        let now = cairn_exchange::clock::wall();
        let revoked = serial.map(|serial| rcgen::RevokedCertParams {
            serial_number: rcgen::SerialNumber::from_slice(serial),
            revocation_time: now.into(),
            reason_code: None,
            invalidity_date: None,
        });
        rcgen::CertificateRevocationListParams {
            this_update: now.into(),
            next_update: (now + LIFE).into(),
            crl_number: rcgen::SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked.into_iter().collect(),
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        }
        .signed_by(issuer)
        .unwrap()
        .into()
    }

    #[test]
    fn trust_follows_roots_trust_domains_and_revocation_and_nothing_else() {
        let (old, new) = (Authority::new("old").unwrap(), Authority::new("new").unwrap());
        let ours = |authority: &Authority| authority.issue(&id("spiffe://td/ns/a/sa/waypoint")).unwrap();
        let client = old.issue(&id("spiffe://td/ns/a/sa/client")).unwrap();
        let now = cairn_exchange::clock::wall();
        let trust =
            |credentials: &Credentials, domain: &str| ClientTrust::new(credentials, &[], &ServerTerms::hbone([domain])).unwrap();
        let before = trust(&ours(&old), "spiffe://td/");
        assert_eq!(before.check(client.chain(), now), Ok(()));

        let renewed = trust(&ours(&old), "spiffe://td/");
        assert_eq!(renewed.mark(), before.mark(), "a new certificate of our own changes nothing");

        let another_root = trust(&ours(&new), "spiffe://td/");
        assert_ne!(another_root.mark(), before.mark());
        let why = another_root.check(client.chain(), now).unwrap_err().to_string();
        assert!(why.contains("UnknownIssuer"), "{why}");

        let another_domain = trust(&ours(&old), "spiffe://other/");
        assert_ne!(another_domain.mark(), before.mark());
        let why = another_domain.check(client.chain(), now).unwrap_err().to_string();
        assert!(why.contains("not of trust domain(s) spiffe://other/"), "{why}");

        assert!(before.check(&[], now).is_err());
        assert!(root_name(client.chain()).contains("old"), "{}", root_name(client.chain()));
    }

    #[test]
    fn what_is_revoked_is_believed_no_more_and_what_has_expired_since_is() {
        let issuer = root("mesh", &PKCS_ECDSA_P256_SHA256);
        let key = rcgen::KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let now = cairn_exchange::clock::wall();
        let credentials = |name: &str| {
            let pem = crate::credentials::Pem {
                chain: leaf_params(&id(name), now, LIFE)
                    .unwrap()
                    .signed_by(&key, &issuer)
                    .unwrap()
                    .pem()
                    .into_bytes(),
                key: key.serialize_pem().into_bytes(),
                roots: issuer.pem().into_bytes(),
            };
            Credentials::from_pem(&pem, now).unwrap()
        };
        let (ours, client) = (
            credentials("spiffe://td/ns/a/sa/waypoint"),
            credentials("spiffe://td/ns/a/sa/client"),
        );
        let trust = |list| ClientTrust::new(&ours, &[list], &ServerTerms::hbone(["spiffe://td/"])).unwrap();
        let serial = X509Certificate::from_der(&client.chain()[0]).unwrap().1.raw_serial().to_vec();
        let nobody = trust(revoking(None, &issuer));
        assert_eq!(nobody.check(client.chain(), now), Ok(()));
        let it = trust(revoking(Some(&serial), &issuer));
        assert_ne!(it.mark(), nobody.mark());
        let why = it.check(client.chain(), now).unwrap_err().to_string();
        assert!(why.contains("Revoked"), "{why}");

        let earlier = now - 2 * LIFE;
        let expired = leaf_params(&id("spiffe://td/ns/a/sa/client"), earlier, LIFE)
            .unwrap()
            .signed_by(&key, &issuer)
            .unwrap();
        let chain = [CertificateDer::from(expired)];
        assert_eq!(nobody.check(&chain, earlier), Ok(()), "when it was shown, it was good");
        assert!(nobody.check(&chain, now).is_err());
    }
}
