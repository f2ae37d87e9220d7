//! `ratelimit` (contract xds §3.12): requests counted by a service, and the service's messages.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use cairn_filters::ratelimit::{Answer, GlobalRateLimit, OnItsRoute, Requests, Settings, Wire};
use cairn_policy::{
    rate_limit::{
        Descriptor, HostLimits, Unit,
        headers::{Limit, Status},
    },
    route::Fraction,
};
use cairn_proto::envoy::{
    config::{core::v3::RuntimeFractionalPercent, ratelimit::v3::RateLimitServiceConfig},
    extensions::{
        common::ratelimit::v3::{
            RateLimitDescriptor,
            rate_limit_descriptor::{Entry, RateLimitOverride},
        },
        filters::http::ratelimit::v3::{
            RateLimit, RateLimitPerRoute, rate_limit::XRateLimitHeadersRfcVersion, rate_limit_per_route::OverrideOptions,
        },
    },
    service::ratelimit::v3::{
        RateLimitRequest, RateLimitResponse,
        rate_limit_response::{Code, DescriptorStatus, rate_limit::Unit as EnvoyUnit},
    },
    r#type::v3::{HttpStatus, RateLimitUnit},
};
use http::StatusCode;
use prost::Message as _;

use super::{
    chain::Context,
    grpc_service, headers, rate_limits,
    report::{Malformed, Notes, ignore_set, refuse_set, unneeded},
    route::compile_fraction,
    value::duration,
};

/// How long the service has where the configuration does not say.
const TIMEOUT: Duration = Duration::from_millis(20);

const NONE: Fraction = Fraction {
    numerator: 0,
    denominator: 100,
};

/// The messages of the service.
const WIRE: Wire = Wire {
    method: "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit",
    question,
    answer,
};

/// Compiles the filter; `None` when it refuses.
pub(crate) fn compile(filter: RateLimit, context: &mut Context, notes: &mut Notes) -> Result<Option<GlobalRateLimit>, Malformed> {
    let RateLimit {
        domain,
        stage,
        request_type,
        timeout,
        failure_mode_deny,
        rate_limited_as_resource_exhausted,
        rate_limit_service,
        enable_x_ratelimit_headers,
        disable_x_envoy_ratelimited_header,
        rate_limited_status,
        response_headers_to_add,
        status_on_error,
        stat_prefix,
        filter_enabled,
        filter_enforced,
        failure_mode_deny_percent,
        rate_limits,
        metadata_namespace,
    } = filter;
    unneeded!(stat_prefix);
    // Where the service's metadata would be noted; nobody reads it yet.
    ignore_set!(notes, metadata_namespace);
    if domain.is_empty() {
        return Err(notes.malformed("domain", "is empty"));
    }
    let timeout = match timeout {
        None => Some(TIMEOUT),
        Some(timeout) => Some(duration("timeout", timeout, notes)?).filter(|timeout| !timeout.is_zero()),
    };
    let RateLimitServiceConfig {
        grpc_service,
        transport_api_version,
    } = rate_limit_service.ok_or_else(|| notes.malformed("rate_limit_service", "is missing"))?;
    unneeded!(transport_api_version);
    let service = grpc_service.ok_or_else(|| notes.malformed("rate_limit_service.grpc_service", "is missing"))?;
    let service = notes.within("rate_limit_service.grpc_service", |notes| {
        grpc_service::compile(service, timeout, context, notes)
    })?;
    let Some(service) = service else { return Ok(None) };
    let deny_on_failure = match (failure_mode_deny_percent, failure_mode_deny) {
        (Some(share), _) => compile_fraction(share, notes)?,
        (None, true) => Fraction::ALL,
        (None, false) => NONE,
    };
    let settings = Settings {
        domain: domain.into(),
        stage,
        own: rate_limits::compile(rate_limits, notes)?,
        requests: match request_type.as_str() {
            "" | "both" => Requests::Both,
            "internal" => Requests::Internal,
            "external" => Requests::External,
            other => return Err(notes.malformed("request_type", format!("`{other}` is none of internal, external, both"))),
        },
        enabled: share(filter_enabled, Fraction::ALL, notes)?,
        enforced: share(filter_enforced, Fraction::ALL, notes)?,
        deny_on_failure,
        status: denial(rate_limited_status),
        status_on_error: status(status_on_error).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
        resource_exhausted: rate_limited_as_resource_exhausted,
        headers: match XRateLimitHeadersRfcVersion::try_from(enable_x_ratelimit_headers) {
            Ok(XRateLimitHeadersRfcVersion::Off) => false,
            Ok(XRateLimitHeadersRfcVersion::DraftVersion03) => true,
            Err(_) => {
                let what = format!("{enable_x_ratelimit_headers} is not known");
                return Err(notes.malformed("enable_x_ratelimit_headers", what));
            }
        },
        tell_limited: !disable_x_envoy_ratelimited_header,
        response_edits: headers::edits(response_headers_to_add, vec![], "response_headers", notes)?,
        service: Arc::new(service),
        wire: WIRE,
    };
    Ok(Some(GlobalRateLimit {
        settings: Arc::new(settings),
    }))
}

