//! What the pool promises: spread, limits, shared dials, and no failure that spreads.

use std::{io, time::Duration};

use bytes::Bytes;
use cairn_hbone::{DialError, OpenError, OpenErrorKind, PoolSettings, ServerSettings, StreamLimits};
use futures_util::{FutureExt, future::join_all};
use http::HeaderMap;
use tokio::{sync::oneshot, time::timeout};

use crate::support::{Mesh, PATIENCE, Step, behave, data, destination, open, round_trip, settle, try_open};

fn one_tunnel() -> PoolSettings {
    PoolSettings {
        spread_tunnels: 1,
        max_tunnels: 1,
        ..PoolSettings::default()
    }
}

#[tokio::test]
async fn opens_that_wait_share_one_dial() {
    let mesh = Mesh::behaving();
    let pool = mesh.pool(PoolSettings::default());
    let opened = join_all((0..16).map(|_| open(&pool, "echo:80"))).await;
    assert_eq!((mesh.dials(), pool.stats().tunnels, pool.stats().streams), (1, 1, 16));
    drop(opened);
    assert_eq!(pool.stats().streams, 0);
}

#[tokio::test]
async fn load_spreads_over_tunnels_up_to_the_limit() {
    let mesh = Mesh::behaving();
    let pool = mesh.pool(PoolSettings {
        spread_streams: 4,
        spread_tunnels: 3,
        ..PoolSettings::default()
    });
    let mut opened = Vec::new();
    for _ in 0..60 {
        opened.push(open(&pool, "echo:80").await);
        settle().await;
    }
    assert_eq!((mesh.dials(), pool.stats().tunnels), (3, 3));
    for opened in &mut opened {
        round_trip(&mut opened.stream, b"x").await;
    }
}

