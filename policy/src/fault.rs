//! Faults put in on purpose: which requests are delayed, aborted or answered slowly (contract xds §4.8).
//!
//! Chance comes in as numbers, one for each question, so that the three faults do not depend on each other; time is for the caller.
//! Where the configuration leaves a fault to headers (`x-envoy-fault-…`), the header says how much and may lower the share, never
//! raise it, as in Envoy.

use std::time::Duration;

use cairn_exchange::RequestHead;
use http::{HeaderName, StatusCode};

use crate::{matcher::HeaderMatcher, route::Fraction};

const DELAY: HeaderName = HeaderName::from_static("x-envoy-fault-delay-request");
const DELAY_SHARE: HeaderName = HeaderName::from_static("x-envoy-fault-delay-request-percentage");
const ABORT: HeaderName = HeaderName::from_static("x-envoy-fault-abort-request");
const ABORT_GRPC: HeaderName = HeaderName::from_static("x-envoy-fault-abort-grpc-request");
const ABORT_SHARE: HeaderName = HeaderName::from_static("x-envoy-fault-abort-request-percentage");
const RATE: HeaderName = HeaderName::from_static("x-envoy-fault-throughput-response");
const RATE_SHARE: HeaderName = HeaderName::from_static("x-envoy-fault-throughput-response-percentage");
const DOWNSTREAM_NODE: HeaderName = HeaderName::from_static("x-envoy-downstream-service-node");

/// Faults, and for which requests.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Requests are held up.
    pub delay: Option<Delay>,
    /// Requests are answered with an error.
    pub abort: Option<Abort>,
    /// Answers are slowed down.
    pub rate: Option<Rate>,
    /// Only for requests to this cluster.
    pub upstream_cluster: Option<Box<str>>,
    /// Only for requests with all of these.
    pub headers: Vec<HeaderMatcher>,
    /// Only for requests of these nodes, as `x-envoy-downstream-service-node` names them; empty for all.
    pub downstream_nodes: Vec<Box<str>>,
    /// Most faults under way at once.
    pub max_active: Option<u64>,
}

/// How long requests are held up.
#[derive(Clone, Debug)]
pub struct Delay {
    /// For how long; `None` leaves it to the request.
    pub fixed: Option<Duration>,
    /// The share of requests.
    pub share: Fraction,
}

/// What requests are answered.
#[derive(Clone, Debug)]
pub struct Abort {
    /// With what; `None` leaves it to the request.
    pub fixed: Option<Aborted>,
    /// The share of requests.
    pub share: Fraction,
}

/// The answer to an aborted request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aborted {
    /// This status.
    Http(StatusCode),
    /// 200 and this gRPC status.
    Grpc(u32),
}

/// How fast answers may be.
#[derive(Clone, Debug)]
pub struct Rate {
    /// KiB a second; `None` leaves it to the request.
    pub fixed: Option<u64>,
    /// The share of requests.
    pub share: Fraction,
}

// === impl Faults ===

impl Faults {
    /// Whether there is nothing to put in.
    pub fn is_inert(&self) -> bool {
        self.delay.is_none() && self.abort.is_none() && self.rate.is_none()
    }

    /// Whether a request to this cluster is among those that are meant.
    pub fn applies(&self, head: &RequestHead, cluster: Option<&str>) -> bool {
        let to = self.upstream_cluster.as_deref().is_none_or(|wanted| cluster == Some(wanted));
        let node = || head.headers.get(&DOWNSTREAM_NODE).map(|node| node.as_bytes());
        to && (self.downstream_nodes.is_empty()
            || node().is_some_and(|node| self.downstream_nodes.iter().any(|wanted| wanted.as_bytes() == node)))
            && self.headers.iter().all(|matcher| matcher.matches(head))
    }

    /// How long the request of this random number is held up.
    pub fn delay(&self, head: &RequestHead, random: u64) -> Option<Duration> {
        let Delay { fixed, share } = self.delay.as_ref()?;
        let duration = match fixed {
            Some(fixed) => *fixed,
            None => Duration::from_millis(number(head, &DELAY)?),
        };
        let share = asked(*share, head, &DELAY_SHARE, fixed.is_none());
        (share.contains(random) && !duration.is_zero()).then_some(duration)
    }

    /// How the request of this random number is aborted.
    pub fn abort(&self, head: &RequestHead, random: u64) -> Option<Aborted> {
        let Abort { fixed, share } = self.abort.as_ref()?;
        if !asked(*share, head, &ABORT_SHARE, fixed.is_none()).contains(random) {
            return None;
        }
        fixed.or_else(|| {
            let status = number(head, &ABORT).filter(|status| (200..600).contains(status));
            let status = status.and_then(|status| StatusCode::from_u16(u16::try_from(status).ok()?).ok());
            let grpc = || u32::try_from(number(head, &ABORT_GRPC)?).ok();
            status.map(Aborted::Http).or_else(|| grpc().map(Aborted::Grpc))
        })
    }

    /// How many bytes a second the answer to the request of this random number may have.
    pub fn rate(&self, head: &RequestHead, random: u64) -> Option<u64> {
        let Rate { fixed, share } = self.rate.as_ref()?;
        let kilobytes = match fixed {
            Some(fixed) => *fixed,
            None => number(head, &RATE)?,
        };
        let share = asked(*share, head, &RATE_SHARE, fixed.is_none());
        (share.contains(random) && kilobytes > 0).then(|| kilobytes.saturating_mul(1024))
    }
}

