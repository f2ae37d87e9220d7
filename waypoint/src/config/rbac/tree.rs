//! Rules as a tree of matchers (`xds.type.matcher.v3.Matcher`) in the place of policies.
//!
//! Of inputs there are those that conditions of policies know, headers and expressions; one that we do not know refuses the chain, for
//! nobody can say where it would lead.

use std::sync::Arc;

use cairn_exchange::cel::{Options, Program};
use cairn_policy::{
    matcher::HeaderName,
    rbac::{Action, Address, Input, Predicate, Text, Tree, Verdict},
};
use cairn_proto::{
    envoy::{
        config::rbac::v3::Action as EnvoyVerdict, extensions::matching::common_inputs::network::v3::FilterStateInput,
        r#type::matcher::v3::HttpRequestHeaderMatchInput,
    },
    google::api::expr::v1alpha1::{CheckedExpr, ParsedExpr},
    xds::{
        core::v3::TypedExtensionConfig,
        r#type::{
            matcher::v3::{
                CelMatcher, IpMatcher, Matcher,
                ip_matcher::IpRangeMatcher,
                matcher::{
                    MatcherList, MatcherTree, MatcherType, OnMatch,
                    matcher_list::{
                        FieldMatcher, Predicate as XdsPredicate,
                        predicate::{MatchType, PredicateList, SinglePredicate, single_predicate},
                    },
                    matcher_tree::{MatchMap, TreeType},
                    on_match,
                },
            },
            v3::{CelExpression, cel_expression::ExprSpecifier},
        },
    },
};
use prost::Message;

use super::{Layer, action, condition};
use crate::config::{
    any::{Unknown, type_name, unpack},
    cel,
    matcher::{compile_range, compile_string},
    report::{Malformed, Notes},
};

const NETWORK: &str = "envoy.extensions.matching.common_inputs.network.v3.";
const ATTRIBUTES: &str = "xds.type.matcher.v3.HttpAttributesCelMatchInput";

/// A tree; `None` for one that is refused, and listed.
type Compiled = Result<Option<Tree>, Malformed>;

/// Compiles a tree.
pub(super) fn compile(matcher: &Matcher, layer: Layer, notes: &mut Notes) -> Compiled {
    let Matcher {
        on_no_match,
        matcher_type,
    } = matcher;
    let otherwise = match on_no_match {
        None => None,
        Some(next) => match notes.within("on_no_match", |notes| on_match(next, layer, notes))? {
            None => return Ok(None),
            Some(tree) => Some(Box::new(tree)),
        },
    };
    match matcher_type {
        None => Err(notes.malformed("", "has neither a list nor a tree")),
        Some(MatcherType::MatcherList(MatcherList { matchers })) => {
            let entries = matchers.iter().enumerate().map(|(index, matcher)| {
                notes.within(format!("matcher_list.matchers[{index}]"), |notes| {
                    entry(matcher, layer, notes)
                })
            });
            let entries = entries.collect::<Result<Option<Vec<_>>, _>>()?;
            Ok(entries.map(|entries| Tree::List { entries, otherwise }))
        }
        Some(MatcherType::MatcherTree(tree)) => notes.within("matcher_tree", |notes| by_value(tree, otherwise, layer, notes)),
    }
}

fn on_match(next: &OnMatch, layer: Layer, notes: &mut Notes) -> Compiled {
    let OnMatch { keep_matching, on_match } = next;
    if *keep_matching {
        notes.refuse("keep_matching", "is not supported");
        return Ok(None);
    }
    match on_match {
        None => Err(notes.malformed("", "leads nowhere")),
        Some(on_match::OnMatch::Matcher(matcher)) => notes.within("matcher", |notes| compile(matcher, layer, notes)),
        Some(on_match::OnMatch::Action(TypedExtensionConfig { name: _, typed_config })) => {
            let any = typed_config
                .as_ref()
                .ok_or_else(|| notes.malformed("action", "has no value"))?;
            if type_name(&any.type_url) != "envoy.config.rbac.v3.Action" {
                notes.refuse("action", format!("{} is not supported", type_name(&any.type_url)));
                return Ok(None);
            }
            let EnvoyVerdict { name, action } = notes.within("action", |notes| unpack(any, Unknown::Refuses, notes))?;
            let action: Action = self::action(action, notes)?;
            let name = Arc::from(name);
            Ok(Some(Tree::Verdict(Verdict { name, action })))
        }
    }
}

