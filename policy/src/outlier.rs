//! Which endpoints are taken out for a while because they fail: the rules of outlier detection, without endpoints and clocks.
//!
//! An endpoint is ejected after so many failures in a row, or when it does worse than the others over an interval. It comes back by
//! itself after a time that grows with each ejection. Never more than a share of a cluster's endpoints is out at once, except that one
//! may always be while another one serves: without that a cluster of fewer than ten endpoints would never eject any (10 % is the
//! default), and traffic would not fail over to another locality.

use std::time::Duration;

/// What outlier detection looks at, and what it does.
#[derive(Clone, Debug, PartialEq)]
pub struct OutlierSettings {
    /// Time between two looks at rates and at endpoints that may come back.
    pub interval: Duration,
    /// Time of the first ejection; the n-th takes n times as long.
    pub base_time: Duration,
    /// The longest ejection.
    pub max_time: Duration,
    /// Up to so much is added by chance, so that endpoints do not come back all at once.
    pub max_jitter: Duration,
    /// Most endpoints that are out at once.
    pub max_percent: u32,
    /// One may be out whatever the share, even the only one.
    pub always_one: bool,
    /// Failures to connect, and timeouts, are counted apart from answers.
    pub split: bool,
    /// 5xx answers in a row.
    pub server_errors: Rule,
    /// 502, 503 and 504 answers in a row.
    pub gateway_errors: Rule,
    /// Failures to connect in a row, where they are counted apart.
    pub local_failures: Rule,
    /// Success rates that fall out of the others'.
    pub success_rate: SuccessRate,
    /// Success rates that are too small.
    pub failure_percentage: FailurePercentage,
}

/// So many in a row, and how often that ejects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// How many; 0 never happens.
    pub consecutive: u32,
    /// Percent of the cases in which it ejects; the others are only told.
    pub enforcing: u32,
}

/// An endpoint whose success rate is so far below the mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SuccessRate {
    /// Fewest endpoints with enough requests.
    pub minimum_hosts: usize,
    /// Requests in an interval that are enough.
    pub volume: u32,
    /// How many standard deviations below the mean.
    pub deviations: f64,
    /// Percent of the cases in which it ejects.
    pub enforcing: u32,
    /// The same for failures to connect, where they are counted apart.
    pub enforcing_local: u32,
}

/// An endpoint of whose requests so many fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FailurePercentage {
    /// Fewest endpoints with enough requests.
    pub minimum_hosts: usize,
    /// Requests in an interval that are enough.
    pub volume: u32,
    /// Percent of failures.
    pub threshold: u32,
    /// Percent of the cases in which it ejects.
    pub enforcing: u32,
    /// The same for failures to connect, where they are counted apart.
    pub enforcing_local: u32,
}

/// Why an endpoint is ejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EjectionKind {
    /// 5xx in a row.
    Consecutive5xx,
    /// Gateway errors in a row.
    ConsecutiveGatewayFailure,
    /// A success rate below the others'.
    SuccessRate,
    /// Failures to connect in a row.
    ConsecutiveLocalOriginFailure,
    /// A rate of connecting below the others'.
    SuccessRateLocalOrigin,
    /// Too many failures.
    FailurePercentage,
    /// Too many failures to connect.
    FailurePercentageLocalOrigin,
}

/// How a request, or a connection, to an endpoint went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// The connection is there; how the request goes is told later.
    Connected,
    /// The connection is there, and nothing more will be told (bytes).
    ConnectedForGood,
    /// No connection, or it was cut before an answer.
    Failed,
    /// No answer in time.
    TimedOut,
    /// An answer with this status.
    Answered(u16),
}

/// What a report means for the counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// A request with this status.
    pub status: Option<u16>,
    /// An attempt to connect that succeeded, or did not.
    pub local: Option<bool>,
}

/// The share of good requests of an endpoint in an interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// Percent that succeeded.
    pub success: f64,
    /// Requests.
    pub volume: u32,
}

/// Mean of the success rates, and the rate below which an endpoint is out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    /// The mean.
    pub average: f64,
    /// The rate below which one is ejected.
    pub threshold: f64,
}

