//! What an answer tells of limits: `x-ratelimit-…`, in the words of the third draft of its standard, as Envoy writes them.

use std::{fmt::Write as _, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue};

use super::{TokenBucket, Unit};

const LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit");
const REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");
const RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset");

/// What a counting service said of one descriptor.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Its limit, where it has one.
    pub limit: Option<Limit>,
    /// How much of it is left.
    pub remaining: u32,
    /// When it starts anew.
    pub until_reset: Duration,
}

/// A limit of a counting service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Its name; may be empty.
    pub name: String,
    /// So many …
    pub requests: u32,
    /// … in this time.
    pub unit: Unit,
}

// === impl Unit ===

impl Unit {
    /// Seconds of it.
    pub fn seconds(self) -> Option<u32> {
        Some(match self {
            Unit::Unknown => return None,
            Unit::Second => 1,
            Unit::Minute => 60,
            Unit::Hour => 60 * 60,
            Unit::Day => 24 * 60 * 60,
            Unit::Week => 7 * 24 * 60 * 60,
            Unit::Month => 30 * 24 * 60 * 60,
            Unit::Year => 365 * 24 * 60 * 60,
        })
    }
}

/// Writes the limit with the least left, and all of them as its policy.
pub fn of_statuses<'s>(statuses: impl Iterator<Item = &'s Status> + Clone, headers: &mut HeaderMap) {
    let limited = statuses.filter_map(|status| Some((status, status.limit.as_ref()?)));
    let Some((least, limit)) = limited.clone().reduce(
        |least, other| {
            if other.0.remaining < least.0.remaining { other } else { least }
        },
    ) else {
        return;
    };
    let mut text = limit.requests.to_string();
    for (_, limit) in limited {
        if let Some(window) = limit.unit.seconds() {
            // Writing to a text does not fail.
            let _ = write!(text, ", {};w={window}", limit.requests);
            if !limit.name.is_empty() {
                let _ = write!(text, ";name=\"{}\"", limit.name);
            }
        }
    }
    if let Ok(value) = HeaderValue::try_from(text) {
        headers.append(LIMIT, value);
    }
    headers.append(REMAINING, HeaderValue::from(least.remaining));
    headers.append(RESET, HeaderValue::from(least.until_reset.as_secs()));
}

/// Writes what is left in a bucket.
pub fn of_bucket(bucket: &TokenBucket, now: Duration, headers: &mut HeaderMap) {
    headers.append(LIMIT, HeaderValue::from(bucket.room()));
    headers.append(REMAINING, HeaderValue::from(bucket.remaining(now)));
    let reset = bucket.next_token(now);
    let seconds = reset.as_secs() + u64::from(reset.subsec_nanos() > 0);
    headers.append(RESET, HeaderValue::from(seconds));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(requests: u32, unit: Unit, remaining: u32, name: &str) -> Status {
        Status {
            limit: Some(Limit {
                name: name.into(),
                requests,
                unit,
            }),
            remaining,
            until_reset: Duration::from_millis(30_900),
        }
    }

    #[test]
    fn the_limit_with_the_least_left_stands_first() {
        for (statuses, told) in [
            (vec![], None),
            (vec![Status::default()], None),
            (vec![status(10, Unit::Minute, 7, "")], Some(("10, 10;w=60", "7"))),
            (
                vec![status(10, Unit::Minute, 7, ""), status(1000, Unit::Hour, 3, "per-ip")],
                Some(("1000, 10;w=60, 1000;w=3600;name=\"per-ip\"", "3")),
            ),
            (vec![status(5, Unit::Unknown, 0, "x")], Some(("5", "0"))),
        ] {
            let mut headers = HeaderMap::new();
            of_statuses(statuses.iter(), &mut headers);
            let text = |name| headers.get(name).map(|value| value.to_str().unwrap());
            assert_eq!(text(LIMIT).zip(text(REMAINING)), told, "{statuses:?}");
            assert_eq!(text(RESET), told.map(|_| "30"));
        }
    }

    #[test]
    fn a_bucket_tells_what_is_left_in_it() {
        let bucket = TokenBucket::new(3, 1, Duration::from_secs(4), Duration::ZERO);
        assert!(bucket.take(3, Duration::ZERO));
        let mut headers = HeaderMap::new();
        of_bucket(&bucket, Duration::from_millis(500), &mut headers);
        assert_eq!(
            (&headers[LIMIT], &headers[REMAINING], &headers[RESET]),
            (&"3".parse().unwrap(), &"0".parse().unwrap(), &"4".parse().unwrap())
        );
    }
}
