//! `x-request-id`: a UUID whose version digit tells whether and why the request is traced, and whose first digits decide by chance.
//!
//! The same request is sampled alike by every proxy on its way, since all compute the decision from the same id.

use http::HeaderValue;

/// Where the digit stands in `xxxxxxxx-xxxx-Vxxx-xxxx-xxxxxxxxxxxx`.
const DIGIT: usize = 14;
/// Letters of a UUID.
const LENGTH: usize = 36;

/// Why a request is traced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TraceReason {
    /// It is not.
    NotTraced,
    /// By chance.
    Sampled,
    /// A service asked for it (`x-envoy-force-trace`).
    Forced,
    /// The client asked for it (`x-client-trace-id`).
    Client,
}

// === impl TraceReason ===

impl TraceReason {
    /// What an id says.
    pub fn of(id: &HeaderValue) -> Self {
        match (id.len() == LENGTH).then(|| id.as_bytes().get(DIGIT)).flatten() {
            Some(b'9') => Self::Sampled,
            Some(b'a') => Self::Forced,
            Some(b'b') => Self::Client,
            _ => Self::NotTraced,
        }
    }

    /// The reason of a request: what its id says already, else what its headers ask for, else chance. `per_ten_thousand` is the share
    /// that is sampled.
    pub fn decide(id: &HeaderValue, client: bool, forced: bool, per_ten_thousand: u32) -> Self {
        match Self::of(id) {
            Self::NotTraced if client => Self::Client,
            Self::NotTraced if forced => Self::Forced,
            Self::NotTraced if lot(id).is_some_and(|lot| lot < per_ten_thousand) => Self::Sampled,
            known => known,
        }
    }
}

/// A number below ten thousand that belongs to the id; `None` when it is no UUID.
fn lot(id: &HeaderValue) -> Option<u32> {
    let first = id.to_str().ok().filter(|id| id.len() == LENGTH)?.get(..8)?;
    Some(u32::from_str_radix(first, 16).ok()? % 10_000)
}

/// The id with the digit of a reason; what is no UUID stays as it is.
pub fn with_trace_reason(id: &HeaderValue, reason: TraceReason) -> HeaderValue {
    let mut bytes = id.as_bytes().to_vec();
    match bytes.get_mut(DIGIT) {
        Some(digit) if id.len() == LENGTH => {
            *digit = match reason {
                TraceReason::NotTraced => b'4',
                TraceReason::Sampled => b'9',
                TraceReason::Forced => b'a',
                TraceReason::Client => b'b',
            }
        }
        _ => return id.clone(),
    }
    HeaderValue::from_bytes(&bytes).unwrap_or_else(|_| id.clone())
}

#[cfg(test)]
mod tests {
    use super::{HeaderValue, TraceReason, with_trace_reason};

    #[test]
    fn the_version_digit_tells_why_a_request_is_traced() {
        let id = HeaderValue::from_static("00000000-0000-4000-8000-000000000001");
        assert_eq!(TraceReason::of(&id), TraceReason::NotTraced);
        for (reason, text) in [
            (TraceReason::Sampled, "00000000-0000-9000-8000-000000000001"),
            (TraceReason::Forced, "00000000-0000-a000-8000-000000000001"),
            (TraceReason::Client, "00000000-0000-b000-8000-000000000001"),
            (TraceReason::NotTraced, "00000000-0000-4000-8000-000000000001"),
        ] {
            let traced = with_trace_reason(&id, reason);
            assert_eq!(traced, text);
            assert_eq!(TraceReason::of(&traced), reason);
        }
    }

    #[test]
    fn an_id_that_is_no_uuid_stays() {
        for id in ["", "abc", "0000-0000-4000-8000"] {
            let id = HeaderValue::from_static(id);
            assert_eq!(with_trace_reason(&id, TraceReason::Sampled), id);
            assert_eq!(TraceReason::decide(&id, false, false, 10_000), TraceReason::NotTraced);
        }
    }

    #[test]
    fn chance_is_in_the_first_digits_and_the_same_everywhere() {
        let id = HeaderValue::from_static("00000064-0000-4000-8000-000000000001");
        for (client, forced, share, reason) in [
            (false, false, 100, TraceReason::NotTraced),
            (false, false, 101, TraceReason::Sampled),
            (false, true, 0, TraceReason::Forced),
            (true, true, 0, TraceReason::Client),
        ] {
            assert_eq!(TraceReason::decide(&id, client, forced, share), reason);
        }
        let decided = with_trace_reason(&id, TraceReason::Forced);
        assert_eq!(TraceReason::decide(&decided, true, false, 10_000), TraceReason::Forced);
    }
}
