//! `jwt_authn` (contract xds §3.6): whose tokens requests must have, and where the keys are.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use cairn_exchange::{RequestHead, Scheme};
use cairn_filters::{
    HttpCall,
    jwt_authn::{JwtAuthn, RemoteKeys, Settings},
};
use cairn_policy::jwt::{Authentication, KeySource, Keys, PerRoute, Place, Provider, ProviderSettings, Requirement};
use cairn_proto::envoy::{
    config::core::v3::{DataSource, HttpUri, data_source::Specifier, http_uri::HttpUpstreamType},
    extensions::filters::http::jwt_authn::v3::{
        JwtAuthentication, JwtClaimToHeader, JwtHeader, JwtProvider, JwtRequirement, JwtRequirementAndList, JwtRequirementOrList,
        PerRouteConfig, ProviderWithAudiences, RemoteJwks, RequirementRule,
        jwt_provider::{JwksSourceSpecifier, NormalizePayload},
        jwt_requirement::RequiresType,
        per_route_config::RequirementSpecifier,
        requirement_rule::RequirementType,
    },
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, uri::PathAndQuery};

use super::{
    chain::Context,
    report::{Malformed, Notes, ignore_set, refuse_set, unneeded},
    route::compile_match,
    value::duration,
};

/// How long fetched keys are good where the configuration does not say.
const CACHED: Duration = Duration::from_secs(600);
/// How long a fetch may take where the configuration does not say.
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);
/// Most bytes of fetched keys.
const MAX_KEYS: usize = 1024 * 1024;
/// Requirements inside of requirements are followed so deep.
const DEPTH: usize = 8;

/// Compiles the filter.
pub(crate) fn compile(filter: JwtAuthentication, context: &mut Context, notes: &mut Notes) -> Result<JwtAuthn, Malformed> {
    let JwtAuthentication {
        providers: configured,
        rules,
        filter_state_rules,
        bypass_cors_preflight,
        requirement_map,
        strip_failure_response,
        stat_prefix,
    } = filter;
    unneeded!(stat_prefix);
    refuse_set!(notes, filter_state_rules);
    let mut clear_route_cache = false;
    let (mut providers, mut remote, mut places) = (Vec::new(), Vec::new(), BTreeMap::new());
    for (name, configured) in configured {
        clear_route_cache |= configured.clear_route_cache;
        let (provider, keys) = notes.within(format!("providers[{name}]"), |notes| {
            provider(&name, configured, context, notes)
        })?;
        places.insert(name, providers.len());
        providers.push(provider);
        remote.push(keys);
    }
    let named = requirement_map.into_iter().map(|(name, required)| {
        let required = notes.within(format!("requirement_map[{name}]"), |notes| {
            requirement(required, &places, DEPTH, notes)
        })?;
        Ok((name.into(), required))
    });
    let named: Vec<(Box<str>, Requirement)> = named.collect::<Result<_, Malformed>>()?;
    let rules = rules.into_iter().enumerate().map(|(index, rule)| {
        notes.at("rules", index, |notes| {
            let RequirementRule {
                r#match,
                requirement_type,
            } = rule;
            let matches = r#match.ok_or_else(|| notes.malformed("match", "is missing"))?;
            let matches = notes.within("match", |notes| compile_match(matches, notes))?;
            let required = match requirement_type {
                None => Requirement::Nothing,
                Some(RequirementType::Requires(required)) => {
                    notes.within("requires", |notes| requirement(required, &places, DEPTH, notes))?
                }
                Some(RequirementType::RequirementName(name)) => {
                    let found = named.iter().find(|(known, _)| **known == *name);
                    let (_, required) = found
                        .ok_or_else(|| notes.malformed("requirement_name", format!("`{name}` is not in requirement_map")))?;
                    required.clone()
                }
            };
            Ok((matches, required))
        })
    });
    let rules = rules.collect::<Result<Vec<_>, Malformed>>()?;
    let authentication = Authentication::new(providers, rules, named, bypass_cors_preflight)
        .map_err(|error| notes.malformed("rules", error.to_string()))?;
    let shared = Arc::new(Settings {
        authentication,
        remote,
        strip_failure_response,
        clear_route_cache,
    });
    Ok(JwtAuthn { shared })
}

/// Compiles what a route says of the filter; `None` when it says nothing.
pub(crate) fn on_route(config: PerRouteConfig, notes: &Notes) -> Result<PerRoute, Malformed> {
    let PerRouteConfig { requirement_specifier } = config;
    match requirement_specifier {
        Some(RequirementSpecifier::Disabled(true)) => Ok(PerRoute::Disabled),
        Some(RequirementSpecifier::RequirementName(name)) if !name.is_empty() => Ok(PerRoute::Requirement(name.into())),
        _ => Err(notes.malformed("", "neither turns the filter off nor names a requirement")),
    }
}

