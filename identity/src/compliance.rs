//! What a policy of the operator allows of TLS, over whatever listeners and clusters demand (contract xds §5.9).
//!
//! The values and what they do are Istio's `COMPLIANCE_POLICY`: they override, they do not intersect, so that a policy set here alone
//! means what it means where istiod has it too. A policy narrows versions, cipher suites and curves. It does not make the cryptography
//! of this build a validated module.

use std::{str::FromStr, sync::Arc};

use rustls::{SupportedProtocolVersion, crypto::CryptoProvider};

use crate::terms::{self, ClientTerms, ServerTerms, TlsVersion};

/// A policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compliance {
    /// Terms are as they are.
    #[default]
    Any,
    /// `fips-140-2`: TLS 1.2, AES-GCM, P-256.
    Fips140V2,
    /// `fips-140-3`, Envoy's `FIPS_202205`: TLS 1.2 and 1.3, AES-GCM, P-256 and P-384.
    Fips140V3,
    /// `pqc`: TLS 1.3, AES-GCM, X25519MLKEM768.
    PostQuantum,
}

/// What TLS is allowed; empty lists allow what the provider can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// Lowest version.
    pub min_version: TlsVersion,
    /// Highest version.
    pub max_version: TlsVersion,
    /// Cipher suites by Envoy's names.
    pub cipher_suites: Vec<String>,
    /// Key exchange groups by Envoy's names.
    pub curves: Vec<String>,
}

/// A name that is no policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("fips-140-2, fips-140-3 or pqc is expected")]
pub struct NoPolicy;

/// Suites of TLS 1.2 under both FIPS policies.
const AES_GCM_V1_2: [&str; 4] = [
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
];
/// Suites of TLS 1.3 under all policies that allow it.
const AES_GCM_V1_3: [&str; 2] = ["TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384"];

// === impl Compliance ===

impl Compliance {
    /// What becomes of parameters under the policy.
    pub fn narrow(self, wanted: Parameters) -> Parameters {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        match self {
            Self::Any => wanted,
            Self::Fips140V2 => {
                let mut cipher_suites = wanted.cipher_suites;
                cipher_suites.retain(|name| AES_GCM_V1_2.contains(&name.as_str()));
                if cipher_suites.is_empty() {
                    cipher_suites = names(&AES_GCM_V1_2);
                }
                Parameters {
                    min_version: TlsVersion::V1_2,
                    max_version: TlsVersion::V1_2,
                    cipher_suites,
                    curves: names(&["P-256"]),
                }
            }
            Self::Fips140V3 => Parameters {
                cipher_suites: [names(&AES_GCM_V1_2), names(&AES_GCM_V1_3)].concat(),
                curves: names(&["P-256", "P-384"]),
                ..wanted
            },
            Self::PostQuantum => Parameters {
                min_version: TlsVersion::V1_3,
                max_version: TlsVersion::V1_3,
                cipher_suites: names(&AES_GCM_V1_3),
                curves: names(&["X25519MLKEM768"]),
            },
        }
    }

    /// The provider for connections without terms of their own: to istiod and its authority.
    pub fn provider(self) -> Arc<CryptoProvider> {
        let Parameters {
            cipher_suites, curves, ..
        } = self.narrow(Parameters::any());
        Arc::new(terms::provider(&cipher_suites, &curves))
    }

