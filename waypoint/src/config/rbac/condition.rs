//! Permissions and principals (contract xds §6.4) into conditions: one kind of message each.

use cairn_policy::{
    matcher::{HeaderMatcher, MetadataMatcher, StringMatch, StringMatcher, ValueMatcher},
    rbac::{Address, Condition, Text, UriTemplate},
};
use cairn_proto::envoy::{
    config::{
        core::v3::{CidrRange, TypedExtensionConfig},
        rbac::v3::{
            MetadataSource, Permission, Principal, SourcedMetadata,
            permission::{self, Rule},
            principal::{self, Authenticated, Identifier},
        },
        route::v3::HeaderMatcher as EnvoyHeader,
    },
    extensions::{
        path::r#match::uri_template::v3::UriTemplateMatchConfig,
        rbac::principals::mtls_authenticated::v3::Config as MtlsAuthenticated,
        transport_sockets::tls::v3::{SubjectAltNameMatcher, subject_alt_name_matcher::SanType},
    },
    r#type::{
        matcher::v3::{
            DoubleMatcher, FilterStateMatcher, ListMatcher, MetadataMatcher as EnvoyMetadata, OrMatcher, PathMatcher,
            ValueMatcher as EnvoyValue, double_matcher, filter_state_matcher, list_matcher,
            metadata_matcher::{PathSegment, path_segment::Segment},
            path_matcher, value_matcher,
        },
        v3::Int32Range,
    },
};

use super::Layer;
use crate::config::{
    any::{Unknown, unpack},
    headers,
    report::{Malformed, Notes},
    value,
};

/// What the keys of objects begin with that Envoy and Istio put into filter state themselves.
const OWN_OBJECTS: [&str; 6] = ["envoy.", "io.istio.", "istio.", "wasm.", "downstream_peer", "upstream_peer"];
/// First port number that there is not.
const PORTS: i32 = 65_536;

/// Compiles each of a list, which must not be empty: Envoy takes none of these.
pub(super) fn each<T>(
    field: &'static str,
    list: Vec<T>,
    notes: &mut Notes,
    compile: impl Fn(T, &mut Notes) -> Result<Condition, Malformed>,
) -> Result<Vec<Condition>, Malformed> {
    if list.is_empty() {
        return Err(notes.malformed(field, "is empty"));
    }
    let list = list.into_iter().enumerate();
    list.map(|(index, one)| notes.at(field, index, |notes| compile(one, notes)))
        .collect()
}

/// What takes the place of a condition that refuses its chain.
fn refused(field: &str, what: impl Into<String>, notes: &mut Notes) -> Condition {
    notes.refuse(field, what);
    Condition::Always
}

/// What is done.
pub(super) fn permission(permission: Permission, layer: Layer, notes: &mut Notes) -> Result<Condition, Malformed> {
    let Permission { rule } = permission;
    let compile = |one, notes: &mut Notes| self::permission(one, layer, notes);
    Ok(match rule {
        None => return Err(notes.malformed("", "is empty")),
        Some(Rule::AndRules(permission::Set { rules })) => Condition::All(each("and_rules", rules, notes, compile)?),
        Some(Rule::OrRules(permission::Set { rules })) => Condition::AnyOf(each("or_rules", rules, notes, compile)?),
        Some(Rule::NotRule(inner)) => Condition::Not(Box::new(
            notes.within("not_rule", |notes| self::permission(*inner, layer, notes))?,
        )),
        Some(Rule::Any(any)) => always(any, notes)?,
        Some(Rule::Header(matcher)) => header(matcher, layer, notes)?,
        Some(Rule::UrlPath(matcher)) => path(matcher, notes)?,
        Some(Rule::UriTemplate(config)) => template(config, notes)?,
        Some(Rule::DestinationIp(range)) => address("destination_ip", Address::Destination, range, notes)?,
        Some(Rule::DestinationPort(port)) => match u16::try_from(port) {
            Ok(port) => Condition::Port(port..=port),
            Err(_) => return Err(notes.malformed("destination_port", format!("{port} is no port"))),
        },
        Some(Rule::DestinationPortRange(range)) => ports(range, notes)?,
        Some(Rule::RequestedServerName(matcher)) => {
            Condition::Text(Text::ServerName, value::string("requested_server_name", matcher, notes)?)
        }
        Some(Rule::Metadata(matcher)) => Condition::Metadata(notes.within("metadata", |notes| metadata(matcher, notes))?),
        Some(Rule::SourcedMetadata(sourced)) => notes.within("sourced_metadata", |notes| sourced_metadata(sourced, notes))?,
        Some(Rule::Matcher(config)) => refused("matcher", format!("{} is not supported", config.name), notes),
    })
}

