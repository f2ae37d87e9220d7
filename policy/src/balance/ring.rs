//! Consistent hashing on a ring, placed bit for bit as Envoy's: the hash of `key_0`, `key_1`, … of each endpoint are its points, as many
//! as its weight says, and a request goes to the endpoint of the next point.
//!
//! Proxies that agree on endpoints and weights agree on every request, whichever of them it meets.

use xxhash_rust::xxh64::xxh64;

use super::murmur;

/// Fewest points of a ring, where configuration says nothing.
pub const DEFAULT_MINIMUM: u64 = 1024;
/// Most points of a ring: Envoy's own limit.
pub const MOST_POINTS: u64 = 8 * 1024 * 1024;

/// What points are hashed with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HashFunction {
    /// xxHash, 64 bits.
    #[default]
    XxHash,
    /// MurmurHash2, 64 bits, with the seed of GNU's `std::hash`.
    Murmur2,
}

/// How large a ring is, and what it is hashed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingSize {
    /// At least so many points, so that shares are close to the weights.
    pub minimum: u64,
    /// At most so many.
    pub maximum: u64,
    /// The function.
    pub function: HashFunction,
}

/// A ring. Endpoints are indices into the list that it was made from.
#[derive(Clone, Debug)]
pub struct Ring {
    /// Points in order, each with its endpoint.
    points: Box<[(u64, u32)]>,
}

impl Default for RingSize {
    fn default() -> Self {
        Self {
            minimum: DEFAULT_MINIMUM,
            maximum: MOST_POINTS,
            function: HashFunction::XxHash,
        }
    }
}

// === impl Ring ===

