//! Header edits and header matchers of routes (contract xds §4.4, §4.5).

use cairn_exchange::format::Template;
use cairn_policy::{
    headers::{EditAction, HeaderEdit, HeaderEdits},
    matcher::{HeaderMatch, HeaderMatcher, HeaderName, StringMatch, StringMatcher},
};
use cairn_proto::envoy::config::{
    core::v3::{HeaderValue, HeaderValueOption, header_value_option::HeaderAppendAction},
    route::v3::{HeaderMatcher as EnvoyMatcher, header_matcher::HeaderMatchSpecifier},
};

use super::{
    report::{Malformed, Notes},
    value,
};

/// Operators of the client's own TLS: inside a tunnel there is none, for Envoy either.
const ABSENT_IN_TUNNELS: [&str; 2] = ["DOWNSTREAM_PEER_", "DOWNSTREAM_TLS_"];

/// Compiles the edits of one level.
pub(crate) fn edits(
    add: Vec<HeaderValueOption>,
    remove: Vec<String>,
    field: &str,
    notes: &mut Notes,
) -> Result<HeaderEdits, Malformed> {
    let add = add
        .into_iter()
        .map(|option| edit(option, field, notes))
        .collect::<Result<Vec<_>, _>>()?;
    for edit in &add {
        for operator in edit.template().into_iter().flat_map(Template::unrecorded) {
            if !ABSENT_IN_TUNNELS.iter().any(|absent| operator.starts_with(absent)) {
                let what = format!("%{operator}% in the value of {} is not known here", edit.name());
                notes.refuse(&format!("{field}_to_add"), what);
            }
        }
    }
    let removals = remove.iter().map(|name| {
        HeaderEdits::removal(name).map_err(|error| notes.malformed(&format!("{field}_to_remove"), error.to_string()))
    });
    Ok(HeaderEdits::new(add, removals.collect::<Result<Vec<_>, _>>()?))
}

fn edit(option: HeaderValueOption, field: &str, notes: &Notes) -> Result<HeaderEdit, Malformed> {
    let field = format!("{field}_to_add");
    let HeaderValueOption {
        header,
        append,
        append_action,
        keep_empty_value,
    } = option;
    let HeaderValue { key, value, raw_value } = header.ok_or_else(|| notes.malformed(&field, "has no header"))?;
    let action = match (append, HeaderAppendAction::try_from(append_action)) {
        // The older field wins where it is there, as in Envoy.
        (Some(true), _) | (None, Ok(HeaderAppendAction::AppendIfExistsOrAdd)) => EditAction::AppendOrAdd,
        (Some(false), _) | (None, Ok(HeaderAppendAction::OverwriteIfExistsOrAdd)) => EditAction::OverwriteOrAdd,
        (None, Ok(HeaderAppendAction::AddIfAbsent)) => EditAction::AddIfAbsent,
        (None, Ok(HeaderAppendAction::OverwriteIfExists)) => EditAction::OverwriteIfExists,
        (None, Err(_)) => return Err(notes.malformed(&field, format!("{append_action} is no append_action"))),
    };
    let value = if raw_value.is_empty() {
        value
    } else {
        String::from_utf8(raw_value).map_err(|_| notes.malformed(&field, format!("the raw value of {key} is no text")))?
    };
    HeaderEdit::new(&key, &value, action, keep_empty_value).map_err(|error| {
        let cause = std::error::Error::source(&error)
            .map(|source| format!(": {source}"))
            .unwrap_or_default();
        notes.malformed(&field, format!("{error}{cause}"))
    })
}

/// Compiles a header matcher.
pub(crate) fn matcher(matcher: EnvoyMatcher, notes: &mut Notes) -> Result<HeaderMatcher, Malformed> {
    let EnvoyMatcher {
        name,
        invert_match,
        treat_missing_header_as_empty,
        header_match_specifier,
    } = matcher;
    let string = |how| Ok(HeaderMatch::String(StringMatcher::new(how, false)));
    let how = match header_match_specifier {
        None => Ok(HeaderMatch::Present(true)),
        Some(HeaderMatchSpecifier::PresentMatch(present)) => Ok(HeaderMatch::Present(present)),
        Some(HeaderMatchSpecifier::StringMatch(matcher)) => {
            value::string("string_match", matcher, notes).map(HeaderMatch::String)
        }
        Some(HeaderMatchSpecifier::RangeMatch(range)) => Ok(HeaderMatch::Range {
            start: range.start,
            end: range.end,
        }),
        Some(HeaderMatchSpecifier::ExactMatch(text)) => string(StringMatch::Exact(text.into())),
        Some(HeaderMatchSpecifier::PrefixMatch(text)) => string(StringMatch::Prefix(text.into())),
        Some(HeaderMatchSpecifier::SuffixMatch(text)) => string(StringMatch::Suffix(text.into())),
        Some(HeaderMatchSpecifier::ContainsMatch(text)) => string(StringMatch::Contains(text.into())),
        Some(HeaderMatchSpecifier::SafeRegexMatch(regex)) => value::regex("safe_regex_match", regex, notes)
            .map(|regex| HeaderMatch::String(StringMatcher::new(StringMatch::Regex(regex), false))),
    }?;
    Ok(HeaderMatcher {
        name: HeaderName::parse(&name).map_err(|_| notes.malformed("name", format!("`{name}` is no header name")))?,
        how,
        invert: invert_match,
        treat_missing_as_empty: treat_missing_header_as_empty,
    })
}
