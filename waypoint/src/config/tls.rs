//! TLS contexts into terms.
//!
//! What a context demands of the other side must be demanded exactly; anything that we cannot check or offer is listed and refuses
//! the listener or cluster. Of certificates and roots only those of the workload itself are used here (`default` and `ROOTCA`,
//! contract xds §1.11); other names belong to TLS inside the tunnel.

use cairn_identity::{ClientTerms, Compliance, Parameters, ServerTerms, TlsVersion, unsupported_ciphers, unsupported_curves};
use cairn_proto::envoy::{
    extensions::transport_sockets::tls::v3::{
        CertificateValidationContext, CommonTlsContext, DownstreamTlsContext, SdsSecretConfig, SubjectAltNameMatcher,
        TlsParameters, UpstreamTlsContext,
        common_tls_context::{CombinedCertificateValidationContext, ValidationContextType},
        downstream_tls_context::SessionTicketKeysType,
        subject_alt_name_matcher::SanType,
        tls_parameters::{CompliancePolicy, TlsProtocol},
    },
    r#type::matcher::v3::{StringMatcher, string_matcher::MatchPattern},
};

use super::report::{Malformed, Notes, Present as _, refuse_set, unneeded};

/// What both kinds of context have in common.
struct Common {
    prefixes: Vec<String>,
    min: TlsVersion,
    max: TlsVersion,
    ciphers: Vec<String>,
    curves: Vec<String>,
    alpn: Vec<Vec<u8>>,
}

/// Terms of tunnels that we accept.
pub(crate) fn server_terms(context: DownstreamTlsContext, notes: &mut Notes) -> Result<ServerTerms, Malformed> {
    let DownstreamTlsContext {
        common_tls_context,
        require_client_certificate,
        require_sni,
        disable_stateful_session_resumption,
        session_timeout,
        ocsp_staple_policy,
        full_scan_certs_on_sni_mismatch,
        prefer_client_ciphers,
        session_ticket_keys_type,
    } = context;
    unneeded!(
        session_timeout,
        full_scan_certs_on_sni_mismatch,
        prefer_client_ciphers,
        disable_stateful_session_resumption
    );
    refuse_set!(notes, ocsp_staple_policy);
    if require_sni == Some(true) {
        notes.refuse("require_sni", "is not supported");
    }
    match session_ticket_keys_type {
        // Tickets are ours to give or not; keys shared with others are not supported, and no connection fails without them.
        None | Some(SessionTicketKeysType::DisableStatelessSessionResumption(_)) => {}
        Some(SessionTicketKeysType::SessionTicketKeys(_) | SessionTicketKeysType::SessionTicketKeysSdsSecretConfig(_)) => {
            notes.ignore("session_ticket_keys", "is not supported");
        }
    }
    let common = common_tls_context.ok_or_else(|| notes.malformed("common_tls_context", "is missing"))?;
    let Common {
        prefixes,
        min,
        max,
        ciphers,
        curves,
        alpn,
    } = notes.within("common_tls_context", |notes| {
        // A server speaks TLS 1.2 and 1.3 unless told otherwise.
        common_terms(common, (TlsVersion::V1_2, TlsVersion::V1_3), notes)
    })?;
    Ok(ServerTerms {
        uri_san_prefixes: prefixes,
        min_version: min,
        max_version: max,
        cipher_suites: ciphers,
        curves,
        alpn,
        require_client_certificate: require_client_certificate == Some(true),
        extra_roots: Vec::new(),
    })
}

/// Terms of tunnels that we open.
pub(crate) fn client_terms(context: UpstreamTlsContext, notes: &mut Notes) -> Result<ClientTerms, Malformed> {
    let UpstreamTlsContext {
        common_tls_context,
        sni,
        auto_host_sni,
        auto_sni_san_validation,
        allow_renegotiation,
        max_session_keys,
        enforce_rsa_key_usage,
    } = context;
    unneeded!(max_session_keys, enforce_rsa_key_usage);
    refuse_set!(notes, sni, auto_host_sni, auto_sni_san_validation, allow_renegotiation);
    let common = common_tls_context.ok_or_else(|| notes.malformed("common_tls_context", "is missing"))?;
    let Common {
        prefixes,
        min,
        max,
        ciphers,
        curves,
        alpn,
    } = notes.within("common_tls_context", |notes| {
        common_terms(common, (TlsVersion::V1_2, TlsVersion::V1_2), notes)
    })?;
    Ok(ClientTerms {
        uri_san_prefixes: prefixes,
        min_version: min,
        max_version: max,
        cipher_suites: ciphers,
        curves,
        alpn,
        extra_roots: Vec::new(),
    })
}

