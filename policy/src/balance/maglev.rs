//! Consistent hashing by Maglev's table (Eisenbud et al., NSDI 2016, §3.4), filled bit for bit as Envoy fills it.
//!
//! Each endpoint walks through the table by an offset and a step that its key decides, and takes the next free entry when its turn
//! comes; one with a smaller weight has fewer turns.

use xxhash_rust::xxh64::xxh64;

/// Entries of a table, where configuration says nothing.
pub const DEFAULT_TABLE: u64 = 65_537;
/// Most entries of a table: Envoy's own limit.
pub const MOST_ENTRIES: u64 = 5_000_011;

/// A table. Endpoints are indices into the list that it was made from.
#[derive(Clone, Debug)]
pub struct Maglev {
    table: Box<[u32]>,
}

struct Walk {
    index: u32,
    offset: u64,
    step: u64,
    next: u64,
    share: f64,
    target: f64,
}

/// Nobody's entry.
const FREE: u32 = u32::MAX;

// === impl Maglev ===

impl Maglev {
    /// A table of endpoints, each with its key and its share of all. `size` is a prime.
    pub fn new<'k>(endpoints: impl Iterator<Item = (&'k str, f64)>, size: u64) -> Self {
        let mut named: Vec<(&str, u32, f64)> = (0u32..)
            .zip(endpoints)
            .map(|(index, (key, share))| (key, index, share))
            .collect();
        named.sort_by(|a, b| a.0.cmp(b.0).then_with(|| a.1.cmp(&b.1)));
        let most = named.iter().map(|(_, _, share)| *share).fold(0.0, f64::max);
        if named.is_empty() || size < 2 || most <= 0.0 {
            return Self { table: Box::default() };
        }
        let mut walks: Vec<Walk> = named
            .into_iter()
            .map(|(key, index, share)| Walk {
                index,
                offset: xxh64(key.as_bytes(), 0) % size,
                step: xxh64(key.as_bytes(), 1) % (size - 1) + 1,
                next: 0,
                share,
                target: 0.0,
            })
            .collect();
        let mut table = vec![FREE; size as usize].into_boxed_slice();
        let mut filled = 0;
        let mut round = 0.0;
        while filled < size {
            round += 1.0;
            for walk in &mut walks {
                if filled == size {
                    break;
                }
                // One with the largest share has a turn in each round, one with a third of it in every third.
                if round * walk.share < walk.target {
                    continue;
                }
                walk.target += most;
                if let Some(entry) = walk.free_entry(&mut table, size) {
                    *entry = walk.index;
                    filled += 1;
                }
            }
        }
        Self { table }
    }

    /// The endpoint for a hash. Later attempts are those of a retry that avoids the endpoints before: other entries.
    pub fn choose(&self, hash: u64, attempt: u32) -> Option<usize> {
        let hash = if attempt == 0 {
            hash
        } else {
            hash ^ (u64::MAX - u64::from(attempt) + 1)
        };
        let at = hash.checked_rem(self.table.len() as u64)?;
        self.table.get(at as usize).map(|index| *index as usize)
    }
}

/// Whether a number is a prime, as the size of a table has to be.
pub fn is_prime(number: u64) -> bool {
    number >= 2
        && (2..)
            .take_while(|divisor| divisor * divisor <= number)
            .all(|divisor| !number.is_multiple_of(divisor))
}

impl Walk {
    /// The next entry of the walk that is nobody's. The step and the size have no common divisor, so it comes by every entry.
    fn free_entry<'t>(&mut self, table: &'t mut [u32], size: u64) -> Option<&'t mut u32> {
        for _ in 0..size {
            let at = (self.offset + self.step * self.next) % size;
            self.next += 1;
            if table.get(at as usize) == Some(&FREE) {
                return table.get_mut(at as usize);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::{Maglev, is_prime};

    fn table(weights: &[u32], size: u64) -> Vec<usize> {
        let names: Vec<String> = (0..weights.len()).map(|index| format!("127.0.0.1:{}", 90 + index)).collect();
        let sum: u32 = weights.iter().sum();
        let pairs = names
            .iter()
            .zip(weights)
            .map(|(name, weight)| (name.as_str(), f64::from(*weight) / f64::from(sum)));
        let maglev = Maglev::new(pairs, size);
        (0..size).filter_map(|hash| maglev.choose(hash, 0)).collect()
    }

    /// Envoy's own test of six endpoints and seven entries (`MaglevLoadBalancerTest.Basic`).
    #[test]
    fn entries_lie_where_envoys_lie() {
        assert_eq!(table(&[1; 6], 7), [2, 4, 0, 1, 5, 0, 3]);
    }

    /// `MaglevLoadBalancerTest.Weighted`: two endpoints of weights one and two, seventeen entries.
    #[test]
    fn weighted_entries_lie_where_envoys_lie() {
        assert_eq!(table(&[1, 2], 17), [1, 0, 0, 1, 0, 1, 1, 0, 1, 1, 1, 1, 1, 0, 1, 0, 1]);
        assert_eq!(table(&[1, 1], 17), [1, 0, 0, 1, 0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0, 1]);
        assert_eq!(table(&[8, 2], 17), [1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0]);
    }

    /// `MaglevLoadBalancerTest.BasicWithRetryHostPredicate`.
    #[test]
    fn a_retry_looks_where_envoys_looks() {
        let names: Vec<String> = (90..96).map(|port| format!("127.0.0.1:{port}")).collect();
        let maglev = Maglev::new(names.iter().map(|name| (name.as_str(), 1.0 / 6.0)), 7);
        let tries: Vec<_> = (0..3).filter_map(|attempt| maglev.choose(10, attempt)).collect();
        assert_eq!(tries, [1, 0, 5]);
    }

    #[test]
    fn sizes_are_primes() {
        for (number, prime) in [
            (0, false),
            (1, false),
            (2, true),
            (101, true),
            (65_537, true),
            (65_536, false),
            (49, false),
        ] {
            assert_eq!(is_prime(number), prime, "{number}");
        }
    }
}
