//! `local_ratelimit` (contract xds §3.12): requests and connections that the proxy counts by itself.
//!
//! Buckets live as long as their configuration stands in its chain, whatever else of the chain changes.

use std::{sync::Arc, time::Duration};

use cairn_filters::local_ratelimit::{Count, LocalLimit, PerConnection, now};
use cairn_policy::{
    rate_limit::{BucketSettings, Buckets, CountedDescriptor, TokenBucket},
    route::Fraction,
};
use cairn_proto::envoy::{
    config::core::v3::RuntimeFeatureFlag,
    extensions::{
        common::ratelimit::v3::{LocalRateLimitDescriptor, XRateLimitHeadersRfcVersion, rate_limit_descriptor::Entry},
        filters::{http::local_ratelimit::v3::LocalRateLimit, network::local_ratelimit::v3::LocalRateLimit as NetworkRateLimit},
    },
    r#type::v3::TokenBucket as EnvoyBucket,
};
use prost::Message as _;

use super::{
    chain::Context,
    headers, rate_limits,
    ratelimit::{denial, share},
    report::{Malformed, Notes, refuse_set, unneeded},
    value::duration,
};

/// The shortest time in which requests may be given tokens, as Envoy has it.
const SHORTEST_FILL: Duration = Duration::from_millis(50);
/// Buckets of a descriptor that stands for all values, where the configuration does not say.
const DYNAMIC: u32 = 20;

/// Compiles a limit of requests, of a chain or of a route.
pub(crate) fn compile(limit: LocalRateLimit, context: &mut Context, notes: &mut Notes) -> Result<LocalLimit, Malformed> {
    let content = limit.encode_to_vec();
    let LocalRateLimit {
        stat_prefix,
        status,
        token_bucket,
        filter_enabled,
        filter_enforced,
        request_headers_to_add_when_not_enforced,
        response_headers_to_add,
        descriptors,
        stage,
        local_rate_limit_per_downstream_connection,
        local_cluster_rate_limit,
        enable_x_ratelimit_headers,
        vh_rate_limits,
        always_consume_default_token_bucket,
        rate_limited_as_resource_exhausted,
        rate_limits,
        max_dynamic_descriptors,
    } = limit;
    unneeded!(stat_prefix);
    if local_cluster_rate_limit.is_some() {
        notes.refuse("local_cluster_rate_limit", "is not supported");
    }
    let default = token_bucket
        .map(|bucket| self::bucket("token_bucket", bucket, SHORTEST_FILL, notes))
        .transpose()?;
    let descriptors = descriptors.into_iter().enumerate();
    let descriptors = descriptors
        .map(|(index, counted)| notes.at("descriptors", index, |notes| self::counted(counted, notes)))
        .collect::<Result<Vec<_>, _>>()?;
    let always_default = always_consume_default_token_bucket != Some(false);
    let most_dynamic = usize::try_from(max_dynamic_descriptors.unwrap_or(DYNAMIC)).unwrap_or(usize::MAX);
    let make = move |now| Buckets::new(default, descriptors.clone(), always_default, most_dynamic, now);
    let count = if local_rate_limit_per_downstream_connection {
        Count::PerConnection(PerConnection::new(make))
    } else {
        Count::Together(context.keep("local_ratelimit", &content, || make(now())))
    };
    let none = Fraction {
        numerator: 0,
        denominator: 100,
    };
    Ok(LocalLimit {
        enabled: share(filter_enabled, none, notes)?,
        enforced: share(filter_enforced, none, notes)?,
        status: denial(status),
        resource_exhausted: rate_limited_as_resource_exhausted,
        request_edits: headers::edits(request_headers_to_add_when_not_enforced, vec![], "request_headers", notes)?,
        response_edits: headers::edits(response_headers_to_add, vec![], "response_headers", notes)?,
        headers: match XRateLimitHeadersRfcVersion::try_from(enable_x_ratelimit_headers) {
            Ok(XRateLimitHeadersRfcVersion::Off) => false,
            Ok(XRateLimitHeadersRfcVersion::DraftVersion03) => true,
            Err(_) => {
                let what = format!("{enable_x_ratelimit_headers} is not known");
                return Err(notes.malformed("enable_x_ratelimit_headers", what));
            }
        },
        stage,
        host_limits: rate_limits::host_limits(vh_rate_limits, notes)?,
        own: rate_limits::compile(rate_limits, notes)?,
        count,
    })
}

/// A limit of connections.
pub(crate) fn network(
    limit: NetworkRateLimit,
    context: &mut Context,
    notes: &mut Notes,
) -> Result<Option<Arc<TokenBucket>>, Malformed> {
    let content = limit.encode_to_vec();
    let NetworkRateLimit {
        stat_prefix,
        token_bucket,
        runtime_enabled,
        share_key,
    } = limit;
    unneeded!(stat_prefix);
    refuse_set!(notes, share_key);
    let bucket = token_bucket.ok_or_else(|| notes.malformed("token_bucket", "is missing"))?;
    let settings = self::bucket("token_bucket", bucket, SHORTEST_FILL, notes)?;
    if let Some(RuntimeFeatureFlag {
        default_value: Some(false),
        runtime_key: _,
    }) = runtime_enabled
    {
        return Ok(None);
    }
    Ok(Some(
        context.keep("network local_ratelimit", &content, || settings.bucket(now())),
    ))
}

fn bucket(field: &str, bucket: EnvoyBucket, shortest: Duration, notes: &Notes) -> Result<BucketSettings, Malformed> {
    let EnvoyBucket {
        max_tokens,
        tokens_per_fill,
        fill_interval,
    } = bucket;
    let interval = fill_interval.ok_or_else(|| notes.malformed(field, "has no fill_interval"))?;
    let interval = duration(field, interval, notes)?;
    let per_fill = tokens_per_fill.unwrap_or(1);
    if interval < shortest {
        return Err(notes.malformed(field, format!("fill_interval is shorter than {shortest:?}")));
    }
    if max_tokens == 0 || per_fill == 0 {
        return Err(notes.malformed(field, "has no tokens"));
    }
    Ok(BucketSettings {
        max: max_tokens,
        per_fill,
        interval,
    })
}

fn counted(counted: LocalRateLimitDescriptor, notes: &Notes) -> Result<CountedDescriptor, Malformed> {
    let LocalRateLimitDescriptor {
        entries,
        token_bucket,
        shadow_mode,
    } = counted;
    let bucket = token_bucket.ok_or_else(|| notes.malformed("token_bucket", "is missing"))?;
    let bucket = self::bucket("token_bucket", bucket, SHORTEST_FILL, notes)?;
    let entry = |Entry { key, value }: Entry| (key.into(), Some(value).filter(|value| !value.is_empty()).map(Into::into));
    Ok(CountedDescriptor {
        entries: entries.into_iter().map(entry).collect(),
        bucket,
        shadow: shadow_mode,
    })
}
