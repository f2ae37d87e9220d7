//! Settings of pilot-agent and of ProxyConfig that have a meaning there and none here: those that are set are named in the log, so that
//! nobody waits for what they would do.

use serde_json::Value;

use super::Asked;

/// Variables, with the value that asks for nothing.
const VARIABLES: [(&str, &str); 14] = [
    ("CA_PROVIDER", "Citadel"),
    ("CREDENTIAL_FETCHER_TYPE", "JWT"),
    // Keys are ECDSA P-256, and written as PKCS#8.
    ("ECC_CURVE", "P256"),
    ("ECC_SIGNATURE_ALGORITHM", "ECDSA"),
    ("PKCS8_KEY", "true"),
    ("WORKLOAD_RSA_KEY_SIZE", "2048"),
    ("ENVOY_SECURE_MERGED_METRICS_PORT", "0"),
    ("ENVOY_SECURE_METRICS_PORT", "0"),
    ("ISTIO_BOOTSTRAP", ""),
    ("ISTIO_BOOTSTRAP_OVERRIDE", ""),
    ("ISTIO_META_DNS_CAPTURE", "false"),
    ("ISTIO_META_ENABLE_DNS_SERVER", "false"),
    ("XDS_AUTH_PROVIDER", ""),
    ("GRPC_XDS_BOOTSTRAP", ""),
];

/// Fields of ProxyConfig; what istiod reads itself and sends on is not among them.
const FIELDS: [&str; 10] = [
    "caCertificatesPem",
    "customConfigFile",
    "envoyAccessLogService",
    "envoyMetricsService",
    "extraStatTags",
    "privateKeyProvider",
    "proxyStatsMatcher",
    "readinessProbe",
    "runtimeValues",
    "statsCompression",
];

/// The names of those that are set.
pub(super) fn names(asked: &Asked<'_>) -> Vec<String> {
    let variables = VARIABLES.iter().filter(|(name, nothing)| {
        let value = asked.environment.text(name);
        value.is_some_and(|value| !value.eq_ignore_ascii_case(nothing))
    });
    let fields = FIELDS.iter().filter(|field| {
        let value = asked.config.json().get(**field);
        !matches!(value, None | Some(Value::Null | Value::Bool(false)))
    });
    variables
        .map(|(name, _)| (*name).to_owned())
        .chain(fields.map(|field| format!("PROXY_CONFIG.{field}")))
        .collect()
}