fn by_value(tree: &MatcherTree, otherwise: Option<Box<Tree>>, layer: Layer, notes: &mut Notes) -> Compiled {
    let MatcherTree { input, tree_type } = tree;
    let Some(input) = self::input(input.as_ref(), layer, notes)? else {
        return Ok(None);
    };
    let map = |MatchMap { map }: &MatchMap, field: &'static str, notes: &mut Notes| {
        if map.is_empty() {
            return Err(notes.malformed(field, "is empty"));
        }
        let leads = map.iter().map(|(key, next)| {
            let tree = notes.within(format!("{field}.map[{key}]"), |notes| on_match(next, layer, notes))?;
            Ok(tree.map(|tree| (Box::<[u8]>::from(key.as_bytes()), tree)))
        });
        leads.collect::<Result<Option<Vec<_>>, Malformed>>()
    };
    Ok(match tree_type {
        None => return Err(notes.malformed("", "has no map")),
        Some(TreeType::ExactMatchMap(values)) => map(values, "exact_match_map", notes)?.map(|values| Tree::Exact {
            input,
            map: values.into_iter().collect(),
            otherwise,
        }),
        Some(TreeType::PrefixMatchMap(values)) => map(values, "prefix_match_map", notes)?.map(|mut prefixes| {
            prefixes.sort_by_key(|(prefix, _)| std::cmp::Reverse(prefix.len()));
            Tree::Prefix {
                input,
                prefixes,
                otherwise,
            }
        }),
        Some(TreeType::CustomMatch(custom)) => {
            return notes.within("custom_match", |notes| by_range(custom, &input, otherwise, layer, notes));
        }
    })
}

fn by_range(
    custom: &TypedExtensionConfig,
    input: &Input,
    otherwise: Option<Box<Tree>>,
    layer: Layer,
    notes: &mut Notes,
) -> Compiled {
    let TypedExtensionConfig { name, typed_config } = custom;
    let any = typed_config.as_ref();
    let any = any.ok_or_else(|| notes.malformed("typed_config", format!("matcher {name} has no configuration")))?;
    let (Input::Address(address), "xds.type.matcher.v3.IPMatcher") = (input, type_name(&any.type_url)) else {
        notes.refuse("typed_config", format!("matcher {name} is not supported here"));
        return Ok(None);
    };
    let IpMatcher { range_matchers } = unpack(any, Unknown::Refuses, notes)?;
    let mut all = Vec::new();
    for (index, matcher) in range_matchers.iter().enumerate() {
        let IpRangeMatcher {
            ranges,
            on_match: next,
            exclusive,
        } = matcher;
        let tree = notes.at("range_matchers", index, |notes| {
            if *exclusive {
                notes.refuse("exclusive", "is not supported");
                return Ok(None);
            }
            let next = next.as_ref().ok_or_else(|| notes.malformed("on_match", "is missing"))?;
            let ranges = ranges
                .iter()
                .map(|range| compile_range(range, notes))
                .collect::<Result<Vec<_>, _>>()?;
            let tree = notes.within("on_match", |notes| on_match(next, layer, notes))?;
            Ok(tree.map(|tree| (ranges, tree)))
        })?;
        let Some((ranges, tree)) = tree else { return Ok(None) };
        all.extend(ranges.into_iter().map(|range| (range, tree.clone())));
    }
    all.sort_by_key(|(range, _)| std::cmp::Reverse(range.prefix_len()));
    Ok(Some(Tree::Ranges {
        address: *address,
        ranges: all,
        otherwise,
    }))
}

fn entry(matcher: &FieldMatcher, layer: Layer, notes: &mut Notes) -> Result<Option<(Predicate, Tree)>, Malformed> {
    let FieldMatcher {
        predicate,
        on_match: next,
    } = matcher;
    let predicate = predicate.as_ref().ok_or_else(|| notes.malformed("predicate", "is missing"))?;
    let predicate = notes.within("predicate", |notes| self::predicate(predicate, layer, notes))?;
    let next = next.as_ref().ok_or_else(|| notes.malformed("on_match", "is missing"))?;
    let tree = notes.within("on_match", |notes| on_match(next, layer, notes))?;
    Ok(predicate.zip(tree))
}

fn predicate(predicate: &XdsPredicate, layer: Layer, notes: &mut Notes) -> Result<Option<Predicate>, Malformed> {
    let XdsPredicate { match_type } = predicate;
    let all = |PredicateList { predicate }: &PredicateList, notes: &mut Notes| {
        let each = predicate.iter().map(|one| self::predicate(one, layer, notes));
        each.collect::<Result<Option<Vec<_>>, _>>()
    };
    Ok(match match_type {
        None => return Err(notes.malformed("", "is empty")),
        Some(MatchType::AndMatcher(list)) => notes.within("and_matcher", |notes| all(list, notes))?.map(Predicate::All),
        Some(MatchType::OrMatcher(list)) => notes.within("or_matcher", |notes| all(list, notes))?.map(Predicate::Any),
        Some(MatchType::NotMatcher(inner)) => {
            let inner = notes.within("not_matcher", |notes| self::predicate(inner, layer, notes))?;
            inner.map(|inner| Predicate::Not(Box::new(inner)))
        }
        Some(MatchType::SinglePredicate(SinglePredicate { input, matcher })) => match matcher {
            None => return Err(notes.malformed("", "compares with nothing")),
            Some(single_predicate::Matcher::ValueMatch(value)) => {
                let input = self::input(input.as_ref(), layer, notes)?;
                input
                    .zip(compile_string(value, notes)?)
                    .map(|(input, matcher)| Predicate::Value(input, matcher))
            }
            Some(single_predicate::Matcher::CustomMatch(custom)) => {
                let asked = input.as_ref().and_then(|input| input.typed_config.as_ref());
                let of_attributes = asked.is_some_and(|any| type_name(&any.type_url) == ATTRIBUTES);
                expression(custom, of_attributes, layer, notes)?.map(Predicate::Expression)
            }
        },
    })
}

