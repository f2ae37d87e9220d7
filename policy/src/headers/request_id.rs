//! `x-request-id`: a UUID whose version digit tells whether and why the request is traced, and whose first digits decide by chance.
//!
//! The same request is sampled alike by every proxy on its way, since all compute the decision from the same id.

use http::{HeaderMap, HeaderValue};

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

/// Which requests of a chain are traced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sampling {
    /// Of those whose clients ask for it, so many of a hundred.
    pub client: u32,
    /// By chance, so many of ten thousand.
    pub random: u32,
    /// Of all those, so many of a hundred.
    pub overall: u32,
    /// The request's id decides; without, every request is traced unless what it brings says otherwise.
    pub by_request_id: bool,
    /// The reason is written into the id.
    pub tell: bool,
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
}

// === impl Sampling ===

impl Sampling {
    /// The reason of a request: what its id says already, else what its headers ask for, else chance. `chance` is any number.
    pub fn reason(&self, id: &HeaderValue, client: bool, forced: bool, chance: u32) -> TraceReason {
        let Some(lot) = lot(id) else {
            return TraceReason::NotTraced;
        };
        let reason = match TraceReason::of(id) {
            TraceReason::NotTraced if client && chance % 100 < self.client => TraceReason::Client,
            TraceReason::NotTraced if forced => TraceReason::Forced,
            TraceReason::NotTraced if lot < self.random => TraceReason::Sampled,
            known => known,
        };
        if lot % 100 < self.overall {
            reason
        } else {
            TraceReason::NotTraced
        }
    }

    /// Decides whether a request is traced, and writes it into its id, so that every proxy on its way decides alike.
    pub fn decide(&self, headers: &mut HeaderMap, chance: u32) -> bool {
        if !self.by_request_id {
            return true;
        }
        let client = headers.contains_key("x-client-trace-id");
        let forced = headers.contains_key("x-envoy-force-trace");
        let Some(id) = headers.get_mut("x-request-id") else {
            return false;
        };
        let reason = self.reason(id, client, forced, chance);
        if self.tell && reason != TraceReason::of(id) {
            *id = with_trace_reason(id, reason);
        }
        reason != TraceReason::NotTraced
    }
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            client: 100,
            random: 10_000,
            overall: 100,
            by_request_id: true,
            tell: true,
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
    use super::{HeaderMap, HeaderValue, Sampling, TraceReason, with_trace_reason};

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
            assert_eq!(Sampling::default().reason(&id, true, true, 0), TraceReason::NotTraced);
        }
    }

    #[test]
    fn chance_is_in_the_first_digits_and_the_same_everywhere() {
        let id = HeaderValue::from_static("00000064-0000-4000-8000-000000000001");
        let random = |random| Sampling {
            random,
            ..Sampling::default()
        };
        let half_of_clients = Sampling { client: 50, ..random(0) };
        let none = Sampling {
            overall: 0,
            ..Sampling::default()
        };
        // Who asks for it, the chain's shares, and what comes of it.
        for (client, forced, sampling, chance, reason) in [
            (false, false, random(100), 0, TraceReason::NotTraced),
            (false, false, random(101), 0, TraceReason::Sampled),
            (false, true, random(0), 0, TraceReason::Forced),
            (true, true, random(0), 0, TraceReason::Client),
            (true, false, half_of_clients, 149, TraceReason::Client),
            (true, false, half_of_clients, 150, TraceReason::NotTraced),
            (true, true, none, 0, TraceReason::NotTraced),
        ] {
            assert_eq!(sampling.reason(&id, client, forced, chance), reason, "{sampling:?}");
        }
        let decided = with_trace_reason(&id, TraceReason::Forced);
        assert_eq!(Sampling::default().reason(&decided, true, false, 0), TraceReason::Forced);
    }

    #[test]
    fn a_decision_is_told_in_the_id_where_that_is_wanted() {
        let id = "00000064-0000-4000-8000-000000000001";
        let decide = |sampling: Sampling, id| {
            let mut headers = HeaderMap::from_iter([("x-request-id".parse().unwrap(), HeaderValue::from_static(id))]);
            let traced = sampling.decide(&mut headers, 0);
            (traced, headers.remove("x-request-id").unwrap())
        };
        let marked = HeaderValue::from_static("00000064-0000-9000-8000-000000000001");
        assert_eq!(decide(Sampling::default(), id), (true, marked));
        let untold = Sampling {
            tell: false,
            ..Sampling::default()
        };
        assert_eq!(decide(untold, id), (true, HeaderValue::from_static(id)));
        let all = Sampling {
            by_request_id: false,
            random: 0,
            ..Sampling::default()
        };
        assert_eq!(decide(all, "no-uuid"), (true, HeaderValue::from_static("no-uuid")));
        assert!(!decide(Sampling::default(), "no-uuid").0);
    }
}
