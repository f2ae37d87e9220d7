//! Requests out, answers in, with the time and size of each answer.
//!
//! The generated client's codec would hide both behind the decoding, and would report bytes that are no answer as one gRPC
//! status among others.

use bytes::Buf as _;
use cairn_exchange::clock::{self, Instant};
use cairn_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use prost::Message as _;
use tonic::{
    Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
};

/// One answer as it came off the wire.
#[derive(Debug)]
pub(crate) struct Arrival {
    pub(crate) response: Result<DeltaDiscoveryResponse, prost::DecodeError>,
    /// When its last byte was there, before decoding.
    pub(crate) received: Instant,
    pub(crate) bytes: usize,
}

#[derive(Debug, Default)]
pub(crate) struct AdsCodec;

// === impl AdsCodec ===

impl Codec for AdsCodec {
    type Encode = DeltaDiscoveryRequest;
    type Decode = Arrival;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for AdsCodec {
    type Item = DeltaDiscoveryRequest;
    type Error = Status;

    fn encode(&mut self, item: Self::Item, dst: &mut EncodeBuf<'_>) -> Result<(), Status> {
        item.encode(dst).map_err(|error| Status::internal(error.to_string()))
    }
}

impl Decoder for AdsCodec {
    type Item = Arrival;
    type Error = Status;

    fn decode(&mut self, src: &mut DecodeBuf<'_>) -> Result<Option<Arrival>, Status> {
        let (received, bytes) = (clock::now(), src.remaining());
        Ok(Some(Arrival {
            response: DeltaDiscoveryResponse::decode(src),
            received,
            bytes,
        }))
    }
}
