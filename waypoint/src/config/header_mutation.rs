//! `header_mutation` (contract xds §3.3): the filter that tells applications who the client is, on a chain and on routes.

use std::sync::Arc;

use cairn_filters::header_mutation::{HeaderMutation, Mutations, QueryAction, QueryMutation};
use cairn_policy::headers::{HeaderEdits, Mutation};
use cairn_proto::envoy::{
    config::{
        common::mutation_rules::v3::{
            HeaderMutation as EnvoyMutation,
            header_mutation::{Action, RemoveOnMatch},
        },
        core::v3::{KeyValueAppend, KeyValueMutation, KeyValuePair, key_value_append::KeyValueAppendAction},
    },
    extensions::filters::http::header_mutation::v3::{HeaderMutation as Filter, Mutations as EnvoyMutations},
};
use prost_types::value::Kind;

use super::{
    headers,
    report::{Malformed, Notes},
    value,
};

/// Compiles the filter.
pub(crate) fn compile(filter: Filter, notes: &mut Notes) -> Result<HeaderMutation, Malformed> {
    let Filter {
        mutations,
        most_specific_header_mutations_wins,
    } = filter;
    Ok(HeaderMutation {
        mutations: Arc::new(self::mutations(mutations, notes)?),
        most_specific_wins: most_specific_header_mutations_wins,
    })
}

/// Compiles the mutations of one level.
pub(crate) fn mutations(mutations: Option<EnvoyMutations>, notes: &mut Notes) -> Result<Mutations, Malformed> {
    let EnvoyMutations {
        request_mutations,
        query_parameter_mutations,
        response_mutations,
        response_trailers_mutations,
        request_trailers_mutations,
    } = mutations.unwrap_or_default();
    Ok(Mutations {
        request: each("mutations.request_mutations", request_mutations, notes)?,
        query: queries(query_parameter_mutations, notes)?,
        request_trailers: trailers("mutations.request_trailers_mutations", request_trailers_mutations, notes)?,
        response: each("mutations.response_mutations", response_mutations, notes)?,
        response_trailers: trailers("mutations.response_trailers_mutations", response_trailers_mutations, notes)?,
    })
}

pub(crate) fn each(field: &'static str, list: Vec<EnvoyMutation>, notes: &mut Notes) -> Result<Vec<Mutation>, Malformed> {
    let list = list.into_iter().enumerate();
    list.map(|(index, mutation)| notes.at(field, index, |notes| one(mutation, notes)))
        .collect()
}

/// When trailers pass, the record is in other hands: their values are literal.
fn trailers(field: &'static str, list: Vec<EnvoyMutation>, notes: &mut Notes) -> Result<Vec<Mutation>, Malformed> {
    let mutations = each(field, list, notes)?;
    let reads = |edits: &HeaderEdits| edits.additions().iter().any(|edit| edit.template().is_some());
    if mutations
        .iter()
        .any(|mutation| matches!(mutation, Mutation::Edit(edits) if reads(edits)))
    {
        notes.refuse(field, "values made from the request are not supported in trailers");
    }
    Ok(mutations)
}

fn one(mutation: EnvoyMutation, notes: &mut Notes) -> Result<Mutation, Malformed> {
    let EnvoyMutation { action } = mutation;
    match action {
        None => Err(notes.malformed("", "is empty")),
        Some(Action::Append(option)) => headers::edits(vec![option], vec![], "append", notes).map(Mutation::Edit),
        Some(Action::Remove(name)) => headers::edits(vec![], vec![name], "remove", notes).map(Mutation::Edit),
        Some(Action::RemoveOnMatch(RemoveOnMatch { key_matcher })) => {
            let matcher = key_matcher.ok_or_else(|| notes.malformed("remove_on_match.key_matcher", "is missing"))?;
            value::string("remove_on_match.key_matcher", matcher, notes).map(Mutation::RemoveMatching)
        }
    }
}

fn queries(list: Vec<KeyValueMutation>, notes: &mut Notes) -> Result<Vec<QueryMutation>, Malformed> {
    let mut mutations = Vec::with_capacity(list.len());
    for (index, mutation) in list.into_iter().enumerate() {
        mutations.extend(notes.at("mutations.query_parameter_mutations", index, |notes| query(mutation, notes))?);
    }
    Ok(mutations)
}

fn query(mutation: KeyValueMutation, notes: &mut Notes) -> Result<Vec<QueryMutation>, Malformed> {
    let KeyValueMutation { append, remove } = mutation;
    let mut mutations = Vec::new();
    if !remove.is_empty() {
        mutations.push(QueryMutation::Remove(remove.into()));
    }
    let Some(KeyValueAppend { record, entry, action }) = append else {
        return Ok(mutations);
    };
    let action = match KeyValueAppendAction::try_from(action) {
        Ok(KeyValueAppendAction::AppendIfExistsOrAdd) => QueryAction::AppendOrAdd,
        Ok(KeyValueAppendAction::AddIfAbsent) => QueryAction::AddIfAbsent,
        Ok(KeyValueAppendAction::OverwriteIfExistsOrAdd) => QueryAction::OverwriteOrAdd,
        Ok(KeyValueAppendAction::OverwriteIfExists) => QueryAction::OverwriteIfExists,
        Err(_) => return Err(notes.malformed("append.action", format!("{action} is not known"))),
    };
    let (key, value) = match (record, entry) {
        (Some(KeyValuePair { key, value }), _) => match value.and_then(|value| value.kind) {
            Some(Kind::StringValue(text)) => (key, text),
            _ => return Err(notes.malformed("append.record.value", "is no text")),
        },
        (None, Some(entry)) => {
            let text = String::from_utf8(entry.value).map_err(|_| notes.malformed("append.entry.value", "is no text"))?;
            (entry.key, text)
        }
        (None, None) => return Err(notes.malformed("append", "adds nothing")),
    };
    if value.contains('%') {
        notes.refuse("append", format!("the value of {key} is a format, which is not supported"));
    }
    mutations.push(QueryMutation::Add {
        key: key.into(),
        value: value.into(),
        action,
    });
    Ok(mutations)
}