/// Who does it.
pub(super) fn principal(principal: Principal, layer: Layer, notes: &mut Notes) -> Result<Condition, Malformed> {
    let Principal { identifier } = principal;
    let compile = |one, notes: &mut Notes| self::principal(one, layer, notes);
    Ok(match identifier {
        None => return Err(notes.malformed("", "is empty")),
        Some(Identifier::AndIds(principal::Set { ids })) => Condition::All(each("and_ids", ids, notes, compile)?),
        Some(Identifier::OrIds(principal::Set { ids })) => Condition::AnyOf(each("or_ids", ids, notes, compile)?),
        Some(Identifier::NotId(inner)) => Condition::Not(Box::new(
            notes.within("not_id", |notes| self::principal(*inner, layer, notes))?,
        )),
        Some(Identifier::Any(any)) => always(any, notes)?,
        Some(Identifier::Authenticated(Authenticated { principal_name })) => match principal_name {
            None => Condition::Authenticated,
            Some(matcher) => {
                let matcher = value::string("authenticated.principal_name", matcher, notes)?;
                spiffe("authenticated.principal_name", matcher, notes)
            }
        },
        Some(Identifier::Custom(config)) => custom(config, notes)?,
        Some(Identifier::SourceIp(range)) => address("source_ip", Address::DirectRemote, range, notes)?,
        Some(Identifier::DirectRemoteIp(range)) => address("direct_remote_ip", Address::DirectRemote, range, notes)?,
        Some(Identifier::RemoteIp(range)) => address("remote_ip", Address::Remote, range, notes)?,
        Some(Identifier::Header(matcher)) => header(matcher, layer, notes)?,
        Some(Identifier::UrlPath(matcher)) => path(matcher, notes)?,
        Some(Identifier::Metadata(matcher)) => Condition::Metadata(notes.within("metadata", |notes| metadata(matcher, notes))?),
        Some(Identifier::SourcedMetadata(sourced)) => {
            notes.within("sourced_metadata", |notes| sourced_metadata(sourced, notes))?
        }
        Some(Identifier::FilterState(matcher)) => notes.within("filter_state", |notes| filter_state(matcher, layer, notes))?,
    })
}

fn always(any: bool, notes: &Notes) -> Result<Condition, Malformed> {
    if any {
        Ok(Condition::Always)
    } else {
        Err(notes.malformed("any", "may only be true"))
    }
}

/// Envoy takes no header rules before bytes; istiod leaves them out (contract xds §6.5).
fn header(matcher: EnvoyHeader, layer: Layer, notes: &mut Notes) -> Result<Condition, Malformed> {
    if layer == Layer::Network {
        return Err(notes.malformed("header", "a TCP connection has no headers"));
    }
    let matcher: HeaderMatcher = notes.within("header", |notes| headers::matcher(matcher, notes))?;
    Ok(Condition::Header(matcher))
}

fn path(matcher: PathMatcher, notes: &mut Notes) -> Result<Condition, Malformed> {
    let PathMatcher { rule } = matcher;
    match rule {
        None => Err(notes.malformed("url_path", "is empty")),
        Some(path_matcher::Rule::Path(matcher)) => Ok(Condition::Path(value::string("url_path.path", matcher, notes)?)),
    }
}

fn template(config: TypedExtensionConfig, notes: &mut Notes) -> Result<Condition, Malformed> {
    let TypedExtensionConfig { name, typed_config } = config;
    let any = typed_config.ok_or_else(|| notes.malformed("uri_template", format!("{name} has no configuration")))?;
    let UriTemplateMatchConfig { path_template } = notes.within("uri_template", |notes| unpack(&any, Unknown::Refuses, notes))?;
    let template = UriTemplate::new(&path_template).map_err(|error| notes.malformed("uri_template", error.to_string()))?;
    Ok(Condition::Template(template))
}

