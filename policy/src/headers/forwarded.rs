//! Who the client is, by `x-forwarded-for`.
//!
//! A waypoint does not append to the header (`use_remote_address` is off): ztunnel and earlier waypoints are trusted to hand on what
//! gateways wrote (contract xds §3.1).

use std::net::IpAddr;

use http::{HeaderMap, HeaderName};

use crate::matcher::joined;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// An address found in `x-forwarded-for`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForwardedFor {
    /// The address.
    pub address: IpAddr,
    /// It is the only one in the header.
    pub alone: bool,
}

/// The last address of `x-forwarded-for` after as many trusted hops, or `None` when it is missing or is not an address.
pub fn forwarded_for(headers: &HeaderMap, trusted_hops: u32) -> Option<ForwardedFor> {
    let value = joined(headers, &FORWARDED_FOR)?;
    let value = std::str::from_utf8(&value).ok()?;
    let mut items = value.rsplit(',');
    let item = items.nth(usize::try_from(trusted_hops).ok()?)?.trim();
    let alone = trusted_hops == 0 && items.next().is_none();
    Some(ForwardedFor {
        address: item.parse().ok()?,
        alone,
    })
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::{FORWARDED_FOR, ForwardedFor, HeaderMap, forwarded_for};

    #[test]
    fn the_last_address_after_the_trusted_hops_is_the_client() {
        for (value, hops, expected) in [
            ("203.0.113.5", 0, Some(("203.0.113.5", true))),
            ("203.0.113.5", 1, None),
            ("203.0.113.1, 203.0.113.2", 0, Some(("203.0.113.2", false))),
            ("203.0.113.1,203.0.113.2", 1, Some(("203.0.113.1", false))),
            ("fd00::1", 0, Some(("fd00::1", true))),
            ("unknown", 0, None),
            ("203.0.113.1, unknown", 0, None),
            ("203.0.113.1,", 0, None),
            ("", 0, None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(FORWARDED_FOR, HeaderValue::from_static(value));
            let expected = expected.map(|(address, alone)| ForwardedFor {
                address: address.parse().unwrap(),
                alone,
            });
            assert_eq!(forwarded_for(&headers, hops), expected, "{value} {hops}");
        }
        assert_eq!(forwarded_for(&HeaderMap::new(), 0), None);
    }

    #[test]
    fn two_fields_are_one_list() {
        let mut headers = HeaderMap::new();
        headers.append(FORWARDED_FOR, HeaderValue::from_static("203.0.113.1"));
        headers.append(FORWARDED_FOR, HeaderValue::from_static("203.0.113.2"));
        let found = forwarded_for(&headers, 0).unwrap();
        assert_eq!((found.address.to_string(), found.alone), ("203.0.113.2".to_owned(), false));
    }
}
