//! Stories over what a real istiod sent.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use cairn_exchange::{Exchange, Protocol};

use super::*;
use crate::snapshot::{ChainKind, Snapshot};

fn fixture(scenario: &str) -> PathBuf {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../conformance/fixtures/xds/istio-1.31.0-20260827");
    fixtures.join(scenario)
}

fn snapshot(scenario: &str) -> Arc<Snapshot> {
    offline::read(&fixture(scenario)).unwrap().snapshot
}

fn question(from: &str, to: &str, method: &str, path: &str, headers: &[&str]) -> Question {
    Question {
        from: Some(from.to_owned()),
        to: to.to_owned(),
        method: Some(method.to_owned()),
        path: Some(path.to_owned()),
        headers: headers.iter().map(|header| (*header).to_owned()).collect(),
        source_ip: "10.244.0.9".parse().ok(),
        ..Question::default()
    }
}

fn story(snapshot: &Snapshot, question: &Question) -> Story {
    explain(snapshot, &question.ask(snapshot).unwrap())
}

#[test]
fn policies_tell_their_story() {
    let snapshot = snapshot("20-authz");
    let tell = |from: &str, method: &str, path: &str, headers: &[&str]| {
        story(&snapshot, &question(from, "web.app:80", method, path, headers)).to_string()
    };
    let stories = [
        tell("app/client", "GET", "/healthz", &[]),
        tell("other/someone", "GET", "/healthz", &[]),
        tell("app/client", "PUT", "/admin/x", &[]),
        tell("app/client", "GET", "/exact", &["x-tenant: blue"]),
    ];
    insta::assert_snapshot!(stories.join("\n"));
}

#[test]
fn connections_tell_their_story() {
    let snapshot = snapshot("20-authz");
    let mut question = question("app/client", "web.app:9000", "GET", "/", &[]);
    question.tcp = true;
    insta::assert_snapshot!(story(&snapshot, &question));
}

#[test]
fn tokens_tell_their_story() {
    let snapshot = snapshot("22-requestauthentication");
    let mut bad = question("app/client", "web.app:80", "GET", "/", &[]);
    bad.jwt = Some("not.a.token".to_owned());
    let none = question("app/client", "web.app:80", "GET", "/", &[]);
    let stories = [story(&snapshot, &none).to_string(), story(&snapshot, &bad).to_string()];
    insta::assert_snapshot!(stories.join("\n"));
}

#[test]
fn routes_tell_their_story() {
    let snapshot = snapshot("12-virtualservice");
    let tell =
        |path: &str, headers: &[&str]| story(&snapshot, &question("app/client", "web.app:80", "GET", path, headers)).to_string();
    insta::assert_snapshot!([tell("/", &[]), tell("/nothing/here", &["x-user: jason"])].join("\n"));
}

/// For every request of the matrix: what the story says is what the filters that serve requests say.
#[test]
fn a_story_ends_as_the_compiled_policies_decide() {
    let snapshot = snapshot("20-authz");
    let mut ends: BTreeMap<bool, usize> = BTreeMap::new();
    for from in ["app/client", "app/evil", "clients/runner", "other/someone", "blocked/someone"] {
        for method in ["GET", "POST", "PUT", "TRACE"] {
            for path in ["/healthz", "/healthz/", "/admin/x", "/exact", "/dry", "/x?healthz"] {
                for headers in [&[][..], &["x-bad: 1"], &["x-tenant: blue", "host: dry.example.com"]] {
                    let question = question(from, "web.app:80", method, path, headers);
                    let asked = question.ask(&snapshot).unwrap();
                    let told = explain(&snapshot, &asked);
                    let chain = snapshot.chains.get(told.chain.as_deref().unwrap()).unwrap();
                    let ChainKind::Http(http) = &chain.kind else {
                        panic!("{}", chain.name)
                    };
                    let mut exchange = Exchange::begin(Protocol::Http11, asked.connection.clone(), chain.name.clone(), 1);
                    exchange.request = asked.head.clone();
                    let denied = http.filters.iter().find_map(|filter| match filter {
                        cairn_filters::Filter::Rbac(rbac) => rbac.check(&mut exchange).err(),
                        _ => None,
                    });
                    let details = denied.as_ref().map(cairn_policy::rbac::Denied::details);
                    assert_eq!(details, told.verdict.details, "{question:?}\n{told}");
                    *ends.entry(told.verdict.allowed).or_default() += 1;
                }
            }
        }
    }
    assert!(
        ends.get(&true).is_some_and(|count| *count > 10) && ends.get(&false).is_some_and(|count| *count > 10),
        "{ends:?}"
    );
}

#[test]
fn questions_that_mean_nothing_are_refused_in_a_sentence() {
    let snapshot = snapshot("20-authz");
    for (question, begin) in [
        (
            question("nobody", "web.app:80", "GET", "/", &[]),
            "from \"nobody\" is not spiffe://",
        ),
        (
            question("a/b", "web.app", "GET", "/", &[]),
            "to \"web.app\" is not SERVICE:PORT",
        ),
        (question("a/b", "web.app:0", "GET", "/", &[]), "to \"web.app:0\" is not"),
        (question("a/b", "web.app:80", "GET", "x", &[]), "path \"x\" is not a path"),
        (question("a/b", "web.app:80", "G T", "/", &[]), "method \"G T\""),
        (question("a/b", "web.app:80", "GET", "/", &["x"]), "header \"x\" is not"),
        (
            question("a/b", "nothing:80", "GET", "/", &[]),
            "no service of this waypoint is called \"nothing\"",
        ),
    ] {
        let error = question.ask(&snapshot).unwrap_err().to_string();
        assert!(error.starts_with(begin), "{error}");
    }
}

#[test]
fn a_story_keeps_secrets_to_itself() {
    let snapshot = snapshot("22-requestauthentication");
    let secret = "c2VjcmV0c2VjcmV0";
    let mut question = question("app/client", "web.app:80", "GET", &format!("/?access_token={secret}"), &[]);
    question.headers = vec![format!("cookie: a={secret}"), format!("x-api-key: {secret}")];
    question.jwt = Some(format!("{secret}.{secret}.{secret}"));
    let told = story(&snapshot, &question);
    let json = serde_json::to_string(&told).unwrap();
    assert!(!told.to_string().contains(secret) && !json.contains(secret), "{told}");
}
