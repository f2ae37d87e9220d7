//! That records are bounded, without secrets, and found.

use cairn_exchange::{RequestHead, Scheme, clock};
use http::{HeaderMap, HeaderName, HeaderValue, uri::PathAndQuery};

use super::*;
use crate::workloads::Workloads;

fn exchange(path: &str, fields: &[(&'static str, &str)]) -> Exchange {
    let connection = Connection {
        id: 1,
        authority: "10.96.1.10:80".into(),
        local_address: "10.96.1.10:80".parse().ok(),
        service_port: 80,
        remote_address: "10.244.0.9:41000".parse().unwrap(),
        peer: "spiffe://cluster.local/ns/app/sa/client".parse().ok(),
        local: None,
        source: None,
        requested_server_name: None,
        opened: clock::now(),
    };
    let mut headers = HeaderMap::new();
    for (name, value) in fields {
        headers.append(HeaderName::from_static(name), HeaderValue::from_str(value).unwrap());
    }
    let mut exchange = Exchange::begin(Protocol::Http11, Arc::new(connection), "chain".into(), 1);
    exchange.request = Some(RequestHead {
        method: Method::GET,
        path: PathAndQuery::try_from(path).unwrap(),
        authority: HeaderValue::from_static("web"),
        scheme: Scheme::Http,
        headers,
    });
    exchange
}

fn recorder(records: usize) -> Recorder {
    Recorder::new(RecorderSettings { records, snapshots: 2 }, 1).unwrap()
}

#[test]
fn secrets_are_in_no_record() {
    let recorder = recorder(10);
    let secret = "c2VjcmV0";
    recorder.record(&exchange(
        &format!("/a?x=1&access_token={secret}&y=2"),
        &[
            ("authorization", &format!("Bearer {secret}")),
            ("proxy-authorization", &format!("Basic {secret}")),
            ("cookie", &format!("session={secret}")),
            ("x-api-key", secret),
            ("x-auth-token", secret),
            ("x-innocent", &format!("bearer {secret}")),
            ("x-forwarded-jwt", &format!("eyJ{secret}")),
            ("x-tenant", "gold"),
        ],
    ));
    let record = recorder.find(1, |_| true).remove(0);
    let all = format!("{record:?} {}", String::from_utf8_lossy(&record.head));
    assert!(!all.contains(secret), "{all}");
    assert_eq!(record.path().as_deref(), Some("/a?x=1&access_token=(hidden)&y=2"));
    assert_eq!(record.field("authorization").as_deref(), Some("(hidden)"));
    assert_eq!(record.field("x-tenant").as_deref(), Some("gold"));
}

#[test]
fn the_oldest_records_make_room() {
    let recorder = recorder(40);
    for n in 0..100 {
        recorder.record(&exchange(&format!("/{n}"), &[("x-request-id", &format!("id-{n}"))]));
    }
    let found = recorder.find(1000, |_| true);
    assert_eq!(found.len(), 40);
    let mut numbers: Vec<_> = found.iter().map(|record| record.id.1).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (60..100).collect::<Vec<_>>());
    assert_eq!(recorder.find(3, |_| true).len(), 3);
    assert_eq!(recorder.find(10, |record| record.is("id-99")).len(), 1);
    assert_eq!(recorder.find(10, |record| record.is("id-59")).len(), 0);
    assert_eq!(
        recorder.find(10, |record| record.is("0-61"))[0].path().as_deref(),
        Some("/61")
    );
}

#[test]
fn long_heads_are_cut_and_said_to_be() {
    let recorder = recorder(2);
    let long = "v".repeat(MOST_HEAD);
    recorder.record(&exchange("/a", &[("x-long", &long), ("x-short", "1")]));
    let record = recorder.find(1, |_| true).remove(0);
    assert!(record.cut && record.head.len() <= MOST_HEAD);
    assert_eq!(
        (record.field("x-long"), record.field("x-short").as_deref()),
        (None, Some("1"))
    );
    recorder.record(&exchange(&format!("/{long}?q"), &[]));
    assert!(recorder.find(1, |record| record.cut && record.head.len() <= MOST_HEAD).len() == 1);
}

#[test]
fn the_clients_own_path_is_kept() {
    let recorder = recorder(2);
    recorder.record(&exchange("/rewritten", &[("x-envoy-original-path", "/own?token=x")]));
    assert_eq!(recorder.find(1, |_| true)[0].path().as_deref(), Some("/own?token=(hidden)"));
}

#[test]
fn nothing_is_kept_where_nothing_is_asked_for() {
    let none = RecorderSettings {
        records: 0,
        snapshots: 4,
    };
    assert!(Recorder::new(none, 4).is_none());
    let few = RecorderSettings {
        records: 3,
        snapshots: 4,
    };
    assert_eq!(Recorder::new(few, 64).unwrap().rings.len(), 3);
}

#[test]
fn the_last_configurations_are_kept() {
    let recorder = recorder(2);
    let workloads = Arc::new(Workloads::new(""));
    for version in 1..=5 {
        let mut snapshot = Snapshot::empty(workloads.clone());
        snapshot.version = version;
        recorder.published(Arc::new(snapshot));
    }
    let kept = |version| recorder.snapshot(version).map(|snapshot| snapshot.version);
    assert_eq!((kept(3), kept(4), kept(5)), (None, Some(4), Some(5)));
}

#[test]
fn workers_write_beside_each_other() {
    let settings = RecorderSettings {
        records: 8000,
        snapshots: 1,
    };
    let recorder = Recorder::new(settings, 4).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..500).for_each(|n| recorder.record(&exchange(&format!("/{n}"), &[]))));
        }
        while recorder.find(usize::MAX, |_| true).len() < 2000 {
            std::thread::yield_now();
        }
    });
    assert_eq!(recorder.find(usize::MAX, |_| true).len(), 2000);
}