    /// The versions for such connections.
    pub fn versions(self) -> Vec<&'static SupportedProtocolVersion> {
        let Parameters {
            min_version,
            max_version,
            ..
        } = self.narrow(Parameters::any());
        terms::versions(min_version, max_version)
    }

    pub(crate) fn server(self, terms: &ServerTerms) -> ServerTerms {
        let Parameters {
            min_version,
            max_version,
            cipher_suites,
            curves,
        } = self.narrow(Parameters {
            min_version: terms.min_version,
            max_version: terms.max_version,
            cipher_suites: terms.cipher_suites.clone(),
            curves: terms.curves.clone(),
        });
        ServerTerms {
            min_version,
            max_version,
            cipher_suites,
            curves,
            ..terms.clone()
        }
    }

    pub(crate) fn client(self, terms: &ClientTerms) -> ClientTerms {
        let Parameters {
            min_version,
            max_version,
            cipher_suites,
            curves,
        } = self.narrow(Parameters {
            min_version: terms.min_version,
            max_version: terms.max_version,
            cipher_suites: terms.cipher_suites.clone(),
            curves: terms.curves.clone(),
        });
        ClientTerms {
            min_version,
            max_version,
            cipher_suites,
            curves,
            ..terms.clone()
        }
    }
}

impl FromStr for Compliance {
    type Err = NoPolicy;

    fn from_str(name: &str) -> Result<Self, NoPolicy> {
        Ok(match name {
            "" => Self::Any,
            "fips-140-2" => Self::Fips140V2,
            "fips-140-3" => Self::Fips140V3,
            "pqc" => Self::PostQuantum,
            _ => return Err(NoPolicy),
        })
    }
}

// === impl Parameters ===

impl Parameters {
    /// Everything that we can do.
    fn any() -> Self {
        Self {
            min_version: TlsVersion::V1_2,
            max_version: TlsVersion::V1_3,
            cipher_suites: Vec::new(),
            curves: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use rustls::{NamedGroup, ProtocolVersion};

    use super::*;

    #[test]
    fn each_policy_leaves_what_it_allows() {
        use NamedGroup::{X25519MLKEM768, secp256r1, secp384r1};
        use ProtocolVersion::{TLSv1_2, TLSv1_3};
        let cases: [(&str, &[ProtocolVersion], &[NamedGroup], usize); 3] = [
            ("fips-140-2", &[TLSv1_2], &[secp256r1], 4),
            ("fips-140-3", &[TLSv1_3, TLSv1_2], &[secp256r1, secp384r1], 6),
            ("pqc", &[TLSv1_3], &[X25519MLKEM768], 2),
        ];
        for (name, versions, groups, suites) in cases {
            let policy: Compliance = name.parse().unwrap();
            let provider = policy.provider();
            let of_versions: Vec<_> = policy.versions().iter().map(|version| version.version).collect();
            assert_eq!(of_versions, versions, "{name}");
            let of_groups: Vec<_> = provider.kx_groups.iter().map(|group| group.name()).collect();
            assert_eq!(of_groups, groups, "{name}");
            let usable = provider
                .cipher_suites
                .iter()
                .filter(|suite| versions.contains(&suite.version().version));
            assert_eq!(usable.clone().count(), suites, "{name}");
            for suite in usable {
                let words = format!("{:?}", suite.suite());
                assert!(words.contains("_GCM_"), "{name}: {words}");
            }
        }
        assert_eq!("fips".parse::<Compliance>(), Err(NoPolicy));
        assert_eq!("".parse(), Ok(Compliance::Any));
    }

    #[test]
    fn a_policy_overrides_terms() {
        let terms = ServerTerms {
            cipher_suites: vec!["ECDHE-RSA-AES256-GCM-SHA384".into(), "ECDHE-RSA-CHACHA20-POLY1305".into()],
            curves: vec!["X25519".into()],
            ..ServerTerms::hbone(["spiffe://cluster.local/"])
        };
        assert_eq!(Compliance::Any.server(&terms), terms);
        let narrowed = Compliance::Fips140V2.server(&terms);
        assert_eq!(
            (narrowed.min_version, narrowed.max_version),
            (TlsVersion::V1_2, TlsVersion::V1_2)
        );
        assert_eq!(narrowed.cipher_suites, ["ECDHE-RSA-AES256-GCM-SHA384"]);
        assert_eq!((narrowed.curves, narrowed.alpn), (vec!["P-256".to_owned()], terms.alpn));
    }
}
