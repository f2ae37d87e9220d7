//! What the pod's file system tells: labels, annotations, certificates that are there, addresses.
//!
//! Read once at start. Paths are relative to the working directory exactly as in the pods that istiod makes
//! (contract runtime §8.3, §8.8), so that several proxies can run on one machine, each in a folder of its own.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
};

/// The downward API's labels.
const LABELS: &str = "/etc/istio/pod/labels";
/// The downward API's annotations.
pub(crate) const ANNOTATIONS: &str = "/etc/istio/pod/annotations";

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// Labels; `None` without the file.
    pub labels: Option<BTreeMap<String, String>>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// Addresses of the pod's interfaces but for local ones.
    pub addresses: Vec<IpAddr>,
    /// Which of the files that settings ask about are there.
    pub present: Present,
}

/// Whether a file is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Present {
    /// As the file system says.
    Real,
    /// Exactly these.
    Only(Vec<String>),
}

// === impl Pod ===

impl Pod {
    /// The one that we run in.
    pub fn read() -> Self {
        let file = |path| fs::read_to_string(path).ok();
        let kernel = |path| file(path).unwrap_or_default();
        let mut addresses = v4_addresses(&kernel("/proc/net/fib_trie"));
        addresses.extend(v6_addresses(&kernel("/proc/net/if_inet6")));
        Self {
            labels: file(LABELS).map(|text| downward(&text)),
            annotations: file(ANNOTATIONS).map(|text| downward(&text)).unwrap_or_default(),
            addresses,
            present: Present::Real,
        }
    }

    /// Whether there is a file or socket of this name.
    pub fn has(&self, path: &str) -> bool {
        match &self.present {
            Present::Real => Path::new(path).exists(),
            Present::Only(paths) => paths.iter().any(|present| present == path),
        }
    }
}

impl Default for Present {
    fn default() -> Self {
        Self::Only(Vec::new())
    }
}

/// Lines of `key="value"`, the value quoted as Go quotes.
pub(crate) fn downward(text: &str) -> BTreeMap<String, String> {
    let entry = |line: &str| {
        let (key, value) = line.split_once('=')?;
        Some((key.to_owned(), unquoted(value)?))
    };
    text.lines().filter_map(entry).collect()
}

/// A text in Go's double quotes.
fn unquoted(text: &str) -> Option<String> {
    let mut out = String::with_capacity(text.len());
    let mut bytes: Vec<u8> = Vec::new();
    let mut rest = text.strip_prefix('"')?.strip_suffix('"')?.chars();
    let flush = |bytes: &mut Vec<u8>, out: &mut String| {
        out.push_str(&String::from_utf8_lossy(bytes));
        bytes.clear();
    };
    while let Some(char) = rest.next() {
        if char != '\\' {
            flush(&mut bytes, &mut out);
            out.push(char);
            continue;
        }
        let digits = match rest.next()? {
            'n' => Ok('\n'),
            't' => Ok('\t'),
            'r' => Ok('\r'),
            'a' => Ok('\u{7}'),
            'b' => Ok('\u{8}'),
            'f' => Ok('\u{c}'),
            'v' => Ok('\u{b}'),
            same @ ('"' | '\\' | '\'') => Ok(same),
            'x' => Err(2),
            'u' => Err(4),
            'U' => Err(8),
            _ => return None,
        };
        match digits {
            Ok(char) => {
                flush(&mut bytes, &mut out);
                out.push(char);
            }
            Err(count) => {
                let hex: String = rest.by_ref().take(count).collect();
                let number = u32::from_str_radix(&hex, 16).ok()?;
                match u8::try_from(number) {
                    // `\xNN` is a byte of what may be a longer character.
                    Ok(byte) if count == 2 => bytes.push(byte),
                    _ => {
                        flush(&mut bytes, &mut out);
                        out.push(char::from_u32(number)?);
                    }
                }
            }
        }
    }
    flush(&mut bytes, &mut out);
    Some(out)
}

/// Addresses of `/proc/net/fib_trie`: a line with an address, then one that says that it is a host's own.
fn v4_addresses(trie: &str) -> Vec<IpAddr> {
    let mut found: Vec<IpAddr> = Vec::new();
    let mut last = None;
    for line in trie.lines() {
        if let Some(address) = line.trim().strip_prefix("|-- ") {
            last = address.parse::<Ipv4Addr>().ok();
        } else if line.trim() == "/32 host LOCAL"
            && let Some(address) = last
            && !address.is_loopback()
            && !address.is_link_local()
            && !found.contains(&address.into())
        {
            found.push(address.into());
        }
    }
    found
}

/// Addresses of `/proc/net/if_inet6` of global scope.
fn v6_addresses(table: &str) -> Vec<IpAddr> {
    let entry = |line: &str| {
        let mut fields = line.split_whitespace();
        let address = u128::from_str_radix(fields.next()?, 16).ok()?;
        let scope = fields.nth(2)?;
        (scope == "00").then(|| IpAddr::from(Ipv6Addr::from(address)))
    };
    table.lines().filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_read_as_the_downward_api_writes_them() {
        let text =
            "app=\"web\"\nproxy.istio.io/config=\"a: 1\\nb: \\\"x\\\"\\n\"\nname=\"\\xc3\\xa4\\u00e4\"\nbroken\nodd=\"\\q\"\n";
        let want = [("app", "web"), ("name", "ää"), ("proxy.istio.io/config", "a: 1\nb: \"x\"\n")];
        assert_eq!(
            downward(text),
            want.map(|(key, value)| (key.to_owned(), value.to_owned())).into()
        );
    }

    #[test]
    fn the_pods_addresses_are_those_that_others_can_reach() {
        let trie = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 10.244.1.7\n        /32 host LOCAL\n     |-- 10.244.1.255\n        /32 link BROADCAST\n     |-- 127.0.0.1\n        /32 host LOCAL\nLocal:\n     |-- 10.244.1.7\n        /32 host LOCAL\n";
        assert_eq!(v4_addresses(trie), [IpAddr::from([10, 244, 1, 7])]);
        let table = "00000000000000000000000000000001 01 80 10 80       lo\nfe80000000000000042b0cfffe5d1bd3 02 40 20 80     eth0\nfd000010024400000000000000000007 02 40 00 80     eth0\n";
        assert_eq!(v6_addresses(table), ["fd00:10:244::7".parse::<IpAddr>().unwrap()]);
    }
}
