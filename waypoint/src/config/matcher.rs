//! `filter_chain_matcher` into the tree that chooses chains.
//!
//! All xds matcher types that exist are read: exact, prefix and IP trees, and lists of predicates (contract xds §2.5). An input, a
//! matcher or an action that we do not know could lead a connection to another chain than the one it belongs to; then what it would
//! have decided is refused, and the rest of the tree serves. What Envoy would not read either is malformed: the last good tree stays.

use std::{collections::BTreeMap, net::IpAddr};

use cairn_policy::matcher::{Regex, StringMatch, StringMatcher};
use cairn_proto::{
    envoy::extensions::matching::common_inputs::network::v3::FilterStateInput,
    xds::{
        core::v3::{CidrRange, TypedExtensionConfig},
        r#type::matcher::v3::{
            IpMatcher, Matcher, StringMatcher as XdsString,
            ip_matcher::IpRangeMatcher,
            matcher::{
                self, MatcherList, MatcherTree, MatcherType, OnMatch,
                matcher_list::{
                    FieldMatcher, Predicate as XdsPredicate,
                    predicate::{MatchType, PredicateList, SinglePredicate, single_predicate},
                },
                matcher_tree::{MatchMap, TreeType},
            },
            regex_matcher::EngineType,
            string_matcher::MatchPattern,
        },
    },
};
use ipnet::IpNet;

use super::{
    any::{Unknown, type_name, unpack},
    report::{Malformed, Notes},
};
use crate::snapshot::matcher::{Input, Node, Predicate, Ranges};

/// Compiles a matcher.
pub(crate) fn compile(matcher: &Matcher, notes: &mut Notes) -> Result<Node, Malformed> {
    let Matcher {
        on_no_match,
        matcher_type,
    } = matcher;
    let otherwise = match on_no_match {
        None => None,
        Some(on_no_match) => notes
            .within("on_no_match", |notes| on_match(on_no_match, notes))
            .map(Some)?
            .map(Box::new),
    };
    match matcher_type {
        None => Err(notes.malformed("", "has neither a list nor a tree")),
        Some(MatcherType::MatcherList(list)) => notes.within("matcher_list", |notes| compile_list(list, otherwise, notes)),
        Some(MatcherType::MatcherTree(tree)) => notes.within("matcher_tree", |notes| compile_tree(tree, otherwise, notes)),
    }
}

/// Names of the chains that a tree leads to.
pub(crate) fn chains<'a>(node: &'a Node, names: &mut Vec<&'a str>) {
    let otherwise = match node {
        Node::Chain(name) => {
            names.push(name);
            return;
        }
        Node::Refused => return,
        Node::Exact {
            input: _,
            map,
            otherwise,
        } => {
            map.values().for_each(|node| chains(node, names));
            otherwise
        }
        Node::Prefix {
            input: _,
            prefixes,
            otherwise,
        } => {
            prefixes.iter().for_each(|(_, node)| chains(node, names));
            otherwise
        }
        Node::Ranges {
            input: _,
            ranges,
            otherwise,
        } => {
            ranges.nodes().for_each(|node| chains(node, names));
            otherwise
        }
        Node::List { entries, otherwise } => {
            entries.iter().for_each(|(_, node)| chains(node, names));
            otherwise
        }
    };
    if let Some(node) = otherwise {
        chains(node, names);
    }
}

fn compile_tree(tree: &MatcherTree, otherwise: Option<Box<Node>>, notes: &mut Notes) -> Result<Node, Malformed> {
    let MatcherTree { input, tree_type } = tree;
    let Some(input) = compile_input(input.as_ref(), notes)? else {
        return Ok(Node::Refused);
    };
    match tree_type {
        None => Err(notes.malformed("", "has no map")),
        Some(TreeType::ExactMatchMap(MatchMap { map })) => {
            let map = compile_map("exact_match_map", map, notes)?;
            Ok(Node::Exact {
                input,
                map: map.into_iter().collect(),
                otherwise,
            })
        }
        Some(TreeType::PrefixMatchMap(MatchMap { map })) => {
            let mut prefixes = compile_map("prefix_match_map", map, notes)?;
            prefixes.sort_by_key(|(prefix, _)| std::cmp::Reverse(prefix.len()));
            Ok(Node::Prefix {
                input,
                prefixes,
                otherwise,
            })
        }
        Some(TreeType::CustomMatch(custom)) => {
            notes.within("custom_match", |notes| compile_ranges(custom, input, otherwise, notes))
        }
    }
}

fn compile_map(
    field: &'static str,
    map: &BTreeMap<String, OnMatch>,
    notes: &mut Notes,
) -> Result<Vec<(Box<str>, Node)>, Malformed> {
    if map.is_empty() {
        return Err(notes.malformed(field, "is empty"));
    }
    notes.within(field, |notes| {
        map.iter()
            .map(|(key, next)| {
                Ok((
                    key.as_str().into(),
                    notes.within(format!("map[{key}]"), |notes| on_match(next, notes))?,
                ))
            })
            .collect()
    })
}