fn number(head: &RequestHead, name: &HeaderName) -> Option<u64> {
    head.headers.get(name)?.to_str().ok()?.trim().parse().ok()
}

/// A share, lowered by the request where it may do that.
fn asked(share: Fraction, head: &RequestHead, name: &HeaderName, may: bool) -> Fraction {
    let lower = number(head, name).filter(|_| may).and_then(|lower| u32::try_from(lower).ok());
    Fraction {
        numerator: lower.map_or(share.numerator, |lower| lower.min(share.numerator)),
        ..share
    }
}

#[cfg(test)]
mod tests {
    use cairn_exchange::Scheme;
    use http::{HeaderMap, HeaderValue, Method, uri::PathAndQuery};

    use super::*;
    use crate::matcher::{HeaderMatch, HeaderName as MatcherName};

    fn head(fields: &[(&'static str, &'static str)]) -> RequestHead {
        let headers = fields.iter().map(|(name, value)| {
            let name: HeaderName = name.parse().unwrap();
            (name, HeaderValue::from_static(value))
        });
        RequestHead {
            method: Method::GET,
            path: PathAndQuery::from_static("/"),
            authority: HeaderValue::from_static("web"),
            scheme: Scheme::Http,
            headers: headers.collect::<HeaderMap>(),
        }
    }

    const HALF: Fraction = Fraction {
        numerator: 50,
        denominator: 100,
    };

    #[test]
    fn a_share_of_requests_is_hit() {
        let faults = Faults {
            delay: Some(Delay {
                fixed: Some(Duration::from_secs(1)),
                share: HALF,
            }),
            abort: Some(Abort {
                fixed: Some(Aborted::Http(StatusCode::IM_A_TEAPOT)),
                share: Fraction {
                    numerator: 0,
                    denominator: 100,
                },
            }),
            ..Faults::default()
        };
        let delayed = (0..100).filter(|random| faults.delay(&head(&[]), *random).is_some()).count();
        assert_eq!(delayed, 50);
        assert!((0..100).all(|random| faults.abort(&head(&[]), random).is_none()));
    }

    #[test]
    fn headers_say_how_much_and_can_only_lower_the_share() {
        let faults = Faults {
            delay: Some(Delay {
                fixed: None,
                share: HALF,
            }),
            abort: Some(Abort {
                fixed: None,
                share: HALF,
            }),
            rate: Some(Rate {
                fixed: None,
                share: HALF,
            }),
            ..Faults::default()
        };
        let delays = |fields| (0..100).filter_map(|random| faults.delay(&head(fields), random)).count();
        assert_eq!(delays(&[]), 0);
        assert_eq!(delays(&[("x-envoy-fault-delay-request", "no")]), 0);
        assert_eq!(delays(&[("x-envoy-fault-delay-request", "0")]), 0);
        assert_eq!(delays(&[("x-envoy-fault-delay-request", "20")]), 50);
        for (share, count) in [("10", 10), ("90", 50), ("x", 50)] {
            let fields = [
                ("x-envoy-fault-delay-request", "20"),
                ("x-envoy-fault-delay-request-percentage", share),
            ];
            let found = (0..100).filter_map(|random| faults.delay(&head(&fields), random)).count();
            assert_eq!(found, count, "{share}");
        }
        for (fields, abort) in [
            (
                vec![("x-envoy-fault-abort-request", "418")],
                Some(Aborted::Http(StatusCode::IM_A_TEAPOT)),
            ),
            (vec![("x-envoy-fault-abort-request", "199")], None),
            (vec![("x-envoy-fault-abort-request", "600")], None),
            (vec![("x-envoy-fault-abort-grpc-request", "7")], Some(Aborted::Grpc(7))),
        ] {
            assert_eq!(faults.abort(&head(&fields), 0), abort, "{fields:?}");
        }
        assert_eq!(
            faults.rate(&head(&[("x-envoy-fault-throughput-response", "2")]), 0),
            Some(2048)
        );
    }

    #[test]
    fn a_fixed_fault_takes_no_orders_from_the_request() {
        let faults = Faults {
            delay: Some(Delay {
                fixed: Some(Duration::from_secs(1)),
                share: HALF,
            }),
            ..Faults::default()
        };
        let fields = [
            ("x-envoy-fault-delay-request", "5000"),
            ("x-envoy-fault-delay-request-percentage", "0"),
        ];
        assert_eq!(faults.delay(&head(&fields), 0), Some(Duration::from_secs(1)));
    }

    #[test]
    fn faults_are_meant_for_some_requests() {
        let faults = Faults {
            upstream_cluster: Some("a".into()),
            downstream_nodes: vec!["n1".into(), "n2".into()],
            headers: vec![HeaderMatcher {
                name: MatcherName::parse("x-chaos").unwrap(),
                how: HeaderMatch::Present(true),
                invert: false,
                treat_missing_as_empty: false,
            }],
            ..Faults::default()
        };
        let all = [("x-chaos", "1"), ("x-envoy-downstream-service-node", "n2")];
        for (fields, cluster, applies) in [
            (&all[..], Some("a"), true),
            (&all[..], Some("b"), false),
            (&all[..], None, false),
            (&all[..1], Some("a"), false),
            (&all[1..], Some("a"), false),
        ] {
            assert_eq!(faults.applies(&head(fields), cluster), applies, "{fields:?} {cluster:?}");
        }
    }
}
