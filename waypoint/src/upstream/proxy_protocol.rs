//! The header of the PROXY protocol, which tells an application who its client is
//! (<https://www.haproxy.org/download/2.9/doc/proxy-protocol.txt>).

use std::net::{IpAddr, SocketAddr};

use bytes::{BufMut as _, BytesMut};

const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
const LOCAL: u8 = 0x20;
const PROXY: u8 = 0x21;
const TCP4: u8 = 0x11;
const TCP6: u8 = 0x21;

/// Bytes of additional values in a header; more are malformed.
pub(crate) const MAX_VALUES: usize = u16::MAX as usize - 36;

/// How a header is written.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ProxyHeader {
    /// As a line of text.
    V1,
    /// In binary.
    V2 {
        /// Additional values by their type; together at most 65,499 bytes with three more for each.
        values: Vec<(u8, Vec<u8>)>,
    },
}

// === impl ProxyHeader ===

impl ProxyHeader {
    /// The bytes of a header that tells of a client at the first address who wanted to go to the second. Without addresses it says that
    /// we speak for ourselves.
    pub fn bytes(&self, told: Option<(SocketAddr, SocketAddr)>) -> BytesMut {
        let told = told.map(one_family);
        match self {
            ProxyHeader::V1 => BytesMut::from(line(told).as_bytes()),
            ProxyHeader::V2 { values } => binary(told, values),
        }
    }
}

/// Both addresses in one family: an IPv4 address beside an IPv6 one is written as IPv6.
fn one_family((from, to): (SocketAddr, SocketAddr)) -> (SocketAddr, SocketAddr) {
    let mapped = |address: SocketAddr| match address.ip() {
        IpAddr::V4(four) => SocketAddr::new(four.to_ipv6_mapped().into(), address.port()),
        IpAddr::V6(_) => address,
    };
    match from.is_ipv4() == to.is_ipv4() {
        true => (from, to),
        false => (mapped(from), mapped(to)),
    }
}

fn line(told: Option<(SocketAddr, SocketAddr)>) -> String {
    let Some((from, to)) = told else {
        return "PROXY UNKNOWN\r\n".to_owned();
    };
    let family = if from.is_ipv4() { "TCP4" } else { "TCP6" };
    format!("PROXY {family} {} {} {} {}\r\n", from.ip(), to.ip(), from.port(), to.port())
}

fn binary(told: Option<(SocketAddr, SocketAddr)>, values: &[(u8, Vec<u8>)]) -> BytesMut {
    let mut rest = BytesMut::new();
    if let Some((from, to)) = told {
        for ip in [from.ip(), to.ip()] {
            match ip {
                IpAddr::V4(ip) => rest.put_slice(&ip.octets()),
                IpAddr::V6(ip) => rest.put_slice(&ip.octets()),
            }
        }
        rest.put_u16(from.port());
        rest.put_u16(to.port());
        for (kind, value) in values {
            rest.put_u8(*kind);
            // The configuration's check keeps all of them together below this limit.
            rest.put_u16(u16::try_from(value.len()).unwrap_or(u16::MAX));
            rest.put_slice(value);
        }
    }
    let mut header = BytesMut::with_capacity(16 + rest.len());
    header.put_slice(SIGNATURE);
    match told {
        None => header.put_slice(&[LOCAL, 0]),
        Some((from, _)) => header.put_slice(&[PROXY, if from.is_ipv4() { TCP4 } else { TCP6 }]),
    }
    header.put_u16(u16::try_from(rest.len()).unwrap_or(u16::MAX));
    header.put_slice(&rest);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(from: &str, to: &str) -> Option<(SocketAddr, SocketAddr)> {
        Some((from.parse().unwrap(), to.parse().unwrap()))
    }

    #[test]
    fn the_first_version_is_a_line() {
        for (told, expected) in [
            (None, "PROXY UNKNOWN\r\n"),
            (
                told("10.0.0.1:1000", "10.0.0.2:80"),
                "PROXY TCP4 10.0.0.1 10.0.0.2 1000 80\r\n",
            ),
            (
                told("[::1]:1000", "[2001:db8::1]:80"),
                "PROXY TCP6 ::1 2001:db8::1 1000 80\r\n",
            ),
            (
                told("10.0.0.1:1000", "[2001:db8::1]:80"),
                "PROXY TCP6 ::ffff:10.0.0.1 2001:db8::1 1000 80\r\n",
            ),
        ] {
            assert_eq!(ProxyHeader::V1.bytes(told), expected.as_bytes());
        }
    }

    #[test]
    fn the_second_version_is_binary() {
        let header = ProxyHeader::V2 {
            values: vec![(0xea, b"vpc".to_vec())],
        };
        let bytes = header.bytes(told("10.0.0.1:1000", "10.0.0.2:80"));
        let expected = [
            &b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x12"[..],
            &[10, 0, 0, 1, 10, 0, 0, 2, 3, 232, 0, 80],
            b"\xea\0\x03vpc",
        ]
        .concat();
        assert_eq!(bytes, expected);
        assert_eq!(header.bytes(None), &b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"[..]);
        let six = header.bytes(told("[::1]:1", "[::2]:2"));
        assert_eq!((six[13], six.len()), (0x21, 16 + 36 + 6));
    }
}
