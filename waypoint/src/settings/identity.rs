//! Where our certificate comes from (contract runtime §8.3).
//!
//! In this order: a SPIFFE socket that somebody else serves, mounted files, istiod's certificate authority.

use std::time::Duration;

use cairn_exchange::SpiffeId;
use cairn_identity::{CaSettings, SYSTEM_ROOTS, Source};

use super::{
    Asked, SettingError,
    environment::wrong,
    istiod::{self, MOUNTED_ROOT, ROOT, TOKEN},
};

/// The folder of the SPIFFE socket.
const SOCKET_FOLDER: &str = "./var/run/secrets/workload-spiffe-uds";
/// The socket's usual name.
const SOCKET: &str = "socket";
/// Chain, key and root, in folders where platforms mount them.
const MOUNTED: [[&str; 3]; 2] = [
    [
        "./var/run/secrets/workload-spiffe-credentials/cert-chain.pem",
        "./var/run/secrets/workload-spiffe-credentials/key.pem",
        "./var/run/secrets/workload-spiffe-credentials/root-cert.pem",
    ],
    ["./etc/certs/cert-chain.pem", "./etc/certs/key.pem", MOUNTED_ROOT],
];
/// istiod's port without TLS: for networks that protect themselves.
const PLAINTEXT_PORT: &str = ":15010";

/// The source that applies.
pub(super) fn source(asked: &Asked<'_>) -> Result<Source, SettingError> {
    let Asked { environment, pod, .. } = asked;
    let name = environment.text_or("WORKLOAD_IDENTITY_SOCKET_FILE", SOCKET);
    if name.contains('/') || name == ".." {
        return Err(wrong(
            "WORKLOAD_IDENTITY_SOCKET_FILE",
            name,
            "the name of a file without folders",
        ));
    }
    let path = format!("{SOCKET_FOLDER}/{name}");
    // A socket that is named is waited for; the usual one is used when it is there.
    if name != SOCKET || pod.has(&path) {
        return Ok(Source::SdsSocket { path: path.into() });
    }
    if environment.flag("FILE_MOUNTED_CERTS", false)? {
        let file = |name| asked.required(name).map(Into::into);
        return Ok(Source::Files {
            chain: file("ISTIO_META_TLS_CLIENT_CERT_CHAIN")?,
            key: file("ISTIO_META_TLS_CLIENT_KEY")?,
            root: file("ISTIO_META_TLS_CLIENT_ROOT_CERT")?,
        });
    }
    for files in MOUNTED {
        if files.iter().all(|path| pod.has(path)) {
            let [chain, key, root] = files;
            return Ok(Source::Files {
                chain: chain.into(),
                key: key.into(),
                root: root.into(),
            });
        }
    }
    Ok(Source::CertificateAuthority(authority(asked)?))
}

fn authority(asked: &Asked<'_>) -> Result<CaSettings, SettingError> {
    let Asked { environment, .. } = asked;
    let trust_domain = environment.text_or("TRUST_DOMAIN", "cluster.local");
    if trust_domain.contains('/') {
        // It would read as another trust domain with a longer path.
        return Err(wrong(
            "TRUST_DOMAIN",
            trust_domain,
            "a name without slashes, such as cluster.local,",
        ));
    }
    let id = SpiffeId::workload(trust_domain, asked.required("POD_NAMESPACE")?, asked.service_account()?).map_err(|error| {
        SettingError::Refused(format!(
            "TRUST_DOMAIN, POD_NAMESPACE and SERVICE_ACCOUNT make no identity: {error}"
        ))
    })?;
    let address = environment.text_or("CA_ADDR", asked.discovery_address());
    let mut settings = CaSettings::new(address, id);
    settings.server_name = environment.text("ISTIOD_SAN").map(str::to_owned);
    settings.plaintext = asked.plaintext() || address.ends_with(PLAINTEXT_PORT);
    settings.root_file = roots(asked).into();
    settings.token_file = TOKEN.into();
    settings.cluster_id = asked.cluster_id().to_owned();
    settings.headers = istiod::headers(asked, "CA_HEADER_");
    settings.cert_signer = environment.text("ISTIO_META_CERT_SIGNER").map(str::to_owned);
    settings.compliance = asked.compliance;
    settings.output = environment.text("OUTPUT_CERTS").map(Into::into);
    settings.ttl = environment.duration("SECRET_TTL", settings.ttl)?;
    if settings.ttl < Duration::from_secs(1) {
        return Err(wrong(
            "SECRET_TTL",
            environment.text_or("SECRET_TTL", ""),
            "a time of a second or more, such as 24h,",
        ));
    }
    settings.renew_ratio = environment.ratio("SECRET_GRACE_PERIOD_RATIO", settings.renew_ratio)?;
    settings.renew_jitter = environment.ratio("SECRET_GRACE_PERIOD_RATIO_JITTER", settings.renew_jitter)?;
    Ok(settings)
}

/// The file of the roots of the authority's own certificate.
fn roots(asked: &Asked<'_>) -> String {
    let Asked { environment, .. } = asked;
    match (environment.text("CA_ROOT_CA"), environment.text("PROV_CERT")) {
        (Some("SYSTEM"), _) => SYSTEM_ROOTS.to_owned(),
        (Some(path), _) => path.to_owned(),
        (None, _) if environment.text("PILOT_CERT_PROVIDER") == Some("custom") => MOUNTED_ROOT.to_owned(),
        (None, Some(folder)) => format!("{folder}/root-cert.pem"),
        (None, None) => ROOT.to_owned(),
    }
}