fn address(field: &str, which: Address, range: CidrRange, notes: &Notes) -> Result<Condition, Malformed> {
    Ok(Condition::Address(which, value::range(field, range, notes)?))
}

fn ports(range: Int32Range, notes: &Notes) -> Result<Condition, Malformed> {
    let Int32Range { start, end } = range;
    let bad = || notes.malformed("destination_port_range", format!("{start} to {end} is no range of ports"));
    if !(0..=PORTS).contains(&start) || !(0..=PORTS).contains(&end) || start >= end {
        return Err(bad());
    }
    // The end is outside.
    let first = u16::try_from(start).map_err(|_| bad())?;
    let last = u16::try_from(end - 1).map_err(|_| bad())?;
    Ok(Condition::Port(first..=last))
}

/// Names in a certificate: we know the SPIFFE id alone. What can only be another kind of name refuses.
fn spiffe(field: &str, matcher: StringMatcher, notes: &mut Notes) -> Condition {
    const SCHEME: &str = "spiffe://";
    let other = match matcher.how() {
        StringMatch::Exact(name) => !name.starts_with(SCHEME),
        StringMatch::Prefix(start) => !start.starts_with(SCHEME) && !SCHEME.starts_with(&**start),
        StringMatch::Suffix(_) | StringMatch::Contains(_) | StringMatch::Regex(_) => false,
    };
    if other {
        return refused(field, "names other than SPIFFE ids are not known", notes);
    }
    Condition::Text(Text::Certificate, matcher)
}

fn custom(config: TypedExtensionConfig, notes: &mut Notes) -> Result<Condition, Malformed> {
    let TypedExtensionConfig { name, typed_config } = config;
    let known = typed_config.filter(|any| {
        any.type_url
            .ends_with("/envoy.extensions.rbac.principals.mtls_authenticated.v3.Config")
    });
    let Some(any) = known else {
        return Ok(refused("custom", format!("{name} is not supported"), notes));
    };
    let MtlsAuthenticated {
        san_matcher,
        any_validated_client_certificate,
    } = notes.within("custom", |notes| unpack(&any, Unknown::Refuses, notes))?;
    match (san_matcher, any_validated_client_certificate) {
        (None, true) => Ok(Condition::Authenticated),
        (
            Some(SubjectAltNameMatcher {
                san_type,
                matcher,
                oid: _,
            }),
            false,
        ) => {
            if SanType::try_from(san_type) != Ok(SanType::Uri) {
                return Ok(refused(
                    "custom.san_matcher",
                    "names other than SPIFFE ids are not known",
                    notes,
                ));
            }
            let matcher = matcher.ok_or_else(|| notes.malformed("custom.san_matcher.matcher", "is missing"))?;
            let matcher = value::string("custom.san_matcher.matcher", matcher, notes)?;
            Ok(spiffe("custom.san_matcher.matcher", matcher, notes))
        }
        _ => Err(notes.malformed("custom", "asks for a name and for any name, or for neither")),
    }
}

/// Objects of filter state that istiod puts there; we hold what they stand for as facts of the connection (contract xds §2.2).
fn filter_state(matcher: FilterStateMatcher, layer: Layer, notes: &mut Notes) -> Result<Condition, Malformed> {
    let FilterStateMatcher { key, matcher } = matcher;
    let matcher = match matcher {
        None => return Err(notes.malformed("matcher", "is missing")),
        Some(filter_state_matcher::Matcher::StringMatch(matcher)) => value::string("string_match", matcher, notes)?,
        Some(filter_state_matcher::Matcher::AddressMatch(_)) => {
            return Ok(refused("address_match", "is not supported", notes));
        }
    };
    if layer == Layer::Tunnel {
        return Ok(refused(
            "key",
            format!("object {key} is not looked up before a tunnel is accepted"),
            notes,
        ));
    }
    let text = match key.as_str() {
        "io.istio.peer_principal" => Text::PeerPrincipal,
        "io.istio.local_principal" => Text::LocalPrincipal,
        "io.istio.connect_authority" => Text::ConnectAuthority,
        // What Envoy and Istio put there themselves we would have to know of; what else is there, filters of the chain have put.
        key if OWN_OBJECTS.iter().any(|own| key.starts_with(own)) => {
            return Ok(refused("key", format!("object {key} of filter state is not known"), notes));
        }
        _ => return Ok(Condition::State(key.into(), matcher)),
    };
    Ok(Condition::Text(text, matcher))
}

