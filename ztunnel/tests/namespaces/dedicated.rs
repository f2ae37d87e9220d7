//! One proxy a pod, in the pod's own namespace.

use std::{net::Ipv4Addr, sync::Arc, time::Duration};

use cairn_hbone::{Destination, Peer, ServerSettings, drain};
use cairn_identity::{Identity, ServerTerms, peer_id};
use cairn_proto::istio::security::{Address, Match, StringMatch, string_match::MatchType};
use cairn_ztunnel::authorization;
use hickory_proto::{
    op::{Message, Query, ResponseCode},
    rr::{Name, RecordType},
};
use http::HeaderMap;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::TlsAcceptor;

use crate::{
    cluster::{Cluster, SERVICE, WAYPOINT, WEB, policy, principal, service, through, workload},
    net::{Capture, Pod, address, until_logged},
};

const CLIENT: &str = "cluster.local/ns/default/sa/client";

#[tokio::test(flavor = "multi_thread")]
async fn a_service_is_reached_from_pod_to_pod_and_both_sides_tell_of_it() {
    let cluster = Cluster::dedicated(Capture::Nftables).await;
    let (mut line, greeting) = cluster.client.say(WEB, "hello").await.unwrap();
    assert_eq!(
        greeting,
        cluster.client.ip.to_string(),
        "the application sees its client's address"
    );
    assert_eq!(line.say("again").await.unwrap(), "again");
    let (_, dump) = cluster.client.page(15000, "/config_dump").await;
    let dump: serde_json::Value = serde_json::from_str(&dump).unwrap();
    let outbound = &dump["workloadState"]["dedicated"]["connections"]["outbound"][0];
    assert_eq!(
        (&outbound["originalDst"], &outbound["actualDst"]),
        (&"10.98.0.1:80".into(), &"10.99.0.2:15008".into())
    );
    assert_eq!(dump["certificates"][0]["state"], "Available");
    drop(line);
    let log = until_logged(
        &cluster.log(&cluster.client, 0),
        &["connection complete", "direction=\"outbound\""],
    )
    .await;
    for part in [
        "\tinfo\taccess\t",
        "src.addr=10.99.0.1:",
        "src.workload=\"client\"",
        "src.identity=\"spiffe://cluster.local/ns/default/sa/client\"",
        "dst.addr=10.99.0.2:15008",
        "dst.hbone_addr=10.99.0.2:8080",
        "dst.service=\"web.default.svc.cluster.local\"",
        "dst.workload=\"server\"",
        "dst.identity=\"spiffe://cluster.local/ns/default/sa/server\"",
        "bytes_sent=12 bytes_recv=22",
    ] {
        assert!(log.contains(part), "{part} in {log}");
    }
    let log = until_logged(
        &cluster.log(&cluster.server, 1),
        &["connection complete", "direction=\"inbound\""],
    )
    .await;
    assert!(
        log.contains("bytes_sent=22 bytes_recv=12") && log.contains("src.workload=\"client\""),
        "{log}"
    );
    for (pod, reporter) in [(&cluster.client, "source"), (&cluster.server, "destination")] {
        let (_, metrics) = pod.page(15020, "/metrics").await;
        let labels = "source_workload=\"client\",source_canonical_service=\"client\",source_canonical_revision=\"v1\",\
            source_workload_namespace=\"default\",source_principal=\"spiffe://cluster.local/ns/default/sa/client\",\
            source_app=\"client\",source_version=\"v1\",source_cluster=\"Kubernetes\",\
            destination_service=\"web.default.svc.cluster.local\",destination_service_namespace=\"default\",destination_service_name=\"web\",\
            destination_workload=\"server\",destination_canonical_service=\"server\",destination_canonical_revision=\"v1\",\
            destination_workload_namespace=\"default\",destination_principal=\"spiffe://cluster.local/ns/default/sa/server\",\
            destination_app=\"server\",destination_version=\"v1\",destination_cluster=\"Kubernetes\",\
            request_protocol=\"tcp\",response_flags=\"-\",connection_security_policy=\"mutual_tls\",\
            source_region=\"unknown\",source_zone=\"unknown\",destination_region=\"unknown\",destination_zone=\"unknown\"";
        for (name, value) in [
            ("connections_opened", 1),
            ("connections_closed", 1),
            ("received_bytes", 12),
            ("sent_bytes", 22),
        ] {
            let line = format!("istio_tcp_{name}_total{{reporter=\"{reporter}\",{labels}}} {value}\n");
            assert!(metrics.contains(&line), "{line} in {metrics}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn iptables_redirect_as_nftables_do() {
    let cluster = Cluster::dedicated(Capture::Iptables).await;
    let (_, greeting) = cluster.client.say(WEB, "hello").await.unwrap();
    assert_eq!(greeting, cluster.client.ip.to_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn captured_and_uncaptured_pods_reach_each_other() {
    for (client, server) in [(Capture::Nftables, Capture::None), (Capture::None, Capture::Nftables)] {
        let mut cluster = Cluster::new(client, server);
        for (pod, capture) in [(cluster.client.clone(), client), (cluster.server.clone(), server)] {
            if matches!(capture, Capture::Nftables) {
                cluster.proxy(&pod, &[]);
                pod.ready().await;
            }
        }
        cluster.server.echo(8080);
        let (_, greeting) = cluster.client.say("10.99.0.2:8080", "hello").await.unwrap();
        assert_eq!(greeting, cluster.client.ip.to_string());
        // Nobody knows the hub.
        if matches!(client, Capture::Nftables) {
            let refused = cluster.client.say("10.99.0.254:9", "x").await.err().unwrap();
            assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionReset);
        } else {
            let strict = policy(
                "strict",
                true,
                Match {
                    not_principals: vec![StringMatch {
                        match_type: Some(MatchType::Presence(())),
                    }],
                    ..Match::default()
                },
            );
            let (mut open, _) = cluster.client.say("10.99.0.2:8080", "open").await.unwrap();
            cluster.istiod.policy(&strict);
            let (ended, after) = open.end().await;
            assert!(
                ended.is_err() && after < Duration::from_millis(300),
                "{ended:?} after {after:?}"
            );
            assert!(cluster.client.say("10.99.0.2:8080", "x").await.is_err());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn policy_decides_about_new_connections_and_ends_open_ones_within_a_third_of_a_second() {
    let cluster = Cluster::dedicated(Capture::Nftables).await;
    let (mut line, _) = cluster.client.say(WEB, "hello").await.unwrap();
    let only = |id: &str| {
        let principals = principal(id);
        policy(
            "only",
            false,
            Match {
                principals,
                ..Match::default()
            },
        )
    };
    cluster.istiod.policy(&only(CLIENT));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(line.say("still here").await.unwrap(), "still here");
    cluster.istiod.policy(&only("cluster.local/ns/default/sa/other"));
    let (ended, after) = line.end().await;
    assert!(
        ended.is_err() && after < Duration::from_millis(300),
        "{ended:?} after {after:?}"
    );
    let log = cluster.log(&cluster.server, 1);
    until_logged(&log, &["connection closed due to policy change"]).await;
    let refused = cluster.client.say(WEB, "x").await.err().unwrap();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionReset);
    until_logged(&log, &["\terror\taccess", "allow policies exist, but none allowed"]).await;
    let log = cluster.log(&cluster.client, 0);
    until_logged(&log, &["\terror\taccess", "401"]).await;
    let (_, metrics) = cluster.server.page(15020, "/metrics").await;
    assert!(metrics.contains("response_flags=\"DENY\""));
    // What cannot be read changes nothing, and is told.
    let mut broken = only(CLIENT);
    broken.groups[0].rules[0].matches[0].source_ips = vec![Address {
        address: vec![1, 2, 3],
        length: 8,
    }];
    cluster.istiod.policy(&broken);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(cluster.client.say(WEB, "x").await.is_err());
    assert!(
        cluster
            .istiod
            .nacks()
            .iter()
            .any(|nack| nack.contains("default/only: source_ips"))
    );
    cluster.istiod.push(authorization::TYPE, Vec::new(), &["default/only"]);
    cluster.client.say_eventually(WEB, "open again").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_mesh_goes_on_without_istiod() {
    let cluster = Cluster::dedicated(Capture::Nftables).await;
    let (mut line, _) = cluster.client.say(WEB, "hello").await.unwrap();
    cluster.istiod.stop();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(line.say("still").await.unwrap(), "still");
    cluster.client.say(WEB, "new").await.unwrap();
    cluster.client.ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_application_that_is_gone_resets_its_clients_and_is_counted() {
    let cluster = Cluster::dedicated(Capture::Nftables).await;
    // Nobody listens there.
    let refused = cluster.client.say("10.99.0.2:9999", "x").await.err().unwrap();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionReset);
    // One that dies in the middle.
    let listener = cluster.server.listen(7070);
    let dies = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.read_u8().await.unwrap();
        cairn_ztunnel::sockets::reset(stream);
    });
    let mut stream = cluster.client.connect("10.99.0.2:7070").await.unwrap();
    stream.write_u8(b'x').await.unwrap();
    let mut line = crate::net::Line(tokio::io::BufReader::new(stream));
    let (ended, _) = line.end().await;
    assert_eq!(ended.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    dies.await.unwrap();
    let (_, metrics) = cluster.client.page(15020, "/metrics").await;
    assert!(
        metrics.contains("istio_tcp_connections_failed_total{reason=\"CONNECT\"} 1\n"),
        "{metrics}"
    );
}

/// Where a gateway goes on to.
#[derive(Clone, Copy)]
enum On {
    /// To the server's pod, in a tunnel of its own: a waypoint.
    Tunnel,
    /// To the server's proxy as it is, for there is a tunnel inside: the gateway of a network.
    Within,
}

/// What a gateway does at layer 4: takes tunnels, remembers what they asked for, and goes on to the server.
fn gateway(cluster: &Cluster, pod: &Pod, on: On) -> Arc<Mutex<Vec<(String, HeaderMap)>>> {
    let id = "spiffe://cluster.local/ns/default/sa/waypoint";
    let identity = Identity::fixed(cluster.istiod.credentials(id));
    let pool = pod.tunnels(identity.clone());
    let listener = pod.listen(15008);
    let asked = Arc::new(Mutex::new(Vec::new()));
    let (log, server, here) = (asked.clone(), cluster.server.ip, pod.clone());
    tokio::spawn(async move {
        loop {
            let (tcp, source) = listener.accept().await.unwrap();
            let config = identity
                .try_server_config(&ServerTerms::hbone(["spiffe://cluster.local/"]))
                .unwrap();
            let Ok(tls) = TlsAcceptor::from(config).accept(tcp).await else {
                continue;
            };
            let peer = Peer {
                id: peer_id(tls.get_ref().1.peer_certificates().unwrap()).ok(),
                address: source,
                local_address: source,
                local_id: None,
            };
            let (log, pool, here) = (log.clone(), pool.clone(), here.clone());
            tokio::spawn(async move {
                let (_trigger, watch) = drain::channel();
                let settings = ServerSettings::default();
                let _ = cairn_hbone::serve(tls, Arc::new(peer), &settings, watch, |connect| {
                    log.lock().push((connect.authority.to_string(), connect.headers.clone()));
                    let (pool, here) = (pool.clone(), here.clone());
                    tokio::spawn(async move {
                        let mut near = connect.accept(HeaderMap::new()).unwrap();
                        match on {
                            On::Tunnel => {
                                let destination = Destination {
                                    address: (server, 15008).into(),
                                    trust: 0,
                                };
                                let opened = pool.open(&destination, &address(server, 8080), HeaderMap::new()).await;
                                let mut far = opened.unwrap().stream;
                                let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                            }
                            On::Within => {
                                let mut far = here.connect(&address(server, 15008)).await.unwrap();
                                let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                            }
                        }
                    });
                })
                .await;
            });
        }
    });
    asked
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_with_a_waypoint_is_reached_through_it_and_who_goes_around_is_seen() {
    let mut cluster = Cluster::dedicated(Capture::Nftables).await;
    let pod = cluster.net.pod("waypoint", 3, Capture::None);
    let asked = gateway(&cluster, &pod, On::Tunnel);
    let mut behind = workload("waypoint", pod.ip, true, &[(WAYPOINT, 15008, 15008)]);
    behind.native_tunnel = true;
    cluster.istiod.workloads(vec![behind]);
    let mut web = service(SERVICE, Ipv4Addr::new(10, 98, 0, 1), 80, 8080);
    web.waypoint = through(WAYPOINT);
    cluster
        .istiod
        .services(vec![service(WAYPOINT, Ipv4Addr::new(10, 98, 0, 9), 15008, 15008), web]);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let (_, greeting) = cluster.client.say_eventually(WEB, "hello").await;
    assert_eq!(greeting, pod.ip.to_string(), "the server's peer is the waypoint");
    {
        let asked = asked.lock();
        let (authority, headers) = asked.last().unwrap();
        assert_eq!(authority, WEB, "the waypoint is told of the service, not of the pod");
        let header = |name: &str| headers[name].to_str().unwrap().to_owned();
        assert!(
            header("baggage").starts_with("k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.deployment.name=client")
        );
        assert!(
            header("forwarded").starts_with("for=\"10.99.0.1:")
                && header("forwarded").ends_with(";host=web.default.svc.cluster.local")
        );
        assert_eq!(header("traceparent").len(), 55);
    }
    // Straight to the pod is possible, and seen.
    let (_, greeting) = cluster.client.say("10.99.0.2:8080", "around").await.unwrap();
    assert_eq!(greeting, cluster.client.ip.to_string());
    let (_, dump) = cluster.server.page(15000, "/config_dump").await;
    let dump: serde_json::Value = serde_json::from_str(&dump).unwrap();
    assert_eq!(
        dump["waypointBypasses"],
        serde_json::json!([{"source": format!("spiffe://{CLIENT}"), "destination": SERVICE, "connections": 1}])
    );
    let (_, metrics) = cluster.server.page(15020, "/metrics").await;
    assert!(metrics.contains("cairn_waypoint_bypassed_total 1\n"));
    // A waypoint that is gone is not gone around.
    cluster
        .istiod
        .push(cairn_ztunnel::wds::TYPE, Vec::new(), &["Kubernetes//Pod/default/waypoint"]);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(cluster.client.say(WEB, "x").await.is_err());
    until_logged(&cluster.log(&cluster.client, 0), &["nothing goes around it"]).await;
}

/// A question over UDP; the code and the records of the answer.
async fn ask(pod: &Pod, name: &str, kind: RecordType) -> (ResponseCode, Vec<String>) {
    let socket = pod.namespace.run(|| std::net::UdpSocket::bind("0.0.0.0:0")).unwrap();
    socket.set_nonblocking(true).unwrap();
    let socket = tokio::net::UdpSocket::from_std(socket).unwrap();
    let mut question = Message::query();
    question.metadata.recursion_desired = true;
    question.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    // Whoever is asked: the question is redirected.
    socket.send_to(&question.to_vec().unwrap(), "10.99.0.77:53").await.unwrap();
    let mut answer = [0; 4096];
    let (length, from) = tokio::time::timeout(Duration::from_secs(20), socket.recv_from(&mut answer))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(from.to_string(), "10.99.0.77:53");
    let answer = Message::from_vec(&answer[..length]).unwrap();
    assert_eq!(answer.metadata.id, question.metadata.id);
    (
        answer.metadata.response_code,
        answer.answers.iter().map(|record| record.data.to_string()).collect(),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn names_of_the_mesh_are_answered_and_garbage_is_not() {
    let mut cluster = Cluster::new(Capture::Nftables, Capture::None);
    let client = cluster.client.clone();
    cluster.proxy(&client, &[("DNS_PROXY", "true")]);
    client.ready().await;
    let yes = (ResponseCode::NoError, vec!["10.98.0.1".to_owned()]);
    assert_eq!(ask(&client, "web.", RecordType::A).await, yes);
    assert_eq!(ask(&client, "web.default.svc.cluster.local.", RecordType::A).await, yes);
    assert_eq!(
        ask(&client, "web.", RecordType::AAAA).await,
        (ResponseCode::NoError, Vec::new())
    );
    // Garbage deserves no answer and harms nobody.
    let socket = client.namespace.run(|| std::net::UdpSocket::bind("0.0.0.0:0")).unwrap();
    for bytes in [&b""[..], b"x", &[0xff; 600], &[0; 12]] {
        socket.send_to(bytes, "10.99.0.77:53").unwrap();
    }
    assert_eq!(ask(&client, "web.", RecordType::A).await, yes);
    let (_, metrics) = client.page(15020, "/metrics").await;
    assert!(metrics.contains("istio_dns_requests_total 8\n"), "{metrics}");
    // The same over TCP, by the port itself.
    let mut question = Message::query();
    question.add_query(Query::query(Name::from_ascii("web.").unwrap(), RecordType::A));
    let question = question.to_vec().unwrap();
    let stream = client
        .namespace
        .run(|| std::net::TcpStream::connect("127.0.0.1:15053"))
        .unwrap();
    stream.set_nonblocking(true).unwrap();
    let mut stream = tokio::net::TcpStream::from_std(stream).unwrap();
    stream.write_u16(question.len() as u16).await.unwrap();
    stream.write_all(&question).await.unwrap();
    let mut answer = vec![0; usize::from(stream.read_u16().await.unwrap())];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(Message::from_vec(&answer).unwrap().answers.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socks_client_reaches_services_by_name() {
    let mut cluster = Cluster::new(Capture::None, Capture::Nftables);
    let (client, server) = (cluster.client.clone(), cluster.server.clone());
    cluster.istiod.workloads(vec![workload("client", client.ip, true, &[])]);
    cluster.proxy(&client, &[("UNSTABLE_ENABLE_SOCKS5", "true")]);
    cluster.proxy(&server, &[]);
    client.ready().await;
    server.ready().await;
    server.echo(8080);
    let stream = client
        .namespace
        .run(|| std::net::TcpStream::connect("127.0.0.1:15080"))
        .unwrap();
    stream.set_nonblocking(true).unwrap();
    let mut stream = tokio::net::TcpStream::from_std(stream).unwrap();
    let name = b"web.default.svc.cluster.local";
    let mut head = vec![5, 1, 0, 5, 1, 0, 3, name.len() as u8];
    head.extend(name);
    head.extend(80_u16.to_be_bytes());
    stream.write_all(&head).await.unwrap();
    let mut reply = [0; 12];
    stream.read_exact(&mut reply).await.unwrap();
    assert_eq!(reply[..4], [5, 0, 5, 0]);
    let mut greeting = [0; 9];
    stream.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting, b"10.99.0.1");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_network_is_reached_by_a_tunnel_inside_one_to_its_gateway() {
    let mut cluster = Cluster::dedicated(Capture::Nftables).await;
    let pod = cluster.net.pod("gateway", 3, Capture::None);
    let asked = gateway(&cluster, &pod, On::Within);
    // For the client the server is elsewhere; the server's own proxy knows it as it was.
    let mut there = workload(
        "remote",
        "10.99.0.2".parse().unwrap(),
        true,
        &[("default/far.default.svc.cluster.local", 80, 8080)],
    );
    there.service_account = "server".into();
    there.network = "other".into();
    there.network_gateway = through(WAYPOINT);
    let mut server = workload(
        "server",
        cluster.server.ip,
        true,
        &[(SERVICE, 80, 8080), ("default/far.default.svc.cluster.local", 80, 8080)],
    );
    server.capacity = Some(0);
    cluster.istiod.workloads(vec![
        workload("waypoint", pod.ip, true, &[(WAYPOINT, 15008, 15008)]),
        there,
        server,
    ]);
    let far = service("default/far.default.svc.cluster.local", Ipv4Addr::new(10, 98, 0, 7), 80, 8080);
    cluster
        .istiod
        .services(vec![service(WAYPOINT, Ipv4Addr::new(10, 98, 0, 9), 15008, 15008), far]);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let (mut line, greeting) = cluster.client.say_eventually("10.98.0.7:80", "hello").await;
    assert_eq!(greeting, pod.ip.to_string());
    assert_eq!(asked.lock().last().unwrap().0, "far.default.svc.cluster.local:80");
    assert_eq!(line.say("again").await.unwrap(), "again");
    drop(line);
    // The server's proxy has seen the client itself, not the gateway.
    let words = [
        "direction=\"inbound\"",
        "src.identity=\"spiffe://cluster.local/ns/default/sa/client\"",
        "far.default",
    ];
    until_logged(&cluster.log(&cluster.server, 1), &words).await;
}
