//! TLS contexts of application clusters into terms (contract xds §5.9).
//!
//! Certificates and roots are secrets with names: files of DestinationRules (`file-cert:`, `file-root:`), the workload's own, or secrets
//! that istiod serves. A context that demands of the other side what we cannot check refuses its cluster.

use cairn_identity::{
    NameKind, NameMatcher, NamePattern, OriginationTerms, Parameters, SYSTEM_ROOTS_SECRET, Secrets, TlsVersion,
};
use cairn_proto::envoy::{
    config::core::v3::{ConfigSource, DataSource, config_source::ConfigSourceSpecifier, data_source::Specifier},
    extensions::transport_sockets::tls::v3::{
        CertificateValidationContext, CommonTlsContext, SdsSecretConfig, SubjectAltNameMatcher, TlsCertificate,
        UpstreamTlsContext,
        common_tls_context::{CombinedCertificateValidationContext, ValidationContextType},
        subject_alt_name_matcher::SanType,
    },
    r#type::matcher::v3::{RegexMatcher, StringMatcher, string_matcher::MatchPattern},
};

use super::{
    report::{Malformed, Notes, Present as _, ignore_set, refuse_set, unneeded},
    tls::parameters,
};

/// Secrets that pilot-agent, and so this proxy, has itself.
const OWN: [&str; 2] = ["default", "ROOTCA"];

/// Names of secrets that terms need.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SecretNames {
    /// Those that istiod serves.
    pub served: Vec<String>,
    /// Those that lie in files.
    pub files: Vec<String>,
}

/// The terms of TLS to an application; names of their secrets are added to `secrets`.
pub(crate) fn terms(
    context: UpstreamTlsContext,
    secrets: &mut SecretNames,
    notes: &mut Notes,
) -> Result<OriginationTerms, Malformed> {
    let UpstreamTlsContext {
        common_tls_context,
        sni,
        auto_host_sni,
        auto_sni_san_validation,
        allow_renegotiation,
        max_session_keys,
        enforce_rsa_key_usage,
    } = context;
    // Renegotiation is something that a server may ask for, and TLS 1.3 does not have.
    unneeded!(max_session_keys, enforce_rsa_key_usage);
    ignore_set!(notes, allow_renegotiation);
    refuse_set!(notes, auto_host_sni, auto_sni_san_validation);
    let mut terms = OriginationTerms {
        certificate: None,
        roots: None,
        revocation: None,
        revocation_of_leaf_only: false,
        names: Vec::new(),
        server_name: Some(sni).filter(|sni| sni.present()).map(Into::into),
        // Envoy's clients speak TLS 1.2 unless told otherwise.
        min_version: TlsVersion::V1_2,
        max_version: TlsVersion::V1_2,
        cipher_suites: Vec::new(),
        curves: Vec::new(),
        alpn: Vec::new(),
    };
    if let Some(common) = common_tls_context {
        notes.within("common_tls_context", |notes| common_terms(common, &mut terms, secrets, notes))?;
    }
    if terms.roots.is_none() && !terms.names.is_empty() {
        return Err(notes.malformed(
            "common_tls_context.validation_context",
            "names are checked, but any authority would be believed",
        ));
    }
    Ok(terms)
}

