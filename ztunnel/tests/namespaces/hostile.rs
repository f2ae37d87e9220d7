//! Peers that ask for what is not theirs.

use cairn_hbone::{Destination, OpenError, Pool};
use cairn_identity::Identity;
use http::HeaderMap;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::{
    cluster::Cluster,
    istiod::Istiod,
    net::{Capture, Pod},
};

/// A peer in a pod's namespace, with credentials of somebody's.
fn peer(pod: &Pod, istiod: &Istiod, id: &str) -> Pool {
    pod.tunnels(Identity::fixed(istiod.credentials(id)))
}

#[tokio::test(flavor = "multi_thread")]
async fn tunnels_lead_to_the_pod_and_nowhere_else() {
    let mut cluster = Cluster::new(Capture::None, Capture::Nftables);
    let server = cluster.server.clone();
    cluster.proxy(&server, &[]);
    server.ready().await;
    server.echo(8080);
    let pool = peer(
        &cluster.client,
        &cluster.istiod,
        "spiffe://cluster.local/ns/default/sa/client",
    );
    let destination = Destination {
        address: (server.ip, 15008).into(),
        trust: 0,
    };
    let cases = [
        ("10.99.0.2:8080", None),
        ("web.default.svc.cluster.local:80", None),
        // A VIP, another pod, ourselves as a loopback address, an unknown name, a port that the service has not.
        ("10.98.0.1:80", Some(400)),
        ("10.99.0.1:8080", Some(400)),
        ("127.0.0.1:8080", Some(400)),
        ("other.default.svc.cluster.local:80", Some(400)),
        ("web.default.svc.cluster.local:81", Some(400)),
        ("10.99.0.2", Some(400)),
        // Loops, and a port where nobody listens.
        ("10.99.0.2:15008", Some(503)),
        ("10.99.0.2:15006", Some(503)),
        ("10.99.0.2:15001", Some(503)),
        ("10.99.0.2:9", Some(503)),
    ];
    for (authority, want) in cases {
        let opened = pool.open(&destination, authority, HeaderMap::new()).await;
        match (opened, want) {
            (Ok(mut opened), None) => {
                let mut greeting = [0; 9];
                opened.stream.read_exact(&mut greeting).await.unwrap();
                assert_eq!(&greeting, b"10.99.0.1");
                assert!(opened.response_headers.contains_key("baggage"));
            }
            (Err(OpenError::Refused { status, .. }), Some(want)) => assert_eq!(status.as_u16(), want, "{authority}"),
            (other, want) => panic!("{authority}: {other:?} instead of {want:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_of_another_trust_domain_or_authority_gets_no_tunnel() {
    let mut cluster = Cluster::new(Capture::None, Capture::Nftables);
    let server = cluster.server.clone();
    cluster.proxy(&server, &[]);
    server.ready().await;
    server.echo(8080);
    let destination = Destination {
        address: (server.ip, 15008).into(),
        trust: 0,
    };
    let stranger = Istiod::new();
    for (istiod, id) in [
        (&cluster.istiod, "spiffe://other.td/ns/default/sa/client"),
        (&stranger, "spiffe://cluster.local/ns/default/sa/client"),
    ] {
        let opened = peer(&cluster.client, istiod, id)
            .open(&destination, "10.99.0.2:8080", HeaderMap::new())
            .await;
        assert!(opened.is_err(), "{id}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ports_of_the_proxy_are_no_way_into_a_loop_and_garbage_harms_nobody() {
    let cluster = Cluster::dedicated(Capture::Nftables).await;
    for port in [15001, 15006] {
        let stream = cluster.client.connect(&format!("10.99.0.2:{port}")).await;
        if let Ok(mut stream) = stream {
            let mut byte = [0; 1];
            assert!(!matches!(stream.read(&mut byte).await, Ok(1..)), "{port}");
        }
    }
    // Garbage where tunnels are expected, from outside and by our own pod.
    let outside = cluster.server.clone();
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 4096], b"\x16\x03\x01\xff\xff"] {
        let mut stream = outside
            .namespace
            .run(|| std::net::TcpStream::connect(("127.0.0.1", 15008)))
            .and_then(|stream| {
                stream.set_nonblocking(true)?;
                tokio::net::TcpStream::from_std(stream)
            })
            .unwrap();
        let _ = stream.write_all(bytes).await;
        let _ = stream.shutdown().await;
    }
    cluster.client.say("10.98.0.1:80", "still there").await.unwrap();
}
