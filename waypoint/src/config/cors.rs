//! Cross-origin sharing (contract xds §3.7, §4.9): as the filter's configuration on a route, and in the old way as a field of routes.

use std::sync::Arc;

use cairn_policy::{cors::CorsPolicy, matcher::StringMatcher, route::Fraction};
use cairn_proto::envoy::{
    config::{
        core::v3::RuntimeFractionalPercent,
        route::v3::{CorsPolicy as OldPolicy, cors_policy::EnabledSpecifier},
    },
    extensions::filters::http::cors::v3::CorsPolicy as EnvoyPolicy,
    r#type::matcher::v3::StringMatcher as EnvoyString,
};
use http::HeaderValue;

use super::{
    report::{Malformed, Notes},
    route::compile_fraction,
    value,
};

/// Compiles the filter's configuration on a route.
pub(crate) fn compile(policy: EnvoyPolicy, notes: &mut Notes) -> Result<CorsPolicy, Malformed> {
    let EnvoyPolicy {
        allow_origin_string_match,
        allow_methods,
        allow_headers,
        expose_headers,
        max_age,
        allow_credentials,
        filter_enabled,
        shadow_enabled,
        allow_private_network_access,
        forward_not_matching_preflights,
    } = policy;
    Ok(CorsPolicy {
        allow_origins: origins(allow_origin_string_match, notes)?,
        allow_methods: list("allow_methods", allow_methods, notes)?,
        allow_headers: list("allow_headers", allow_headers, notes)?,
        expose_headers: list("expose_headers", expose_headers, notes)?,
        max_age: list("max_age", max_age, notes)?,
        allow_credentials,
        allow_private_network: allow_private_network_access,
        forward_other_preflights: forward_not_matching_preflights,
        enabled: fraction(filter_enabled, notes)?,
        shadow: fraction(shadow_enabled, notes)?,
    })
}

/// Compiles the field of a route, completed by that of its virtual host; without the first the second alone counts.
pub(crate) fn of_route(
    policy: Option<OldPolicy>,
    around: Option<&Arc<CorsPolicy>>,
    notes: &mut Notes,
) -> Result<Option<Arc<CorsPolicy>>, Malformed> {
    let Some(policy) = policy else {
        return Ok(around.cloned());
    };
    let OldPolicy {
        allow_origin_string_match,
        allow_methods,
        allow_headers,
        expose_headers,
        max_age,
        allow_credentials,
        shadow_enabled,
        allow_private_network_access,
        forward_not_matching_preflights,
        enabled_specifier,
    } = policy;
    let filter_enabled = enabled_specifier.map(|EnabledSpecifier::FilterEnabled(share)| share);
    let same = EnvoyPolicy {
        allow_origin_string_match,
        allow_methods,
        allow_headers,
        expose_headers,
        max_age,
        allow_credentials,
        filter_enabled,
        shadow_enabled,
        allow_private_network_access,
        forward_not_matching_preflights,
    };
    let compiled = notes.within("cors", |notes| compile(same, notes))?;
    Ok(Some(Arc::new(match around {
        None => compiled,
        Some(around) => compiled.over(around),
    })))
}

fn origins(origins: Vec<EnvoyString>, notes: &mut Notes) -> Result<Vec<StringMatcher>, Malformed> {
    let origins = origins.into_iter();
    origins
        .map(|origin| value::string("allow_origin_string_match", origin, notes))
        .collect()
}

/// What browsers are told; nothing where it is empty.
fn list(field: &str, text: String, notes: &Notes) -> Result<Option<HeaderValue>, Malformed> {
    if text.is_empty() {
        return Ok(None);
    }
    let value = HeaderValue::try_from(text).map_err(|_| notes.malformed(field, "cannot stand in a header"))?;
    Ok(Some(value))
}

fn fraction(share: Option<RuntimeFractionalPercent>, notes: &Notes) -> Result<Option<Fraction>, Malformed> {
    share.map(|share| compile_fraction(share, notes)).transpose()
}
