//! Mirrors (contract xds §4.6): who gets copies of requests. They stand on routes, virtual hosts, tables and clusters; the lists of
//! different levels do not add up, the nearest to the route counts, and a cluster's own comes before all.

use cairn_policy::route::{Fraction, Mirror, MirrorTarget};
use cairn_proto::envoy::config::route::v3::route_action::RequestMirrorPolicy;
use http::HeaderName;

use super::{
    chain::Context,
    header_mutation,
    report::{Malformed, Notes},
    route::compile_fraction,
    route_action::header_value,
};

/// The field on all levels.
const FIELD: &str = "request_mirror_policies";

/// Compiles the mirrors of one level of a chain's routes.
pub(crate) fn compile(
    list: Vec<RequestMirrorPolicy>,
    context: &mut Context,
    notes: &mut Notes,
) -> Result<Vec<Mirror>, Malformed> {
    let mirrors = list_of(list, notes)?;
    context.clusters.extend(mirrors.iter().filter_map(Mirror::cluster).cloned());
    Ok(mirrors)
}

/// Compiles the mirrors of one level.
pub(crate) fn list_of(list: Vec<RequestMirrorPolicy>, notes: &mut Notes) -> Result<Vec<Mirror>, Malformed> {
    let list = list.into_iter().enumerate();
    list.map(|(index, policy)| notes.at(FIELD, index, |notes| mirror(policy, notes)))
        .collect()
}

fn mirror(policy: RequestMirrorPolicy, notes: &mut Notes) -> Result<Mirror, Malformed> {
    let RequestMirrorPolicy {
        cluster,
        cluster_header,
        runtime_fraction,
        trace_sampled,
        disable_shadow_host_suffix_append,
        request_headers_mutations,
        host_rewrite_literal,
    } = policy;
    let to = match (cluster.is_empty(), cluster_header.is_empty()) {
        (false, true) => MirrorTarget::Cluster(cluster.into()),
        (true, false) => HeaderName::try_from(&cluster_header)
            .map(MirrorTarget::Header)
            .map_err(|_| notes.malformed("cluster_header", format!("`{cluster_header}` is no header name")))?,
        (true, true) => return Err(notes.malformed("cluster", "is missing")),
        (false, false) => return Err(notes.malformed("cluster_header", "stands beside cluster")),
    };
    Ok(Mirror {
        to,
        fraction: runtime_fraction.map_or(Ok(Fraction::ALL), |fraction| compile_fraction(fraction, notes))?,
        shadow_host_suffix: !disable_shadow_host_suffix_append,
        host_rewrite: Some(host_rewrite_literal)
            .filter(|host| !host.is_empty())
            .map(|host| header_value("host_rewrite_literal", host, notes))
            .transpose()?,
        edits: header_mutation::each("request_headers_mutations", request_headers_mutations, notes)?,
        trace_sampled,
    })
}

#[cfg(test)]
mod tests {
    use cairn_proto::envoy::{config::core::v3::RuntimeFractionalPercent, r#type::v3::FractionalPercent};

    use super::*;

    #[test]
    fn a_mirror_that_names_nobody_or_two_is_malformed() {
        for (cluster, header, message) in [
            ("", "", Some("request_mirror_policies[0].cluster: is missing")),
            (
                "a",
                "x-to",
                Some("request_mirror_policies[0].cluster_header: stands beside cluster"),
            ),
            (
                "",
                "x to",
                Some("request_mirror_policies[0].cluster_header: `x to` is no header name"),
            ),
            ("", "x-to", None),
            ("a", "", None),
        ] {
            let policy = RequestMirrorPolicy {
                cluster: cluster.into(),
                cluster_header: header.into(),
                ..Default::default()
            };
            let error = list_of(vec![policy], &mut Notes::of("test"))
                .err()
                .map(|error| error.to_string());
            assert_eq!(error.as_deref(), message, "{cluster} {header}");
        }
    }

    #[test]
    fn a_share_of_nothing_mirrors_nothing() {
        let policy = |percent| RequestMirrorPolicy {
            cluster: "a".into(),
            runtime_fraction: Some(RuntimeFractionalPercent {
                default_value: percent,
                runtime_key: String::new(),
            }),
            ..Default::default()
        };
        let half = FractionalPercent {
            numerator: 50,
            denominator: 0,
        };
        let list = vec![policy(None), policy(Some(half))];
        let mirrors = list_of(list, &mut Notes::of("test")).unwrap();
        let shares = mirrors.iter().map(|mirror| mirror.fraction.numerator);
        assert_eq!(shares.collect::<Vec<_>>(), [0, 50]);
    }
}
