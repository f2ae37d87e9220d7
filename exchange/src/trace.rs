//! Which trace an exchange belongs to.

/// The span of an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceIds {
    /// The trace; one that fits into 64 bits may be written so where that is usual.
    pub trace: u128,
    /// The span of the exchange itself.
    pub span: u64,
    /// Whether the span is kept, and told to a collector.
    pub sampled: bool,
}