fn provider(
    name: &str,
    provider: JwtProvider,
    context: &mut Context,
    notes: &mut Notes,
) -> Result<(Provider, Option<RemoteKeys>), Malformed> {
    let JwtProvider {
        issuer,
        audiences,
        subjects,
        require_expiration,
        max_lifetime,
        forward,
        from_headers,
        from_params,
        from_cookies,
        forward_payload_header,
        pad_forward_payload_header,
        payload_in_metadata,
        normalize_payload_in_metadata,
        header_in_metadata,
        failed_status_in_metadata,
        clock_skew_seconds,
        jwt_cache_config,
        claim_to_headers,
        // The filter's, for any of its providers.
        clear_route_cache: _,
        jwks_source_specifier,
    } = provider;
    // Verified tokens are always remembered.
    unneeded!(jwt_cache_config);
    refuse_set!(notes, subjects, require_expiration, max_lifetime);
    let headers = from_headers.into_iter().map(|JwtHeader { name, value_prefix }| {
        let header = header_name("from_headers", &name, notes)?;
        Ok(Place::Header {
            name: header.as_str().into(),
            prefix: value_prefix.into(),
        })
    });
    let mut places = headers.collect::<Result<Vec<_>, Malformed>>()?;
    places.extend(from_params.into_iter().map(|name| Place::Parameter(name.into())));
    places.extend(from_cookies.into_iter().map(|name| Place::Cookie(name.into())));
    let claim_headers = claim_to_headers.into_iter().map(
        |JwtClaimToHeader {
             header_name: header,
             claim_name,
         }| { Ok((header_name("claim_to_headers", &header, notes)?, claim_name.into())) },
    );
    let claim_headers = claim_headers.collect::<Result<_, Malformed>>()?;
    let payload_header = Some(forward_payload_header).filter(|name| !name.is_empty());
    let payload_header = payload_header
        .map(|name| header_name("forward_payload_header", &name, notes))
        .transpose()?;
    let key = |text: String| Some(text).filter(|text| !text.is_empty()).map(Arc::from);
    let space_delimited = normalize_payload_in_metadata.map(|NormalizePayload { space_delimited_claims }| space_delimited_claims);
    let settings = ProviderSettings {
        name: name.into(),
        issuer: Some(issuer).filter(|issuer| !issuer.is_empty()).map(Into::into),
        audiences: audiences.into_iter().map(Into::into).collect(),
        places,
        forward,
        payload_header,
        pad_payload_header: pad_forward_payload_header,
        claim_headers,
        payload_in_metadata: key(payload_in_metadata),
        header_in_metadata: key(header_in_metadata),
        failure_in_metadata: key(failed_status_in_metadata),
        space_delimited: space_delimited.into_iter().flatten().map(Into::into).collect(),
        clock_skew: clock_skew_seconds.into(),
    };
    let (source, remote) = match jwks_source_specifier {
        None => return Err(notes.malformed("jwks_source_specifier", "says nothing of the keys")),
        Some(JwksSourceSpecifier::LocalJwks(source)) => (notes.within("local_jwks", |notes| inline(source, notes))?, None),
        Some(JwksSourceSpecifier::RemoteJwks(remote)) => {
            let remote = notes.within("remote_jwks", |notes| remote_keys(remote, context, notes))?;
            (KeySource::Remote, Some(remote))
        }
    };
    Ok((Provider::new(settings, source), remote))
}

/// Keys in the configuration. Those that cannot be read refuse every token of the issuer and are listed; istiod itself sends such where
/// it could not fetch the right ones, so that nothing else of the chain may depend on them.
fn inline(source: DataSource, notes: &mut Notes) -> Result<KeySource, Malformed> {
    let DataSource {
        watched_directory,
        specifier,
    } = source;
    unneeded!(watched_directory);
    let text = match specifier {
        Some(Specifier::InlineString(text)) => text,
        Some(Specifier::InlineBytes(bytes)) => String::from_utf8_lossy(&bytes).into_owned(),
        Some(Specifier::Filename(_) | Specifier::EnvironmentVariable(_)) => {
            notes.refuse("", "keys in files and variables are not supported");
            String::new()
        }
        None => return Err(notes.malformed("", "is empty")),
    };
    let keys = Keys::parse(&text);
    if let Err(problem) = &keys {
        notes.ignore(
            "",
            format!("the keys cannot be used ({problem}): every token of this issuer is refused"),
        );
    }
    Ok(KeySource::Inline(keys))
}

