//! CONNECTs that are refused before any chain is asked: what the client hears, and what the access log says.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::large_futures,
    clippy::disallowed_methods,
    reason = "a test fails by panicking, and may look at the clock"
)]

mod rig;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use cairn_exchange::format::{Absent, Template};
use cairn_policy::rbac::{Action, Condition, Filters, Policy, Rbac, Rules};
use cairn_telemetry::access_log::{AccessLog, Comparison, Filter, LogFormat, Output, Sink};
use cairn_waypoint::snapshot::Snapshot;
use http::StatusCode;
use rig::{Config, Rig, echo_app};

const WEB: &str = "10.96.1.10:80";
const NOBODY: &str = "10.96.1.99:80";

/// As istiod configures it: CONNECTs that were answered with an error.
fn logs(rig: &Rig, path: &std::path::Path) -> AccessLog {
    let format = "%REQ(:METHOD)% %REQ(:AUTHORITY)% %PROTOCOL% %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% \
                  \"%UPSTREAM_TRANSPORT_FAILURE_REASON%\" %DOWNSTREAM_LOCAL_ADDRESS%\n";
    let format = LogFormat::Text {
        template: Template::parse(format).unwrap(),
        absent: Absent::Dash,
    };
    let file = rig.engine.logs.open(path.to_str().unwrap()).unwrap();
    AccessLog::new([Sink {
        filter: Filter::Status(Comparison::AtLeast, 400),
        output: Output::File { format, file },
    }])
}

#[tokio::test]
async fn a_refused_connect_has_a_line_in_the_access_log() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, echo_app("web")).await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    let config = || Config::default().http(WEB, &[pod.address]).tunnel_logs(logs(&rig, &path));
    rig.serve(config()).await;
    drop(rig.open(WEB).await.unwrap());
    assert_eq!(
        rig.open(NOBODY).await.unwrap_err().status(),
        Some(StatusCode::SERVICE_UNAVAILABLE)
    );
    let policy = Policy {
        permissions: vec![Condition::Always],
        principals: vec![Condition::Always],
        condition: None,
    };
    let deny = Rbac {
        rules: Some(Rules::new(Action::Deny, BTreeMap::from([("p".to_owned(), policy)]))),
        shadow: None,
    };
    rig.publish(config().guarded(Filters::from_iter([deny])));
    assert_eq!(rig.open(WEB).await.unwrap_err().status(), Some(StatusCode::FORBIDDEN));
    rig.engine.logs.flush(Duration::from_secs(5)).await;
    let at = rig.address;
    assert_eq!(
        std::fs::read_to_string(&path).unwrap(),
        format!(
            "CONNECT {NOBODY} HTTP/2 503 UF upstream_reset_before_response_started{{remote_connection_failure}} \
             \"no_service_of_this_waypoint_has_this_address_and_port\" {at}\n\
             CONNECT {WEB} HTTP/2 403 - rbac_access_denied_matched_policy[p] \"-\" {at}\n"
        )
    );
}

#[tokio::test]
async fn without_the_listener_that_accepts_tunnels_every_connect_is_refused() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, echo_app("web")).await;
    rig.serve(Config::default().http(WEB, &[pod.address])).await;
    drop(rig.open(WEB).await.unwrap());
    let before = rig.engine.snapshot.load_full();
    let mut without = Snapshot::empty(rig.engine.workloads.clone());
    without.matcher = before.matcher.clone();
    without.chains = before.chains.clone();
    without.clusters = before.clusters.clone();
    rig.engine.snapshot.store(Arc::new(without));
    let refused = rig.open(WEB).await.unwrap_err();
    assert_eq!(refused.status(), Some(StatusCode::SERVICE_UNAVAILABLE));
    assert!(refused.to_string().contains("connect_terminate"), "{refused}");
}
