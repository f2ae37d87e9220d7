//! Counts the messages of a gRPC call in both directions, for `istio_request_messages_total` and `istio_response_messages_total`.
//!
//! gRPC frames are a flag byte and a length of four bytes before each message; they may be cut anywhere by DATA frames. Calls that are
//! not gRPC are left alone.

use bytes::Bytes;
use cairn_exchange::{Exchange, is_grpc_content_type};

use crate::contract::{BodyNeed, Needs, ResponseHead, Slot, Verdict};

/// Length of a gRPC frame's head.
const FRAME_HEAD: u64 = 5;

/// Counts the messages of one direction.
#[derive(Clone, Copy, Debug, Default)]
pub struct FrameCounter {
    messages: u64,
    /// Bytes of the current frame's head that have been seen, 0 to 5.
    head: u64,
    /// The length in the head so far; then what is left of the message.
    length: u64,
}

/// Both directions of one call.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    request: FrameCounter,
    response: FrameCounter,
    /// Whether the answer is gRPC too.
    response_is_grpc: bool,
}

// === impl FrameCounter ===

impl FrameCounter {
    /// Takes the next bytes of the body.
    pub fn observe(&mut self, mut data: &[u8]) {
        while let Some((&first, rest)) = data.split_first() {
            if self.head == FRAME_HEAD {
                let skipped = usize::try_from(self.length).unwrap_or(usize::MAX).min(data.len());
                data = data.get(skipped..).unwrap_or_default();
                self.length -= skipped as u64;
            } else {
                if self.head > 0 {
                    self.length = (self.length << 8) | u64::from(first);
                }
                self.head += 1;
                data = rest;
                if self.head == FRAME_HEAD {
                    self.messages += 1;
                }
            }
            if self.head == FRAME_HEAD && self.length == 0 {
                self.head = 0;
            }
        }
    }

    /// Messages whose head has been seen.
    pub fn messages(&self) -> u64 {
        self.messages
    }
}

/// What the filter needs.
pub(crate) const NEEDS: Needs = Needs {
    request: BodyNeed::Observe,
    observe_response: true,
};

pub(crate) fn decode_head(slot: &mut Slot, exchange: &Exchange) -> Verdict {
    if exchange.is_grpc() {
        *slot = Slot::GrpcStats(Counters::default());
    }
    Verdict::Continue
}

pub(crate) fn decode_data(slot: &mut Slot, data: &Bytes) {
    if let Slot::GrpcStats(counters) = slot {
        counters.request.observe(data);
    }
}

pub(crate) fn encode_head(slot: &mut Slot, head: &ResponseHead) {
    if let Slot::GrpcStats(counters) = slot {
        counters.response_is_grpc = head
            .headers
            .get(http::header::CONTENT_TYPE)
            .is_some_and(|value| is_grpc_content_type(value.as_bytes()));
    }
}

pub(crate) fn encode_data(slot: &mut Slot, data: &Bytes) {
    if let Slot::GrpcStats(counters) = slot
        && counters.response_is_grpc
    {
        counters.response.observe(data);
    }
}

pub(crate) fn finish(slot: &Slot, exchange: &mut Exchange) {
    if let Slot::GrpcStats(counters) = slot {
        exchange.counts.request_messages = counters.request.messages();
        exchange.counts.response_messages = counters.response.messages();
    }
}

#[cfg(test)]
mod tests {
    use super::FrameCounter;

    #[test]
    fn messages_are_counted_wherever_the_frames_are_cut() {
        let mut body = Vec::new();
        for length in [0u32, 1, 300, 0, 7] {
            body.push(0);
            body.extend_from_slice(&length.to_be_bytes());
            body.resize(body.len() + length as usize, b'x');
        }
        for piece in [1, 2, 3, 5, 7, 100, body.len()] {
            let mut counter = FrameCounter::default();
            body.chunks(piece).for_each(|chunk| counter.observe(chunk));
            assert_eq!(counter.messages(), 5, "pieces of {piece}");
        }
    }
}
