//! How long a request may take: the route's timeout, the client's `grpc-timeout`, and what the backend is told of it.
//!
//! Times are durations, never moments; who has a clock puts them on it. Zero, where configuration says it, means "no limit" and is
//! `None` here.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};

const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
const EXPECTED: HeaderName = HeaderName::from_static("x-envoy-expected-rq-timeout-ms");
const GLOBAL: HeaderName = HeaderName::from_static("x-envoy-upstream-rq-timeout-ms");
const PER_TRY: HeaderName = HeaderName::from_static("x-envoy-upstream-rq-per-try-timeout-ms");

/// The largest number that `grpc-timeout` can carry: eight digits.
const LARGEST_GRPC_NUMBER: u64 = 99_999_999;

/// What a route says about time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RouteTimeouts {
    /// From the request's end to the answer's end; `None` is no limit.
    pub timeout: Option<Duration>,
    /// With it, `grpc-timeout` replaces the timeout of gRPC requests, but at most this; zero is no cap.
    pub max_grpc_timeout: Option<Duration>,
    /// Taken off `grpc-timeout`.
    pub grpc_timeout_offset: Option<Duration>,
    /// Without a byte in either direction; `None` leaves it to the chain, zero is no limit.
    pub idle: Option<Duration>,
    /// Limits on the whole stream.
    pub max_stream: Option<MaxStreamDuration>,
}

/// Limits on the life of a stream. With `duration`, they replace the route's timeout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MaxStreamDuration {
    /// The limit; zero is none.
    pub duration: Option<Duration>,
    /// With it, `grpc-timeout` is the limit, but at most this; zero is no cap.
    pub grpc_timeout_max: Option<Duration>,
    /// Taken off `grpc-timeout`.
    pub grpc_timeout_offset: Option<Duration>,
}

/// How long one request may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timeouts {
    /// All attempts together.
    pub global: Option<Duration>,
    /// Each attempt, up to the answer's head.
    pub per_try: Option<Duration>,
    /// Whether `grpc-timeout` is rewritten for the backend.
    rewrites_grpc: bool,
}

/// What `grpc-timeout` says; `None` when it is missing or malformed. Numbers of more than eight digits are cut to the largest.
pub fn grpc_timeout(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(GRPC_TIMEOUT)?.to_str().ok()?;
    let unit = value.chars().next_back()?;
    let number = value.get(..value.len() - unit.len_utf8())?;
    if number.is_empty() || !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number = number.parse().unwrap_or(u64::MAX).min(LARGEST_GRPC_NUMBER);
    Some(match unit {
        'H' => Duration::from_secs(number * 3600),
        'M' => Duration::from_secs(number * 60),
        'S' => Duration::from_secs(number),
        'm' => Duration::from_millis(number),
        // Envoy counts in milliseconds and rounds up.
        'u' => Duration::from_millis(number.div_ceil(1000)),
        'n' => Duration::from_millis(number.div_ceil(1_000_000)),
        _ => return None,
    })
}

/// A `grpc-timeout` of that length, in the finest unit from milliseconds up whose number fits in eight digits.
pub fn grpc_timeout_value(timeout: Duration) -> HeaderValue {
    let milliseconds = milliseconds(timeout);
    let mut number = milliseconds;
    let mut units = [("S", 1000), ("M", 60), ("H", 60)].into_iter();
    let mut unit = "m";
    while number > LARGEST_GRPC_NUMBER {
        let Some((coarser, factor)) = units.next() else {
            number = LARGEST_GRPC_NUMBER;
            break;
        };
        (unit, number) = (coarser, number / factor);
    }
    // Digits and a letter are always a header value.
    HeaderValue::from_str(&format!("{number}{unit}")).unwrap_or_else(|_| HeaderValue::from_static("0m"))
}

// === impl RouteTimeouts ===