/// Compiles what a route says of it.
pub(crate) fn on_route(filter: RateLimitPerRoute, notes: &mut Notes) -> Result<OnItsRoute, Malformed> {
    let RateLimitPerRoute {
        vh_rate_limits,
        override_option,
        rate_limits,
        domain,
    } = filter;
    // Not implemented by Envoy either.
    if OverrideOptions::try_from(override_option) != Ok(OverrideOptions::Default) {
        refuse_set!(notes, override_option);
    }
    let host_limits: HostLimits = rate_limits::host_limits(vh_rate_limits, notes)?;
    Ok(OnItsRoute {
        host_limits,
        own: rate_limits::compile(rate_limits, notes)?,
        domain: Some(domain).filter(|domain| !domain.is_empty()).map(Into::into),
    })
}

/// A share of requests, or what it is where nothing is said.
pub(crate) fn share(share: Option<RuntimeFractionalPercent>, otherwise: Fraction, notes: &Notes) -> Result<Fraction, Malformed> {
    share.map_or(Ok(otherwise), |share| compile_fraction(share, notes))
}

/// The status of a denial: what is said, where that is an error.
pub(crate) fn denial(said: Option<HttpStatus>) -> StatusCode {
    let said = status(said).filter(|status| status.as_u16() >= 400);
    said.unwrap_or(StatusCode::TOO_MANY_REQUESTS)
}

fn status(said: Option<HttpStatus>) -> Option<StatusCode> {
    StatusCode::from_u16(u16::try_from(said?.code).ok()?).ok()
}

fn question(domain: &str, descriptors: &[Descriptor]) -> Bytes {
    let descriptors = descriptors.iter().map(|descriptor| RateLimitDescriptor {
        entries: descriptor
            .entries
            .iter()
            .map(|(key, value)| Entry {
                key: key.to_string(),
                value: value.clone(),
            })
            .collect(),
        limit: descriptor.limit.map(|limit| RateLimitOverride {
            requests_per_unit: limit.requests,
            unit: match limit.unit {
                Unit::Unknown | Unit::Week => RateLimitUnit::Unknown,
                Unit::Second => RateLimitUnit::Second,
                Unit::Minute => RateLimitUnit::Minute,
                Unit::Hour => RateLimitUnit::Hour,
                Unit::Day => RateLimitUnit::Day,
                Unit::Month => RateLimitUnit::Month,
                Unit::Year => RateLimitUnit::Year,
            } as i32,
        }),
        hits_addend: descriptor.hits,
        is_negative_hits: descriptor.negative,
    });
    let request = RateLimitRequest {
        domain: domain.to_owned(),
        descriptors: descriptors.collect(),
        hits_addend: 0,
    };
    request.encode_to_vec().into()
}

fn answer(bytes: &[u8]) -> Result<Answer, String> {
    let answer = RateLimitResponse::decode(bytes).map_err(|error| format!("is no RateLimitResponse: {error}"))?;
    let RateLimitResponse {
        overall_code,
        statuses,
        response_headers_to_add,
        request_headers_to_add,
        raw_body,
        dynamic_metadata: _,
        quota: _,
    } = answer;
    Ok(Answer {
        over: Code::try_from(overall_code) == Ok(Code::OverLimit),
        statuses: statuses.into_iter().map(status_of).collect(),
        response_headers: grpc_service::fields(response_headers_to_add),
        request_headers: grpc_service::fields(request_headers_to_add),
        body: raw_body.into(),
    })
}

