//! `cairn check`: a table of expected decisions, held against a configuration.
//!
//! It needs no cluster and takes milliseconds, so that it can stand in CI before a policy is applied: 0 where all is as expected, 1
//! where something is not, 2 where that cannot be told.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result};
use clap::Args;
use serde::Deserialize;

use crate::{
    explain::{Question, Story, explain, offline},
    snapshot::Snapshot,
};

/// Holds a table of expected decisions against a configuration.
#[derive(Args, Debug)]
pub struct Check {
    /// A folder with a capture (cds.pb, eds.pb, lds.pb, …), or a file with Envoy's /config_dump JSON.
    #[arg(long, value_name = "PATH")]
    config: PathBuf,
    /// The table, in YAML.
    #[arg(long, value_name = "FILE")]
    tests: PathBuf,
}

/// A table.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// Its rows.
    pub cases: Vec<Case>,
}

/// A row: a request and what is expected of it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Case {
    /// What it is called; its place in the table without.
    pub name: Option<String>,
    /// As in [`Question`].
    pub from: Option<String>,
    /// As in [`Question`].
    pub to: String,
    /// As in [`Question`].
    pub method: Option<String>,
    /// As in [`Question`].
    pub path: Option<String>,
    /// As in [`Question`].
    pub headers: Vec<String>,
    /// As in [`Question`].
    pub source_ip: Option<std::net::IpAddr>,
    /// As in [`Question`].
    pub jwt: Option<String>,
    /// As in [`Question`].
    pub tcp: bool,
    /// `allow` or `deny`.
    pub expect: Option<Expected>,
    /// The policy that decides, `NAMESPACE/NAME`.
    pub policy: Option<String>,
    /// The name of the route.
    pub route: Option<String>,
    /// A cluster that it may go to.
    pub cluster: Option<String>,
}

/// What is expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Expected {
    /// It gets through.
    Allow,
    /// It does not.
    Deny,
}

// === impl Case ===

impl Case {
    /// The request.
    pub fn question(&self) -> Question {
        let case = self.clone();
        Question {
            from: case.from,
            to: case.to,
            method: case.method,
            path: case.path,
            headers: case.headers,
            source_ip: case.source_ip,
            jwt: case.jwt,
            tcp: case.tcp,
        }
    }

    /// What is not as expected.
    fn differences(&self, story: &Story) -> Vec<String> {
        let mut differences = Vec::new();
        let verdict = &story.verdict;
        let expected = self.expect.map(|expected| expected == Expected::Allow);
        if expected.is_some_and(|allowed| allowed != verdict.allowed) {
            let words = |allowed| if allowed { "allow" } else { "deny" };
            differences.push(format!(
                "expected {}, it is {}",
                words(!verdict.allowed),
                words(verdict.allowed)
            ));
        }
        let mut differs = |what: &str, wanted: &Option<String>, found: Option<&str>| {
            if let Some(wanted) = wanted
                && Some(wanted.as_str()) != found
            {
                differences.push(format!("expected {what} {wanted}, it is {}", found.unwrap_or("none")));
            }
        };
        differs("policy", &self.policy, verdict.policy.as_deref());
        let route = story.route.as_ref().and_then(|route| route.name.as_deref());
        differs("route", &self.route, route);
        let clusters: Vec<_> = story.clusters.iter().map(|cluster| cluster.name.as_str()).collect();
        let named = clusters.iter().find(|name| Some(**name) == self.cluster.as_deref());
        differs("cluster", &self.cluster, named.or(clusters.first()).copied());
        differences
    }
}

/// Reads a table.
pub fn read(path: &Path) -> Result<Table> {
    let text = std::fs::read_to_string(path).with_context(|| format!("{} cannot be read", path.display()))?;
    let table: Table = serde_saphyr::from_str(&text).map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))?;
    anyhow::ensure!(!table.cases.is_empty(), "{}: there are no cases", path.display());
    Ok(table)
}

/// Checks the table.
pub fn main(args: &Check) -> ExitCode {
    let checked = read(&args.tests).and_then(|table| {
        let offline = offline::read(&args.config).map_err(|error| anyhow::anyhow!("{error}"))?;
        offline
            .complaints
            .iter()
            .for_each(|complaint| eprintln!("cairn check: {complaint}"));
        check(&offline.snapshot, &table)
    });
    match checked {
        Ok((report, failed)) => {
            print!("{report}");
            ExitCode::from(u8::from(failed > 0))
        }
        Err(error) => {
            eprintln!("cairn check: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// The report, and how many cases are not as expected.
pub fn check(snapshot: &Snapshot, table: &Table) -> Result<(String, usize)> {
    let mut report = String::new();
    let mut failed = 0;
    for (at, case) in table.cases.iter().enumerate() {
        let name = case.name.clone().unwrap_or_else(|| format!("case {}", at + 1));
        anyhow::ensure!(
            case.expect.is_some() || case.policy.is_some() || case.route.is_some() || case.cluster.is_some(),
            "{name}: nothing is expected; say `expect: allow` or `expect: deny`"
        );
        let asked = case.question().ask(snapshot).with_context(|| name.clone())?;
        let story = explain(snapshot, &asked);
        let differences = case.differences(&story);
        if differences.is_empty() {
            continue;
        }
        failed += 1;
        writeln!(report, "FAILED {name}: {}", differences.join("; "))?;
        for line in story.to_string().lines() {
            writeln!(report, "  {line}")?;
        }
    }
    writeln!(report, "{} of {} as expected", table.cases.len() - failed, table.cases.len())?;
    Ok((report, failed))
}