impl RouteTimeouts {
    /// The timeouts of a request, from the route, its retry policy's `per_try`, and the headers of the request; the headers that
    /// are for this proxy alone are taken out. A try that may last as long as the whole request is not limited on its own.
    pub fn of_request(&self, per_try: Option<Duration>, grpc: bool, headers: &mut HeaderMap) -> Timeouts {
        let new_style = self.max_stream.is_some_and(|limits| limits.duration.is_some());
        let mut global = match self.max_grpc_timeout {
            _ if new_style => None,
            Some(max) if grpc => capped(offset(grpc_timeout(headers), self.grpc_timeout_offset), max),
            _ => self.timeout,
        };
        if let Some(asked) = take_milliseconds(headers, &GLOBAL) {
            global = asked;
        }
        let mut per_try = per_try;
        if let Some(asked) = take_milliseconds(headers, &PER_TRY) {
            per_try = asked;
        }
        if let (Some(each), Some(all)) = (per_try, global)
            && each >= all
        {
            per_try = None;
        }
        Timeouts {
            global: positive(global),
            per_try: positive(per_try),
            rewrites_grpc: grpc && !new_style && self.max_grpc_timeout.is_some(),
        }
    }

    /// How long the stream may live from its beginning; `chain` is the limit of the chain. Where that is what the client says, the
    /// backend is told it anew, as by Envoy.
    pub fn stream_limit(&self, chain: Option<Duration>, headers: &mut HeaderMap) -> Option<Duration> {
        let limits = self.max_stream.unwrap_or_default();
        match (grpc_timeout(headers), limits.grpc_timeout_max) {
            (Some(asked), Some(max)) => {
                let cut = if max.is_zero() { asked } else { asked.min(max) };
                let limit = offset(Some(cut), limits.grpc_timeout_offset);
                if let Some(limit) = limit {
                    headers.insert(GRPC_TIMEOUT, grpc_timeout_value(limit));
                }
                limit
            }
            _ => positive(limits.duration.or(chain)),
        }
    }
}

// === impl Timeouts ===

impl Timeouts {
    /// Tells the backend of an attempt how long it has, `elapsed` after the request began: `x-envoy-expected-rq-timeout-ms` (when
    /// `tell`) and `grpc-timeout`.
    pub fn write(&self, elapsed: Duration, tell: bool, headers: &mut HeaderMap) {
        let Some(mut expected) = self.per_try.or(self.global) else {
            return;
        };
        if let Some(global) = self.global {
            // Out of time, but zero would mean for ever.
            let rest = global
                .checked_sub(elapsed)
                .filter(|rest| milliseconds(*rest) > 0)
                .unwrap_or(Duration::from_millis(1));
            expected = expected.min(rest);
        }
        if tell {
            headers.insert(EXPECTED, HeaderValue::from(milliseconds(expected)));
        }
        if self.rewrites_grpc {
            headers.insert(GRPC_TIMEOUT, grpc_timeout_value(expected));
        }
    }
}

/// Takes an offset off, unless nothing would be left.
fn offset(timeout: Option<Duration>, offset: Option<Duration>) -> Option<Duration> {
    let timeout = timeout?;
    Some(match offset {
        Some(offset) if offset < timeout => timeout - offset,
        _ => timeout,
    })
}

/// At most `max`, which is no limit when zero; no timeout is the longest.
fn capped(timeout: Option<Duration>, max: Duration) -> Option<Duration> {
    let timeout = positive(timeout);
    if max.is_zero() {
        timeout
    } else {
        Some(timeout.map_or(max, |timeout| timeout.min(max)))
    }
}

fn positive(timeout: Option<Duration>) -> Option<Duration> {
    timeout.filter(|timeout| !timeout.is_zero())
}

