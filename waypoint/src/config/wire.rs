//! A listener taken apart without decoding its filter chains.
//!
//! istiod sends `main_internal` whole for nearly every change, 4.9 KB a service (contract seen §4). Walking the outermost fields
//! of the wire format gives the bytes of each chain, to be compared with those of the last time; only chains that differ are
//! decoded.

use bytes::{Buf, Bytes, BytesMut};
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

/// `Listener.filter_chains`
const FILTER_CHAINS: u32 = 3;
/// `FilterChain.name`
const CHAIN_NAME: u32 = 7;
/// `Listener.name`
const LISTENER_NAME: u32 = 1;

/// Bytes that are no message.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub(crate) enum WireError {
    /// The length of a field is wrong.
    #[error("field {number} is longer than what is left of the message")]
    Truncated {
        /// The field.
        number: u32,
    },
    /// A field is no field.
    #[error(transparent)]
    Malformed(#[from] prost::DecodeError),
}

/// The parts of an encoded listener.
#[derive(Clone, Debug, Default)]
pub(crate) struct ListenerParts {
    /// Its name.
    pub name: String,
    /// Each chain's bytes; slices of the whole.
    pub chains: Vec<Bytes>,
    /// All other fields: an encoded listener without chains.
    pub rest: Bytes,
}

/// Splits an encoded listener.
pub(crate) fn split_listener(bytes: &Bytes) -> Result<ListenerParts, WireError> {
    let mut parts = ListenerParts::default();
    let mut rest = BytesMut::new();
    fields(bytes, |number, field, whole| match (number, field) {
        (FILTER_CHAINS, Some(chain)) => parts.chains.push(chain),
        (number, field) => {
            if let (LISTENER_NAME, Some(name)) = (number, field) {
                parts.name = String::from_utf8_lossy(&name).into_owned();
            }
            rest.extend_from_slice(&whole);
        }
    })?;
    parts.rest = rest.freeze();
    Ok(parts)
}

/// The name of an encoded filter chain.
pub(crate) fn chain_name(bytes: &Bytes) -> Result<String, WireError> {
    let mut name = String::new();
    fields(bytes, |number, field, _| {
        if let (CHAIN_NAME, Some(field)) = (number, field) {
            name = String::from_utf8_lossy(&field).into_owned();
        }
    })?;
    Ok(name)
}

/// Calls `f` for each outermost field with its number, its content if it is length-delimited, and all its bytes.
fn fields(bytes: &Bytes, mut f: impl FnMut(u32, Option<Bytes>, Bytes)) -> Result<(), WireError> {
    let mut buffer = bytes.clone();
    while buffer.has_remaining() {
        let start = bytes.len() - buffer.remaining();
        let (number, wire_type) = decode_key(&mut buffer)?;
        let content = if wire_type == WireType::LengthDelimited {
            let length = decode_varint(&mut buffer)?;
            match usize::try_from(length) {
                Ok(length) if length <= buffer.remaining() => Some(buffer.split_to(length)),
                _ => return Err(WireError::Truncated { number }),
            }
        } else {
            skip_field(wire_type, number, &mut buffer, DecodeContext::default())?;
            None
        };
        let end = bytes.len() - buffer.remaining();
        f(number, content, bytes.slice(start..end));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use cairn_proto::envoy::config::listener::v3::{FilterChain, Listener};
    use prost::Message as _;

    use super::*;

    #[test]
    fn the_parts_of_a_listener_are_its_chains_and_the_rest() {
        let chain = |name: &str| FilterChain {
            name: name.into(),
            ..Default::default()
        };
        let listener = Listener {
            name: "main_internal".into(),
            filter_chains: vec![chain("a"), chain(""), chain("b")],
            traffic_direction: 1,
            stat_prefix: "x".into(),
            ..Default::default()
        };
        let parts = split_listener(&listener.encode_to_vec().into()).unwrap();
        assert_eq!(parts.name, "main_internal");
        let names: Vec<_> = parts.chains.iter().map(|chain| chain_name(chain).unwrap()).collect();
        assert_eq!(names, ["a", "", "b"]);
        assert_eq!(
            Listener::decode(parts.rest).unwrap(),
            Listener {
                filter_chains: vec![],
                ..listener
            }
        );
    }

    #[test]
    fn a_field_longer_than_the_message_is_an_error() {
        for bytes in [
            &[0x1a, 0x05, 0x00][..],
            &[0x1a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f],
            &[0x1a],
            &[0x07],
            &[0x80],
        ] {
            assert!(split_listener(&Bytes::copy_from_slice(bytes)).is_err(), "{bytes:?}");
        }
    }
}