fn common_terms(
    context: CommonTlsContext,
    terms: &mut OriginationTerms,
    secrets: &mut SecretNames,
    notes: &mut Notes,
) -> Result<(), Malformed> {
    let CommonTlsContext {
        tls_params,
        tls_certificates,
        tls_certificate_sds_secret_configs,
        tls_certificate_provider_instance,
        custom_tls_certificate_selector,
        tls_certificate_certificate_provider,
        tls_certificate_certificate_provider_instance,
        alpn_protocols,
        custom_handshaker,
        key_log,
        validation_context_type,
    } = context;
    refuse_set!(
        notes,
        tls_certificate_provider_instance,
        custom_tls_certificate_selector,
        tls_certificate_certificate_provider,
        tls_certificate_certificate_provider_instance,
        custom_handshaker,
        key_log,
    );
    terms.alpn = alpn_protocols.into_iter().map(String::into_bytes).collect();
    for certificate in tls_certificates {
        let name = certificate_files(certificate, notes);
        terms.certificate = name.and_then(|name| secret(name, false, "tls_certificates", secrets, notes));
    }
    for config in tls_certificate_sds_secret_configs {
        terms.certificate = by_sds(config, "tls_certificate_sds_secret_configs", secrets, notes);
    }
    match validation_context_type {
        // Envoy verifies nobody when nothing is said (istiod: `insecureSkipVerify`).
        None => {}
        Some(ValidationContextType::ValidationContext(context)) => {
            notes.within("validation_context", |notes| validation(context, terms, secrets, notes))?;
        }
        Some(ValidationContextType::ValidationContextSdsSecretConfig(config)) => {
            terms.roots = by_sds(config, "validation_context_sds_secret_config", secrets, notes);
        }
        Some(ValidationContextType::CombinedValidationContext(combined)) => {
            let CombinedCertificateValidationContext {
                default_validation_context,
                validation_context_sds_secret_config,
                validation_context_certificate_provider,
                validation_context_certificate_provider_instance,
            } = combined;
            notes.within("combined_validation_context", |notes| {
                refuse_set!(
                    notes,
                    validation_context_certificate_provider,
                    validation_context_certificate_provider_instance
                );
                if let Some(context) = default_validation_context {
                    notes.within("default_validation_context", |notes| {
                        validation(context, terms, secrets, notes)
                    })?;
                }
                if let Some(config) = validation_context_sds_secret_config {
                    terms.roots = by_sds(config, "validation_context_sds_secret_config", secrets, notes);
                }
                Ok(())
            })?;
        }
        Some(
            ValidationContextType::ValidationContextCertificateProvider(_)
            | ValidationContextType::ValidationContextCertificateProviderInstance(_),
        ) => notes.refuse("validation_context_certificate_provider", "is not supported"),
    }
    if let Some(params) = tls_params {
        let Parameters {
            min_version,
            max_version,
            cipher_suites,
            curves,
        } = notes.within("tls_params", |notes| {
            parameters(params, (terms.min_version, terms.max_version), notes)
        })?;
        terms.min_version = min_version;
        terms.max_version = max_version;
        terms.cipher_suites = cipher_suites;
        terms.curves = curves;
    }
    Ok(())
}

/// The name of a secret that is asked for over SDS: of istiod, of the agent beside the proxy, or not at all.
fn by_sds(config: SdsSecretConfig, field: &str, secrets: &mut SecretNames, notes: &mut Notes) -> Option<std::sync::Arc<str>> {
    let SdsSecretConfig { name, sds_config } = config;
    let specifier = sds_config.and_then(
        |ConfigSource {
             config_source_specifier, ..
         }| config_source_specifier,
    );
    let served = matches!(specifier, Some(ConfigSourceSpecifier::Ads(_)));
    secret(name, served, field, secrets, notes)
}

fn secret(name: String, served: bool, field: &str, secrets: &mut SecretNames, notes: &mut Notes) -> Option<std::sync::Arc<str>> {
    let known = std::sync::Arc::from(name.as_str());
    if served {
        secrets.served.push(name);
    } else if Secrets::is_local(&name) {
        secrets.files.push(name);
    } else if !OWN.contains(&name.as_str()) {
        notes.refuse(field, format!("nobody serves the secret `{name}`"));
        return None;
    }
    Some(known)
}

/// The name of a pair of files.
fn certificate_files(certificate: TlsCertificate, notes: &mut Notes) -> Option<String> {
    let TlsCertificate {
        certificate_chain,
        private_key,
        pkcs12,
        watched_directory,
        private_key_provider,
        password,
        ocsp_staple,
        signed_certificate_timestamp,
    } = certificate;
    unneeded!(watched_directory);
    notes.within("tls_certificates", |notes| {
        refuse_set!(
            notes,
            pkcs12,
            private_key_provider,
            password,
            ocsp_staple,
            signed_certificate_timestamp
        );
        let chain = file("certificate_chain", certificate_chain, notes)?;
        let key = file("private_key", private_key, notes)?;
        Some(format!("file-cert:{chain}~{key}"))
    })
}

fn file(field: &str, source: Option<DataSource>, notes: &mut Notes) -> Option<String> {
    match source.and_then(|source| source.specifier) {
        Some(Specifier::Filename(path)) => Some(path),
        _ => {
            notes.refuse(field, "has to be a file");
            None
        }
    }
}

