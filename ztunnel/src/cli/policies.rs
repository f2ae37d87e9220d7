//! `cairn-ztunnel policies`: the AuthorizationPolicies that would enforce the way through waypoints.
//!
//! It asks a running proxy for what it knows and prints, for each service with a waypoint, a policy that lets nobody but the waypoint
//! come to its workloads. Nothing is applied.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read as _, Write as _},
    net::TcpStream,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use serde_json::Value;

/// Prints policies that let nobody but the waypoint come to its workloads.
#[derive(Args, Debug)]
pub struct Policies {
    /// The administration of a running proxy.
    #[arg(long, default_value = "127.0.0.1:15000")]
    admin: String,
    /// A saved config_dump instead.
    #[arg(long)]
    dump: Option<std::path::PathBuf>,
    /// Only for services that somebody has reached around their waypoint.
    #[arg(long)]
    bypassed: bool,
}

/// How long the proxy may take to answer.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Prints them.
pub fn main(args: &Policies) -> ExitCode {
    let text = match &args.dump {
        Some(path) => std::fs::read_to_string(path).with_context(|| format!("{} cannot be read", path.display())),
        None => ask(&args.admin),
    };
    let dump = text.and_then(|text| serde_json::from_str::<Value>(&text).context("what was read is no config_dump"));
    match dump {
        Ok(dump) => {
            print!("{}", policies(&dump, args.bypassed));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("cairn-ztunnel policies: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn ask(admin: &str) -> Result<String> {
    let failed = || format!("the proxy at {admin} does not answer; is it running here, or is --admin another address?");
    let mut stream = TcpStream::connect(admin).with_context(failed)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    write!(stream, "GET /config_dump HTTP/1.0\r\nhost: {admin}\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).with_context(failed)?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.contains(" 200 ") => Ok(body.to_owned()),
        _ => bail!("the proxy at {admin} answered: {}", answer.lines().next().unwrap_or_default()),
    }
}

/// The policies for everything in a dump, as YAML documents.
fn policies(dump: &Value, bypassed_only: bool) -> String {
    let list = |name: &str| dump[name].as_array().cloned().unwrap_or_default();
    let text = |value: &Value, name: &str| value[name].as_str().unwrap_or_default().to_owned();
    let (workloads, services) = (list("workloads"), list("services"));
    let bypassed: BTreeSet<_> = list("waypointBypasses").iter().map(|one| text(one, "destination")).collect();
    let accounts: BTreeMap<_, _> = workloads
        .iter()
        .map(|one| {
            let domain = text(one, "trustDomain");
            let principal = format!("{domain}/ns/{}/sa/{}", text(one, "namespace"), text(one, "serviceAccount"));
            (text(one, "uid"), principal)
        })
        .collect();
    let endpoints = |service: &Value| service["endpoints"].as_object().cloned().unwrap_or_default();
    let mut out = String::new();
    for service in &services {
        let key = format!("{}/{}", text(service, "namespace"), text(service, "hostname"));
        let waypoint = service["waypoint"]["destination"].as_str().unwrap_or_default();
        if waypoint.is_empty() || (bypassed_only && !bypassed.contains(&key)) {
            continue;
        }
        let behind = services.iter().find(|other| {
            format!("{}/{}", text(other, "namespace"), text(other, "hostname")) == waypoint
                || other["vips"]
                    .as_array()
                    .is_some_and(|vips| vips.iter().any(|vip| *vip == *waypoint))
        });
        let principals: BTreeSet<_> = behind
            .map(|gateway| {
                endpoints(gateway)
                    .keys()
                    .filter_map(|uid| accounts.get(uid).cloned())
                    .collect()
            })
            .unwrap_or_default();
        if principals.is_empty() {
            out.push_str(&format!(
                "# {key}: its waypoint {waypoint} has no workload that is known here\n---\n"
            ));
            continue;
        }
        let names: BTreeSet<_> = workloads
            .iter()
            .filter(|one| endpoints(service).contains_key(&text(one, "uid")))
            .map(|one| text(one, "canonicalName"))
            .collect();
        for name in names {
            out.push_str(&policy(
                &text(service, "namespace"),
                &text(service, "name"),
                &name,
                &principals,
            ));
        }
    }
    out
}

fn policy(namespace: &str, service: &str, app: &str, principals: &BTreeSet<String>) -> String {
    let quoted: Vec<_> = principals.iter().map(|one| format!("\"{one}\"")).collect();
    format!(
        "apiVersion: security.istio.io/v1\n\
         kind: AuthorizationPolicy\n\
         metadata:\n  name: {service}-{app}-only-through-waypoint\n  namespace: {namespace}\n\
         spec:\n  selector:\n    matchLabels:\n      app: {app}\n  action: DENY\n  rules:\n  - from:\n    - source:\n        notPrincipals: [{}]\n---\n",
        quoted.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_service_with_a_waypoint_gets_a_policy_that_lets_only_the_waypoint_come() {
        let pod = |name: &str| json!({"uid": name, "namespace": "app", "serviceAccount": name, "trustDomain": "td", "canonicalName": name});
        let dump = json!({
            "workloads": [pod("web"), pod("wp")],
            "services": [
                {"name": "web", "namespace": "app", "hostname": "web.svc", "vips": ["/10.0.0.1"],
                 "waypoint": {"destination": "app/wp.svc"}, "endpoints": {"web": {}}},
                {"name": "wp", "namespace": "app", "hostname": "wp.svc", "vips": ["/10.0.0.9"], "endpoints": {"wp": {}}},
                {"name": "plain", "namespace": "app", "hostname": "plain.svc", "vips": [], "endpoints": {"web": {}}},
            ],
            "waypointBypasses": [],
        });
        let printed = policies(&dump, false);
        assert!(
            printed.contains("name: web-web-only-through-waypoint") && printed.contains("notPrincipals: [\"td/ns/app/sa/wp\"]"),
            "{printed}"
        );
        assert_eq!(printed.matches("kind:").count(), 1);
        assert_eq!(policies(&dump, true), "");
    }
}
