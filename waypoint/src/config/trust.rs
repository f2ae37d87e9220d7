//! Trust anchors from istiod (PCDS, contract xds §1.9): roots that peers may be signed by beside our own authority's.
//!
//! They come as a ProxyConfig of which nothing but the certificates is meant: the rest of it the pod has been told at its start.

use cairn_proto::istio::mesh::v1alpha1::ProxyConfig;
use prost::Message as _;

use super::Resource;

/// The certificates of all resources, in PEM form; the words of the refusal when one is none.
pub(crate) fn anchors(resources: &[Resource]) -> Result<Vec<String>, String> {
    let mut all = Vec::new();
    for resource in resources {
        let config = ProxyConfig::decode(resource.bytes.clone())
            .map_err(|error| format!("{}: is no istio.mesh.v1alpha1.ProxyConfig: {error}", resource.name))?;
        all.extend(config.ca_certificates_pem);
    }
    Ok(all)
}
