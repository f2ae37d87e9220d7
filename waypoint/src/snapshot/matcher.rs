//! Which chain serves a tunnel: istiod's `filter_chain_matcher`, compiled.
//!
//! The tree is generic over the xDS matcher types (contract xds §2.5): exact and prefix maps, IP ranges, and lists of predicates
//! over the inputs that exist for an inner connection. Semantics are Envoy's: of all ranges that hold the address the longest
//! prefix is tried first, then the order of declaration; a nested matcher that finds nothing is not final; then `on_no_match`.

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use foldhash::fast::RandomState;
use ipnet::IpNet;
use smallvec::SmallVec;

/// What a matcher may look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Address of the CONNECT authority.
    DestinationIp,
    /// Port of the CONNECT authority.
    DestinationPort,
    /// Address of the client.
    SourceIp,
    /// What is spoken inside, as Envoy's inspectors say: `'h2c'`, `'http/1.1'`, … with the quotes.
    ApplicationProtocol,
    /// A string that an earlier filter left: `io.istio.connect_authority`, `io.istio.source`, …
    FilterState(Arc<str>),
}

/// One node of the tree.
#[derive(Clone, Debug)]
pub enum Node {
    /// The chain with this name.
    Chain(Arc<str>),
    /// Something decides here that is not supported: what comes this far is served by nobody, and looks no further.
    Refused,
    /// A map from exact texts.
    Exact {
        /// What is looked at.
        input: Input,
        /// Text to what follows.
        map: HashMap<Box<str>, Node, RandomState>,
        /// What follows when nothing fits.
        otherwise: Option<Box<Node>>,
    },
    /// A map from prefixes; the longest that fits and leads somewhere wins.
    Prefix {
        /// What is looked at.
        input: Input,
        /// Longest first.
        prefixes: Vec<(Box<str>, Node)>,
        /// What follows when nothing fits.
        otherwise: Option<Box<Node>>,
    },
    /// Ranges of addresses.
    Ranges {
        /// What is looked at.
        input: Input,
        /// The ranges.
        ranges: Ranges,
        /// What follows when nothing fits.
        otherwise: Option<Box<Node>>,
    },
    /// Predicates in order; the first that holds and leads somewhere wins.
    List {
        /// Predicate and what follows.
        entries: Vec<(Predicate, Node)>,
        /// What follows when nothing fits.
        otherwise: Option<Box<Node>>,
    },
}

/// A condition of a list.
#[derive(Clone, Debug)]
pub enum Predicate {
    /// One input fits a text matcher.
    Text(Input, cairn_policy::matcher::StringMatcher),
    /// All hold.
    All(Vec<Predicate>),
    /// One holds.
    Any(Vec<Predicate>),
    /// It does not hold.
    Not(Box<Predicate>),
}

/// Address ranges, indexed: single addresses by hash, wider ranges by length.
#[derive(Clone, Debug, Default)]
pub struct Ranges {
    nodes: Vec<Node>,
    single: HashMap<IpAddr, SmallVec<[u32; 1]>, RandomState>,
    /// Longest prefix first, then order of declaration.
    wide: Vec<(IpNet, u32)>,
}

/// What is known of an inner connection.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// Address of the authority, when it is one.
    pub destination_ip: Option<IpAddr>,
    /// Port of the authority.
    pub destination_port: Option<u16>,
    /// Address of the client.
    pub source_ip: IpAddr,
    /// The authority as sent.
    pub authority: &'a str,
    /// `x-istio-source` of the CONNECT request.
    pub source: Option<&'a str>,
    /// What is spoken; `None` while it is not known.
    pub spoken: Option<Spoken>,
}

/// The outcome of protocol detection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spoken {
    /// HTTP/1.0
    Http10,
    /// HTTP/1.1
    Http11,
    /// HTTP/2 with prior knowledge
    Http2,
    /// Something else
    Other,
}

/// Where the tree leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome<'a> {
    /// To this chain, whatever is spoken.
    Chain(&'a Arc<str>),
    /// It depends on what is spoken, and that is not known yet.
    Detect,
    /// To something that is not supported.
    Refused,
    /// Nowhere.
    Nothing,
}

// === impl Spoken ===

impl Spoken {
    /// As Envoy's application protocol input renders it (contract xds §2.5).
    fn text(self) -> Option<&'static str> {
        match self {
            Spoken::Http10 => Some("'http/1.0'"),
            Spoken::Http11 => Some("'http/1.1'"),
            Spoken::Http2 => Some("'h2c'"),
            Spoken::Other => None,
        }
    }
}

// === impl Ranges ===

