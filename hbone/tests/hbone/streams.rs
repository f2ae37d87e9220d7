//! What a stream promises: bytes, half-closes, resets, back-pressure.

use std::{io, time::Duration};

use bytes::Bytes;
use cairn_hbone::{Budget, Connect, PoolSettings, ServerSettings, StreamError, StreamLimits, TunnelStream, WindowSettings};
use h2::Reason;
use http::HeaderMap;
use tokio::{
    io::{AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::mpsc,
    time::timeout,
};

use crate::support::{Mesh, PATIENCE, data, open, round_trip};

/// Both ends of one stream.
async fn pair() -> (TunnelStream, TunnelStream) {
    let (sender, mut accepted) = mpsc::unbounded_channel();
    let mesh = Mesh::new(ServerSettings::default(), move |connect: Connect| {
        sender.send(connect.accept(HeaderMap::new()).unwrap()).unwrap();
    });
    let near = open(&mesh.pool(PoolSettings::default()), "pair:1").await.stream;
    (near, accepted.recv().await.unwrap())
}

fn error_of(error: &io::Error) -> (io::ErrorKind, Option<Reason>) {
    (error.kind(), StreamError::of(error).unwrap().reason)
}

#[tokio::test]
async fn bytes_come_back_unchanged() {
    let mesh = Mesh::behaving();
    let mut stream = open(&mesh.pool(PoolSettings::default()), "echo:80").await.stream;
    round_trip(&mut stream, b"hello").await;
    let body: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
    let (mut read, mut write) = tokio::io::split(stream);
    let send = body.clone();
    let sending = tokio::spawn(async move {
        write.write_all(&send).await.unwrap();
        write.shutdown().await.unwrap();
        write
    });
    let mut back = Vec::new();
    timeout(PATIENCE, read.read_to_end(&mut back)).await.unwrap().unwrap();
    assert!(back == body);
    drop(sending.await.unwrap());
}

#[tokio::test]
async fn a_half_close_keeps_the_other_direction_open_both_ways() {
    let (mut near, mut far) = pair().await;
    near.write_all(b"question").await.unwrap();
    near.shutdown().await.unwrap();
    let mut question = Vec::new();
    far.read_to_end(&mut question).await.unwrap();
    assert_eq!(question, b"question");
    far.write_all(b"answer").await.unwrap();
    far.shutdown().await.unwrap();
    let mut answer = Vec::new();
    near.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, b"answer");

    let (mut near, mut far) = pair().await;
    far.shutdown().await.unwrap();
    assert!(data(&mut near).await.is_none());
    near.write_all(b"still").await.unwrap();
    near.shutdown().await.unwrap();
    let mut rest = Vec::new();
    far.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"still");
}

#[tokio::test]
async fn the_end_rides_on_the_last_frame() {
    let (mut near, mut far) = pair().await;
    let mut chunk = Bytes::from_static(b"all of it");
    let sent = std::future::poll_fn(|cx| near.poll_send(cx, &mut chunk, true)).await.unwrap();
    assert!(sent == 9 && chunk.is_empty() && near.is_write_ended());
    assert_eq!(data(&mut far).await.unwrap().unwrap(), "all of it");
    assert!(data(&mut far).await.is_none() && far.is_read_ended());
    assert_eq!(near.write_all(b"more").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
}

#[tokio::test]
async fn a_reset_is_an_error_and_never_a_clean_end() {
    let (mut near, far) = pair().await;
    far.reset(Reason::CONNECT_ERROR);
    let error = data(&mut near).await.unwrap().unwrap_err();
    assert_eq!(
        error_of(&error),
        (io::ErrorKind::ConnectionReset, Some(Reason::CONNECT_ERROR))
    );
    let error = near.write_all(b"x").await.unwrap_err();
    assert_eq!(
        error_of(&error),
        (io::ErrorKind::ConnectionReset, Some(Reason::CONNECT_ERROR))
    );

    let (near, mut far) = pair().await;
    drop(near);
    let error = far.read_to_end(&mut Vec::new()).await.unwrap_err();
    assert_eq!(error_of(&error), (io::ErrorKind::ConnectionReset, Some(Reason::CANCEL)));

    // What arrived before the reset is still read.
    let (mut near, mut far) = pair().await;
    near.write_all(b"some").await.unwrap();
    assert_eq!(data(&mut far).await.unwrap().unwrap(), "some");
    near.reset(Reason::NO_ERROR);
    let error = std::future::poll_fn(|cx| far.poll_reset(cx)).await;
    assert_eq!(error_of(&error), (io::ErrorKind::ConnectionReset, Some(Reason::NO_ERROR)));
    assert!(data(&mut far).await.unwrap().is_err());
}

#[tokio::test]
async fn a_reset_without_error_after_the_end_loses_nothing() {
    let (mut near, mut far) = pair().await;
    far.write_all(&[1; 40_000]).await.unwrap();
    far.shutdown().await.unwrap();
    // The accepting side drops a stream whose answer is complete: RST_STREAM(NO_ERROR) follows END_STREAM.
    drop(far);
    let error = std::future::poll_fn(|cx| near.poll_reset(cx)).await;
    assert_eq!(error_of(&error), (io::ErrorKind::ConnectionReset, Some(Reason::NO_ERROR)));
    let mut answer = Vec::new();
    near.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer.len(), 40_000);
    assert_eq!(error_of(&near.write_all(b"x").await.unwrap_err()).1, Some(Reason::NO_ERROR));
}

