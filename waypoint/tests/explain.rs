//! `cairn explain`, `check` and `diff`, and the flight recorder, from outside.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::large_futures,
    clippy::disallowed_methods,
    reason = "a test fails by panicking, and may look at the clock"
)]

mod rig;

use std::{
    collections::BTreeMap,
    process::{Command, Output},
    sync::Arc,
};

use bytes::Bytes;
use cairn_filters::{Filter, FilterChain};
use cairn_policy::{
    matcher::StringMatcher,
    rbac::{Action, Condition, Policy, Rbac, Rules},
};
use cairn_waypoint::{admin, config::Store, serve::DenyDetail};
use http::{Request, StatusCode};
use http_body_util::Full;
use rig::{Config, Rig, echo_app, send};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
const WEB: &str = "10.96.1.10:80";
const SECRET: &str = "c2VjcmV0LW9mLXRoZS1jbGllbnQ";

fn cairn(arguments: &[&str]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = Command::new(env!("CARGO_BIN_EXE_cairn"))
        .args(arguments)
        .current_dir(ROOT)
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code(), text(stdout), text(stderr))
}

fn captured(scenario: &str) -> String {
    format!("conformance/fixtures/xds/istio-1.31.0-20260827/{scenario}")
}

#[test]
fn the_exit_status_is_the_verdict() {
    let config = captured("20-authz");
    let ask = |more: &[&str]| cairn(&[&["explain", "--config", config.as_str()], more].concat());
    let healthz = ["--from", "app/client", "--to", "web.app:80", "--path", "/healthz"];
    let (code, told, _) = ask(&healthz);
    assert_eq!(code, Some(0), "{told}");
    let (code, told, _) = ask(&["--from", "app/client", "--to", "web.app:80", "--path", "/healthz2"]);
    assert_eq!(code, Some(1), "{told}");
    assert!(
        told.contains("rule 1 of app/web-allow matches except path: /healthz vs /healthz2"),
        "{told}"
    );
    let (code, told, _) = ask(&[&healthz[..], &["--output", "json"]].concat());
    let json: serde_json::Value = serde_json::from_str(&told).unwrap();
    assert_eq!((code, json["verdict"]["policy"].as_str()), (Some(0), Some("app/web-allow")));
    let (code, _, error) = ask(&["--to", "nothing:80"]);
    assert_eq!(code, Some(2));
    assert!(
        error.starts_with("cairn explain: no service of this waypoint is called \"nothing\""),
        "{error}"
    );
    assert_eq!(cairn(&["explain", "--to", "x:1"]).0, Some(2));
    let (code, _, error) = cairn(&["explain", "--config", "/nowhere", "--to", "x:1"]);
    assert_eq!(code, Some(2));
    assert!(error.contains("/nowhere"), "{error}");
}

#[test]
fn a_table_of_cases_is_held_against_a_configuration() {
    let check = |tests: &str| cairn(&["check", "--config", "examples/demo-config", "--tests", tests]);
    let (code, report, error) = check("examples/cases.yaml");
    assert_eq!((code, report.as_str()), (Some(0), "4 of 4 as expected\n"), "{error}");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("cases.yaml");
    let table = |text: &str| {
        std::fs::write(&file, text).unwrap();
        check(file.to_str().unwrap())
    };
    let (code, report, _) = table(
        "cases:\n- {name: guest, from: demo/guest, to: 'vault.demo:80', expect: deny, policy: demo/no-visitors, cluster: other}\n",
    );
    assert_eq!(code, Some(1));
    assert!(
        report.starts_with("FAILED guest: expected deny, it is allow; expected policy demo/no-visitors, it is none; expected cluster other, it is inbound-vip|80"),
        "{report}"
    );
    assert!(
        report.contains("nearest: rule 0 of demo/no-visitors does not match: principal: "),
        "{report}"
    );
    for (text, wanted) in [
        ("cases: []", "there are no cases"),
        ("cases:\n- {to: 'vault.demo:80', expects: deny}", "expects"),
        ("cases:\n- {to: 'vault.demo:80'}", "nothing is expected"),
        ("cases:\n- {to: 'vault.demo', expect: deny}", "is not SERVICE:PORT"),
    ] {
        let (code, _, error) = table(text);
        assert_eq!(code, Some(2), "{text}");
        assert!(error.contains(wanted), "{error}");
    }
}

#[test]
fn two_configurations_are_compared_by_what_they_decide() {
    let (with, without) = (captured("20-authz"), captured("01-http-basic"));
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("exchanges.json");
    let exchanges = serde_json::json!({"exchanges": [
        {"id": "0-1", "question": {"from": "app/client", "to": WEB, "path": "/nothing"}},
        {"id": "0-2", "question": {"from": "app/client", "to": WEB, "path": "/healthz", "headers": ["authorization: (hidden)"]}},
    ]});
    std::fs::write(&file, exchanges.to_string()).unwrap();
    let file = file.to_str().unwrap();
    let (code, report, error) = cairn(&["diff", &with, &with, "--exchanges", file]);
    assert_eq!((code, report.as_str()), (Some(0), "0 of 2 decided otherwise\n"), "{error}");
    let (code, report, _) = cairn(&["diff", &with, &without, "--exchanges", file]);
    assert_eq!(code, Some(1));
    assert!(
        report.contains("CHANGED 0-1: GET /nothing to 10.96.1.10:80 as app/client\n  old DENIED 403"),
        "{report}"
    );
    assert!(report.contains("  new ALLOWED"), "{report}");
    let (code, report, _) = cairn(&[
        "diff",
        "examples/demo-config",
        "examples/demo-config",
        "--tests",
        "examples/cases.yaml",
    ]);
    assert_eq!((code, report.as_str()), (Some(0), "0 of 4 decided otherwise\n"));
    assert_eq!(cairn(&["diff", &with, &with]).0, Some(2));
}

