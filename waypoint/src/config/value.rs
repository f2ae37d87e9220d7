//! Small values that many messages share: durations, fractions, addresses, strings to compare with.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use cairn_policy::matcher::{Regex, StringMatch, StringMatcher};
use cairn_proto::envoy::{
    config::core::v3::{
        Address, CidrRange, DataSource, EnvoyInternalAddress, SocketAddress, address, data_source::Specifier,
        envoy_internal_address::AddressNameSpecifier, socket_address::PortSpecifier,
    },
    r#type::matcher::v3::{RegexMatcher, StringMatcher as EnvoyString, string_matcher::MatchPattern},
};

use ipnet::IpNet;

use super::report::{Malformed, Notes, refuse_set};

/// A duration; zero stays zero.
pub(crate) fn duration(field: &str, value: prost_types::Duration, notes: &Notes) -> Result<Duration, Malformed> {
    Duration::try_from(value).map_err(|_| notes.malformed(field, format!("{value} is no length of time")))
}

/// A duration of which zero and absence have their own meaning: absent is `default`, zero is never.
pub(crate) fn limit(
    field: &str,
    value: Option<prost_types::Duration>,
    default: Option<Duration>,
    notes: &Notes,
) -> Result<Option<Duration>, Malformed> {
    match value {
        None => Ok(default),
        Some(value) => Ok(Some(duration(field, value, notes)?).filter(|duration| !duration.is_zero())),
    }
}

/// Where an address leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// To an IP address and port.
    Socket(SocketAddr),
    /// To a host name and port.
    Host(String, u16),
    /// To an internal listener, with the endpoint's id.
    Internal(String, String),
    /// To something that we do not connect to, and that is listed.
    Elsewhere,
}

/// An address.
pub(crate) fn place(address: Address, notes: &mut Notes) -> Result<Place, Malformed> {
    let Address { address } = address;
    match address {
        None => Err(notes.malformed("address", "is empty")),
        Some(address::Address::Pipe(_)) => {
            notes.refuse("address.pipe", "is not supported");
            Ok(Place::Elsewhere)
        }
        Some(address::Address::SocketAddress(socket)) => {
            let SocketAddress {
                protocol,
                address,
                resolver_name,
                ipv4_compat: _,
                network_namespace_filepath,
                port_specifier,
            } = socket;
            refuse_set!(notes, protocol, resolver_name, network_namespace_filepath);
            let port = match port_specifier {
                Some(PortSpecifier::PortValue(port)) => {
                    u16::try_from(port).map_err(|_| notes.malformed("address.port_value", format!("{port} is no port")))?
                }
                Some(PortSpecifier::NamedPort(name)) => {
                    notes.refuse("address.named_port", format!("`{name}` is not supported"));
                    return Ok(Place::Elsewhere);
                }
                None => 0,
            };
            Ok(match address.parse::<IpAddr>() {
                Ok(ip) => Place::Socket(SocketAddr::new(ip, port)),
                Err(_) => Place::Host(address, port),
            })
        }
        Some(address::Address::EnvoyInternalAddress(internal)) => {
            let EnvoyInternalAddress {
                endpoint_id,
                address_name_specifier,
            } = internal;
            match address_name_specifier {
                Some(AddressNameSpecifier::ServerListenerName(listener)) => Ok(Place::Internal(listener, endpoint_id)),
                None => Err(notes.malformed("address.envoy_internal_address", "names no listener")),
            }
        }
    }
}

/// A range of addresses.
pub(crate) fn range(field: &str, range: CidrRange, notes: &Notes) -> Result<IpNet, Malformed> {
    let CidrRange {
        address_prefix,
        prefix_len,
    } = range;
    let address: IpAddr = address_prefix
        .parse()
        .map_err(|_| notes.malformed(field, format!("`{address_prefix}` is no IP address")))?;
    let length = prefix_len.unwrap_or(0);
    let net = u8::try_from(length).ok().and_then(|length| IpNet::new(address, length).ok());
    net.map(|net| net.trunc())
        .ok_or_else(|| notes.malformed(field, format!("{length} is too long for {address}")))
}

/// A string matcher.
pub(crate) fn string(field: &'static str, matcher: EnvoyString, notes: &mut Notes) -> Result<StringMatcher, Malformed> {
    let EnvoyString {
        ignore_case,
        match_pattern,
    } = matcher;
    let how = match match_pattern {
        None => return Err(notes.malformed(field, "is empty")),
        Some(MatchPattern::Exact(text)) => StringMatch::Exact(text.into()),
        Some(MatchPattern::Prefix(text)) => StringMatch::Prefix(text.into()),
        Some(MatchPattern::Suffix(text)) => StringMatch::Suffix(text.into()),
        Some(MatchPattern::Contains(text)) => StringMatch::Contains(text.into()),
        Some(MatchPattern::SafeRegex(regex)) => {
            StringMatch::Regex(notes.within(field, |notes| self::regex("safe_regex", regex, notes))?)
        }
        Some(MatchPattern::Custom(custom)) => {
            notes.refuse(field, format!("matcher {} is not known", custom.name));
            StringMatch::Exact(String::new().into())
        }
    };
    Ok(StringMatcher::new(how, ignore_case))
}

/// A regular expression.
pub(crate) fn regex(field: &str, matcher: RegexMatcher, notes: &Notes) -> Result<Regex, Malformed> {
    let RegexMatcher { regex, engine_type: _ } = matcher;
    Regex::new(&regex).map_err(|error| notes.malformed(field, error.to_string()))
}

/// Bytes in the configuration itself.
pub(crate) fn inline(field: &str, source: DataSource, notes: &mut Notes) -> Option<Vec<u8>> {
    let DataSource {
        watched_directory: _,
        specifier,
    } = source;
    match specifier {
        Some(Specifier::InlineBytes(bytes)) => Some(bytes),
        Some(Specifier::InlineString(text)) => Some(text.into_bytes()),
        None => Some(Vec::new()),
        Some(Specifier::Filename(name)) => {
            notes.refuse(field, format!("file {name} is not read"));
            None
        }
        Some(Specifier::EnvironmentVariable(name)) => {
            notes.refuse(field, format!("environment variable {name} is not read"));
            None
        }
    }
}