#[tokio::test]
async fn a_lost_connection_is_an_error_on_its_streams() {
    let mesh = Mesh::behaving();
    let mut stream = open(&mesh.pool(PoolSettings::default()), "echo:80").await.stream;
    round_trip(&mut stream, b"hello").await;
    mesh.kill();
    let error = timeout(PATIENCE, data(&mut stream)).await.unwrap().unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
    assert!(!StreamError::of(&error).unwrap().is_reset);
}

#[tokio::test]
async fn slices_written_together_arrive_as_one_frame() {
    let (mut near, mut far) = pair().await;
    let slices = [io::IoSlice::new(b"head"), io::IoSlice::new(b""), io::IoSlice::new(b"body")];
    assert!(near.is_write_vectored());
    assert_eq!(near.write_vectored(&slices).await.unwrap(), 8);
    assert_eq!(data(&mut far).await.unwrap().unwrap(), "headbody");
}

#[tokio::test]
async fn a_writer_waits_while_nobody_reads() {
    let (mut near, far) = pair().await;
    let mut sent = 0;
    while let Ok(count) = timeout(Duration::from_millis(200), near.write(&[0; 10_000])).await {
        sent += count.unwrap();
    }
    // One stream window, and not more than the send buffer on top of it.
    assert!((128 * 1024..=(128 + 128) * 1024).contains(&sent), "{sent}");
    drop(far);
}

#[tokio::test]
async fn a_peer_is_never_told_of_a_larger_window() {
    let mesh = Mesh::new(ServerSettings::default(), |connect: Connect| {
        tokio::spawn(crate::support::behave(connect));
    });
    let pool = mesh.pool(PoolSettings {
        spread_tunnels: 1,
        max_tunnels: 1,
        ..PoolSettings::default()
    });
    // Many streams make the windows smaller; when they are gone, what is read fast must not make them larger: a peer could use the
    // larger window before it says so, and its stream would be reset.
    let streams = futures_util::future::join_all((0..90).map(|_| open(&pool, "echo:80"))).await;
    drop(streams);
    let mut stream = open(&pool, "echo:80").await.stream;
    for _ in 0..200 {
        round_trip(&mut stream, &[7; 60_000]).await;
    }
}

#[tokio::test]
async fn streams_that_are_not_read_do_not_hold_up_another() {
    for (authority, writes) in [("stall:1", true), ("flood:1", false)] {
        let settings = WindowSettings {
            budget: Budget::new(32 << 20),
            ..WindowSettings::default()
        };
        let server = ServerSettings {
            streams: StreamLimits::fixed(128),
            windows: settings.clone(),
            ..ServerSettings::default()
        };
        let mesh = Mesh::new(server, |connect: Connect| {
            tokio::spawn(crate::support::behave(connect));
        });
        let pool = mesh.pool(PoolSettings {
            spread_tunnels: 1,
            max_tunnels: 1,
            windows: settings,
            ..PoolSettings::default()
        });
        let mut stalled = Vec::new();
        for _ in 0..100 {
            let mut stream = open(&pool, authority).await.stream;
            while writes && timeout(Duration::from_millis(20), stream.write(&[0; 16_384])).await.is_ok() {}
            stalled.push(stream);
        }
        let mut live = open(&pool, "echo:80").await.stream;
        for _ in 0..100 {
            round_trip(&mut live, &[9; 50_000]).await;
        }
        assert_eq!((mesh.dials(), pool.stats().streams), (1, 101), "{authority}");
    }
}

#[test]
fn a_stream_is_small() {
    assert!(size_of::<TunnelStream>() <= 192, "{}", size_of::<TunnelStream>());
    assert!(size_of::<Connect>() <= 384, "{}", size_of::<Connect>());
}
