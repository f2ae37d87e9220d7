//! `fault` (contract xds §3.8, §4.8), on a chain or on a route.

use std::time::Duration;

use cairn_policy::{
    fault::{Abort, Aborted, Delay, Faults, Rate},
    route::Fraction,
};
use cairn_proto::envoy::{
    extensions::filters::{
        common::fault::v3::{FaultDelay, FaultRateLimit, fault_delay::FaultDelaySecifier, fault_rate_limit::LimitType},
        http::fault::v3::{FaultAbort, HttpFault, fault_abort::ErrorType},
    },
    r#type::v3::FractionalPercent,
};
use http::StatusCode;

use super::{
    headers,
    report::{Malformed, Notes, ignore_set, unneeded},
    route::percent,
    value::duration,
};

/// Compiles faults. Their runtime keys are never set, as there is no runtime here.
pub(crate) fn compile(fault: HttpFault, notes: &mut Notes) -> Result<Faults, Malformed> {
    let HttpFault {
        delay,
        abort,
        upstream_cluster,
        headers,
        downstream_nodes,
        max_active_faults,
        response_rate_limit,
        delay_percent_runtime,
        abort_percent_runtime,
        delay_duration_runtime,
        abort_http_status_runtime,
        max_active_faults_runtime,
        response_rate_limit_percent_runtime,
        abort_grpc_status_runtime,
        disable_downstream_cluster_stats,
        filter_metadata,
    } = fault;
    unneeded!(
        delay_percent_runtime,
        abort_percent_runtime,
        delay_duration_runtime,
        abort_http_status_runtime,
        max_active_faults_runtime,
        response_rate_limit_percent_runtime,
        abort_grpc_status_runtime,
        disable_downstream_cluster_stats
    );
    ignore_set!(notes, filter_metadata);
    let headers = headers.into_iter().enumerate();
    let headers = headers.map(|(index, matcher)| notes.at("headers", index, |notes| headers::matcher(matcher, notes)));
    let headers = headers.collect::<Result<_, _>>()?;
    Ok(Faults {
        delay: delay
            .map(|delay| notes.within("delay", |notes| compile_delay(delay, notes)))
            .transpose()?,
        abort: abort
            .map(|abort| notes.within("abort", |notes| compile_abort(abort, notes)))
            .transpose()?,
        rate: response_rate_limit
            .map(|rate| notes.within("response_rate_limit", |notes| compile_rate(rate, notes)))
            .transpose()?,
        upstream_cluster: Some(upstream_cluster).filter(|name| !name.is_empty()).map(Into::into),
        headers,
        downstream_nodes: downstream_nodes.into_iter().map(Into::into).collect(),
        max_active: max_active_faults.map(u64::from),
    })
}

/// A share; one that is not said is none, as in Envoy.
fn share(share: Option<FractionalPercent>, notes: &Notes) -> Result<Fraction, Malformed> {
    percent(share.unwrap_or_default(), notes)
}

fn compile_delay(delay: FaultDelay, notes: &Notes) -> Result<Delay, Malformed> {
    let FaultDelay {
        percentage,
        fault_delay_secifier,
    } = delay;
    let fixed = match fault_delay_secifier {
        None => return Err(notes.malformed("", "says not for how long")),
        Some(FaultDelaySecifier::HeaderDelay(_)) => None,
        Some(FaultDelaySecifier::FixedDelay(fixed)) => Some(duration("fixed_delay", fixed, notes)?),
    };
    if fixed == Some(Duration::ZERO) {
        return Err(notes.malformed("fixed_delay", "has to be longer than nothing"));
    }
    Ok(Delay {
        fixed,
        share: share(percentage, notes)?,
    })
}

fn compile_abort(abort: FaultAbort, notes: &Notes) -> Result<Abort, Malformed> {
    let FaultAbort { percentage, error_type } = abort;
    let fixed = match error_type {
        None => return Err(notes.malformed("", "says not with what")),
        Some(ErrorType::HeaderAbort(_)) => None,
        Some(ErrorType::GrpcStatus(code)) => Some(Aborted::Grpc(code)),
        Some(ErrorType::HttpStatus(code)) => {
            let status = u16::try_from(code).ok().filter(|code| (200..600).contains(code));
            let status = status.and_then(|code| StatusCode::from_u16(code).ok());
            let what = || notes.malformed("http_status", format!("{code} is no status of a final answer"));
            Some(Aborted::Http(status.ok_or_else(what)?))
        }
    };
    Ok(Abort {
        fixed,
        share: share(percentage, notes)?,
    })
}

fn compile_rate(rate: FaultRateLimit, notes: &Notes) -> Result<Rate, Malformed> {
    let FaultRateLimit { percentage, limit_type } = rate;
    let fixed = match limit_type {
        None => return Err(notes.malformed("", "says not how fast")),
        Some(LimitType::HeaderLimit(_)) => None,
        Some(LimitType::FixedLimit(limit)) if limit.limit_kbps == 0 => {
            return Err(notes.malformed("fixed_limit.limit_kbps", "has to be more than nothing"));
        }
        Some(LimitType::FixedLimit(limit)) => Some(limit.limit_kbps),
    };
    Ok(Rate {
        fixed,
        share: share(percentage, notes)?,
    })
}