impl Ranges {
    /// Adds what follows for some ranges. `0.0.0.0/32` stands for "no address" in istiod's output and never matches.
    pub fn add(&mut self, ranges: impl IntoIterator<Item = IpNet>, node: Node) {
        let index = u32::try_from(self.nodes.len()).unwrap_or(u32::MAX);
        self.nodes.push(node);
        for range in ranges {
            if range.addr().is_unspecified() && range.prefix_len() == range.max_prefix_len() {
                continue;
            }
            if range.prefix_len() == range.max_prefix_len() {
                self.single.entry(range.addr()).or_default().push(index);
            } else {
                let at = self
                    .wide
                    .partition_point(|(other, _)| other.prefix_len() >= range.prefix_len());
                self.wide.insert(at, (range, index));
            }
        }
    }

    /// Nodes whose ranges hold the address, best first.
    fn candidates(&self, address: IpAddr) -> impl Iterator<Item = &Node> {
        let single = self.single.get(&address).into_iter().flatten();
        let wide = self
            .wide
            .iter()
            .filter(move |(range, _)| range.contains(&address))
            .map(|(_, index)| index);
        single.chain(wide).filter_map(|index| self.nodes.get(*index as usize))
    }

    /// What follows any of the ranges.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter()
    }

    /// Every range with what follows, for display.
    pub fn iter(&self) -> impl Iterator<Item = (Vec<IpNet>, &Node)> {
        self.nodes.iter().enumerate().map(|(at, node)| {
            let here = |index: &u32| *index as usize == at;
            let single = self
                .single
                .iter()
                .filter(|(_, list)| list.iter().any(here))
                .map(|(address, _)| IpNet::from(*address));
            let mut ranges: Vec<_> = single
                .chain(self.wide.iter().filter(|(_, index)| here(index)).map(|(range, _)| *range))
                .collect();
            ranges.sort();
            (ranges, node)
        })
    }
}

// === impl Node ===

impl Node {
    /// Walks the tree.
    pub fn find<'a>(&'a self, facts: &Facts<'_>) -> Outcome<'a> {
        match self {
            Node::Chain(name) => Outcome::Chain(name),
            Node::Refused => Outcome::Refused,
            Node::Exact { input, map, otherwise } => {
                if input.is_unknown(facts) {
                    return Outcome::Detect;
                }
                let found = input
                    .with_text(facts, |text| map.get(text))
                    .flatten()
                    .map_or(Outcome::Nothing, |node| node.find(facts));
                found.or_else(otherwise, facts)
            }
            Node::Prefix {
                input,
                prefixes,
                otherwise,
            } => {
                if input.is_unknown(facts) {
                    return Outcome::Detect;
                }
                let found = input.with_text(facts, |text| {
                    let fitting = prefixes.iter().filter(|(prefix, _)| text.starts_with(&**prefix));
                    first(fitting.map(|(_, node)| node), facts)
                });
                found.unwrap_or(Outcome::Nothing).or_else(otherwise, facts)
            }
            Node::Ranges {
                input,
                ranges,
                otherwise,
            } => {
                let found = input.address(facts).map(|address| first(ranges.candidates(address), facts));
                found.unwrap_or(Outcome::Nothing).or_else(otherwise, facts)
            }
            Node::List { entries, otherwise } => {
                for (predicate, node) in entries {
                    match predicate.holds(facts) {
                        None => return Outcome::Detect,
                        Some(false) => {}
                        Some(true) => match node.find(facts) {
                            Outcome::Nothing => {}
                            found => return found,
                        },
                    }
                }
                Outcome::Nothing.or_else(otherwise, facts)
            }
        }
    }
}

fn first<'a>(nodes: impl Iterator<Item = &'a Node>, facts: &Facts<'_>) -> Outcome<'a> {
    for node in nodes {
        match node.find(facts) {
            Outcome::Nothing => {}
            found => return found,
        }
    }
    Outcome::Nothing
}

// === impl Outcome ===

impl<'a> Outcome<'a> {
    fn or_else(self, otherwise: &'a Option<Box<Node>>, facts: &Facts<'_>) -> Self {
        match (self, otherwise) {
            (Outcome::Nothing, Some(node)) => node.find(facts),
            _ => self,
        }
    }
}

// === impl Predicate ===

impl Predicate {
    /// `None` while an input is not known yet.
    fn holds(&self, facts: &Facts<'_>) -> Option<bool> {
        match self {
            Predicate::Text(input, _) if input.is_unknown(facts) => None,
            Predicate::Text(input, matcher) => Some(
                input
                    .with_text(facts, |text| matcher.matches(text.as_bytes()))
                    .unwrap_or(false),
            ),
            Predicate::All(all) => all.iter().try_fold(true, |so_far, next| Some(so_far && next.holds(facts)?)),
            Predicate::Any(any) => any.iter().try_fold(false, |so_far, next| Some(so_far || next.holds(facts)?)),
            Predicate::Not(inner) => inner.holds(facts).map(|holds| !holds),
        }
    }
}

// === impl Input ===

