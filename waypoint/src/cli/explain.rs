//! `cairn explain`: why a request is, or was, decided so.
//!
//! It ends with 0 where the request gets through, with 1 where it does not, and with 2 where that cannot be told.

use std::{net::IpAddr, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result, bail};
use clap::{Args, ValueEnum};

use super::ask;
use crate::explain::{Question, Story, explain, offline};

/// Tells why a request is decided so: over captured configuration, or by a running proxy.
#[derive(Args, Debug)]
pub struct Explain {
    /// A folder with a capture (cds.pb, eds.pb, lds.pb, …), or a file with Envoy's /config_dump JSON.
    #[arg(long, value_name = "PATH", required_unless_present = "admin", conflicts_with = "admin")]
    config: Option<PathBuf>,
    /// The administration of a running proxy, port 15000 in its pod.
    #[arg(long, value_name = "ADDRESS:PORT")]
    admin: Option<String>,
    /// With --admin: a request that was served, by the x-request-id of its access log.
    #[arg(long, value_name = "ID", requires = "admin", conflicts_with = "to")]
    request_id: Option<String>,
    /// The client: spiffe://…, or NAMESPACE/SERVICEACCOUNT of cluster.local.
    #[arg(long, value_name = "SPIFFE_ID")]
    from: Option<String>,
    /// What it asks for.
    #[arg(long, value_name = "SERVICE:PORT or ADDRESS:PORT", required_unless_present = "request_id")]
    to: Option<String>,
    /// The method; GET without it.
    #[arg(long)]
    method: Option<String>,
    /// Path and query; / without it.
    #[arg(long)]
    path: Option<String>,
    /// A header; may be repeated.
    #[arg(long = "header", value_name = "NAME: VALUE")]
    headers: Vec<String>,
    /// The client's address.
    #[arg(long, value_name = "ADDRESS")]
    source_ip: Option<IpAddr>,
    /// A token, sent as `authorization: Bearer`.
    #[arg(long, value_name = "TOKEN")]
    jwt: Option<String>,
    /// Bytes instead of an HTTP request.
    #[arg(long)]
    tcp: bool,
    /// How it is told.
    #[arg(long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

/// How a story is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// Tells it.
pub fn main(args: &Explain) -> ExitCode {
    match story(args) {
        Ok(story) => {
            let told = match args.output {
                Output::Text => story.to_string(),
                Output::Json => serde_json::to_string_pretty(&story).unwrap_or_default() + "\n",
            };
            print!("{told}");
            ExitCode::from(u8::from(!story.verdict.allowed))
        }
        Err(error) => {
            eprintln!("cairn explain: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn story(args: &Explain) -> Result<Story> {
    let question = Question {
        from: args.from.clone(),
        to: args.to.clone().unwrap_or_default(),
        method: args.method.clone(),
        path: args.path.clone(),
        headers: args.headers.clone(),
        source_ip: args.source_ip,
        jwt: args.jwt.clone(),
        tcp: args.tcp,
    };
    match (&args.config, &args.admin, &args.request_id) {
        (Some(path), _, _) => {
            let offline = offline::read(path).map_err(|error| anyhow::anyhow!("{error}"))?;
            let asked = question.ask(&offline.snapshot)?;
            let mut story = explain(&offline.snapshot, &asked);
            let complaints = offline
                .complaints
                .iter()
                .map(|complaint| format!("the configuration: {complaint}"));
            story.notes.extend(complaints);
            Ok(story)
        }
        (None, Some(admin), Some(id)) => {
            let id = ask::encoded(id);
            parsed(&ask::get(admin, &format!("/exchanges/{id}/story"))?)
        }
        (None, Some(admin), None) => parsed(&ask::get(admin, &format!("/explain?{}", query(&question)))?),
        (None, None, _) => bail!("name a configuration with --config, or a proxy with --admin"),
    }
}

fn parsed(answer: &[u8]) -> Result<Story> {
    serde_json::from_slice(answer).context("the answer is no story; is it a proxy of another version?")
}

fn query(question: &Question) -> String {
    let Question {
        from,
        to,
        method,
        path,
        headers,
        source_ip,
        jwt,
        tcp,
    } = question;
    let source_ip = source_ip.map(|address| address.to_string());
    let one = [
        ("to", Some(to)),
        ("from", from.as_ref()),
        ("method", method.as_ref()),
        ("path", path.as_ref()),
        ("source_ip", source_ip.as_ref()),
        ("jwt", jwt.as_ref()),
    ];
    let mut pairs: Vec<_> = one
        .into_iter()
        .filter_map(|(name, value)| Some(format!("{name}={}", ask::encoded(value?))))
        .collect();
    pairs.extend(headers.iter().map(|header| format!("header={}", ask::encoded(header))));
    if *tcp {
        pairs.push("tcp=true".to_owned());
    }
    pairs.join("&")
}
