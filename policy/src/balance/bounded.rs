//! Consistent hashing with bounded loads: an endpoint takes at most so many percent of the average, and what it may not take goes to
//! another, in an order that the hash decides (Mirrokni et al., arXiv 1608.01350; Chen et al., arXiv 1908.08762).
//!
//! The order is Envoy's, random number by random number, so that several proxies send what overflows to the same endpoints.

/// What an endpoint has to do.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Requests under way at it.
    pub active: u32,
    /// Its share of all.
    pub share: f64,
}

/// The endpoint for a hash whose first choice is `first`. `overall` is the number of requests under way in the cluster, `factor` the
/// percentage of the average that one endpoint may have.
pub fn within_bounds(first: usize, hash: u64, count: usize, overall: u32, factor: u32, load: impl Fn(usize) -> Load) -> usize {
    let overload = |at: usize| {
        let Load { active, share } = load(at);
        let total = ((u64::from(overall) + 1) * u64::from(factor)).div_ceil(100);
        let slots = (total as f64 * share).ceil().max(1.0);
        f64::from(active) / slots
    };
    let mut least = overload(first);
    if least <= 1.0 {
        return first;
    }
    let mut chosen = first;
    // Envoy seeds its generator with the low half: `std::mt19937` takes 32 bits.
    let mut random = Mt19937::new(hash as u32);
    let mut order: Vec<usize> = (0..count).collect();
    for at in 0..count {
        let jump = random.below(u32::try_from(count - at).unwrap_or(u32::MAX)) as usize;
        order.swap(at, at + jump);
        let Some(candidate) = order.get(at).copied().filter(|candidate| *candidate != first) else {
            continue;
        };
        let factor = overload(candidate);
        if factor <= 1.0 {
            return candidate;
        }
        if factor < least {
            (chosen, least) = (candidate, factor);
        }
    }
    chosen
}

/// The Mersenne twister of 32 bits (Matsumoto and Nishimura, 1998), as C++'s `std::mt19937`.
struct Mt19937 {
    state: [u32; LENGTH],
    at: usize,
}

const LENGTH: usize = 624;
const MIDDLE: usize = 397;

impl Mt19937 {
    fn new(seed: u32) -> Self {
        let mut state = [0; LENGTH];
        let mut previous = seed;
        for (word, number) in state.iter_mut().zip(0u32..) {
            if number > 0 {
                previous = (previous ^ (previous >> 30)).wrapping_mul(1_812_433_253).wrapping_add(number);
            }
            *word = previous;
        }
        Self { state, at: LENGTH }
    }

    fn next(&mut self) -> u32 {
        if self.at == LENGTH {
            self.twist();
        }
        // `at` is below the length after a twist.
        let mut word = self.state[self.at];
        self.at += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    fn twist(&mut self) {
        for at in 0..LENGTH {
            let word = (self.state[at] & 0x8000_0000) | (self.state[(at + 1) % LENGTH] & 0x7fff_ffff);
            let mut mixed = self.state[(at + MIDDLE) % LENGTH] ^ (word >> 1);
            if word & 1 == 1 {
                mixed ^= 0x9908_b0df;
            }
            self.state[at] = mixed;
        }
        self.at = 0;
    }

    /// A number below `bound`, each as likely.
    fn below(&mut self, bound: u32) -> u32 {
        let part = (1u64 << 32) / u64::from(bound.max(1));
        loop {
            let number = u64::from(self.next()) / part;
            if number < u64::from(bound.max(1)) {
                // It is below a u32.
                return number as u32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Load, Mt19937, within_bounds};

    /// C++ promises this value of the ten thousandth number of the default seed ([rand.predef]).
    #[test]
    fn the_generator_is_that_of_the_standard() {
        let mut random = Mt19937::new(5489);
        let last = (0..10_000).map(|_| random.next()).last();
        assert_eq!(last, Some(4_123_659_995));
    }

    fn choose(first: usize, active: &[u32], factor: u32) -> usize {
        let overall = active.iter().sum();
        let share = 1.0 / active.len() as f64;
        within_bounds(first, 7, active.len(), overall, factor, |at| Load {
            active: active[at],
            share,
        })
    }

    #[test]
    fn an_endpoint_within_its_bound_keeps_its_requests() {
        assert_eq!(choose(1, &[0, 2, 2], 150), 1);
        assert_eq!(choose(0, &[0, 0, 0], 150), 0);
    }

    #[test]
    fn what_overflows_goes_to_one_that_has_room_always_the_same() {
        let chosen = choose(1, &[0, 30, 0], 110);
        assert_ne!(chosen, 1);
        assert!((0..20).all(|_| choose(1, &[0, 30, 0], 110) == chosen));
    }

    #[test]
    fn when_all_are_full_the_least_full_takes_it() {
        let loads = |at: usize| Load {
            active: [9, 8, 7][at],
            share: 0.01,
        };
        assert_eq!(within_bounds(0, 1, 3, 1, 100, loads), 2);
    }
}