fn status_of(status: DescriptorStatus) -> Status {
    let DescriptorStatus {
        code: _,
        current_limit,
        limit_remaining,
        duration_until_reset,
        quota: _,
    } = status;
    Status {
        limit: current_limit.map(|limit| Limit {
            name: limit.name,
            requests: limit.requests_per_unit,
            unit: match EnvoyUnit::try_from(limit.unit) {
                Ok(EnvoyUnit::Second) => Unit::Second,
                Ok(EnvoyUnit::Minute) => Unit::Minute,
                Ok(EnvoyUnit::Hour) => Unit::Hour,
                Ok(EnvoyUnit::Day) => Unit::Day,
                Ok(EnvoyUnit::Week) => Unit::Week,
                Ok(EnvoyUnit::Month) => Unit::Month,
                Ok(EnvoyUnit::Year) => Unit::Year,
                Ok(EnvoyUnit::Unknown) | Err(_) => Unit::Unknown,
            },
        }),
        remaining: limit_remaining,
        until_reset: duration_until_reset
            .and_then(|duration| Duration::try_from(duration).ok())
            .unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use cairn_policy::rate_limit::LimitOverride;
    use cairn_proto::envoy::{
        config::core::v3::HeaderValue, service::ratelimit::v3::rate_limit_response::RateLimit as ServiceLimit,
    };

    use super::*;

    #[test]
    fn a_question_is_what_the_service_understands() {
        let descriptor = Descriptor {
            entries: vec![("k".into(), "v".into())],
            limit: Some(LimitOverride {
                requests: 5,
                unit: Unit::Hour,
            }),
            hits: Some(3),
            negative: true,
            headers: None,
        };
        let asked = RateLimitRequest::decode(question("domain", &[descriptor])).unwrap();
        assert_eq!((asked.domain.as_str(), asked.hits_addend), ("domain", 0));
        let descriptor = &asked.descriptors[0];
        assert_eq!(
            (descriptor.entries[0].key.as_str(), descriptor.entries[0].value.as_str()),
            ("k", "v")
        );
        let limit = descriptor.limit.as_ref().unwrap();
        assert_eq!((limit.requests_per_unit, limit.unit), (5, RateLimitUnit::Hour as i32));
        assert_eq!((descriptor.hits_addend, descriptor.is_negative_hits), (Some(3), true));
    }

    #[test]
    fn an_answer_is_over_the_limit_only_when_it_says_so() {
        for (code, over) in [(Code::Unknown, false), (Code::Ok, false), (Code::OverLimit, true)] {
            let said = RateLimitResponse {
                overall_code: code as i32,
                statuses: vec![DescriptorStatus {
                    current_limit: Some(ServiceLimit {
                        name: "n".into(),
                        requests_per_unit: 10,
                        unit: EnvoyUnit::Minute as i32,
                    }),
                    limit_remaining: 7,
                    ..DescriptorStatus::default()
                }],
                response_headers_to_add: vec![
                    HeaderValue {
                        key: "x-a".into(),
                        value: "1".into(),
                        ..HeaderValue::default()
                    },
                    HeaderValue {
                        key: "no name".into(),
                        ..HeaderValue::default()
                    },
                ],
                raw_body: b"body".to_vec(),
                ..RateLimitResponse::default()
            };
            let read = answer(&said.encode_to_vec()).unwrap();
            assert_eq!((read.over, &read.body[..]), (over, &b"body"[..]), "{code:?}");
            assert_eq!(read.response_headers.len(), 1, "what is no field is left out");
            let limit = read.statuses[0].limit.as_ref().unwrap();
            assert_eq!(
                (limit.requests, limit.unit, read.statuses[0].remaining),
                (10, Unit::Minute, 7)
            );
        }
        assert!(answer(b"\xff").is_err());
    }
}
