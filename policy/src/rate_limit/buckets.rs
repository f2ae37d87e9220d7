//! Buckets of a local limit: one for all requests, and others for descriptors.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;

use super::{Descriptor, TokenBucket};

/// The size of a bucket.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BucketSettings {
    /// Room for tokens.
    pub max: u32,
    /// Tokens that come …
    pub per_fill: u32,
    /// … in this time.
    pub interval: Duration,
}

/// A descriptor that has buckets of its own.
#[derive(Clone, Debug, PartialEq)]
pub struct CountedDescriptor {
    /// Keys and values; one without a value stands for all values, each with a bucket of its own.
    pub entries: Vec<(Arc<str>, Option<Box<str>>)>,
    /// The size of its buckets.
    pub bucket: BucketSettings,
    /// It is counted and denies nothing.
    pub shadow: bool,
}

/// The buckets of a limit.
#[derive(Debug)]
pub struct Buckets {
    /// For all requests.
    default: Option<Arc<TokenBucket>>,
    descriptors: Vec<OfDescriptor>,
    /// Requests with a descriptor of ours count for all requests too.
    always_default: bool,
    /// Most buckets of a descriptor that stands for all values.
    most_dynamic: usize,
}

#[derive(Debug)]
struct OfDescriptor {
    counted: CountedDescriptor,
    /// The one, or those of the values that were seen last, the latest last.
    buckets: Mutex<Vec<(Vec<String>, Arc<TokenBucket>)>>,
}

/// Whether a request is allowed, and by which bucket.
#[derive(Debug)]
pub struct Allowance {
    /// Whether it is.
    pub allowed: bool,
    /// The bucket that decided.
    pub bucket: Option<Arc<TokenBucket>>,
}

// === impl BucketSettings ===

impl BucketSettings {
    /// A full bucket.
    pub fn bucket(&self, now: Duration) -> TokenBucket {
        TokenBucket::new(self.max, self.per_fill, self.interval, now)
    }
}

// === impl Buckets ===

impl Buckets {
    /// Full buckets.
    pub fn new(
        default: Option<BucketSettings>,
        descriptors: Vec<CountedDescriptor>,
        always_default: bool,
        most_dynamic: usize,
        now: Duration,
    ) -> Self {
        let of_descriptor = |counted| OfDescriptor {
            counted,
            buckets: Mutex::default(),
        };
        Self {
            default: default.map(|settings| Arc::new(settings.bucket(now))),
            descriptors: descriptors.into_iter().map(of_descriptor).collect(),
            always_default,
            most_dynamic: most_dynamic.max(1),
        }
    }

    /// Whether any descriptor has a bucket of its own.
    pub fn has_descriptors(&self) -> bool {
        !self.descriptors.is_empty()
    }

    /// Takes the tokens of a request with these descriptors. Buckets that fill more slowly come first; one that has none left denies
    /// the request, and those behind it keep theirs.
    pub fn take(&self, descriptors: &[Descriptor], now: Duration) -> Allowance {
        let mut ours: Vec<(Arc<TokenBucket>, u64, bool)> = descriptors
            .iter()
            .filter_map(|asked| {
                let counted = self.descriptors.iter().find(|ours| ours.counted.is(asked))?;
                let bucket = counted.bucket(asked, self.most_dynamic, now);
                Some((bucket, asked.hits.unwrap_or(1), counted.counted.shadow))
            })
            .collect();
        ours.sort_by(|(a, ..), (b, ..)| a.rate().total_cmp(&b.rate()));
        for (bucket, hits, shadow) in &ours {
            if !bucket.take(*hits, now) && !shadow {
                return Allowance {
                    allowed: false,
                    bucket: Some(bucket.clone()),
                };
            }
        }
        let first = ours.into_iter().next().map(|(bucket, ..)| bucket);
        let allowed = |bucket| Allowance { allowed: true, bucket };
        match &self.default {
            Some(default) if first.is_none() || self.always_default => {
                if default.take(1, now) {
                    allowed(first.or_else(|| Some(default.clone())))
                } else {
                    Allowance {
                        allowed: false,
                        bucket: Some(default.clone()),
                    }
                }
            }
            _ => allowed(first),
        }
    }
}

// === impl CountedDescriptor ===

impl CountedDescriptor {
    fn is(&self, asked: &Descriptor) -> bool {
        self.entries.len() == asked.entries.len()
            && self
                .entries
                .iter()
                .zip(&asked.entries)
                .all(|((key, value), (asked_key, asked_value))| {
                    key == asked_key && value.as_ref().is_none_or(|value| **value == **asked_value)
                })
    }
}

// === impl OfDescriptor ===

