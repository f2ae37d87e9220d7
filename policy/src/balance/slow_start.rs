//! Slow start: a new endpoint gets a growing part of its share, so that its caches and compilers warm up.

use std::time::Duration;

/// How an endpoint is warmed up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SlowStart {
    /// How long it takes.
    pub window: Duration,
    /// 1 grows evenly; above 1 faster in the beginning.
    pub aggression: f64,
    /// The least part of the weight, 0 to 1.
    pub least: f64,
}

// === impl SlowStart ===

impl SlowStart {
    /// The part of its weight that an endpoint has at this age.
    pub fn factor(&self, age: Duration) -> f64 {
        if age >= self.window {
            return 1.0;
        }
        let time = age.max(Duration::from_millis(1)).as_secs_f64() / self.window.as_secs_f64();
        let grown = if self.aggression == 1.0 || self.aggression <= 0.0 {
            time
        } else {
            time.powf(1.0 / self.aggression)
        };
        grown.clamp(self.least, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::SlowStart;

    #[test]
    fn the_part_grows_from_the_least_to_all() {
        let slow = |aggression| SlowStart {
            window: Duration::from_secs(60),
            aggression,
            least: 0.1,
        };
        for (aggression, age, expected) in [
            (1.0, 0, 0.1),
            (1.0, 3, 0.1),
            (1.0, 30, 0.5),
            (1.0, 60, 1.0),
            (1.0, 600, 1.0),
            (2.0, 15, 0.5),
            (0.5, 30, 0.25),
        ] {
            let factor = slow(aggression).factor(Duration::from_secs(age));
            assert!((factor - expected).abs() < 1e-9, "{aggression} {age}: {factor}");
        }
    }
}
