//! `header_mutation` (contract xds §3.3): the filter that tells applications who the client is.

use cairn_filters::header_mutation::HeaderMutation;
use cairn_policy::headers::HeaderEdits;
use cairn_proto::envoy::{
    config::common::mutation_rules::v3::{HeaderMutation as EnvoyMutation, header_mutation::Action},
    extensions::filters::http::header_mutation::v3::{HeaderMutation as Filter, Mutations},
};

use super::{
    headers,
    report::{Malformed, Notes, refuse_set, unneeded},
};

/// Compiles the filter.
pub(crate) fn compile(filter: Filter, notes: &mut Notes) -> Result<HeaderMutation, Malformed> {
    let Filter {
        mutations,
        most_specific_header_mutations_wins,
    } = filter;
    // It orders this filter against its configuration on routes, which refuses those.
    unneeded!(most_specific_header_mutations_wins);
    let Mutations {
        request_mutations,
        query_parameter_mutations,
        response_mutations,
        response_trailers_mutations,
        request_trailers_mutations,
    } = mutations.unwrap_or_default();
    refuse_set!(
        notes,
        query_parameter_mutations,
        response_trailers_mutations,
        request_trailers_mutations
    );
    Ok(HeaderMutation {
        request: each("mutations.request_mutations", request_mutations, notes)?,
        response: each("mutations.response_mutations", response_mutations, notes)?,
    })
}

fn each(field: &'static str, list: Vec<EnvoyMutation>, notes: &mut Notes) -> Result<Vec<HeaderEdits>, Malformed> {
    let mut edits = Vec::with_capacity(list.len());
    for (index, EnvoyMutation { action }) in list.into_iter().enumerate() {
        let one = notes.at(field, index, |notes| match action {
            None => Err(notes.malformed("", "is empty")),
            Some(Action::Append(option)) => headers::edits(vec![option], vec![], "append", notes),
            Some(Action::Remove(name)) => headers::edits(vec![], vec![name], "remove", notes),
            Some(Action::RemoveOnMatch(_)) => {
                notes.refuse("remove_on_match", "is not supported");
                Ok(HeaderEdits::default())
            }
        })?;
        edits.push(one);
    }
    Ok(edits)
}
