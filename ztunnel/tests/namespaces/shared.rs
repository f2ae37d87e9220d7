//! One proxy for the pods of a node: istio-cni's part is played here.

use std::{
    fs::File,
    io::IoSlice,
    mem::MaybeUninit,
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
    time::Duration,
};

use cairn_exchange::clock;
use cairn_proto::istio::workload::zds::{
    AddWorkload, DelWorkload, KeepWorkload, SnapshotSent, WorkloadInfo, WorkloadRequest, WorkloadResponse, ZdsHello,
    workload_request::Payload, workload_response,
};
use prost::Message as _;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::{
    cluster::{Cluster, WEB},
    net::{Capture, PATIENCE, Pod, until_logged},
};

/// istio-cni's end of the socket.
struct Cni {
    listener: Socket,
    path: PathBuf,
}

struct Connection(Socket);

impl Cni {
    fn new(path: PathBuf) -> Self {
        let listener = Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap();
        listener.bind(&SockAddr::unix(&path).unwrap()).unwrap();
        listener.listen(4).unwrap();
        Self { listener, path }
    }

    /// The proxy's connection, after its hello.
    async fn accept(&self) -> Connection {
        let listener = self.listener.try_clone().unwrap();
        let accepted = tokio::task::spawn_blocking(move || {
            listener.set_read_timeout(Some(PATIENCE)).unwrap();
            let (socket, _) = listener.accept().unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            Connection(socket)
        });
        let connection = accepted.await.unwrap();
        let hello = ZdsHello::decode(&*connection.receive()).unwrap();
        assert_eq!(hello.version, 1);
        connection
    }
}

impl Connection {
    fn receive(&self) -> Vec<u8> {
        let mut bytes = vec![0; 2048];
        let (length, _) = rustix::net::recv(&self.0, &mut bytes, RecvFlags::empty()).unwrap();
        bytes.truncate(length);
        bytes
    }

    /// Sends a message with descriptors; the error of the answer, empty if all is well.
    fn ask(&self, bytes: &[u8], fds: &[&OwnedFd]) -> String {
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        }
        sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
        let answer = WorkloadResponse::decode(&*self.receive()).unwrap();
        match answer.payload.unwrap() {
            workload_response::Payload::Ack(ack) => ack.error,
        }
    }

    fn say(&self, payload: Payload) -> String {
        self.ask(&message(payload), &[])
    }

    fn add(&self, uid: &str, name: &str, pod: &Pod) -> String {
        let fd: OwnedFd = File::open(format!("/run/netns/{}", pod.space)).unwrap().into();
        self.ask(&message(add(uid, name)), &[&fd])
    }
}

fn message(payload: Payload) -> Vec<u8> {
    let payload = Some(payload);
    WorkloadRequest { payload }.encode_to_vec()
}

fn add(uid: &str, name: &str) -> Payload {
    Payload::Add(AddWorkload {
        uid: uid.into(),
        workload_info: Some(WorkloadInfo {
            name: name.into(),
            namespace: "default".into(),
            service_account: name.into(),
        }),
    })
}

fn keep(uid: &str) -> Payload {
    Payload::Keep(KeepWorkload { uid: uid.into() })
}

fn del(uid: &str) -> Payload {
    Payload::Del(DelWorkload { uid: uid.into() })
}

/// A node whose proxy serves the client's and the server's pod.
async fn node() -> (Cluster, Pod, Cni, Connection) {
    let mut cluster = Cluster::new(Capture::Nftables, Capture::Nftables);
    let node = cluster.net.pod("node", 9, Capture::None);
    let cni = Cni::new(cluster.net.folder.path().join("zds.sock"));
    run(&mut cluster, &node, &cni);
    let connection = cni.accept().await;
    cluster.server.echo(8080);
    (cluster, node, cni, connection)
}

