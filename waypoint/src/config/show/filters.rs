//! What routes say of filters, in words.

use std::fmt::{self, Write as _};

use cairn_filters::{PerRoute, RouteConfig};
use cairn_policy::{
    fault::{Aborted, Faults},
    jwt,
    rate_limit::{Action, RateLimit},
    route::{Fraction, Overrides},
};

/// Writes what one level says of filters.
pub(super) fn write_overrides(out: &mut String, overrides: &Overrides, depth: usize) -> fmt::Result {
    for (name, word) in overrides {
        let words = match word.downcast_ref::<PerRoute>() {
            None => continue,
            Some(PerRoute { disabled: true, .. }) => "off".to_owned(),
            Some(PerRoute { config: None, .. }) => "on".to_owned(),
            Some(PerRoute {
                config: Some(config), ..
            }) => config_words(config),
        };
        writeln!(out, "{:depth$}filter {name}: {words}", "")?;
    }
    Ok(())
}

/// Writes what requests count as.
pub(super) fn write_limits(out: &mut String, limits: &[RateLimit], depth: usize) -> fmt::Result {
    for limit in limits {
        let entries: Vec<_> = limit.actions.iter().map(action).collect();
        writeln!(out, "{:depth$}counts as {} (stage {})", "", entries.join(", "), limit.stage)?;
    }
    Ok(())
}

fn action(action: &Action) -> String {
    match action {
        Action::SourceCluster => "source_cluster".to_owned(),
        Action::DestinationCluster => "destination_cluster".to_owned(),
        Action::RemoteAddress => "remote_address".to_owned(),
        Action::MaskedRemoteAddress { v4, v6 } => format!("masked_remote_address (/{v4}, /{v6})"),
        Action::Header { name, key, .. } => format!("{key} = header {name:?}"),
        Action::Query { name, key, .. } => format!("{key} = parameter {name}"),
        Action::Generic { key, .. } => format!("{key} = a text"),
        Action::HeaderMatch { key, .. } | Action::QueryMatch { key, .. } | Action::AddressMatch { key, .. } => {
            format!("{key} = a text where it matches")
        }
        Action::Metadata { key, filter, .. } => format!("{key} = metadata of {filter}"),
    }
}

fn config_words(config: &RouteConfig) -> String {
    match config {
        RouteConfig::Rbac(None) => "lets everything pass".to_owned(),
        RouteConfig::Rbac(Some(_)) => "rules of its own".to_owned(),
        RouteConfig::Fault(faults) => fault_words(faults),
        RouteConfig::LocalRateLimit(limit) => {
            format!("a limit of its own, {} of {}", share(limit.enforced), share(limit.enabled))
        }
        RouteConfig::RateLimit(here) => format!("limits of the virtual host: {:?}", here.host_limits),
        RouteConfig::ExtAuthz(here) => match (&here.authorizer, here.disabled) {
            (_, true) => "asks nobody".to_owned(),
            (Some(authorizer), false) => format!("asks {}", authorizer.cluster()),
            (None, false) => "questions of its own".to_owned(),
        },
        RouteConfig::Buffer(None) => "off".to_owned(),
        RouteConfig::Buffer(Some(limit)) => format!("at most {limit} bytes"),
        RouteConfig::Jwt(jwt::PerRoute::Disabled) => "asks for no token".to_owned(),
        RouteConfig::Jwt(jwt::PerRoute::Requirement(name)) => format!("requirement {name}"),
        RouteConfig::HeaderMutation(_) => "edits of its own".to_owned(),
        RouteConfig::Cors(policy) => format!("{} origins", policy.allow_origins.len()),
    }
}

fn fault_words(faults: &Faults) -> String {
    let delay = faults.delay.as_ref().map(|delay| match delay.fixed {
        Some(fixed) => format!("delays {} by {fixed:?}", share(delay.share)),
        None => format!("delays {} as asked", share(delay.share)),
    });
    let abort = faults.abort.as_ref().map(|abort| match abort.fixed {
        Some(Aborted::Http(status)) => format!("answers {} with {}", share(abort.share), status.as_u16()),
        Some(Aborted::Grpc(code)) => format!("answers {} with gRPC status {code}", share(abort.share)),
        None => format!("answers {} as asked", share(abort.share)),
    });
    let rate = faults.rate.as_ref().map(|rate| match rate.fixed {
        Some(fixed) => format!("slows {} to {fixed} KiB/s", share(rate.share)),
        None => format!("slows {} as asked", share(rate.share)),
    });
    let words: Vec<_> = [delay, abort, rate].into_iter().flatten().collect();
    if words.is_empty() {
        "nothing".to_owned()
    } else {
        words.join(", ")
    }
}

fn share(share: Fraction) -> String {
    format!("{} of {}", share.numerator, share.denominator)
}
