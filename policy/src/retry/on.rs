//! The words of `retry_on`.

use std::ops::{BitOr, BitOrAssign};

/// A set of conditions under which a request is tried again.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct RetryOn(u32);

/// Each condition with Envoy's word for it; the words of `x-envoy-retry-on` first, then those of `x-envoy-retry-grpc-on`.
const WORDS: [(&str, RetryOn); 16] = [
    ("5xx", RetryOn::SERVER_ERROR),
    ("gateway-error", RetryOn::GATEWAY_ERROR),
    ("connect-failure", RetryOn::CONNECT_FAILURE),
    ("envoy-ratelimited", RetryOn::RATE_LIMITED),
    ("retriable-4xx", RetryOn::RETRIABLE_4XX),
    ("refused-stream", RetryOn::REFUSED_STREAM),
    ("retriable-status-codes", RetryOn::STATUS_CODES),
    ("retriable-headers", RetryOn::HEADERS),
    ("reset", RetryOn::RESET),
    ("reset-before-request", RetryOn::RESET_BEFORE_REQUEST),
    ("http3-post-connect-failure", RetryOn::HTTP3_POST_CONNECT_FAILURE),
    ("cancelled", RetryOn::CANCELLED),
    ("deadline-exceeded", RetryOn::DEADLINE_EXCEEDED),
    ("resource-exhausted", RetryOn::RESOURCE_EXHAUSTED),
    ("unavailable", RetryOn::UNAVAILABLE),
    ("internal", RetryOn::INTERNAL),
];

// === impl RetryOn ===

impl RetryOn {
    /// Never.
    pub const NONE: Self = Self(0);
    /// Any 5xx, or no answer at all.
    pub const SERVER_ERROR: Self = Self(1);
    /// 502, 503, 504, or no answer at all.
    pub const GATEWAY_ERROR: Self = Self(1 << 1);
    /// No connection could be made.
    pub const CONNECT_FAILURE: Self = Self(1 << 2);
    /// The answer has `x-envoy-ratelimited`.
    pub const RATE_LIMITED: Self = Self(1 << 3);
    /// 409.
    pub const RETRIABLE_4XX: Self = Self(1 << 4);
    /// The stream was refused (REFUSED_STREAM).
    pub const REFUSED_STREAM: Self = Self(1 << 5);
    /// A status that the policy lists.
    pub const STATUS_CODES: Self = Self(1 << 6);
    /// A header that the policy lists.
    pub const HEADERS: Self = Self(1 << 7);
    /// No answer at all.
    pub const RESET: Self = Self(1 << 8);
    /// No answer, and nothing of the request was sent.
    pub const RESET_BEFORE_REQUEST: Self = Self(1 << 9);
    /// HTTP/3 only: accepted, never met.
    pub const HTTP3_POST_CONNECT_FAILURE: Self = Self(1 << 10);
    /// gRPC status 1.
    pub const CANCELLED: Self = Self(1 << 11);
    /// gRPC status 4.
    pub const DEADLINE_EXCEEDED: Self = Self(1 << 12);
    /// gRPC status 8.
    pub const RESOURCE_EXHAUSTED: Self = Self(1 << 13);
    /// gRPC status 14.
    pub const UNAVAILABLE: Self = Self(1 << 14);
    /// gRPC status 13.
    pub const INTERNAL: Self = Self(1 << 15);

    /// The conditions of a comma-separated list, and the words in it that are none.
    pub fn parse(list: &str) -> (Self, Vec<&str>) {
        let mut on = Self::NONE;
        let mut unknown = Vec::new();
        for word in list.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            match WORDS.iter().find(|(known, _)| *known == word) {
                Some((_, condition)) => on |= *condition,
                None => unknown.push(word),
            }
        }
        (on, unknown)
    }

    /// Whether all of `other` is in it.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether something of `other` is in it.
    pub fn any_of(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Whether it is never.
    pub fn is_none(self) -> bool {
        self.0 == 0
    }

    /// The condition of a gRPC status.
    pub fn of_grpc(status: u32) -> Self {
        match status {
            1 => Self::CANCELLED,
            4 => Self::DEADLINE_EXCEEDED,
            8 => Self::RESOURCE_EXHAUSTED,
            13 => Self::INTERNAL,
            14 => Self::UNAVAILABLE,
            _ => Self::NONE,
        }
    }

    /// Its words.
    pub fn words(self) -> impl Iterator<Item = &'static str> {
        WORDS
            .iter()
            .filter(move |(_, condition)| self.contains(*condition))
            .map(|(word, _)| *word)
    }
}

impl BitOr for RetryOn {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitOrAssign for RetryOn {
    fn bitor_assign(&mut self, other: Self) {
        self.0 |= other.0;
    }
}

impl std::fmt::Debug for RetryOn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.words()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::{RetryOn, WORDS};

    #[test]
    fn words_become_conditions_and_unknown_ones_are_told() {
        let (on, unknown) = RetryOn::parse("connect-failure, refused-stream,,unavailable,soon,cancelled ,5XX");
        let expected = RetryOn::CONNECT_FAILURE | RetryOn::REFUSED_STREAM | RetryOn::UNAVAILABLE | RetryOn::CANCELLED;
        assert_eq!((on, unknown), (expected, vec!["soon", "5XX"]));
        assert_eq!(RetryOn::parse(""), (RetryOn::NONE, vec![]));
    }

    #[test]
    fn every_word_is_a_condition_of_its_own() {
        let all: Vec<&str> = WORDS.iter().map(|(word, _)| *word).collect();
        let list = all.join(",");
        let (on, unknown) = RetryOn::parse(&list);
        assert!(unknown.is_empty());
        assert_eq!(on.words().collect::<Vec<_>>(), all);
        for word in all {
            assert_eq!(RetryOn::parse(word).0.words().collect::<Vec<_>>(), [word]);
        }
    }
}