impl Default for OutlierSettings {
    /// Envoy's defaults.
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(10),
            base_time: Duration::from_secs(30),
            max_time: Duration::from_secs(300),
            max_jitter: Duration::ZERO,
            max_percent: 10,
            always_one: false,
            split: false,
            server_errors: Rule {
                consecutive: 5,
                enforcing: 100,
            },
            gateway_errors: Rule {
                consecutive: 5,
                enforcing: 0,
            },
            local_failures: Rule {
                consecutive: 5,
                enforcing: 100,
            },
            success_rate: SuccessRate {
                minimum_hosts: 5,
                volume: 100,
                deviations: 1.9,
                enforcing: 100,
                enforcing_local: 100,
            },
            failure_percentage: FailurePercentage {
                minimum_hosts: 5,
                volume: 50,
                threshold: 85,
                enforcing: 0,
                enforcing_local: 0,
            },
        }
    }
}

// === impl OutlierSettings ===

impl OutlierSettings {
    /// What a report counts as.
    pub fn count(&self, report: Report) -> Counted {
        let status = |status| Counted {
            status: Some(status),
            local: None,
        };
        let local = |success| Counted {
            status: None,
            local: Some(success),
        };
        match (report, self.split) {
            (Report::Answered(code), _) => status(code),
            (Report::Connected | Report::ConnectedForGood, true) => local(true),
            (Report::Failed | Report::TimedOut, true) => local(false),
            (Report::Connected, false) => Counted::default(),
            (Report::ConnectedForGood, false) => status(200),
            (Report::Failed, false) => status(503),
            (Report::TimedOut, false) => status(504),
        }
    }

    /// Whether one more of `all` endpoints may be out, when `out` are, and `others` could serve instead.
    pub fn may_eject(&self, out: usize, all: usize, others: usize) -> bool {
        let percent = 100.0 * (out + 1) as f64 / all.max(1) as f64;
        let first = out == 0 && (self.always_one || self.max_percent > 0 && others > 0);
        first || percent <= f64::from(self.max_percent.min(100))
    }

    /// Percent of the cases in which a kind of failure ejects.
    pub fn enforcing(&self, kind: EjectionKind) -> u32 {
        match kind {
            EjectionKind::Consecutive5xx => self.server_errors.enforcing,
            EjectionKind::ConsecutiveGatewayFailure => self.gateway_errors.enforcing,
            EjectionKind::ConsecutiveLocalOriginFailure => self.local_failures.enforcing,
            EjectionKind::SuccessRate => self.success_rate.enforcing,
            EjectionKind::SuccessRateLocalOrigin => self.success_rate.enforcing_local,
            EjectionKind::FailurePercentage => self.failure_percentage.enforcing,
            EjectionKind::FailurePercentageLocalOrigin => self.failure_percentage.enforcing_local,
        }
    }

    /// How long an ejection lasts; `times` counts ejections that were not yet forgiven.
    pub fn time_out(&self, times: u32, jitter: Duration) -> Duration {
        self.base_time.saturating_mul(times).min(self.max_time) + jitter
    }

    /// The count of ejections after another one: it stops growing where the time does.
    pub fn after_ejection(&self, times: u32) -> u32 {
        if self.base_time.saturating_mul(times) < self.max_time + self.base_time {
            times + 1
        } else {
            times
        }
    }

    /// Mean and threshold of the success rates, when enough endpoints had enough requests. `all` is the number of endpoints.
    pub fn success_rate_verdict(&self, all: usize, rates: impl Iterator<Item = Rate> + Clone) -> Option<Verdict> {
        let rule = &self.success_rate;
        let rates = rates.filter(|rate| rate.volume >= rule.volume).map(|rate| rate.success);
        let count = rates.clone().count();
        if all < rule.minimum_hosts.min(self.failure_percentage.minimum_hosts) || count == 0 || count < rule.minimum_hosts {
            return None;
        }
        let average = rates.clone().sum::<f64>() / count as f64;
        let variance = rates.map(|rate| (rate - average).powi(2)).sum::<f64>() / count as f64;
        Some(Verdict {
            average,
            threshold: average - rule.deviations * variance.sqrt(),
        })
    }

    /// Whether enough endpoints had enough requests to look at failure percentages.
    pub fn judges_failures(&self, all: usize, rates: impl Iterator<Item = Rate>) -> bool {
        let rule = &self.failure_percentage;
        let count = rates.filter(|rate| rate.volume >= rule.volume).count();
        all >= rule.minimum_hosts.min(self.success_rate.minimum_hosts) && count > 0 && count >= rule.minimum_hosts
    }

    /// Whether an endpoint fails too often.
    pub fn fails_too_often(&self, rate: Rate) -> bool {
        let rule = &self.failure_percentage;
        rate.volume >= rule.volume && 100.0 - rate.success >= f64::from(rule.threshold)
    }
}

// === impl EjectionKind ===