fn remote_keys(remote: RemoteJwks, context: &mut Context, notes: &mut Notes) -> Result<RemoteKeys, Malformed> {
    let RemoteJwks {
        http_uri,
        cache_duration,
        async_fetch,
        retry_policy,
    } = remote;
    // Keys are asked for when they are first needed, once; whoever needs them next asks again.
    ignore_set!(notes, async_fetch, retry_policy);
    let HttpUri {
        uri,
        timeout,
        http_upstream_type,
    } = http_uri.ok_or_else(|| notes.malformed("http_uri", "is missing"))?;
    let Some(HttpUpstreamType::Cluster(cluster)) = http_upstream_type.filter(|HttpUpstreamType::Cluster(name)| !name.is_empty())
    else {
        return Err(notes.malformed("http_uri.cluster", "is empty"));
    };
    let head = get(&uri).ok_or_else(|| notes.malformed("http_uri.uri", format!("`{uri}` is no address of a resource")))?;
    let cluster: Arc<str> = cluster.into();
    context.clusters.insert(cluster.clone());
    let timeout = timeout
        .map(|timeout| duration("http_uri.timeout", timeout, notes))
        .transpose()?;
    let cached = cache_duration
        .map(|cached| duration("cache_duration", cached, notes))
        .transpose()?;
    let call = HttpCall {
        cluster,
        timeout: Some(timeout.filter(|timeout| !timeout.is_zero()).unwrap_or(FETCH_TIMEOUT)),
        head,
        body: Bytes::new(),
        max_answer: MAX_KEYS,
    };
    Ok(RemoteKeys::new(call, cached.unwrap_or(CACHED)))
}

/// The head of a GET for a resource.
fn get(uri: &str) -> Option<RequestHead> {
    let parts = Uri::try_from(uri).ok()?.into_parts();
    Some(RequestHead {
        method: Method::GET,
        path: parts.path_and_query.unwrap_or(PathAndQuery::from_static("/")),
        authority: HeaderValue::try_from(parts.authority?.as_str()).ok()?,
        scheme: match parts.scheme?.as_str() {
            "https" => Scheme::Https,
            "http" => Scheme::Http,
            _ => return None,
        },
        headers: HeaderMap::new(),
    })
}

fn requirement(
    required: JwtRequirement,
    places: &BTreeMap<String, usize>,
    depth: usize,
    notes: &mut Notes,
) -> Result<Requirement, Malformed> {
    let JwtRequirement { requires_type } = required;
    let place = |name: &str| {
        let found = places.get(name).copied();
        found.ok_or_else(|| notes.malformed("provider_name", format!("`{name}` is not among the providers")))
    };
    let Some(deeper) = depth.checked_sub(1) else {
        return Err(notes.malformed("", format!("requirements are nested deeper than {DEPTH}")));
    };
    Ok(match requires_type {
        None => Requirement::Nothing,
        Some(RequiresType::ProviderName(name)) => Requirement::Provider {
            provider: place(&name)?,
            audiences: None,
        },
        Some(RequiresType::ProviderAndAudiences(ProviderWithAudiences {
            provider_name,
            audiences,
        })) => Requirement::Provider {
            provider: place(&provider_name)?,
            audiences: Some(audiences.into_iter().map(Into::into).collect()).filter(|all: &Vec<_>| !all.is_empty()),
        },
        Some(RequiresType::RequiresAny(JwtRequirementOrList { requirements })) => {
            Requirement::Any(each("requires_any", requirements, places, deeper, notes)?)
        }
        Some(RequiresType::RequiresAll(JwtRequirementAndList { requirements })) => {
            Requirement::All(each("requires_all", requirements, places, deeper, notes)?)
        }
        Some(RequiresType::AllowMissingOrFailed(())) => Requirement::AllowMissingOrFailed,
        Some(RequiresType::AllowMissing(())) => Requirement::AllowMissing,
        Some(RequiresType::ExtractOnlyWithoutValidation(_)) => {
            notes.refuse("extract_only_without_validation", "is not supported");
            Requirement::AllowMissing
        }
    })
}

fn each(
    field: &'static str,
    list: Vec<JwtRequirement>,
    places: &BTreeMap<String, usize>,
    depth: usize,
    notes: &mut Notes,
) -> Result<Vec<Requirement>, Malformed> {
    let list = list.into_iter().enumerate();
    list.map(|(index, one)| notes.at(field, index, |notes| requirement(one, places, depth, notes)))
        .collect()
}

fn header_name(field: &'static str, name: &str, notes: &Notes) -> Result<HeaderName, Malformed> {
    HeaderName::try_from(name).map_err(|_| notes.malformed(field, format!("`{name}` is no header name")))
}