/// An expression over attributes.
fn expression(
    custom: &TypedExtensionConfig,
    of_attributes: bool,
    layer: Layer,
    notes: &mut Notes,
) -> Result<Option<Arc<Program>>, Malformed> {
    let TypedExtensionConfig { name, typed_config } = custom;
    let known = typed_config
        .as_ref()
        .filter(|any| of_attributes && layer != Layer::Tunnel && type_name(&any.type_url) == "xds.type.matcher.v3.CelMatcher");
    let Some(any) = known else {
        notes.refuse("custom_match", format!("matcher {name} is not supported here"));
        return Ok(None);
    };
    let CelMatcher {
        expr_match,
        description: _,
    } = notes.within("custom_match", |notes| unpack(any, Unknown::Refuses, notes))?;
    let CelExpression {
        cel_expr_parsed,
        cel_expr_checked,
        cel_expr_string,
        expr_specifier,
    } = expr_match.unwrap_or_default();
    // The newer messages are the older ones under another name, field by field.
    let newer = |bytes: Vec<u8>, notes: &Notes| {
        CheckedExpr::decode(&*bytes).map_err(|error| notes.malformed("custom_match", error.to_string()))
    };
    let tree = match (cel_expr_checked, cel_expr_parsed, expr_specifier) {
        (Some(checked), ..) => cel::checked(newer(checked.encode_to_vec(), notes)?),
        (None, Some(parsed), _) => {
            let parsed = ParsedExpr::decode(&*parsed.encode_to_vec());
            let parsed = parsed.map_err(|error| notes.malformed("custom_match", error.to_string()))?;
            parsed.expr.unwrap_or_default()
        }
        (None, None, Some(ExprSpecifier::CheckedExpr(checked))) => cel::checked(checked),
        (None, None, Some(ExprSpecifier::ParsedExpr(parsed))) => parsed.expr.unwrap_or_default(),
        (None, None, None) => return cel::deciding_text("custom_match", &cel_expr_string, Options::default(), notes),
    };
    cel::deciding("custom_match", tree, Options::default(), notes)
}

/// `None` for what is not supported, and listed.
fn input(input: Option<&TypedExtensionConfig>, layer: Layer, notes: &mut Notes) -> Result<Option<Input>, Malformed> {
    let Some(TypedExtensionConfig { name, typed_config }) = input else {
        return Err(notes.malformed("input", "is missing"));
    };
    let any = typed_config.as_ref();
    let any = any.ok_or_else(|| notes.malformed("input", format!("{name} has no configuration")))?;
    let kind = type_name(&any.type_url);
    if kind == "envoy.type.matcher.v3.HttpRequestHeaderMatchInput" {
        if layer == Layer::Network {
            return Err(notes.malformed("input", "a TCP connection has no headers"));
        }
        let HttpRequestHeaderMatchInput { header_name } = notes.within("input", |notes| unpack(any, Unknown::Refuses, notes))?;
        let name =
            HeaderName::parse(&header_name).map_err(|_| notes.malformed("input", format!("`{header_name}` is no header")))?;
        return Ok(Some(Input::Header(name)));
    }
    Ok(Some(match kind.strip_prefix(NETWORK).unwrap_or_default() {
        "DestinationIPInput" => Input::Address(Address::Destination),
        "DestinationPortInput" => Input::Port,
        "SourceIPInput" => Input::Address(Address::Remote),
        "DirectSourceIPInput" => Input::Address(Address::DirectRemote),
        "ServerNameInput" => Input::Text(Text::ServerName),
        "FilterStateInput" => {
            let FilterStateInput { key, field } = notes.within("input", |notes| unpack(any, Unknown::Refuses, notes))?;
            if !field.is_empty() {
                notes.refuse("input", format!("field {field} of object {key} is not known"));
                return Ok(None);
            }
            return Ok(condition::object(&key, layer, notes).map(|object| match object {
                condition::Object::Text(text) => Input::Text(text),
                condition::Object::State(key) => Input::State(key),
            }));
        }
        _ => {
            notes.refuse("input", format!("{kind} is not supported"));
            return Ok(None);
        }
    }))
}