impl Ring {
    /// A ring of endpoints, each with its key and its share of all (shares are positive and add up to 1).
    pub fn new<'k>(endpoints: impl ExactSizeIterator<Item = (&'k str, f64)> + Clone, size: RingSize) -> Self {
        let least = endpoints.clone().map(|(_, share)| share).fold(1.0, f64::min);
        if endpoints.len() == 0 || least <= 0.0 {
            return Self { points: Box::default() };
        }
        // The endpoint with the smallest share has a whole number of points, unless that makes the ring too large.
        let scale = ((least * size.minimum as f64).ceil() / least).min(size.maximum as f64);
        let mut points = Vec::with_capacity(scale.ceil() as usize);
        let (mut made, mut wanted) = (0.0, 0.0);
        let mut key = Vec::new();
        for (index, (name, share)) in (0u32..).zip(endpoints) {
            wanted += scale * share;
            key.clear();
            key.extend_from_slice(name.as_bytes());
            key.push(b'_');
            let stem = key.len();
            let mut number = 0u64;
            while made < wanted {
                key.truncate(stem);
                key.extend_from_slice(number.to_string().as_bytes());
                let point = match size.function {
                    HashFunction::XxHash => xxh64(&key, 0),
                    HashFunction::Murmur2 => murmur::murmur2(&key, murmur::STD_SEED),
                };
                points.push((point, index));
                number += 1;
                made += 1.0;
            }
        }
        points.sort_by_key(|(point, _)| *point);
        Self { points: points.into() }
    }

    /// The endpoint for a hash. Later attempts are those of a retry that avoids the endpoints before: the next points.
    pub fn choose(&self, hash: u64, attempt: u32) -> Option<usize> {
        let at = self.points.partition_point(|(point, _)| *point < hash);
        let at = if at == self.points.len() { 0 } else { at };
        let at = (at + attempt as usize).checked_rem(self.points.len())?;
        self.points.get(at).map(|(_, index)| *index as usize)
    }

    /// Number of points.
    pub fn len(&self) -> usize {
        self.points.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.points.is_empty()
    }

    #[cfg(test)]
    fn owners(&self) -> Vec<u32> {
        self.points.iter().map(|(_, index)| *index).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::{HashFunction, Ring, RingSize};

    fn ring(ports: &[u16], size: RingSize) -> Ring {
        let names: Vec<String> = ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
        let share = 1.0 / names.len() as f64;
        Ring::new(names.iter().map(|name| (name.as_str(), share)), size)
    }

    /// The order of points that Envoy's own test of six endpoints and twelve points expects (`RingHashLoadBalancerTest.Basic`).
    #[test]
    fn points_lie_where_envoys_lie() {
        let size = RingSize {
            minimum: 12,
            ..RingSize::default()
        };
        let ring = ring(&[90, 91, 92, 93, 94, 95], size);
        assert_eq!(ring.len(), 12);
        assert_eq!(ring.owners(), [4, 2, 0, 5, 3, 1, 1, 3, 5, 2, 4, 0]);
        for (hash, expected) in [
            (0, 4),
            (u64::MAX, 4),
            (3_551_244_743_356_806_947, 5),
            (3_551_244_743_356_806_948, 3),
            (16_117_243_373_044_804_880, 0),
        ] {
            assert_eq!(ring.choose(hash, 0), Some(expected), "{hash}");
        }
        // A retry takes the next points in turn.
        let tries: Vec<_> = (0..4)
            .filter_map(|attempt| ring.choose(3_551_244_743_356_806_947, attempt))
            .collect();
        assert_eq!(tries, [5, 3, 1, 1]);
    }

    /// `RingHashLoadBalancerTest.BasicWithHostname`: other keys, other places.
    #[test]
    fn keys_decide_where_points_lie() {
        let size = RingSize {
            minimum: 12,
            ..RingSize::default()
        };
        let ring = Ring::new(
            ["90", "91", "92", "93", "94", "95"].into_iter().map(|name| (name, 1.0 / 6.0)),
            size,
        );
        assert_eq!(ring.owners(), [5, 5, 3, 4, 3, 2, 0, 2, 1, 0, 1, 4]);
        assert_eq!(ring.choose(7_225_015_537_174_310_577, 0), Some(2));
        assert_eq!(ring.choose(6_803_900_775_736_438_537, 0), Some(3));
    }

    /// `RingHashLoadBalancerTest.BasicWithMurmur2`.
    #[test]
    fn murmur_points_lie_where_envoys_lie() {
        let size = RingSize {
            minimum: 12,
            function: HashFunction::Murmur2,
            ..RingSize::default()
        };
        let names: Vec<String> = (80..86).map(|port| format!("127.0.0.1:{port}")).collect();
        let ring = Ring::new(names.iter().map(|name| (name.as_str(), 1.0 / 6.0)), size);
        assert_eq!(ring.owners(), [5, 3, 4, 1, 2, 4, 1, 2, 3, 0, 5, 0]);
        assert_eq!(ring.choose(1_358_027_074_129_602_068, 0), Some(5));
        assert_eq!(ring.choose(1_358_027_074_129_602_069, 0), Some(3));
        assert_eq!(ring.choose(10_150_910_876_324_007_730, 0), Some(2));
    }

    #[test]
    fn weights_share_the_points_and_a_full_ring_drops_the_small() {
        let weighted = |weights: &[u32], minimum, maximum| {
            let names: Vec<String> = (0..weights.len()).map(|index| format!("127.0.0.1:{}", 80 + index)).collect();
            let sum: u32 = weights.iter().sum();
            let pairs: Vec<(&str, f64)> = names
                .iter()
                .zip(weights)
                .map(|(name, weight)| (name.as_str(), f64::from(*weight) / f64::from(sum)))
                .collect();
            let size = RingSize {
                minimum,
                maximum,
                ..RingSize::default()
            };
            let owners = Ring::new(pairs.into_iter(), size).owners();
            (0..weights.len() as u32)
                .map(|index| owners.iter().filter(|owner| **owner == index).count())
                .collect::<Vec<_>>()
        };
        assert_eq!(weighted(&[1, 2], 3, 1024), [1, 2]);
        assert_eq!(weighted(&[1, 1, 2], 1, 1024), [1, 1, 2]);
        // Four endpoints, six points: `LopsidedWeightSmallScale` and its like round in order.
        assert_eq!(weighted(&[1, 1, 1, 1], 6, 6), [2, 1, 2, 1]);
        assert_eq!(weighted(&[], 6, 6), [] as [usize; 0]);
    }
}
