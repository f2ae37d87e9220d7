//! The message that records are sent in: what comes before them and around them.

use bytes::{BufMut, Bytes, BytesMut};
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};

/// What records are put into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Envelope {
    /// Messages inside of one another, the outermost first; the records are in the last one's field.
    Protobuf(Box<[Layer]>),
    /// A list.
    Json,
}

/// One message around others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layer {
    /// Its other fields, as they are written.
    pub before: Bytes,
    /// The field that holds what is inside.
    pub field: u32,
}

// === impl Envelope ===

impl Envelope {
    /// The message with these records.
    pub fn wrap(&self, records: &[Vec<u8>]) -> Bytes {
        match self {
            Self::Json => list(records),
            Self::Protobuf(layers) => nest(layers, records),
        }
    }
}

fn list(records: &[Vec<u8>]) -> Bytes {
    let length: usize = records.iter().map(|record| record.len() + 1).sum();
    let mut out = BytesMut::with_capacity(length + 2);
    out.put_u8(b'[');
    for (index, record) in records.iter().enumerate() {
        if index > 0 {
            out.put_u8(b',');
        }
        out.put_slice(record);
    }
    out.put_u8(b']');
    out.freeze()
}

fn nest(layers: &[Layer], records: &[Vec<u8>]) -> Bytes {
    let Some((innermost, around)) = layers.split_last() else {
        return Bytes::new();
    };
    let field = |field: u32, length: usize| key_len(field) + encoded_len_varint(length as u64) + length;
    let inside: usize = records.iter().map(|record| field(innermost.field, record.len())).sum();
    let mut length = innermost.before.len() + inside;
    // Lengths from the inside out, to be written from the outside in.
    let mut lengths = Vec::with_capacity(around.len());
    for layer in around.iter().rev() {
        lengths.push(length);
        length = layer.before.len() + field(layer.field, length);
    }
    let mut out = BytesMut::with_capacity(length);
    let begin = |number, length: usize, out: &mut BytesMut| {
        encode_key(number, WireType::LengthDelimited, out);
        encode_varint(length as u64, out);
    };
    for (layer, length) in around.iter().zip(lengths.into_iter().rev()) {
        out.put_slice(&layer.before);
        begin(layer.field, length, &mut out);
    }
    out.put_slice(&innermost.before);
    for record in records {
        begin(innermost.field, record.len(), &mut out);
        out.put_slice(record);
    }
    out.freeze()
}
