//! Nothing waits, nothing grows without bound, and what is lost is counted.

use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    resource::v1::Resource,
    trace::v1::{ResourceSpans, ScopeSpans, Span},
};
use prost::Message;
use tokio::sync::Semaphore;

use super::*;
use crate::prometheus::Format;

/// Notes what it carries, when it may.
struct Noting {
    carried: Arc<Mutex<Vec<Bytes>>>,
    may: Arc<Semaphore>,
    fails: bool,
}

impl Courier<&'static str> for Noting {
    fn carry(&self, _: &&'static str, message: Bytes) -> Carried {
        let (carried, may, fails) = (self.carried.clone(), self.may.clone(), self.fails);
        Box::pin(async move {
            may.acquire().await.map_err(|error| error.to_string())?.forget();
            carried.lock().push(message);
            if fails { Err("nobody is there".into()) } else { Ok(()) }
        })
    }
}

struct Rig {
    exports: Exports<&'static str>,
    registry: Registry,
    carried: Arc<Mutex<Vec<Bytes>>>,
    may: Arc<Semaphore>,
}

fn rig(fails: bool) -> Rig {
    let registry = Registry::new();
    let (carried, may) = (Arc::default(), Arc::new(Semaphore::new(0)));
    let courier = Noting {
        carried: Arc::clone(&carried),
        may: may.clone(),
        fails,
    };
    Rig {
        exports: Exports::new(Handle::current(), &registry, Arc::new(courier)),
        registry,
        carried,
        may,
    }
}

fn spec(limits: Limits) -> Spec<&'static str> {
    Spec {
        destination: "there",
        envelope: Envelope::Json,
        kind: "traces",
        name: "there".into(),
        limits,
    }
}

impl Rig {
    fn count(&self, what: &str) -> u64 {
        let text = String::from_utf8(self.registry.render(Format::Text)).unwrap();
        let line = text
            .lines()
            .find(|line| line.starts_with(&format!("cairn_export_{what}_records_total")));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap()
    }
}

#[tokio::test(start_paused = true)]
async fn records_leave_together_when_there_are_enough_or_the_first_has_waited() {
    let rig = rig(false);
    rig.may.add_permits(10);
    let limits = Limits {
        batch: 2,
        ..Limits::default()
    };
    let exporter = rig.exports.open(spec(limits));
    for record in [b"1", b"2", b"3"] {
        exporter.push(record.to_vec());
    }
    tokio::time::sleep(limits.interval / 2).await;
    assert_eq!(*rig.carried.lock(), ["[1,2]"]);
    tokio::time::sleep(limits.interval).await;
    assert_eq!(*rig.carried.lock(), ["[1,2]", "[3]"]);
    assert_eq!((rig.count("sent"), rig.count("dropped"), rig.count("failed")), (3, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn what_finds_no_room_is_dropped_and_counted() {
    let rig = rig(false);
    let limits = Limits {
        queue: 3,
        batch: 1,
        ..Limits::default()
    };
    let exporter = rig.exports.open(spec(limits));
    exporter.push(b"0".to_vec());
    tokio::task::yield_now().await;
    for _ in 0..10 {
        exporter.push(b"1".to_vec());
    }
    assert_eq!(rig.count("dropped"), 7, "one is on its way, three wait");
    exporter.push(vec![b' '; QUEUE_BYTES]);
    assert_eq!(rig.count("dropped"), 8, "bytes are bounded too");
    rig.may.add_permits(10);
    assert!(rig.exports.flush(Duration::from_secs(5)).await);
    assert_eq!(rig.count("sent"), 4);
}

#[tokio::test(start_paused = true)]
async fn a_collector_that_is_down_costs_records_and_nothing_else() {
    let rig = rig(true);
    rig.may.add_permits(1);
    let exporter = rig.exports.open(spec(Limits::default()));
    exporter.push(b"1".to_vec());
    assert!(rig.exports.flush(Duration::from_secs(5)).await);
    assert_eq!((rig.count("sent"), rig.count("failed")), (0, 1));
    exporter.push(b"1".to_vec());
    assert!(
        !rig.exports.flush(Duration::from_secs(5)).await,
        "nobody waits for it longer than told"
    );
}

#[tokio::test]
async fn chains_with_one_destination_share_its_queue_and_it_ends_with_them() {
    let rig = rig(false);
    let one = rig.exports.open(spec(Limits::default()));
    assert_eq!(one, rig.exports.open(spec(Limits::default())));
    let other = Limits {
        batch: 7,
        ..Limits::default()
    };
    assert_ne!(one, rig.exports.open(spec(other)));
    drop(one);
    rig.exports.open(spec(other));
    assert!(format!("{:?}", rig.exports).contains("1 dest"));
}

#[test]
fn messages_around_records_are_what_a_collector_reads() {
    let span = |name: &str| Span {
        name: name.into(),
        ..Span::default()
    };
    let resource = Resource {
        dropped_attributes_count: 300,
        ..Resource::default()
    };
    let whole = ExportTraceServiceRequest {
        resource_spans: vec![ResourceSpans {
            resource: Some(resource.clone()),
            scope_spans: vec![ScopeSpans {
                spans: vec![span("one"), span(&"two".repeat(100))],
                ..ScopeSpans::default()
            }],
            ..ResourceSpans::default()
        }],
    };
    let of_resource = ResourceSpans {
        resource: Some(resource),
        ..ResourceSpans::default()
    };
    let layers = [
        Layer {
            before: Bytes::new(),
            field: 1,
        },
        Layer {
            before: of_resource.encode_to_vec().into(),
            field: 2,
        },
        Layer {
            before: Bytes::new(),
            field: 2,
        },
    ];
    let records = [span("one").encode_to_vec(), span(&"two".repeat(100)).encode_to_vec()];
    let written = Envelope::Protobuf(layers.into()).wrap(&records);
    assert_eq!(ExportTraceServiceRequest::decode(written).unwrap(), whole);
}
