//! When a certificate is renewed, and what happens when that fails.
//!
//! A certificate is renewed when half of the life that it had when it came in is over, give or take a little so that a fleet
//! does not come at once. The old one stays in use until the new one is in. A failed renewal is tried again with growing waits,
//! for as long as it takes: the old certificate serves until its end, and a new one may come after it.
//!
//! The life is counted from when the certificate came in, not from its first moment: authorities back-date certificates, and
//! with short lives a proxy would ask again at once, for ever (contract runtime §8.3).

use std::{
    error::Error,
    time::{Duration, SystemTime},
};

use cairn_exchange::clock;

use crate::{backoff::Backoff, credentials::Credentials, identity::Shared};

/// Renewals are at least this far apart, however short the certificates live.
const MIN_INTERVAL: Duration = Duration::from_secs(1);
/// The time of day may jump (a suspended machine); it is compared again at least this often.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// At which part of its life a certificate is renewed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Renewal {
    /// Part of the life that is left when it is renewed (`SECRET_GRACE_PERIOD_RATIO`).
    pub(crate) ratio: f64,
    /// The ratio varies by up to this (`SECRET_GRACE_PERIOD_RATIO_JITTER`).
    pub(crate) jitter: f64,
}

/// Issues, installs and renews for ever.
pub(crate) async fn keep_fresh<E: Error, F, R>(shared: &Shared, renewal: Renewal, mut issue: F)
where
    F: FnMut() -> R,
    R: Future<Output = Result<Credentials, E>>,
{
    let mut backoff = Backoff::new();
    loop {
        match issue().await {
            Ok(credentials) => {
                backoff.reset();
                let at = renewal.at(&credentials, shared.wall().now());
                shared.install(credentials, Some(at));
                tokio::time::sleep(MIN_INTERVAL).await;
                wait_until(shared, at).await;
            }
            Err(error) => {
                shared.failed("asking for a workload certificate", &error);
                tokio::time::sleep(backoff.next()).await;
            }
        }
    }
}

async fn wait_until(shared: &Shared, at: SystemTime) {
    while let Ok(left) = at.duration_since(shared.wall().now()) {
        if left.is_zero() {
            return;
        }
        tokio::time::sleep_until(clock::now() + left.min(LOOK_AGAIN)).await;
    }
}

// === impl Renewal ===

impl Renewal {
    fn at(self, credentials: &Credentials, now: SystemTime) -> SystemTime {
        let ratio = self.ratio + self.jitter * (2.0 * fastrand::f64() - 1.0);
        now + credentials.remaining(now).mul_f64(1.0 - ratio.clamp(0.0, 1.0))
    }
}
