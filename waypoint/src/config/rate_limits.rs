//! What requests count as for rate limits (contract xds §3.12): `rate_limits` of routes, of virtual hosts and of the filters
//! themselves. They mean something only where the chain has a filter that counts; elsewhere they are not looked at.

use std::sync::Arc;

use cairn_exchange::format::Template;
use cairn_policy::{
    matcher::{CidrSet, HeaderMatcher, HeaderName, QueryMatcher},
    rate_limit::{Action, Hits, HostLimits, LimitOverride, RateLimit, Unit, Value},
};
use cairn_proto::envoy::{
    config::route::v3::{
        HeaderMatcher as EnvoyHeader, QueryParameterMatcher, RateLimit as EnvoyLimit,
        rate_limit::{
            Action as EnvoyAction, HitsAddend, Override, XRateLimitOption,
            action::{
                ActionSpecifier, DynamicMetaData, GenericKey, HeaderValueMatch, MaskedRemoteAddress, MetaData,
                QueryParameterValueMatch, QueryParameters, RemoteAddressMatch, RequestHeaders, meta_data::Source,
            },
            r#override::OverrideSpecifier,
        },
    },
    r#type::{
        matcher::v3::AddressMatcher,
        metadata::v3::{MetadataKey, metadata_key::path_segment::Segment},
        v3::RateLimitUnit,
    },
};

use super::{
    headers,
    report::{Malformed, Notes, refuse_set, unneeded},
    route,
};

/// Actions that make one descriptor; more are refused.
const MAX_ACTIONS: usize = 32;

/// Compiles a list of limits.
pub(crate) fn compile(limits: Vec<EnvoyLimit>, notes: &mut Notes) -> Result<Vec<RateLimit>, Malformed> {
    let limits = limits.into_iter().enumerate();
    limits
        .map(|(index, limit)| notes.at("rate_limits", index, |notes| one(limit, notes)))
        .collect()
}

fn one(limit: EnvoyLimit, notes: &mut Notes) -> Result<RateLimit, Malformed> {
    let EnvoyLimit {
        stage,
        disable_key,
        actions,
        limit,
        hits_addend,
        apply_on_stream_done,
        x_ratelimit_option,
    } = limit;
    // A runtime key; there is no runtime here that could set it.
    unneeded!(disable_key);
    refuse_set!(notes, apply_on_stream_done);
    if actions.len() > MAX_ACTIONS {
        return Err(notes.malformed("actions", format!("{} are more than {MAX_ACTIONS}", actions.len())));
    }
    let mut compiled = Vec::with_capacity(actions.len());
    for (index, EnvoyAction { action_specifier }) in actions.into_iter().enumerate() {
        compiled.extend(notes.at("actions", index, |notes| action(action_specifier, notes))?);
    }
    Ok(RateLimit {
        stage: stage.unwrap_or(0),
        actions: compiled,
        limit: match limit.map(|Override { override_specifier }| override_specifier) {
            None | Some(None) => None,
            // No filter notes such a limit, and without one Envoy leaves it to the service.
            Some(Some(OverrideSpecifier::DynamicMetadata(_))) => None,
            Some(Some(OverrideSpecifier::RateLimit(limit))) => Some(LimitOverride {
                requests: limit.requests_per_unit,
                unit: unit(limit.unit, notes)?,
            }),
        },
        hits: hits_addend.map(|hits| self::hits(hits, notes)).transpose()?,
        headers: match XRateLimitOption::try_from(x_ratelimit_option) {
            Ok(XRateLimitOption::Unspecified) => None,
            Ok(XRateLimitOption::Off) => Some(false),
            Ok(XRateLimitOption::DraftVersion03) => Some(true),
            Err(_) => return Err(notes.malformed("x_ratelimit_option", format!("{x_ratelimit_option} is not known"))),
        },
    })
}

fn hits(hits: HitsAddend, notes: &mut Notes) -> Result<Hits, Malformed> {
    let HitsAddend {
        number,
        format,
        is_negative_hits,
    } = hits;
    let count = match number {
        Some(number) => Ok(number),
        None if format.is_empty() => Ok(1),
        None => Err(template("hits_addend.format", &format, notes)?),
    };
    Ok(Hits {
        count,
        negative: is_negative_hits,
    })
}

