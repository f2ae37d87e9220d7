//! A recorded exchange as JSON, as a question, and as the story of what was decided.

use std::time::UNIX_EPOCH;

use cairn_policy::miss::HIDDEN;
use serde_json::{Value, json};

use super::{Question, Story, explain};
use crate::recorder::{Record, Recorder};

/// What is told of a record.
pub fn json(record: &Record) -> Value {
    let service = record.cluster.as_ref().and_then(|cluster| cluster.service.as_ref());
    json!({
        "id": record.name(),
        "request_id": record.field("x-request-id"),
        "time": record.wall.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64(),
        "duration_ms": record.duration.as_secs_f64() * 1000.0,
        "question": question(record),
        "authority": record.authority(),
        "cut": record.cut,
        "chain": &*record.chain,
        "route": record.route.as_deref(),
        "cluster": record.cluster.as_ref().map(|cluster| &*cluster.name),
        "service": service.map(|service| &*service.host),
        "endpoint": record.endpoint.as_deref(),
        "code": record.status,
        "flags": record.flags.to_string(),
        "details": record.details,
        "policy": record.details.as_deref().and_then(policy),
        "attempts": record.attempts,
        "snapshot": record.snapshot,
    })
}

/// The policy that the details name.
fn policy(details: &str) -> Option<&str> {
    let name = details
        .strip_prefix("rbac_access_denied_matched_policy[")?
        .strip_suffix(']')?;
    (name != "none").then_some(name)
}

/// The question that the exchange was; secrets are not in it.
pub fn question(record: &Record) -> Question {
    let connection = &record.connection;
    let to = connection
        .local_address
        .map_or_else(|| connection.authority.to_string(), |address| address.to_string());
    let host = record.authority().map(|authority| format!("host: {authority}"));
    Question {
        from: connection.peer.as_ref().map(|peer| peer.as_str().to_owned()),
        to,
        method: record.method.as_ref().map(ToString::to_string),
        path: record.path().map(|path| path.into_owned()),
        headers: host
            .into_iter()
            .chain(record.fields().map(|line| line.into_owned()))
            .collect(),
        source_ip: Some(connection.remote_address.ip()),
        jwt: None,
        tcp: record.method.is_none(),
    }
}

/// Why it was decided so; the error says what is missing.
pub fn story(recorder: &Recorder, record: &Record) -> Result<Story, String> {
    let version = record.snapshot;
    let Some(snapshot) = recorder.snapshot(version) else {
        return Err(format!(
            "the configuration of that exchange (version {version}) is not kept any more; CAIRN_EXCHANGES_SNAPSHOTS keeps more"
        ));
    };
    let mut asked = question(record).ask(&snapshot).map_err(|error| error.to_string())?;
    // The port and the authority are the connection's own, also where it asked for a service by name.
    asked.connection = record.connection.clone();
    asked.address = record.connection.authority.parse().ok();
    asked.noted =
        (!record.metadata.is_empty() || record.fields().any(|line| line.ends_with(HIDDEN))).then(|| record.metadata.clone());
    let mut story = explain(&snapshot, &asked);
    if record.cut {
        story
            .notes
            .push("the head of the request was too long for the record: some fields are not in it".to_owned());
    }
    let status = record
        .status
        .map_or_else(|| "no answer".to_owned(), |status| status.to_string());
    let details = record.details.as_deref().unwrap_or("-");
    story
        .notes
        .push(format!("recorded: {status}, {details}, flags {}", record.flags));
    let by_policy = record
        .details
        .as_deref()
        .is_some_and(|details| details.contains("_access_denied"));
    if by_policy == story.verdict.allowed {
        story.notes.push(
            "the story does not agree with the record: a filter or route had changed the request when it was recorded".to_owned(),
        );
    }
    Ok(story)
}