/// Takes a header out; `Some(None)` when it asks for no limit, `None` when it is missing or no number.
fn take_milliseconds(headers: &mut HeaderMap, name: &HeaderName) -> Option<Option<Duration>> {
    let number: u64 = headers.remove(name)?.to_str().ok()?.parse().ok()?;
    Some(positive(Some(Duration::from_millis(number))))
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::{
        Duration, EXPECTED, GLOBAL, GRPC_TIMEOUT, HeaderMap, HeaderValue, MaxStreamDuration, PER_TRY, RouteTimeouts,
        grpc_timeout, grpc_timeout_value,
    };

    fn ms(number: u64) -> Option<Duration> {
        Some(Duration::from_millis(number))
    }

    fn with_grpc(value: &'static str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(GRPC_TIMEOUT, HeaderValue::from_static(value));
        headers
    }

    #[test]
    fn grpc_timeouts_are_numbers_with_a_unit() {
        for (value, timeout) in [
            ("300m", ms(300)),
            ("2S", ms(2000)),
            ("1M", ms(60_000)),
            ("1H", ms(3_600_000)),
            ("1u", ms(1)),
            ("1001u", ms(2)),
            ("1000000n", ms(1)),
            ("0m", ms(0)),
            ("99999999999999999999S", ms(99_999_999_000)),
            ("", None),
            ("m", None),
            ("5", None),
            ("-5m", None),
            ("+5m", None),
            ("5 m", None),
            ("5x", None),
        ] {
            assert_eq!(grpc_timeout(&with_grpc(value)), timeout, "{value}");
        }
        assert_eq!(grpc_timeout(&HeaderMap::new()), None);
    }

    #[test]
    fn grpc_timeouts_are_written_with_at_most_eight_digits() {
        for (milliseconds, value) in [
            (300, "300m"),
            (99_999_999, "99999999m"),
            (100_000_000, "100000S"),
            (100_000_000_000, "1666666M"),
            (u64::MAX, "99999999H"),
        ] {
            assert_eq!(grpc_timeout_value(Duration::from_millis(milliseconds)), value);
        }
    }

    #[test]
    fn a_grpc_request_brings_its_own_timeout_up_to_the_routes_cap() {
        // (route timeout, cap, offset, grpc-timeout, gRPC, result)
        for (timeout, max, offset, asked, grpc, expected) in [
            (None, ms(0), None, Some("300m"), true, ms(300)),
            (None, ms(0), None, None, true, None),
            (None, ms(0), None, Some("300m"), false, None),
            (ms(2000), ms(2000), None, Some("300m"), true, ms(300)),
            (ms(2000), ms(2000), None, Some("3S"), true, ms(2000)),
            (ms(2000), ms(2000), None, None, true, ms(2000)),
            (ms(2000), ms(2000), None, Some("0m"), true, ms(2000)),
            (ms(2000), ms(2000), None, Some("300m"), false, ms(2000)),
            (ms(2000), None, None, Some("300m"), true, ms(2000)),
            (None, ms(0), ms(100), Some("300m"), true, ms(200)),
            (None, ms(0), ms(300), Some("300m"), true, ms(300)),
        ] {
            let route = RouteTimeouts {
                timeout,
                max_grpc_timeout: max,
                grpc_timeout_offset: offset,
                ..RouteTimeouts::default()
            };
            let mut headers = asked.map(with_grpc).unwrap_or_default();
            assert_eq!(
                route.of_request(None, grpc, &mut headers).global,
                expected,
                "{route:?} {asked:?} {grpc}"
            );
        }
    }

    #[test]
    fn an_attempt_is_limited_only_when_that_is_less_than_the_whole() {
        for (timeout, per_try, expected) in [
            (ms(3000), ms(1000), ms(1000)),
            (ms(1000), ms(1000), None),
            (ms(1000), ms(2000), None),
            (None, ms(2000), ms(2000)),
        ] {
            let route = RouteTimeouts {
                timeout,
                ..RouteTimeouts::default()
            };
            assert_eq!(route.of_request(per_try, false, &mut HeaderMap::new()).per_try, expected);
        }
    }

    #[test]
    fn headers_that_reach_the_route_overrule_it_and_go_no_further() {
        let route = RouteTimeouts {
            timeout: ms(3000),
            ..RouteTimeouts::default()
        };
        for (global, per_try, expected) in [
            (Some("100"), None, (ms(100), None)),
            (Some("0"), Some("50"), (None, ms(50))),
            (Some("x"), Some("y"), (ms(3000), ms(1000))),
            (Some("100"), Some("0"), (ms(100), None)),
        ] {
            let mut headers = HeaderMap::new();
            global.map(|value| headers.insert(GLOBAL, HeaderValue::from_static(value)));
            per_try.map(|value| headers.insert(PER_TRY, HeaderValue::from_static(value)));
            let timeouts = route.of_request(ms(1000), false, &mut headers);
            assert_eq!((timeouts.global, timeouts.per_try), expected);
            assert!(headers.is_empty());
        }
    }

    #[test]
    fn the_backend_is_told_how_long_it_has() {
        let route = |timeout| RouteTimeouts {
            timeout,
            ..RouteTimeouts::default()
        };
        for (timeout, per_try, elapsed, expected) in [
            (ms(3000), ms(1000), 0, Some("1000")),
            (ms(3000), ms(1000), 2500, Some("500")),
            (ms(3000), None, 0, Some("3000")),
            (ms(3000), None, 3000, Some("1")),
            (ms(3000), None, 4000, Some("1")),
            (None, ms(1000), 9000, Some("1000")),
            (None, None, 0, None),
        ] {
            let mut headers = HeaderMap::new();
            let timeouts = route(timeout).of_request(per_try, false, &mut headers);
            timeouts.write(Duration::from_millis(elapsed), false, &mut headers);
            assert!(headers.is_empty());
            timeouts.write(Duration::from_millis(elapsed), true, &mut headers);
            assert_eq!(headers.get(EXPECTED).map(HeaderValue::as_bytes), expected.map(str::as_bytes));
            assert!(!headers.contains_key(GRPC_TIMEOUT));
        }
    }

    #[test]
    fn the_grpc_timeout_is_rewritten_in_milliseconds() {
        let route = RouteTimeouts {
            max_grpc_timeout: ms(0),
            ..RouteTimeouts::default()
        };
        let mut headers = with_grpc("2S");
        let timeouts = route.of_request(None, true, &mut headers);
        timeouts.write(Duration::from_millis(500), true, &mut headers);
        assert_eq!(
            (&headers[GRPC_TIMEOUT], &headers[EXPECTED]),
            (&"1500m".parse().unwrap(), &"1500".parse().unwrap())
        );
    }

    #[test]
    fn a_stream_lives_as_long_as_route_client_and_chain_allow() {
        for (duration, max, offset, asked, chain, expected) in [
            (None, None, None, None, ms(9), ms(9)),
            (ms(5), None, None, None, ms(9), ms(5)),
            (ms(0), None, None, None, ms(9), None),
            (ms(0), ms(0), None, Some("300m"), None, ms(300)),
            (ms(0), ms(100), None, Some("300m"), None, ms(100)),
            (ms(0), ms(0), ms(50), Some("300m"), None, ms(250)),
            (ms(5), ms(0), None, None, None, ms(5)),
            (ms(5), None, None, Some("300m"), None, ms(5)),
        ] {
            let limits = MaxStreamDuration {
                duration,
                grpc_timeout_max: max,
                grpc_timeout_offset: offset,
            };
            let route = RouteTimeouts {
                max_stream: Some(limits),
                timeout: ms(1),
                ..RouteTimeouts::default()
            };
            let mut headers = asked.map(with_grpc).unwrap_or_default();
            assert_eq!(route.stream_limit(chain, &mut headers), expected, "{limits:?} {asked:?}");
            if duration.is_some() {
                assert_eq!(
                    route.of_request(None, false, &mut headers).global,
                    None,
                    "the stream's limit replaces the timeout"
                );
            }
        }
    }
}
