//! Messages taken apart without decoding what is in them.
//!
//! istiod sends `main_internal` whole for nearly every change, 4.9 KB a service (contract seen §4), and an assignment whole when one
//! endpoint of ten thousand changes. Walking the outermost fields of the wire format gives the bytes of each chain or endpoint, to
//! be compared with those of the last time; only those that differ are decoded.

use std::ops::Range;

use bytes::{Buf, Bytes};
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

/// `Listener.filter_chains`
const FILTER_CHAINS: u32 = 3;
/// `FilterChain.name`
const CHAIN_NAME: u32 = 7;
/// `Listener.name`
const LISTENER_NAME: u32 = 1;
/// `ClusterLoadAssignment.endpoints`
const LOCALITIES: u32 = 2;
/// `LocalityLbEndpoints.lb_endpoints`
const ENDPOINTS: u32 = 2;

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
    /// It has more than 4 GiB.
    #[error("the message is longer than 4 GiB")]
    Huge,
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

/// The parts of an encoded endpoint assignment.
#[derive(Clone, Debug, Default)]
pub(crate) struct AssignmentParts {
    /// By locality, in order.
    pub localities: Vec<LocalityParts>,
    /// All other fields: an encoded assignment without endpoints.
    pub rest: Vec<u8>,
}

/// The parts of the endpoints of one locality.
#[derive(Clone, Debug, Default)]
pub(crate) struct LocalityParts {
    /// Where in the whole each endpoint's bytes are.
    pub endpoints: Vec<Place>,
    /// All other fields.
    pub rest: Vec<u8>,
}

/// A place in a message: half of what a range takes, as assignments keep one for each endpoint.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    start: u32,
    end: u32,
}

/// Splits an encoded listener.
pub(crate) fn split_listener(bytes: &Bytes) -> Result<ListenerParts, WireError> {
    let mut parts = ListenerParts::default();
    let mut rest = Vec::new();
    fields(bytes, |number, field, whole| match (number, field) {
        (FILTER_CHAINS, Some(chain)) => parts.chains.push(bytes.slice(chain)),
        (number, field) => {
            if let (LISTENER_NAME, Some(name)) = (number, field) {
                parts.name = String::from_utf8_lossy(part(bytes, name)).into_owned();
            }
            rest.extend_from_slice(part(bytes, whole));
        }
    })?;
    parts.rest = rest.into();
    Ok(parts)
}

/// Splits an encoded endpoint assignment.
pub(crate) fn split_assignment(bytes: &[u8]) -> Result<AssignmentParts, WireError> {
    let mut parts = AssignmentParts::default();
    let mut localities = Vec::new();
    fields(bytes, |number, field, whole| match (number, field) {
        (LOCALITIES, Some(locality)) => localities.push(locality),
        _ => parts.rest.extend_from_slice(part(bytes, whole)),
    })?;
    for locality in localities {
        let (start, inside) = (locality.start, part(bytes, locality));
        let mut split = LocalityParts::default();
        let mut far = false;
        fields(inside, |number, field, whole| match (number, field) {
            (ENDPOINTS, Some(endpoint)) => match Place::new(start + endpoint.start..start + endpoint.end) {
                Some(place) => split.endpoints.push(place),
                None => far = true,
            },
            _ => split.rest.extend_from_slice(part(inside, whole)),
        })?;
        if far {
            return Err(WireError::Huge);
        }
        parts.localities.push(split);
    }
    Ok(parts)
}

/// The name of an encoded filter chain.
pub(crate) fn chain_name(bytes: &Bytes) -> Result<String, WireError> {
    let mut name = String::new();
    fields(bytes, |number, field, _| {
        if let (CHAIN_NAME, Some(field)) = (number, field) {
            name = String::from_utf8_lossy(part(bytes, field)).into_owned();
        }
    })?;
    Ok(name)
}

/// Calls `f` for each outermost field with its number, where its content is if it is length-delimited, and where all of it is.
fn fields(bytes: &[u8], mut f: impl FnMut(u32, Option<Range<usize>>, Range<usize>)) -> Result<(), WireError> {
    let mut left = bytes;
    while left.has_remaining() {
        let start = bytes.len() - left.len();
        let (number, wire_type) = decode_key(&mut left)?;
        let content = if wire_type == WireType::LengthDelimited {
            let length = decode_varint(&mut left)?;
            let from = bytes.len() - left.len();
            match usize::try_from(length).ok().and_then(|length| left.split_at_checked(length)) {
                Some((content, after)) => {
                    left = after;
                    Some(from..from + content.len())
                }
                None => return Err(WireError::Truncated { number }),
            }
        } else {
            skip_field(wire_type, number, &mut left, DecodeContext::default())?;
            None
        };
        f(number, content, start..bytes.len() - left.len());
    }
    Ok(())
}

fn part(bytes: &[u8], range: Range<usize>) -> &[u8] {
    bytes.get(range).unwrap_or_default()
}

// === impl Place ===

impl Place {
    fn new(range: Range<usize>) -> Option<Self> {
        Some(Self {
            start: range.start.try_into().ok()?,
            end: range.end.try_into().ok()?,
        })
    }

    /// What is there in the message that it is a place in.
    pub(crate) fn of(self, bytes: &[u8]) -> &[u8] {
        part(bytes, self.start as usize..self.end as usize)
    }
}

#[cfg(test)]
mod tests {
    use cairn_proto::envoy::config::{
        endpoint::v3::{ClusterLoadAssignment, LbEndpoint, LocalityLbEndpoints},
        listener::v3::{FilterChain, Listener},
    };
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
    fn the_parts_of_an_assignment_are_its_endpoints_its_localities_and_the_rest() {
        let endpoint = |weight| LbEndpoint {
            load_balancing_weight: Some(weight),
            ..Default::default()
        };
        let locality = |priority, weights: &[u32]| LocalityLbEndpoints {
            priority,
            lb_endpoints: weights.iter().map(|weight| endpoint(*weight)).collect(),
            ..Default::default()
        };
        let assignment = ClusterLoadAssignment {
            cluster_name: "web".into(),
            endpoints: vec![locality(0, &[1, 2]), locality(1, &[]), locality(2, &[3])],
            ..Default::default()
        };
        let bytes = assignment.encode_to_vec();
        let parts = split_assignment(&bytes).unwrap();
        let again = ClusterLoadAssignment {
            endpoints: parts
                .localities
                .iter()
                .map(|parts| LocalityLbEndpoints {
                    lb_endpoints: parts
                        .endpoints
                        .iter()
                        .map(|place| LbEndpoint::decode(place.of(&bytes)).unwrap())
                        .collect(),
                    ..LocalityLbEndpoints::decode(&*parts.rest).unwrap()
                })
                .collect(),
            ..ClusterLoadAssignment::decode(&*parts.rest).unwrap()
        };
        assert_eq!(again, assignment);
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