fn compile_ranges(
    custom: &TypedExtensionConfig,
    input: Input,
    otherwise: Option<Box<Node>>,
    notes: &mut Notes,
) -> Result<Node, Malformed> {
    let TypedExtensionConfig { name, typed_config } = custom;
    let Some(any) = typed_config else {
        return Err(notes.malformed("typed_config", format!("matcher {name} has no configuration")));
    };
    if type_name(&any.type_url) != "xds.type.matcher.v3.IPMatcher" {
        notes.refuse(
            "typed_config",
            format!("matcher {} is not supported", type_name(&any.type_url)),
        );
        return Ok(Node::Refused);
    }
    if !matches!(input, Input::DestinationIp | Input::SourceIp) {
        return Err(notes.malformed("typed_config", "an IPMatcher needs an address as input"));
    }
    let refusals = notes.refusals();
    let IpMatcher { range_matchers } = unpack(any, Unknown::Refuses, notes)?;
    if notes.refusals() > refusals {
        return Ok(Node::Refused);
    }
    let mut ranges = Ranges::default();
    for (index, matcher) in range_matchers.iter().enumerate() {
        notes.at("range_matchers", index, |notes| {
            let IpRangeMatcher {
                ranges: list,
                on_match: next,
                exclusive,
            } = matcher;
            if list.is_empty() {
                return Err(notes.malformed("ranges", "is empty"));
            }
            let nets = list
                .iter()
                .map(|range| compile_range(range, notes))
                .collect::<Result<Vec<_>, _>>()?;
            let next = next.as_ref().ok_or_else(|| notes.malformed("on_match", "is missing"))?;
            let mut node = notes.within("on_match", |notes| on_match(next, notes))?;
            if *exclusive {
                notes.refuse("exclusive", "is not supported");
                node = Node::Refused;
            }
            ranges.add(nets, node);
            Ok(())
        })?;
    }
    Ok(Node::Ranges {
        input,
        ranges,
        otherwise,
    })
}

pub(super) fn compile_range(range: &CidrRange, notes: &Notes) -> Result<IpNet, Malformed> {
    let CidrRange {
        address_prefix,
        prefix_len,
    } = range;
    let address: IpAddr = address_prefix
        .parse()
        .map_err(|_| notes.malformed("ranges.address_prefix", format!("`{address_prefix}` is no IP address")))?;
    let length = prefix_len.unwrap_or(0);
    let net = u8::try_from(length).ok().and_then(|length| IpNet::new(address, length).ok());
    net.map(|net| net.trunc())
        .ok_or_else(|| notes.malformed("ranges.prefix_len", format!("{length} is too long for {address}")))
}

fn compile_list(list: &MatcherList, otherwise: Option<Box<Node>>, notes: &mut Notes) -> Result<Node, Malformed> {
    let MatcherList { matchers } = list;
    let mut entries = Vec::with_capacity(matchers.len());
    for (index, matcher) in matchers.iter().enumerate() {
        let entry = notes.at("matchers", index, |notes| {
            let FieldMatcher {
                predicate,
                on_match: next,
            } = matcher;
            let predicate = predicate.as_ref().ok_or_else(|| notes.malformed("predicate", "is missing"))?;
            let predicate = notes.within("predicate", |notes| compile_predicate(predicate, notes))?;
            let next = next.as_ref().ok_or_else(|| notes.malformed("on_match", "is missing"))?;
            let node = notes.within("on_match", |notes| on_match(next, notes))?;
            Ok(match predicate {
                Some(predicate) => (predicate, node),
                // Nobody knows whether it holds, so nothing after it is reached.
                None => (Predicate::All(Vec::new()), Node::Refused),
            })
        })?;
        entries.push(entry);
    }
    Ok(Node::List { entries, otherwise })
}

/// `None` for what is not supported, and listed.
fn compile_predicate(predicate: &XdsPredicate, notes: &mut Notes) -> Result<Option<Predicate>, Malformed> {
    let XdsPredicate { match_type } = predicate;
    let all = |list: &PredicateList, notes: &mut Notes| {
        let PredicateList { predicate } = list;
        predicate
            .iter()
            .map(|predicate| compile_predicate(predicate, notes))
            .collect::<Result<Option<Vec<_>>, _>>()
    };
    Ok(match match_type {
        None => return Err(notes.malformed("", "is empty")),
        Some(MatchType::AndMatcher(list)) => notes.within("and_matcher", |notes| all(list, notes))?.map(Predicate::All),
        Some(MatchType::OrMatcher(list)) => notes.within("or_matcher", |notes| all(list, notes))?.map(Predicate::Any),
        Some(MatchType::NotMatcher(inner)) => notes
            .within("not_matcher", |notes| compile_predicate(inner, notes))?
            .map(|inner| Predicate::Not(Box::new(inner))),
        Some(MatchType::SinglePredicate(single)) => {
            let SinglePredicate { input, matcher } = single;
            let input = compile_input(input.as_ref(), notes)?;
            match matcher {
                Some(single_predicate::Matcher::ValueMatch(value)) => {
                    let matcher = compile_string(value, notes)?;
                    input.zip(matcher).map(|(input, matcher)| Predicate::Text(input, matcher))
                }
                Some(single_predicate::Matcher::CustomMatch(custom)) => {
                    notes.refuse("custom_match", format!("matcher {} is not supported", custom.name));
                    None
                }
                None => return Err(notes.malformed("", "compares with nothing")),
            }
        }
    })
}