impl Input {
    fn is_unknown(&self, facts: &Facts<'_>) -> bool {
        *self == Input::ApplicationProtocol && facts.spoken.is_none()
    }

    fn address(&self, facts: &Facts<'_>) -> Option<IpAddr> {
        match self {
            Input::DestinationIp => facts.destination_ip,
            Input::SourceIp => Some(facts.source_ip),
            Input::DestinationPort | Input::ApplicationProtocol | Input::FilterState(_) => None,
        }
    }

    /// Calls `f` with the input's text; an input without value gives `None`.
    fn with_text<T>(&self, facts: &Facts<'_>, f: impl FnOnce(&str) -> T) -> Option<T> {
        match self {
            Input::DestinationIp => facts.destination_ip.map(|ip| f(&ip.to_string())),
            Input::SourceIp => Some(f(&facts.source_ip.to_string())),
            Input::DestinationPort => facts.destination_port.map(|port| f(&port.to_string())),
            Input::ApplicationProtocol => facts.spoken.and_then(Spoken::text).map(f),
            Input::FilterState(key) => match &**key {
                "io.istio.connect_authority" => Some(f(facts.authority)),
                "io.istio.source" => facts.source.map(f),
                _ => None,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(name: &str) -> Node {
        Node::Chain(name.into())
    }

    fn port_map(ports: &[(&str, Node)]) -> Node {
        let map = ports.iter().map(|(port, node)| ((*port).into(), node.clone())).collect();
        Node::Exact {
            input: Input::DestinationPort,
            map,
            otherwise: None,
        }
    }

    fn facts(authority: &str, spoken: Option<Spoken>) -> Facts<'_> {
        let address: Option<std::net::SocketAddr> = authority.parse().ok();
        Facts {
            destination_ip: address.map(|a| a.ip()),
            destination_port: address.map(|a| a.port()),
            source_ip: [10, 244, 0, 9].into(),
            authority,
            source: None,
            spoken,
        }
    }

    fn name(outcome: Outcome<'_>) -> &str {
        match outcome {
            Outcome::Chain(name) => name,
            Outcome::Detect => "?",
            Outcome::Refused => "!",
            Outcome::Nothing => "-",
        }
    }

    fn tree() -> Node {
        let detect = Node::Exact {
            input: Input::ApplicationProtocol,
            map: [("'h2c'".into(), chain("http")), ("'http/1.1'".into(), chain("http"))]
                .into_iter()
                .collect(),
            otherwise: Some(Box::new(chain("tcp"))),
        };
        let mut ranges = Ranges::default();
        ranges.add(
            ["10.0.0.0/8".parse().unwrap()],
            port_map(&[("80", chain("wide")), ("81", chain("wide-81"))]),
        );
        ranges.add(
            ["10.96.1.10/32".parse().unwrap()],
            port_map(&[("80", chain("web")), ("90", detect)]),
        );
        ranges.add(["0.0.0.0/32".parse().unwrap()], chain("headless"));
        Node::Ranges {
            input: Input::DestinationIp,
            ranges,
            otherwise: None,
        }
    }

    #[test]
    fn what_is_refused_falls_through_to_nothing_else() {
        let mut ranges = Ranges::default();
        ranges.add(["10.0.0.0/8".parse().unwrap()], chain("wide"));
        ranges.add(["10.96.1.10/32".parse().unwrap()], port_map(&[("80", Node::Refused)]));
        let tree = Node::Ranges {
            input: Input::DestinationIp,
            ranges,
            otherwise: Some(Box::new(chain("otherwise"))),
        };
        for (authority, expected) in [
            ("10.96.1.10:80", "!"),
            ("10.96.1.10:81", "wide"),
            ("192.168.0.1:80", "otherwise"),
        ] {
            assert_eq!(name(tree.find(&facts(authority, None))), expected, "{authority}");
        }
    }

    #[test]
    fn the_longest_range_that_leads_somewhere_wins() {
        let tree = tree();
        for (authority, expected) in [
            ("10.96.1.10:80", "web"),
            ("10.96.1.10:81", "wide-81"),
            ("10.1.1.1:80", "wide"),
            ("10.1.1.1:99", "-"),
            ("192.168.0.1:80", "-"),
            ("web.app:80", "-"),
            ("0.0.0.0:80", "-"),
        ] {
            assert_eq!(name(tree.find(&facts(authority, None))), expected, "{authority}");
        }
    }

    #[test]
    fn a_port_that_depends_on_what_is_spoken_says_so() {
        let tree = tree();
        for (spoken, expected) in [
            (None, "?"),
            (Some(Spoken::Http11), "http"),
            (Some(Spoken::Http2), "http"),
            (Some(Spoken::Http10), "tcp"),
            (Some(Spoken::Other), "tcp"),
        ] {
            assert_eq!(name(tree.find(&facts("10.96.1.10:90", spoken))), expected, "{spoken:?}");
        }
    }
}