fn sourced_metadata(sourced: SourcedMetadata, notes: &mut Notes) -> Result<Condition, Malformed> {
    let SourcedMetadata {
        metadata_matcher,
        metadata_source,
    } = sourced;
    let matcher = metadata_matcher.ok_or_else(|| notes.malformed("metadata_matcher", "is missing"))?;
    let matcher = notes.within("metadata_matcher", |notes| metadata(matcher, notes))?;
    match MetadataSource::try_from(metadata_source) {
        Ok(MetadataSource::Dynamic) => Ok(Condition::Metadata(matcher)),
        Ok(MetadataSource::Route) => Ok(refused("metadata_source", "metadata of routes is not supported", notes)),
        Err(_) => Err(notes.malformed("metadata_source", format!("{metadata_source} is not known"))),
    }
}

/// A matcher of what filters have noted.
pub(crate) fn metadata(matcher: EnvoyMetadata, notes: &mut Notes) -> Result<MetadataMatcher, Malformed> {
    let EnvoyMetadata {
        filter,
        path,
        value,
        invert,
    } = matcher;
    if filter.is_empty() {
        return Err(notes.malformed("filter", "is empty"));
    }
    let keys = path.into_iter().map(|PathSegment { segment }| match segment {
        Some(Segment::Key(key)) if !key.is_empty() => Ok(key.into_boxed_str()),
        _ => Err(notes.malformed("path", "a key is empty")),
    });
    let path = keys.collect::<Result<Vec<_>, _>>()?;
    if path.is_empty() {
        return Err(notes.malformed("path", "is empty"));
    }
    let value = value.ok_or_else(|| notes.malformed("value", "is missing"))?;
    Ok(MetadataMatcher {
        filter: filter.into(),
        path: path.into(),
        value: notes.within("value", |notes| metadata_value(value, notes))?,
        invert,
    })
}

fn metadata_value(matcher: EnvoyValue, notes: &mut Notes) -> Result<ValueMatcher, Malformed> {
    use value_matcher::{MatchPattern, NullMatch};
    let EnvoyValue { match_pattern } = matcher;
    Ok(match match_pattern {
        None => return Err(notes.malformed("", "is empty")),
        Some(MatchPattern::NullMatch(NullMatch {})) => ValueMatcher::Null,
        Some(MatchPattern::BoolMatch(wanted)) => ValueMatcher::Bool(wanted),
        Some(MatchPattern::PresentMatch(wanted)) => ValueMatcher::Present(wanted),
        Some(MatchPattern::StringMatch(matcher)) => ValueMatcher::String(value::string("string_match", matcher, notes)?),
        Some(MatchPattern::DoubleMatch(DoubleMatcher { match_pattern })) => match match_pattern {
            None => return Err(notes.malformed("double_match", "is empty")),
            Some(double_matcher::MatchPattern::Exact(wanted)) => ValueMatcher::Exact(wanted),
            Some(double_matcher::MatchPattern::Range(range)) => ValueMatcher::Range {
                start: range.start,
                end: range.end,
            },
        },
        Some(MatchPattern::ListMatch(list)) => {
            let ListMatcher { match_pattern } = *list;
            let Some(list_matcher::MatchPattern::OneOf(item)) = match_pattern else {
                return Err(notes.malformed("list_match", "is empty"));
            };
            let item = notes.within("list_match.one_of", |notes| metadata_value(*item, notes))?;
            ValueMatcher::ListOneOf(Box::new(item))
        }
        Some(MatchPattern::OrMatch(OrMatcher { value_matchers })) => {
            let any = value_matchers.into_iter().enumerate();
            let any = any.map(|(index, one)| notes.at("or_match.value_matchers", index, |notes| metadata_value(one, notes)));
            ValueMatcher::Or(any.collect::<Result<_, _>>()?)
        }
    })
}