/// `None` for what is not supported, and listed.
pub(super) fn compile_string(string: &XdsString, notes: &mut Notes) -> Result<Option<StringMatcher>, Malformed> {
    let XdsString {
        ignore_case,
        match_pattern,
    } = string;
    let how = match match_pattern {
        None => return Err(notes.malformed("value_match", "is empty")),
        Some(MatchPattern::Exact(text)) => StringMatch::Exact(text.as_str().into()),
        Some(MatchPattern::Prefix(text)) => StringMatch::Prefix(text.as_str().into()),
        Some(MatchPattern::Suffix(text)) => StringMatch::Suffix(text.as_str().into()),
        Some(MatchPattern::Contains(text)) => StringMatch::Contains(text.as_str().into()),
        Some(MatchPattern::SafeRegex(regex)) => {
            match &regex.engine_type {
                None | Some(EngineType::GoogleRe2(_)) => {}
            }
            StringMatch::Regex(
                Regex::new(&regex.regex).map_err(|error| notes.malformed("value_match.safe_regex", error.to_string()))?,
            )
        }
        Some(MatchPattern::Custom(custom)) => {
            notes.refuse("value_match.custom", format!("matcher {} is not supported", custom.name));
            return Ok(None);
        }
    };
    Ok(Some(StringMatcher::new(how, *ignore_case)))
}

/// `None` for what is not supported, and listed.
fn compile_input(input: Option<&TypedExtensionConfig>, notes: &mut Notes) -> Result<Option<Input>, Malformed> {
    let Some(TypedExtensionConfig { name, typed_config }) = input else {
        return Err(notes.malformed("input", "is missing"));
    };
    let Some(any) = typed_config else {
        return Err(notes.malformed("input", format!("{name} has no configuration")));
    };
    const INPUTS: &str = "envoy.extensions.matching.common_inputs.network.v3.";
    let kind = type_name(&any.type_url);
    Ok(Some(match kind.strip_prefix(INPUTS).unwrap_or_default() {
        "DestinationIPInput" => Input::DestinationIp,
        "DestinationPortInput" => Input::DestinationPort,
        // The source is the client of the tunnel: `envoy.filters.listener.original_dst.remote_ip`.
        "SourceIPInput" | "DirectSourceIPInput" => Input::SourceIp,
        "ApplicationProtocolInput" => Input::ApplicationProtocol,
        "FilterStateInput" => {
            let refusals = notes.refusals();
            let FilterStateInput { key, field } = notes.within("input", |notes| unpack(any, Unknown::Refuses, notes))?;
            match (key.as_str(), field.as_str()) {
                ("io.istio.connect_authority" | "io.istio.source", "") => {}
                _ => notes.refuse("input", format!("filter state `{key}` `{field}` is not known")),
            }
            if notes.refusals() > refusals {
                return Ok(None);
            }
            Input::FilterState(key.into())
        }
        _ => {
            notes.refuse("input", format!("{kind} is not supported"));
            return Ok(None);
        }
    }))
}

fn on_match(next: &OnMatch, notes: &mut Notes) -> Result<Node, Malformed> {
    let OnMatch { keep_matching, on_match } = next;
    if *keep_matching {
        notes.refuse("keep_matching", "is not supported");
        return Ok(Node::Refused);
    }
    match on_match {
        None => Err(notes.malformed("", "leads nowhere")),
        Some(matcher::on_match::OnMatch::Matcher(matcher)) => notes.within("matcher", |notes| compile(matcher, notes)),
        Some(matcher::on_match::OnMatch::Action(TypedExtensionConfig { name: _, typed_config })) => {
            let any = typed_config
                .as_ref()
                .ok_or_else(|| notes.malformed("action", "has no value"))?;
            if type_name(&any.type_url) != "google.protobuf.StringValue" {
                notes.refuse("action", format!("{} is not supported", type_name(&any.type_url)));
                return Ok(Node::Refused);
            }
            let name: String = prost::Message::decode(any.value.as_slice())
                .map_err(|error| notes.malformed("action", format!("is no google.protobuf.StringValue: {error}")))?;
            Ok(Node::Chain(name.into()))
        }
    }
}