fn deny_admin() -> FilterChain {
    let policy = Policy {
        permissions: vec![Condition::Path(StringMatcher::prefix("/admin"))],
        principals: vec![Condition::Always],
        condition: None,
    };
    let policies = BTreeMap::from([("ns[app]-policy[deny-admin]-rule[0]".to_owned(), policy)]);
    let rbac = Rbac {
        rules: Some(Rules::new(Action::Deny, policies)),
        shadow: None,
    };
    FilterChain::new(vec![Filter::Rbac(Arc::new(rbac))])
}

#[tokio::test]
async fn a_denied_request_is_found_by_its_id_and_explained() {
    let namespace = rig::id("client").namespace().unwrap().to_owned();
    let rig = Rig::start_with(|settings| settings.deny_detail = DenyDetail::parse(&namespace)).await;
    let pod = rig.pod(10, echo_app("web")).await;
    let config = Config::default().http_with(WEB, &[pod.address], |http| http.filters = deny_admin(), |_| {});
    rig.serve(config).await;
    let recorder = rig.engine.recorder.clone().unwrap();
    recorder.published(rig.engine.snapshot.load_full());
    let mut sender = rig.http1(WEB).await;
    for (path, status, by) in [
        ("/administration", StatusCode::FORBIDDEN, Some("rule 0 of app/deny-admin")),
        ("/a", StatusCode::OK, None),
    ] {
        let request = Request::get(path)
            .header("host", "web")
            .header("x-request-id", format!("id-of-{}", &path[1..]))
            .header("authorization", format!("Bearer {SECRET}"));
        let (found, headers, _) = send(&mut sender, request.body(Full::new(Bytes::new())).unwrap()).await;
        let told = headers.get("x-cairn-denied-by").map(|value| value.to_str().unwrap());
        assert_eq!((found, told), (status, by), "{path}");
    }
    rig.told(2).await;

    let pages = admin::static_pages(&rig.engine, Arc::new(Store::default()));
    let at = admin::serve("127.0.0.1:0".parse().unwrap(), pages).await.unwrap().to_string();
    let ask = |arguments: Vec<String>| {
        let at = at.clone();
        tokio::task::spawn_blocking(move || {
            let begin = ["explain".to_owned(), "--admin".to_owned(), at];
            let all: Vec<_> = begin.into_iter().chain(arguments).collect();
            cairn(&all.iter().map(String::as_str).collect::<Vec<_>>())
        })
    };
    let id = |id: &str| vec!["--request-id".to_owned(), id.to_owned()];
    let (code, told, error) = ask(id("id-of-administration")).await.unwrap();
    assert_eq!(code, Some(1), "{told}{error}");
    assert!(
        told.contains("denied: rule 0 of app/deny-admin matches: path /administration is /admin*"),
        "{told}"
    );
    assert!(
        told.contains("recorded: 403, rbac_access_denied_matched_policy[ns[app]-policy[deny-admin]-rule[0]]"),
        "{told}"
    );
    assert!(!told.contains("does not agree") && !told.contains(SECRET), "{told}");
    assert_eq!(ask(id("id-of-a")).await.unwrap().0, Some(0));
    let (code, _, error) = ask(id("id-of-nothing")).await.unwrap();
    assert_eq!(code, Some(2));
    assert!(error.contains("it is none, or too old"), "{error}");
    let live = ["--to", WEB, "--path", "/admin?x=1&y=2", "--header", "x-a: b c"].map(str::to_owned);
    let (code, told, error) = ask(live.to_vec()).await.unwrap();
    assert_eq!(code, Some(1), "{told}{error}");
    assert!(told.starts_with("GET /admin?x=1&y=2 of 10.96.1.10:80 x-a=b c to"), "{told}");

    for (query, wanted) in [
        ("", 2),
        ("?code=403", 1),
        ("?code=2xx", 1),
        ("?code=5xx", 0),
        ("?principal=client", 2),
        ("?principal=nobody", 0),
        ("?id=id-of-a", 1),
        ("?limit=1", 1),
        ("?service=nothing", 0),
    ] {
        let body = page(&at, &format!("/exchanges{query}")).await;
        assert!(!body.contains(SECRET), "{body}");
        let json: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(json["exchanges"].as_array().map(Vec::len), Some(wanted), "{query}: {body}");
    }
    assert!(
        page(&at, "/exchanges?codes=1")
            .await
            .contains("none of service, code, principal, id, limit")
    );
}

/// The body of an administrative page.
async fn page(at: &str, path: &str) -> String {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(at).await.unwrap();
    let head = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer.split_once("\r\n\r\n").unwrap().1.to_owned()
}