fn unit(unit: i32, notes: &Notes) -> Result<Unit, Malformed> {
    Ok(match RateLimitUnit::try_from(unit) {
        Ok(RateLimitUnit::Second) => Unit::Second,
        Ok(RateLimitUnit::Minute) => Unit::Minute,
        Ok(RateLimitUnit::Hour) => Unit::Hour,
        Ok(RateLimitUnit::Day) => Unit::Day,
        Ok(RateLimitUnit::Month) => Unit::Month,
        Ok(RateLimitUnit::Year) => Unit::Year,
        Ok(_) | Err(_) => return Err(notes.malformed("limit.rate_limit.unit", format!("{unit} is no unit of time"))),
    })
}

/// One action; what is not supported refuses, and makes no entry.
fn action(action: Option<ActionSpecifier>, notes: &mut Notes) -> Result<Option<Action>, Malformed> {
    Ok(Some(match action {
        None => return Err(notes.malformed("", "is empty")),
        Some(ActionSpecifier::SourceCluster(_)) => Action::SourceCluster,
        Some(ActionSpecifier::DestinationCluster(_)) => Action::DestinationCluster,
        Some(ActionSpecifier::RemoteAddress(_)) => Action::RemoteAddress,
        Some(ActionSpecifier::RequestHeaders(RequestHeaders {
            header_name,
            descriptor_key,
            skip_if_absent,
        })) => Action::Header {
            name: HeaderName::parse(&header_name)
                .map_err(|_| notes.malformed("request_headers.header_name", format!("`{header_name}` is no header name")))?,
            key: descriptor_key.into(),
            skip_if_absent,
        },
        Some(ActionSpecifier::QueryParameters(QueryParameters {
            query_parameter_name,
            descriptor_key,
            skip_if_absent,
        })) => Action::Query {
            name: query_parameter_name.into(),
            key: descriptor_key.into(),
            skip_if_absent,
        },
        Some(ActionSpecifier::MaskedRemoteAddress(MaskedRemoteAddress {
            v4_prefix_mask_len,
            v6_prefix_mask_len,
        })) => {
            let length = |field, length: Option<u32>, most: u8| match length {
                None => Ok(most),
                Some(length) => u8::try_from(length)
                    .ok()
                    .filter(|length| *length <= most)
                    .ok_or_else(|| notes.malformed(field, format!("{length} is more than {most}"))),
            };
            Action::MaskedRemoteAddress {
                v4: length("masked_remote_address.v4_prefix_mask_len", v4_prefix_mask_len, 32)?,
                v6: length("masked_remote_address.v6_prefix_mask_len", v6_prefix_mask_len, 128)?,
            }
        }
        Some(ActionSpecifier::GenericKey(GenericKey {
            descriptor_value,
            default_value,
            descriptor_key,
        })) => Action::Generic {
            key: key(descriptor_key, "generic_key"),
            value: value(&descriptor_value, default_value, notes)?,
        },
        Some(ActionSpecifier::HeaderValueMatch(HeaderValueMatch {
            descriptor_value,
            default_value,
            descriptor_key,
            expect_match,
            headers,
        })) => Action::HeaderMatch {
            key: key(descriptor_key, "header_match"),
            value: value(&descriptor_value, default_value, notes)?,
            expect: expect_match != Some(false),
            headers: header_matchers(headers, notes)?,
        },
        Some(ActionSpecifier::QueryParameterValueMatch(QueryParameterValueMatch {
            descriptor_value,
            default_value,
            descriptor_key,
            expect_match,
            query_parameters,
        })) => Action::QueryMatch {
            key: key(descriptor_key, "query_match"),
            value: value(&descriptor_value, default_value, notes)?,
            expect: expect_match != Some(false),
            parameters: query_matchers(query_parameters, notes)?,
        },
        Some(ActionSpecifier::RemoteAddressMatch(RemoteAddressMatch {
            descriptor_value,
            descriptor_key,
            default_value,
            address_matcher,
        })) => {
            let AddressMatcher { ranges, invert_match } = address_matcher.unwrap_or_default();
            let range = |range: cairn_proto::xds::core::v3::CidrRange| {
                let range = cairn_proto::envoy::config::core::v3::CidrRange {
                    address_prefix: range.address_prefix,
                    prefix_len: range.prefix_len,
                };
                super::value::range("remote_address_match.address_matcher", range, notes)
            };
            let ranges = ranges.into_iter().map(range).collect::<Result<CidrSet, _>>()?;
            Action::AddressMatch {
                key: key(descriptor_key, "remote_address_match"),
                value: value(&descriptor_value, default_value, notes)?,
                invert: invert_match,
                ranges,
            }
        }
        Some(ActionSpecifier::DynamicMetadata(DynamicMetaData {
            descriptor_key,
            metadata_key,
            default_value,
        })) => metadata(descriptor_key, metadata_key, default_value, false, notes)?,
        Some(ActionSpecifier::Metadata(MetaData {
            descriptor_key,
            metadata_key,
            default_value,
            source,
            skip_if_absent,
        })) => {
            if Source::try_from(source) != Ok(Source::Dynamic) {
                notes.refuse("metadata.source", "metadata of routes and clusters is not supported");
                return Ok(None);
            }
            metadata(descriptor_key, metadata_key, default_value, skip_if_absent, notes)?
        }
        Some(ActionSpecifier::Extension(extension)) => {
            notes.refuse("extension", format!("{} is not supported", extension.name));
            return Ok(None);
        }
    }))
}