fn run(cluster: &mut Cluster, node: &Pod, cni: &Cni) {
    let path = cni.path.to_str().unwrap();
    cluster
        .net
        .ztunnel(&node.space, &[("INPOD_UDS", path), ("NODE_NAME", "node")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_are_served_in_their_own_namespaces_as_istio_cni_tells() {
    let (cluster, node, _cni, connection) = node().await;
    let (status, body) = node.page(15021, "/healthz/ready").await;
    assert!(status.contains("500") && body.contains("pods are served"), "{status} {body}");
    assert_eq!(connection.add("u1", "client", &cluster.client), "");
    assert_eq!(connection.add("u2", "server", &cluster.server), "");
    assert_eq!(connection.add("u2", "server", &cluster.server), "", "twice is once");
    assert_eq!(connection.say(Payload::SnapshotSent(SnapshotSent {})), "");
    node.ready().await;
    let (mut line, greeting) = cluster.client.say(WEB, "hello").await.unwrap();
    assert_eq!(greeting, cluster.client.ip.to_string());
    // Certificates are asked for in the pods' names, once for each account.
    let mut asked = cluster.istiod.asked();
    asked.sort();
    assert_eq!(
        asked,
        [
            "impersonated spiffe://cluster.local/ns/default/sa/client",
            "impersonated spiffe://cluster.local/ns/default/sa/server"
        ]
    );
    let (_, dump) = node.page(15000, "/config_dump").await;
    let dump: serde_json::Value = serde_json::from_str(&dump).unwrap();
    assert_eq!(dump["workloadState"]["u1"]["info"]["name"], "client");
    assert_eq!(
        dump["workloadState"]["u2"]["connections"]["inbound"][0]["originalDst"],
        "10.99.0.2:8080"
    );
    // A pod that is gone takes its connections along at once.
    assert_eq!(connection.say(del("u2")), "");
    let (ended, after) = line.end().await;
    assert!(ended.is_err() && after < Duration::from_secs(1), "{ended:?} after {after:?}");
    assert!(cluster.client.say(WEB, "x").await.is_err());
    assert_eq!(connection.add("u2", "server", &cluster.server), "");
    cluster.client.say_eventually(WEB, "back").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_istio_cni_says_wrong_is_answered_and_harms_no_other_pod() {
    let (cluster, node, _cni, connection) = node().await;
    assert_eq!(connection.add("u1", "client", &cluster.client), "");
    let null: OwnedFd = File::open("/dev/null").unwrap().into();
    let real: OwnedFd = File::open(format!("/run/netns/{}", cluster.server.space)).unwrap().into();
    let cases = [
        (connection.ask(b"\xff\xff\xff", &[]), "cannot be read"),
        (connection.ask(&message(add("u3", "x")), &[]), "0 file descriptors"),
        (
            connection.ask(&message(add("u3", "x")), &[&real, &real]),
            "2 file descriptors",
        ),
        (connection.ask(&message(add("u3", "x")), &[&null]), "cannot be entered"),
        (connection.say(keep("nobody")), "not known here"),
    ];
    for (answer, words) in cases {
        assert!(answer.contains(words), "{answer:?} instead of {words:?}");
    }
    assert_eq!(connection.say(del("nobody")), "");
    // A namespace that is gone but for this descriptor: there is no way in or out, and no reason to fail.
    assert_eq!(connection.add("u2", "server", &cluster.server), "");
    assert_eq!(connection.say(Payload::SnapshotSent(SnapshotSent {})), "");
    assert!(connection.say(keep("u1")).contains("after the snapshot"));
    node.ready().await;
    cluster.client.say_eventually(WEB, "hello").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_go_on_without_istio_cni_and_are_told_apart_when_it_is_back() {
    let (cluster, node, cni, connection) = node().await;
    assert_eq!(connection.add("u1", "client", &cluster.client), "");
    assert_eq!(connection.add("u2", "server", &cluster.server), "");
    assert_eq!(connection.say(Payload::SnapshotSent(SnapshotSent {})), "");
    node.ready().await;
    let (mut line, _) = cluster.client.say_eventually(WEB, "hello").await;
    drop(connection);
    assert_eq!(line.say("without").await.unwrap(), "without");
    let connection = cni.accept().await;
    assert_eq!(connection.say(keep("u1")), "");
    assert_eq!(line.say("before the snapshot").await.unwrap(), "before the snapshot");
    assert_eq!(connection.say(Payload::SnapshotSent(SnapshotSent {})), "");
    // The server's pod was not named.
    let (ended, _) = line.end().await;
    assert!(ended.is_err(), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_that_gets_no_certificate_is_alone_with_it() {
    let (mut cluster, node, _cni, connection) = node().await;
    let other = cluster.net.pod("other", 4, Capture::Nftables);
    cluster
        .istiod
        .workloads(vec![crate::cluster::workload("other", other.ip, true, &[])]);
    cluster.istiod.refuse("spiffe://cluster.local/ns/default/sa/other");
    assert_eq!(connection.add("u1", "client", &cluster.client), "");
    assert_eq!(connection.add("u2", "server", &cluster.server), "");
    assert_eq!(connection.add("u4", "other", &other), "");
    assert_eq!(connection.say(Payload::SnapshotSent(SnapshotSent {})), "");
    node.ready().await;
    cluster.client.say_eventually(WEB, "hello").await;
    let begin = clock::now();
    assert!(other.say(WEB, "x").await.is_err());
    assert!(begin.elapsed() < Duration::from_secs(12));
    cluster.client.say(WEB, "still").await.unwrap();
    until_logged(
        &cluster.log(&node, 0),
        &["asking for a workload certificate failed", "not on this node"],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_instance_takes_over_and_the_older_one_keeps_what_is_open() {
    let (mut cluster, node, cni, old) = node().await;
    let all = |connection: &Connection| {
        assert_eq!(connection.add("u1", "client", &cluster.client), "");
        assert_eq!(connection.add("u2", "server", &cluster.server), "");
        assert_eq!(connection.say(Payload::SnapshotSent(SnapshotSent {})), "");
    };
    all(&old);
    node.ready().await;
    let (mut line, _) = cluster.client.say_eventually(WEB, "hello").await;
    let client = cluster.client.clone();
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = stop.clone();
    let load = tokio::spawn(async move {
        let mut done = 0;
        while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
            client.say(WEB, "under load").await.unwrap();
            done += 1;
        }
        done
    });
    let newer = cluster.net.pod("newer", 8, Capture::None);
    run(&mut cluster, &newer, &cni);
    let new = cni.accept().await;
    assert_eq!(new.add("u1", "client", &cluster.client), "");
    assert_eq!(new.add("u2", "server", &cluster.server), "");
    assert_eq!(new.say(Payload::SnapshotSent(SnapshotSent {})), "");
    newer.ready().await;
    // Both serve, then only the newer one.
    tokio::time::sleep(Duration::from_millis(500)).await;
    cluster.net.signal(0);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(line.say("still here").await.unwrap(), "still here");
    assert!(!cluster.net.has_ended(0), "it keeps what is open");
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(load.await.unwrap() > 10, "no connection failed meanwhile");
    let (_, dump) = newer.page(15000, "/config_dump").await;
    assert!(dump.contains("\"u2\""));
    drop(line);
    let begin = clock::now();
    while !cluster.net.has_ended(0) {
        assert!(begin.elapsed() < PATIENCE, "it ends with the last connection");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    cluster.client.say(WEB, "hello").await.unwrap();
}