fn validation(
    context: CertificateValidationContext,
    terms: &mut OriginationTerms,
    secrets: &mut SecretNames,
    notes: &mut Notes,
) -> Result<(), Malformed> {
    let CertificateValidationContext {
        trusted_ca,
        ca_certificate_provider_instance,
        system_root_certs,
        watched_directory,
        verify_certificate_spki,
        verify_certificate_hash,
        match_typed_subject_alt_names,
        match_subject_alt_names,
        require_signed_certificate_timestamp,
        crl,
        allow_expired_certificate,
        trust_chain_verification,
        custom_validator_config,
        only_verify_leaf_cert_crl,
        max_verify_depth,
        suppress_client_ca_list,
    } = context;
    unneeded!(watched_directory, suppress_client_ca_list);
    refuse_set!(
        notes,
        ca_certificate_provider_instance,
        verify_certificate_spki,
        verify_certificate_hash,
        allow_expired_certificate,
        trust_chain_verification,
        custom_validator_config,
        max_verify_depth,
    );
    if require_signed_certificate_timestamp.present() {
        notes.refuse("require_signed_certificate_timestamp", "is not supported");
    }
    if trusted_ca.present()
        && let Some(path) = file("trusted_ca", trusted_ca, notes)
    {
        terms.roots = secret(format!("file-root:{path}"), false, "trusted_ca", secrets, notes);
    } else if system_root_certs.is_some() {
        terms.roots = secret(SYSTEM_ROOTS_SECRET.to_owned(), false, "system_root_certs", secrets, notes);
    }
    if crl.present()
        && let Some(path) = file("crl", crl, notes)
    {
        terms.revocation = secret(Secrets::revocation_file(&path), false, "crl", secrets, notes);
        terms.revocation_of_leaf_only = only_verify_leaf_cert_crl;
    }
    for (index, matcher) in match_subject_alt_names.into_iter().enumerate() {
        notes.at("match_subject_alt_names", index, |notes| name(None, matcher, terms, notes))?;
    }
    for (index, SubjectAltNameMatcher { san_type, matcher, oid }) in match_typed_subject_alt_names.into_iter().enumerate() {
        notes.at("match_typed_subject_alt_names", index, |notes| {
            refuse_set!(notes, oid);
            let kind = match SanType::try_from(san_type) {
                Ok(SanType::Email) => NameKind::Email,
                Ok(SanType::Dns) => NameKind::Dns,
                Ok(SanType::Uri) => NameKind::Uri,
                Ok(SanType::IpAddress) => NameKind::Ip,
                Ok(SanType::OtherName | SanType::Unspecified) | Err(_) => {
                    notes.refuse("san_type", "names of this kind are not supported");
                    return Ok(());
                }
            };
            let matcher = matcher.ok_or_else(|| notes.malformed("matcher", "is missing"))?;
            name(Some(kind), matcher, terms, notes)
        })?;
    }
    Ok(())
}

/// Adds one alternative of the believed names.
fn name(
    kind: Option<NameKind>,
    matcher: StringMatcher,
    terms: &mut OriginationTerms,
    notes: &mut Notes,
) -> Result<(), Malformed> {
    let StringMatcher {
        ignore_case,
        match_pattern,
    } = matcher;
    let pattern = match match_pattern {
        Some(MatchPattern::Exact(text)) => NamePattern::Exact(text),
        Some(MatchPattern::Prefix(text)) => NamePattern::Prefix(text),
        Some(MatchPattern::Suffix(text)) => NamePattern::Suffix(text),
        Some(MatchPattern::Contains(text)) => NamePattern::Contains(text),
        Some(MatchPattern::SafeRegex(RegexMatcher { regex, engine_type })) => {
            unneeded!(engine_type);
            NamePattern::regex(&regex).map_err(|error| notes.malformed("safe_regex", error.to_string()))?
        }
        Some(MatchPattern::Custom(_)) => {
            notes.refuse("custom", "is not supported");
            return Ok(());
        }
        None => return Err(notes.malformed("", "has no pattern")),
    };
    terms.names.push(NameMatcher {
        kind,
        pattern,
        ignore_case,
    });
    Ok(())
}