impl OfDescriptor {
    /// The bucket of these values.
    fn bucket(&self, asked: &Descriptor, most: usize, now: Duration) -> Arc<TokenBucket> {
        let values = self.counted.entries.iter().zip(&asked.entries);
        let values: Vec<String> = values
            .filter(|((_, value), _)| value.is_none())
            .map(|(_, (_, value))| value.clone())
            .collect();
        let mut buckets = self.buckets.lock();
        let at = buckets.iter().position(|(known, _)| *known == values);
        let entry = match at {
            Some(at) => buckets.remove(at),
            None => {
                if buckets.len() >= most {
                    buckets.remove(0);
                }
                (values, Arc::new(self.counted.bucket.bucket(now)))
            }
        };
        let bucket = entry.1.clone();
        buckets.push(entry);
        bucket
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn settings(max: u32) -> BucketSettings {
        BucketSettings {
            max,
            per_fill: max,
            interval: Duration::from_secs(60),
        }
    }

    fn counted(entries: &[(&str, Option<&str>)], max: u32) -> CountedDescriptor {
        let entry = |(key, value): &(&str, Option<&str>)| ((*key).into(), value.map(Into::into));
        CountedDescriptor {
            entries: entries.iter().map(entry).collect(),
            bucket: settings(max),
            shadow: false,
        }
    }

    fn asked(entries: &[(&str, &str)]) -> Descriptor {
        let entry = |(key, value): &(&str, &str)| ((*key).into(), (*value).to_owned());
        Descriptor {
            entries: entries.iter().map(entry).collect(),
            ..Descriptor::default()
        }
    }

    fn passes(buckets: &Buckets, descriptors: &[Descriptor], of: usize) -> usize {
        (0..of).filter(|_| buckets.take(descriptors, Duration::ZERO).allowed).count()
    }

    #[test]
    fn a_descriptor_has_its_own_bucket_beside_that_of_all() {
        let special = asked(&[("header_match", "special")]);
        for (always, default, special_passes, others_pass) in [
            (true, Some(10), 2, 8),
            (false, Some(10), 2, 10),
            (true, Some(1), 1, 0),
            (true, None, 2, 20),
        ] {
            let descriptors = vec![counted(&[("header_match", Some("special"))], 2)];
            let buckets = Buckets::new(default.map(settings), descriptors, always, 20, Duration::ZERO);
            assert_eq!(
                passes(&buckets, std::slice::from_ref(&special), 20),
                special_passes,
                "{always} {default:?}"
            );
            let other = asked(&[("header_match", "other")]);
            assert_eq!(passes(&buckets, &[other], 20), others_pass, "{always} {default:?}");
        }
    }

    #[test]
    fn all_entries_have_to_be_those_of_the_descriptor() {
        let buckets = Buckets::new(
            None,
            vec![counted(&[("a", Some("1")), ("b", Some("2"))], 1)],
            true,
            20,
            Duration::ZERO,
        );
        for other in [
            &[("a", "1")][..],
            &[("b", "2"), ("a", "1")],
            &[("a", "1"), ("b", "2"), ("c", "3")],
        ] {
            assert_eq!(passes(&buckets, &[asked(other)], 5), 5, "{other:?}");
        }
        assert_eq!(passes(&buckets, &[asked(&[("a", "1"), ("b", "2")])], 5), 1);
    }

    #[test]
    fn a_descriptor_without_a_value_counts_each_value_and_forgets_the_oldest() {
        let buckets = Buckets::new(None, vec![counted(&[("user", None)], 1)], true, 2, Duration::ZERO);
        let of = |user: &str| passes(&buckets, &[asked(&[("user", user)])], 3);
        assert_eq!([of("a"), of("b"), of("a"), of("c"), of("a"), of("b")], [1, 1, 0, 1, 0, 1]);
    }

    #[test]
    fn a_shadow_denies_nothing() {
        let shadow = CountedDescriptor {
            shadow: true,
            ..counted(&[("a", Some("1"))], 1)
        };
        let buckets = Buckets::new(None, vec![shadow], true, 20, Duration::ZERO);
        assert_eq!(passes(&buckets, &[asked(&[("a", "1")])], 5), 5);
    }

    #[test]
    fn the_slowest_bucket_is_asked_first_and_saves_the_others() {
        let descriptors = vec![counted(&[("fast", Some("1"))], 9), counted(&[("slow", Some("1"))], 1)];
        let buckets = Buckets::new(None, descriptors, true, 20, Duration::ZERO);
        let both = [asked(&[("fast", "1")]), asked(&[("slow", "1")])];
        assert_eq!(passes(&buckets, &both, 5), 1);
        assert_eq!(passes(&buckets, &both[..1], 20), 8);
    }
}