fn key(key: String, otherwise: &str) -> Arc<str> {
    if key.is_empty() { otherwise.into() } else { key.into() }
}

fn value(format: &str, otherwise: String, notes: &mut Notes) -> Result<Value, Malformed> {
    Ok(Value {
        format: template("descriptor_value", format, notes)?,
        otherwise: otherwise.into(),
    })
}

fn template(field: &str, format: &str, notes: &mut Notes) -> Result<Template, Malformed> {
    let template = Template::parse(format).map_err(|error| notes.malformed(field, error.to_string()))?;
    for operator in template.unrecorded() {
        notes.refuse(field, format!("%{operator}% is not known here"));
    }
    Ok(template)
}

fn header_matchers(headers: Vec<EnvoyHeader>, notes: &mut Notes) -> Result<Vec<HeaderMatcher>, Malformed> {
    let headers = headers.into_iter().enumerate();
    headers
        .map(|(index, matcher)| notes.at("headers", index, |notes| headers::matcher(matcher, notes)))
        .collect()
}

fn query_matchers(parameters: Vec<QueryParameterMatcher>, notes: &mut Notes) -> Result<Vec<QueryMatcher>, Malformed> {
    let parameters = parameters.into_iter();
    parameters.map(|matcher| route::compile_query(matcher, notes)).collect()
}

fn metadata(
    key: String,
    place: Option<MetadataKey>,
    otherwise: String,
    skip_if_absent: bool,
    notes: &Notes,
) -> Result<Action, Malformed> {
    let MetadataKey { key: filter, path } = place.ok_or_else(|| notes.malformed("metadata_key", "is missing"))?;
    let path = path.into_iter().map(|segment| match segment.segment {
        Some(Segment::Key(key)) => Ok(key.into()),
        None => Err(notes.malformed("metadata_key.path", "has an empty segment")),
    });
    Ok(Action::Metadata {
        key: key.into(),
        filter: filter.into(),
        path: path.collect::<Result<_, _>>()?,
        otherwise: otherwise.into(),
        skip_if_absent,
    })
}

/// What becomes of the limits of virtual hosts: the numbers are the same in both filters.
pub(crate) fn host_limits(option: i32, notes: &Notes) -> Result<HostLimits, Malformed> {
    Ok(match option {
        0 => HostLimits::Override,
        1 => HostLimits::Include,
        2 => HostLimits::Ignore,
        _ => return Err(notes.malformed("vh_rate_limits", format!("{option} is not known"))),
    })
}
