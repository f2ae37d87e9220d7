//! Sets of address ranges.
//!
//! An IPv4 address that arrives in IPv6 form (`::ffff:a.b.c.d`) is the IPv4 address.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// A set of address ranges.
///
/// Ranges of one family are kept sorted and without overlap, so that a lookup is a binary search.
#[derive(Clone, Debug, Default)]
pub struct CidrSet {
    v4: Vec<Ipv4Net>,
    v6: Vec<Ipv6Net>,
}

// === impl CidrSet ===

impl CidrSet {
    /// Whether no address is in it.
    pub fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }

    /// Whether an address is in it.
    pub fn contains(&self, address: IpAddr) -> bool {
        match address.to_canonical() {
            IpAddr::V4(address) => self.contains_v4(address),
            IpAddr::V6(address) => self.contains_v6(address),
        }
    }

    fn contains_v4(&self, address: Ipv4Addr) -> bool {
        let after = self.v4.partition_point(|net| net.network() <= address);
        after
            .checked_sub(1)
            .and_then(|last| self.v4.get(last))
            .is_some_and(|net| net.contains(&address))
    }

    fn contains_v6(&self, address: Ipv6Addr) -> bool {
        let after = self.v6.partition_point(|net| net.network() <= address);
        after
            .checked_sub(1)
            .and_then(|last| self.v6.get(last))
            .is_some_and(|net| net.contains(&address))
    }
}

impl FromIterator<IpNet> for CidrSet {
    fn from_iter<I: IntoIterator<Item = IpNet>>(nets: I) -> Self {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for net in nets {
            match net {
                IpNet::V4(net) => v4.push(net),
                IpNet::V6(net) => v6.push(net),
            }
        }
        Self {
            v4: Ipv4Net::aggregate(&v4),
            v6: Ipv6Net::aggregate(&v6),
        }
    }
}

#[cfg(test)]
mod tests {
    use ipnet::IpNet;
    use proptest::prelude::*;

    use super::CidrSet;

    fn set(nets: &[&str]) -> CidrSet {
        nets.iter().map(|net| net.parse::<IpNet>().unwrap()).collect()
    }

    #[test]
    fn an_address_is_in_the_set_when_a_range_has_it() {
        let set = set(&["10.0.0.0/8", "10.1.0.0/16", "192.168.1.7/32", "fd00::/8"]);
        for (address, inside) in [
            ("10.0.0.0", true),
            ("10.255.255.255", true),
            ("11.0.0.0", false),
            ("9.255.255.255", false),
            ("192.168.1.7", true),
            ("192.168.1.8", false),
            ("::ffff:10.2.3.4", true),
            ("fd12::1", true),
            ("fe80::1", false),
        ] {
            assert_eq!(set.contains(address.parse().unwrap()), inside, "{address}");
        }
        assert!(!CidrSet::default().contains("::".parse().unwrap()));
    }

    proptest! {
        #[test]
        fn the_search_agrees_with_asking_every_range(
            nets in proptest::collection::vec((any::<u32>(), 0u8..=32), 0..12),
            addresses in proptest::collection::vec(any::<u32>(), 1..20),
        ) {
            let nets: Vec<IpNet> = nets
                .into_iter()
                .map(|(bits, length)| IpNet::new(std::net::Ipv4Addr::from(bits).into(), length).unwrap())
                .collect();
            let set: CidrSet = nets.iter().copied().collect();
            for bits in addresses {
                let address = std::net::IpAddr::from(std::net::Ipv4Addr::from(bits));
                prop_assert_eq!(set.contains(address), nets.iter().any(|net| net.contains(&address)));
            }
        }
    }
}