#[tokio::test]
async fn a_full_tunnel_makes_another_and_the_peers_limit_counts() {
    let server = ServerSettings {
        streams: StreamLimits::fixed(10),
        ..ServerSettings::default()
    };
    let mesh = Mesh::new(server, |connect| {
        tokio::spawn(behave(connect));
    });
    let pool = mesh.pool(PoolSettings {
        spread_tunnels: 1,
        max_tunnels: 3,
        ..PoolSettings::default()
    });
    let mut opened = Vec::new();
    for _ in 0..30 {
        opened.push(open(&pool, "echo:80").await);
    }
    assert_eq!((mesh.dials(), pool.stats().streams), (3, 30));
    // Everything is full: the next waits until a stream ends.
    let mut waiting = Box::pin(open(&pool, "echo:80"));
    settle().await;
    assert!((&mut waiting).now_or_never().is_none());
    opened.pop();
    let mut late = timeout(PATIENCE, waiting).await.unwrap();
    round_trip(&mut late.stream, b"late").await;
    assert_eq!(mesh.dials(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_failed_dial_fails_those_who_waited_for_it_and_nobody_else() {
    let mesh = Mesh::behaving();
    let pool = mesh.pool(PoolSettings::default());
    mesh.set_delay(Duration::from_secs(1));
    mesh.next(Step::Refuse);
    let failed = join_all((0..20).map(|_| try_open(&pool, "echo:80"))).await;
    for result in failed {
        let error = result.unwrap_err();
        assert!(
            error.kind() == OpenErrorKind::ConnectFailure && error.is_connect_failure(),
            "{error}"
        );
        let OpenError::Dial { source, .. } = error else {
            panic!("{error}")
        };
        assert!(matches!(&*source, DialError::Connect(error) if error.kind() == io::ErrorKind::ConnectionRefused));
    }
    assert_eq!((mesh.dials(), pool.stats().destinations), (1, 0));
    round_trip(&mut open(&pool, "echo:80").await.stream, b"the next one dials afresh").await;
    assert_eq!(mesh.dials(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_failed_dial_for_more_spread_harms_nobody() {
    let mesh = Mesh::behaving();
    let pool = mesh.pool(PoolSettings {
        spread_streams: 1,
        spread_tunnels: 2,
        ..PoolSettings::default()
    });
    let first = open(&pool, "echo:80").await;
    mesh.next(Step::Refuse);
    let mut opened = Vec::new();
    for _ in 0..20 {
        opened.push(open(&pool, "echo:80").await);
        settle().await;
    }
    assert_eq!(mesh.dials(), 2, "and is not repeated with each open");
    tokio::time::sleep(Duration::from_secs(2)).await;
    opened.push(open(&pool, "echo:80").await);
    settle().await;
    assert_eq!(pool.stats().tunnels, 2);
    drop(first);
}

#[tokio::test]
async fn a_refused_open_harms_no_other() {
    let mesh = Mesh::behaving();
    let pool = mesh.pool(one_tunnel());
    let names: Vec<_> = (0..40).map(|i| if i % 4 == 0 { "refuse:80" } else { "echo:80" }).collect();
    let results = join_all(names.iter().map(|name| try_open(&pool, name))).await;
    for (name, result) in names.iter().zip(results) {
        match result {
            Ok(mut opened) => {
                assert_eq!(*name, "echo:80");
                round_trip(&mut opened.stream, b"fine").await;
            }
            Err(error) => {
                assert_eq!(
                    (*name, error.status().map(|status| status.as_u16())),
                    ("refuse:80", Some(503))
                );
                assert!(
                    !error.is_connect_failure() && error.to_string().ends_with("503 Service Unavailable: no such service"),
                    "{error}"
                );
            }
        }
    }
    assert_eq!((mesh.dials(), pool.stats().streams), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_dial_that_hangs_ends_at_the_connect_timeout() {
    let mesh = Mesh::behaving();
    let pool = mesh.pool(PoolSettings::default());
    mesh.next(Step::Hang);
    let started = tokio::time::Instant::now();
    let error = pool.open(&destination(), "echo:80", HeaderMap::new()).await.unwrap_err();
    assert_eq!(
        (error.kind(), started.elapsed().as_secs()),
        (OpenErrorKind::ConnectTimeout, 10)
    );
    settle().await;
    assert_eq!(pool.stats().destinations, 0);
}

#[tokio::test(start_paused = true)]
async fn a_dial_that_was_given_up_holds_up_nobody() {
    let mesh = Mesh::behaving();
    let pool = mesh.pool(PoolSettings::default());
    mesh.next(Step::Hang);
    assert!(timeout(Duration::from_millis(300), try_open(&pool, "echo:80")).await.is_err());
    // A young one may yet succeed, and is joined.
    assert!(timeout(Duration::from_secs(2), try_open(&pool, "echo:80")).await.is_err());
    assert_eq!(mesh.dials(), 1);
    // An old one may be between two late packets, and is overtaken.
    let started = tokio::time::Instant::now();
    let mut stream = open(&pool, "echo:80").await.stream;
    assert_eq!((mesh.dials(), started.elapsed().as_secs()), (2, 0));
    // Its end, at the connect timeout, fails nobody.
    tokio::time::sleep(Duration::from_secs(20)).await;
    round_trip(&mut stream, b"still there").await;
    round_trip(&mut open(&pool, "echo:80").await.stream, b"and open").await;
    assert_eq!((mesh.dials(), pool.stats().tunnels), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_does_not_come_ends_at_its_timeout() {
    let mesh = Mesh::behaving();
    let pool = mesh.pool(PoolSettings::default());
    let started = tokio::time::Instant::now();
    let error = pool.open(&destination(), "never:80", HeaderMap::new()).await.unwrap_err();
    assert_eq!(
        (error.kind(), started.elapsed().as_secs()),
        (OpenErrorKind::AnswerTimeout, 15)
    );
    assert_eq!(pool.stats().streams, 0);
    round_trip(&mut open(&pool, "late:80").await.stream, b"fine").await;
    assert_eq!(mesh.dials(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_that_is_idle_for_long_is_closed() {
    let mesh = Mesh::behaving();
    let pool = mesh.pool(PoolSettings {
        idle_timeout: Duration::from_secs(600),
        ..PoolSettings::default()
    });
    let stream = open(&pool, "echo:80").await.stream;
    tokio::time::sleep(Duration::from_secs(700)).await;
    assert_eq!(pool.stats().tunnels, 1);
    drop(stream);
    tokio::time::sleep(Duration::from_secs(590)).await;
    assert_eq!(pool.stats().tunnels, 1);
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_eq!((pool.stats().tunnels, pool.stats().destinations), (0, 0));
    let (_, served) = mesh.take_served().pop().unwrap();
    served.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_tunnel_that_the_peer_drains_is_replaced() {
    let mesh = Mesh::behaving();
    let pool = mesh.pool(one_tunnel());
    let mut old = open(&pool, "echo:80").await.stream;
    mesh.drain();
    settle().await;
    let mut new = open(&pool, "echo:80").await.stream;
    round_trip(&mut new, b"new").await;
    round_trip(&mut old, b"old").await;
    assert_eq!((mesh.dials(), pool.stats().tunnels), (2, 1));
}

#[tokio::test]
async fn an_open_that_races_with_the_end_of_its_tunnel_is_repeated() {
    // In the same moment the connection is killed and an open is sent on it.
    let mesh = Mesh::behaving();
    let pool = mesh.pool(one_tunnel());
    drop(open(&pool, "echo:80").await);
    mesh.kill();
    round_trip(&mut open(&pool, "echo:80").await.stream, b"again").await;
    assert_eq!(mesh.dials(), 2);

    // The peer says GOAWAY for streams that it has not looked at.
    let mesh = Mesh::behaving();
    let pool = mesh.pool(one_tunnel());
    let (give, given) = oneshot::channel();
    mesh.next(Step::Give(give));
    let opening = {
        let pool = pool.clone();
        tokio::spawn(async move { open(&pool, "echo:80").await })
    };
    let mut server = h2::server::handshake(given.await.unwrap()).await.unwrap();
    let (_request, mut respond) = server.accept().await.unwrap().unwrap();
    respond.send_reset(h2::Reason::REFUSED_STREAM);
    server.graceful_shutdown();
    let peer = tokio::spawn(async move { while let Some(Ok(_)) = server.accept().await {} });
    let mut opened = timeout(PATIENCE, opening).await.unwrap().unwrap();
    round_trip(&mut opened.stream, b"again").await;
    assert_eq!(mesh.dials(), 2);
    peer.await.unwrap();
}

#[tokio::test]
async fn a_peer_that_always_refuses_streams_is_tried_twice() {
    let mesh = Mesh::behaving();
    let pool = mesh.pool(one_tunnel());
    let (give, given) = oneshot::channel();
    mesh.next(Step::Give(give));
    let opening = tokio::spawn(async move { pool.open(&destination(), "echo:80", HeaderMap::new()).await });
    let mut server = h2::server::Builder::new()
        .handshake::<_, Bytes>(given.await.unwrap())
        .await
        .unwrap();
    let mut asked = 0;
    let peer = tokio::spawn(async move {
        while let Some(Ok((_, mut respond))) = server.accept().await {
            asked += 1;
            respond.send_reset(h2::Reason::REFUSED_STREAM);
        }
        asked
    });
    let error = timeout(PATIENCE, opening).await.unwrap().unwrap().unwrap_err();
    assert_eq!(error.kind(), OpenErrorKind::Reset);
    assert_eq!((timeout(PATIENCE, peer).await.unwrap().unwrap(), mesh.dials()), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_is_frozen_is_dropped_with_its_streams() {
    let mesh = Mesh::behaving();
    let pool = mesh.pool(one_tunnel());
    let (give, given) = oneshot::channel();
    mesh.next(Step::Give(give));
    let opening = {
        let pool = pool.clone();
        tokio::spawn(async move { open(&pool, "echo:80").await })
    };
    let mut server = h2::server::handshake(given.await.unwrap()).await.unwrap();
    let (_request, mut respond) = server.accept().await.unwrap().unwrap();
    let _send = respond.send_response(http::Response::new(()), false).unwrap();
    let mut opened = tokio::select! {
        opened = opening => opened.unwrap(),
        _ = server.accept() => panic!("the connection ended"),
    };
    let error = data(&mut opened.stream).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
    settle().await;
    assert_eq!(pool.stats().tunnels, 0);
    round_trip(&mut open(&pool, "echo:80").await.stream, b"another").await;
}

#[tokio::test]
async fn letting_go_of_a_destination_cuts_no_stream() {
    let mesh = Mesh::behaving();
    let pool = mesh.pool(one_tunnel());
    let mut stream = open(&pool, "echo:80").await.stream;
    pool.retain(|_| true);
    assert_eq!(pool.stats().tunnels, 1);
    pool.retain(|destination| destination.trust != 0);
    assert_eq!(pool.stats().destinations, 0);
    round_trip(&mut stream, b"goes on").await;
    let (_, served) = mesh.take_served().pop().unwrap();
    drop(stream);
    let _how = timeout(PATIENCE, served).await.unwrap().unwrap();
    round_trip(&mut open(&pool, "echo:80").await.stream, b"new").await;
    assert_eq!(mesh.dials(), 2);
}

#[tokio::test]
async fn a_dropped_pool_ends_its_tunnels_after_their_streams() {
    let mesh = Mesh::behaving();
    let pool = mesh.pool(one_tunnel());
    let mut stream = open(&pool, "echo:80").await.stream;
    drop(pool);
    settle().await;
    round_trip(&mut stream, b"goes on").await;
    let (_, served) = mesh.take_served().pop().unwrap();
    drop(stream);
    let _how = timeout(PATIENCE, served).await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn only_so_many_may_wait() {
    let mesh = Mesh::behaving();
    let pool = mesh.pool(PoolSettings {
        max_waiting: 5,
        ..PoolSettings::default()
    });
    mesh.next(Step::Hang);
    let results = join_all((0..8).map(|_| try_open(&pool, "echo:80"))).await;
    let kinds: Vec<_> = results.into_iter().map(|result| result.unwrap_err().kind()).collect();
    assert_eq!(kinds.iter().filter(|kind| **kind == OpenErrorKind::Overflow).count(), 3);
    assert_eq!(kinds.iter().filter(|kind| **kind == OpenErrorKind::ConnectTimeout).count(), 5);
}

#[tokio::test]
async fn terms_that_differ_share_no_tunnel_and_nonsense_is_not_sent() {
    let mesh = Mesh::behaving();
    let pool = mesh.pool(one_tunnel());
    let other = cairn_hbone::Destination {
        trust: 1,
        ..destination()
    };
    let _first = open(&pool, "echo:80").await;
    let _second = pool.open(&other, "echo:80", HeaderMap::new()).await.unwrap();
    assert_eq!((mesh.dials(), pool.stats().destinations), (2, 2));
    let error = pool.open(&other, "not an authority", HeaderMap::new()).await.unwrap_err();
    assert_eq!(error.kind(), OpenErrorKind::Invalid);
    let headers = HeaderMap::from_iter([(http::header::CONNECTION, http::HeaderValue::from_static("close"))]);
    assert_eq!(
        pool.open(&other, "echo:80", headers).await.unwrap_err().kind(),
        OpenErrorKind::Invalid
    );
    assert_eq!(pool.stats().streams, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn opens_survive_connections_that_come_and_go() {
    let mesh = Mesh::behaving();
    let pool = mesh.pool(PoolSettings {
        spread_streams: 4,
        ..PoolSettings::default()
    });
    let workers: Vec<_> = (0..32)
        .map(|_| {
            let pool = pool.clone();
            tokio::spawn(async move {
                for _ in 0..100 {
                    round_trip(&mut open(&pool, "echo:80").await.stream, b"through the storm").await;
                }
            })
        })
        .collect();
    let storm = {
        let mesh = mesh.clone();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_millis(3)).await;
                mesh.drain();
            }
        })
    };
    for worker in workers {
        timeout(PATIENCE, worker).await.unwrap().unwrap();
    }
    storm.abort();
    assert!(mesh.dials() > 4, "{}", mesh.dials());
    assert_eq!(pool.stats().streams, 0);
}
