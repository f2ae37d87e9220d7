//! `cairn diff`: which requests are decided otherwise under another configuration.
//!
//! The requests are those of a table ([`super::check`]) or of a flight record (`/exchanges` of a running proxy, saved to a file). It
//! A record has no secrets: requests are asked again without their tokens and cookies. It
//! ends with 0 where all is decided alike, with 1 where something is not, with 2 where that cannot be told.

use std::{fmt::Write as _, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use cairn_policy::miss::{HIDDEN, without_secrets};
use clap::Args;
use serde::Deserialize;

use super::check;
use crate::{
    explain::{Question, Story, explain, offline},
    snapshot::Snapshot,
};

/// Lists the requests that are decided otherwise under another configuration.
#[derive(Args, Debug)]
pub struct Diff {
    /// The configuration as it is: a capture or a /config_dump.
    #[arg(value_name = "OLD")]
    old: PathBuf,
    /// As it will be.
    #[arg(value_name = "NEW")]
    new: PathBuf,
    /// A table of requests, in YAML.
    #[arg(
        long,
        value_name = "FILE",
        required_unless_present = "exchanges",
        conflicts_with = "exchanges"
    )]
    tests: Option<PathBuf>,
    /// What /exchanges of a running proxy answered.
    #[arg(long, value_name = "FILE")]
    exchanges: Option<PathBuf>,
}

/// A flight record.
#[derive(Debug, Deserialize)]
struct Exchanges {
    exchanges: Vec<Exchange>,
}

#[derive(Debug, Deserialize)]
struct Exchange {
    id: String,
    question: Question,
}

/// Lists them.
pub fn main(args: &Diff) -> ExitCode {
    match run(args) {
        Ok((report, changed)) => {
            print!("{report}");
            ExitCode::from(u8::from(changed > 0))
        }
        Err(error) => {
            eprintln!("cairn diff: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(args: &Diff) -> Result<(String, usize)> {
    let questions = questions(args)?;
    let old = offline::read(&args.old).map_err(|error| anyhow::anyhow!("{error}"))?;
    let new = offline::read(&args.new).map_err(|error| anyhow::anyhow!("{error}"))?;
    Ok(compare(&old.snapshot, &new.snapshot, &questions)?)
}

fn questions(args: &Diff) -> Result<Vec<(String, Question)>> {
    if let Some(path) = &args.tests {
        let table = check::read(path)?;
        let cases = table.cases.iter().enumerate();
        let named = cases.map(|(at, case)| {
            let name = case.name.clone().unwrap_or_else(|| format!("case {}", at + 1));
            (name, case.question())
        });
        return Ok(named.collect());
    }
    let path = args.exchanges.as_ref().context("name requests with --tests or --exchanges")?;
    let text = std::fs::read(path).with_context(|| format!("{} cannot be read", path.display()))?;
    let record: Exchanges =
        serde_json::from_slice(&text).with_context(|| format!("{} is no answer of /exchanges", path.display()))?;
    let questions = record.exchanges.into_iter().map(|Exchange { id, mut question }| {
        // What the record does not tell is not sent: a token without its text would be a bad one.
        question.headers.retain(|header| !header.ends_with(HIDDEN));
        (id, question)
    });
    Ok(questions.collect())
}

/// The report, and how many are decided otherwise.
pub fn compare(old: &Snapshot, new: &Snapshot, questions: &[(String, Question)]) -> Result<(String, usize), std::fmt::Error> {
    let mut report = String::new();
    let mut changed = 0;
    for (name, question) in questions {
        let (before, after) = (decision(old, question), decision(new, question));
        if before == after {
            continue;
        }
        changed += 1;
        writeln!(report, "CHANGED {name}: {}", question_words(question))?;
        writeln!(report, "  old {before}")?;
        writeln!(report, "  new {after}")?;
    }
    writeln!(report, "{changed} of {} decided otherwise", questions.len())?;
    Ok((report, changed))
}

fn question_words(question: &Question) -> String {
    let method = question.method.as_deref().unwrap_or("GET");
    let path = without_secrets(question.path.as_deref().unwrap_or("/"));
    let from = question.from.as_deref().unwrap_or("nobody");
    format!("{method} {path} to {} as {from}", question.to)
}

/// The decision alone: verdict, status, policy, route, clusters.
fn decision(snapshot: &Snapshot, question: &Question) -> String {
    let asked = match question.ask(snapshot) {
        Ok(asked) => asked,
        Err(error) => return format!("unknown: {error}"),
    };
    let Story {
        route,
        clusters,
        verdict,
        ..
    } = explain(snapshot, &asked);
    let route = route.and_then(|route| route.name).map(|name| format!(", route {name}"));
    let clusters: Vec<_> = clusters
        .iter()
        .map(|cluster| match &cluster.share {
            Some(share) => format!("{} ({share})", cluster.name),
            None => cluster.name.clone(),
        })
        .collect();
    let to = if clusters.is_empty() {
        String::new()
    } else {
        format!(", to {}", clusters.join(", "))
    };
    format!("{verdict}{}{to}", route.unwrap_or_default())
}