impl EjectionKind {
    /// As event logs name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Consecutive5xx => "CONSECUTIVE_5XX",
            Self::ConsecutiveGatewayFailure => "CONSECUTIVE_GATEWAY_FAILURE",
            Self::SuccessRate => "SUCCESS_RATE",
            Self::ConsecutiveLocalOriginFailure => "CONSECUTIVE_LOCAL_ORIGIN_FAILURE",
            Self::SuccessRateLocalOrigin => "SUCCESS_RATE_LOCAL_ORIGIN",
            Self::FailurePercentage => "FAILURE_PERCENTAGE",
            Self::FailurePercentageLocalOrigin => "FAILURE_PERCENTAGE_LOCAL_ORIGIN",
        }
    }
}

/// The HTTP status that a gRPC status counts as.
pub fn status_of_grpc(grpc: u32) -> u16 {
    match grpc {
        0 => 200,
        1 => 499,
        3 | 9 | 11 => 400,
        4 => 504,
        5 => 404,
        6 | 10 => 409,
        7 => 403,
        8 => 429,
        12 => 501,
        14 => 503,
        16 => 401,
        _ => 500,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Counted, OutlierSettings, Rate, Report};

    #[test]
    fn connecting_is_counted_apart_only_where_it_is_asked_for() {
        let together = OutlierSettings::default();
        let apart = OutlierSettings {
            split: true,
            ..OutlierSettings::default()
        };
        let status = |status| Counted {
            status: Some(status),
            local: None,
        };
        let local = |local| Counted {
            status: None,
            local: Some(local),
        };
        for (report, in_one, split) in [
            (Report::Connected, Counted::default(), local(true)),
            (Report::ConnectedForGood, status(200), local(true)),
            (Report::Failed, status(503), local(false)),
            (Report::TimedOut, status(504), local(false)),
            (Report::Answered(500), status(500), status(500)),
        ] {
            assert_eq!((together.count(report), apart.count(report)), (in_one, split), "{report:?}");
        }
    }

    #[test]
    fn no_more_than_a_share_is_out_but_one_always_may_be() {
        let of = |max_percent, always_one| OutlierSettings {
            max_percent,
            always_one,
            ..OutlierSettings::default()
        };
        for (max, always_one, out, all, others, may) in [
            (10, false, 0, 10, 9, true),
            (10, false, 1, 10, 8, false),
            (60, false, 0, 2, 1, true),
            (60, false, 1, 2, 0, false),
            (100, false, 1, 2, 0, true),
            // Beyond Envoy.
            (10, false, 0, 3, 2, true),
            (10, false, 1, 3, 1, false),
            (10, false, 0, 1, 0, false),
            (0, false, 0, 3, 2, false),
            (0, true, 0, 1, 0, true),
            (0, true, 1, 3, 1, false),
        ] {
            assert_eq!(of(max, always_one).may_eject(out, all, others), may, "{max} {out} {all}");
        }
    }

    #[test]
    fn each_ejection_lasts_longer_up_to_a_limit() {
        let settings = OutlierSettings {
            base_time: Duration::from_secs(30),
            max_time: Duration::from_secs(100),
            ..OutlierSettings::default()
        };
        let mut times = 0;
        let mut lasted = Vec::new();
        for _ in 0..6 {
            times = settings.after_ejection(times);
            lasted.push(settings.time_out(times, Duration::from_secs(1)).as_secs());
        }
        assert_eq!(lasted, [31, 61, 91, 101, 101, 101]);
        assert_eq!(times, 5);
    }

    /// The example of Envoy's documentation: rates 50, 100, 100, 100, 100 and factor 1.9 give 52.
    #[test]
    fn a_rate_far_below_the_mean_is_an_outlier() {
        let settings = OutlierSettings::default();
        let rates = [50.0, 100.0, 100.0, 100.0, 100.0].map(|success| Rate { success, volume: 100 });
        let verdict = settings.success_rate_verdict(5, rates.iter().copied()).unwrap();
        assert!((verdict.average - 90.0).abs() < 1e-9 && (verdict.threshold - 52.0).abs() < 1e-9);
        assert_eq!(settings.success_rate_verdict(5, rates.iter().copied().take(4)), None);
        let few = rates.map(|rate| Rate { volume: 99, ..rate });
        assert_eq!(settings.success_rate_verdict(5, few.iter().copied()), None);
        assert!(settings.judges_failures(5, few.iter().copied()));
        for (success, volume, often) in [(15.0, 50, true), (15.1, 50, false), (0.0, 49, false)] {
            assert_eq!(
                settings.fails_too_often(Rate { success, volume }),
                often,
                "{success} {volume}"
            );
        }
    }
}