fn common_terms(context: CommonTlsContext, versions: (TlsVersion, TlsVersion), notes: &mut Notes) -> Result<Common, Malformed> {
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
        tls_certificates,
        tls_certificate_provider_instance,
        custom_tls_certificate_selector,
        tls_certificate_certificate_provider,
        tls_certificate_certificate_provider_instance,
        custom_handshaker,
        key_log,
    );
    for SdsSecretConfig { name, sds_config } in &tls_certificate_sds_secret_configs {
        unneeded!(sds_config);
        if name != "default" {
            notes.refuse(
                "tls_certificate_sds_secret_configs",
                format!("certificate `{name}` is not the workload's own"),
            );
        }
    }
    let prefixes = match validation_context_type {
        None => Vec::new(),
        Some(ValidationContextType::ValidationContext(context)) => {
            notes.within("validation_context", |notes| san_prefixes(context, notes))
        }
        Some(ValidationContextType::ValidationContextSdsSecretConfig(secret)) => {
            check_roots(&secret, notes);
            Vec::new()
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
                if let Some(secret) = &validation_context_sds_secret_config {
                    check_roots(secret, notes);
                }
                default_validation_context.map_or(Vec::new(), |context| {
                    notes.within("default_validation_context", |notes| san_prefixes(context, notes))
                })
            })
        }
        Some(
            ValidationContextType::ValidationContextCertificateProvider(_)
            | ValidationContextType::ValidationContextCertificateProviderInstance(_),
        ) => {
            notes.refuse("validation_context_certificate_provider", "is not supported");
            Vec::new()
        }
    };
    let mut common = Common {
        prefixes,
        min: versions.0,
        max: versions.1,
        ciphers: Vec::new(),
        curves: Vec::new(),
        alpn: alpn_protocols.into_iter().map(String::into_bytes).collect(),
    };
    if let Some(params) = tls_params {
        let Parameters {
            min_version,
            max_version,
            cipher_suites,
            curves,
        } = notes.within("tls_params", |notes| parameters(params, versions, notes))?;
        common = Common {
            min: min_version,
            max: max_version,
            ciphers: cipher_suites,
            curves,
            ..common
        };
    }
    Ok(common)
}

fn check_roots(secret: &SdsSecretConfig, notes: &mut Notes) {
    let SdsSecretConfig { name, sds_config } = secret;
    unneeded!(sds_config);
    if name != "ROOTCA" {
        notes.refuse(
            "validation_context_sds_secret_config",
            format!("roots `{name}` are not the mesh's own"),
        );
    }
}

/// Reads TLS parameters; `versions` are those that are spoken when nothing is said.
pub(super) fn parameters(
    parameters: TlsParameters,
    versions: (TlsVersion, TlsVersion),
    notes: &mut Notes,
) -> Result<Parameters, Malformed> {
    let TlsParameters {
        tls_minimum_protocol_version,
        tls_maximum_protocol_version,
        cipher_suites,
        ecdh_curves,
        signature_algorithms,
        compliance_policies,
    } = parameters;
    refuse_set!(notes, signature_algorithms);
    let mut version = |field: &str, value: i32, default: TlsVersion| match TlsProtocol::try_from(value) {
        Ok(TlsProtocol::TlsAuto) => Ok(default),
        Ok(TlsProtocol::TlSv12) => Ok(TlsVersion::V1_2),
        Ok(TlsProtocol::TlSv13) => Ok(TlsVersion::V1_3),
        Ok(TlsProtocol::TlSv10 | TlsProtocol::TlSv11) => {
            // As a lowest version it allows what we speak, and more that we never do.
            notes.ignore(field, "TLS 1.0 and 1.1 are never spoken");
            Ok(TlsVersion::V1_2)
        }
        Err(_) => Err(notes.malformed(field, format!("{value} is no version of TLS"))),
    };
    let min_version = version("tls_minimum_protocol_version", tls_minimum_protocol_version, versions.0)?;
    let max_version = version("tls_maximum_protocol_version", tls_maximum_protocol_version, versions.1)?;
    if min_version > max_version {
        return Err(notes.malformed("", "the lowest version is above the highest"));
    }
    let unknown = unsupported_ciphers(&cipher_suites);
    if !unknown.is_empty() {
        notes.ignore("cipher_suites", format!("{} is never offered", unknown.join(", ")));
    }
    let unknown = unsupported_curves(&ecdh_curves);
    if !unknown.is_empty() {
        notes.ignore("ecdh_curves", format!("{} is never offered", unknown.join(", ")));
    }
    let mut left = Parameters {
        min_version,
        max_version,
        cipher_suites,
        curves: ecdh_curves,
    };
    for policy in compliance_policies {
        match CompliancePolicy::try_from(policy) {
            // It replaces the lists, as in BoringSSL.
            Ok(CompliancePolicy::Fips202205) => left = Compliance::Fips140V3.narrow(left),
            Ok(other) => notes.refuse("compliance_policies", format!("{} is not supported", other.as_str_name())),
            Err(_) => return Err(notes.malformed("compliance_policies", format!("{policy} is not known"))),
        }
    }
    Ok(left)
}

/// The prefixes of URI names that are believed; of all names in the list one has to fit.
fn san_prefixes(context: CertificateValidationContext, notes: &mut Notes) -> Vec<String> {
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
    unneeded!(watched_directory, only_verify_leaf_cert_crl, suppress_client_ca_list);
    refuse_set!(
        notes,
        trusted_ca,
        ca_certificate_provider_instance,
        system_root_certs,
        verify_certificate_spki,
        verify_certificate_hash,
        match_subject_alt_names,
        crl,
        allow_expired_certificate,
        trust_chain_verification,
        custom_validator_config,
        max_verify_depth,
    );
    if require_signed_certificate_timestamp.present() {
        notes.refuse("require_signed_certificate_timestamp", "is not supported");
    }
    let mut prefixes = Vec::new();
    for SubjectAltNameMatcher { san_type, matcher, oid } in match_typed_subject_alt_names {
        refuse_set!(notes, oid);
        let pattern = matcher.and_then(
            |StringMatcher {
                 ignore_case,
                 match_pattern,
             }| match_pattern.filter(|_| !ignore_case),
        );
        match (SanType::try_from(san_type), pattern) {
            (Ok(SanType::Uri), Some(MatchPattern::Prefix(prefix))) => prefixes.push(prefix),
            _ => notes.refuse("match_typed_subject_alt_names", "only prefixes of URI names are supported"),
        }
    }
    prefixes
}
