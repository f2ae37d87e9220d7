//! HTTP/2 that wants to hurt, in tunnels and inside of them: what an attacker costs is bounded, and its neighbours are served.
//!
//! Each attack sends frames as fast as they are taken, until the proxy ends the connection, stops to read, or a number of frames that
//! would show in any of the bounds has been sent. Attacker, proxy and neighbour share this process, so its time and memory are an upper
//! bound of the proxy's. The attacks are one test: beside one another they could not be measured.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::large_futures,
    clippy::disallowed_methods,
    unreachable_pub,
    dead_code,
    reason = "a test fails by panicking, and may look at the clock"
)]

mod rig;
#[path = "bad_input/wire.rs"]
mod wire;

use std::{fs, time::Duration};

use http::StatusCode;
use http_body_util::Full;
use rig::{Config, Rig, fetch, http_app};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    time::{Instant, timeout},
};
use wire::{CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, field, frame, raw_tunnel};

const WEB: &str = "10.96.1.10:80";
const PATIENCE: Duration = Duration::from_secs(10);
/// An attacker that is not read for so long has been stopped.
const STOPPED: Duration = Duration::from_secs(1);
/// Frames of one attack.
const FRAMES: u32 = 60_000;
/// Memory that one attack may cost the process, in KiB.
const MEMORY: u64 = 64 * 1024;
/// Time of a processor that one frame may cost, attacker, TLS and all, in a build without optimizations.
const TIME: Duration = Duration::from_micros(400);
/// What an answer is long that nobody reads.
const BIG: usize = 256 * 1024;

/// The frames of an attack, by their number.
type Attack = fn(bool, u32) -> Vec<u8>;

/// A request that is accepted: CONNECT in a tunnel, POST inside.
fn begin(tunnel: bool, stream: u32, flags: u8) -> Vec<u8> {
    let head = match tunnel {
        true => [field(2, "", b"CONNECT"), field(1, "", WEB.as_bytes())].concat(),
        false => [
            field(3, "", b"POST"),
            field(6, "", b"http"),
            field(4, "", b"/"),
            field(1, "", b"web"),
        ]
        .concat(),
    };
    // The index alone is a field of the static table: of these two the value is given.
    frame(HEADERS, END_HEADERS | flags, stream, &head)
}

fn stream(number: u32) -> u32 {
    2 * number + 1
}

const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const PRIORITY: u8 = 2;
const WINDOW_UPDATE: u8 = 8;
const CANCEL: [u8; 4] = [0, 0, 0, 8];

const ATTACKS: [(&str, Attack); 17] = [
    ("rapid reset", |tunnel, number| {
        [
            begin(tunnel, stream(number), 0),
            frame(RST_STREAM, 0, stream(number), &CANCEL),
        ]
        .concat()
    }),
    ("resets that we have to send", |tunnel, number| {
        // A window that grows by nothing is an error of its stream (RFC 9113 §6.9).
        [
            begin(tunnel, stream(number), 0),
            frame(WINDOW_UPDATE, 0, stream(number), &[0; 4]),
        ]
        .concat()
    }),
    ("data behind the end", |tunnel, number| {
        [
            begin(tunnel, stream(number), END_STREAM),
            frame(DATA, 0, stream(number), b"x"),
        ]
        .concat()
    }),
    ("CONTINUATION without end", |tunnel, number| match number {
        0 => frame(HEADERS, 0, 1, &field(2, "", if tunnel { b"CONNECT" } else { b"GET" })),
        _ => frame(CONTINUATION, 0, 1, &field(0, "x", &[b'x'; 100])),
    }),
    ("empty CONTINUATION without end", |_, number| match number {
        0 => frame(HEADERS, 0, 1, &field(2, "", b"GET")),
        _ => frame(CONTINUATION, 0, 1, &[]),
    }),
    ("SETTINGS", |_, _| frame(SETTINGS, 0, 0, &[])),
    ("SETTINGS that change the table", |_, number| {
        frame(SETTINGS, 0, 0, &[0, 1, 0, 0, (number % 16) as u8, 0])
    }),
    ("PING", |_, _| frame(PING, 0, 0, &[7; 8])),
    ("PRIORITY", |_, number| frame(PRIORITY, 0, stream(number), &[0, 0, 0, 0, 1])),
    ("empty DATA", |tunnel, number| match number {
        0 => begin(tunnel, 1, 0),
        _ => frame(DATA, 0, 1, &[]),
    }),
    ("DATA that is padding", |tunnel, number| match number {
        0 => begin(tunnel, 1, 0),
        _ => frame(DATA, 8, 1, &[[200].as_slice(), &[0; 200]].concat()),
    }),
    ("frames of no kind", |_, _| frame(77, 0xff, 0, b"whatever")),
    ("windows that grow by one", |_, _| frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1])),
    ("a window that overflows", |_, _| {
        frame(WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff])
    }),
    ("resets of streams that never were", |_, number| {
        frame(RST_STREAM, 0, stream(number), &CANCEL)
    }),
    ("an HPACK bomb", |tunnel, number| {
        let method: &[u8] = if tunnel { b"CONNECT" } else { b"GET" };
        // 4,000 bytes go into the dynamic table once, and are named by a byte ever after.
        let mut head = field(2, "", method);
        head.push(0x40);
        head.extend(field(0, "x", &[b'x'; 3900]).iter().skip(1));
        head.extend([0xbe; 4000]);
        frame(HEADERS, END_HEADERS | END_STREAM, stream(number), &head)
    }),
    ("answers that nobody takes", |tunnel, number| match number {
        // No window, and more than one connection's worth of requests.
        0 => frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0]),
        1..200 => begin(tunnel, stream(number), END_STREAM),
        _ => frame(PING, 0, 0, &[7; 8]),
    }),
];

/// How an attack ended.
#[derive(Debug, PartialEq)]
enum End {
    /// The proxy ended the connection.
    Closed,
    /// It read no more.
    Stopped,
    /// All was read.
    Taken,
}

/// Attacks a connection on which HTTP/2 has begun; how it ended, and after how many frames.
async fn attack<Io>(io: Io, frames: impl Fn(u32) -> Vec<u8>) -> (End, u32)
where
    Io: AsyncRead + AsyncWrite + Send + 'static,
{
    let (mut read, mut write) = tokio::io::split(io);
    // Answers are thrown away, so that only the proxy's own bounds end it.
    let mut reading = tokio::spawn(async move {
        let mut buffer = vec![0; 64 * 1024];
        while read.read(&mut buffer).await.is_ok_and(|count| count > 0) {}
    });
    let mut number = 0;
    let end = loop {
        if number >= FRAMES {
            break End::Taken;
        }
        let mut bytes = Vec::new();
        while bytes.len() < 16 * 1024 && number < FRAMES {
            bytes.extend(frames(number));
            number += 1;
        }
        match timeout(STOPPED, write.write_all(&bytes)).await {
            Err(_) => break End::Stopped,
            Ok(Err(_)) => break End::Closed,
            Ok(Ok(())) if reading.is_finished() => break End::Closed,
            Ok(Ok(())) => {}
        }
    };
    // What was written may still have to be judged.
    let ended = timeout(STOPPED, &mut reading).await.is_ok();
    reading.abort();
    (if ended { End::Closed } else { end }, number)
}

/// Time of a processor and resident memory (KiB) of this process.
fn spent() -> (Duration, u64) {
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<_> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let memory = line.trim().trim_end_matches(" kB").parse().unwrap();
    (Duration::from_millis(ticks * 10), memory)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_attacker_costs_is_bounded_and_its_neighbours_are_served() {
    let rig = Rig::start().await;
    let big = bytes::Bytes::from(vec![b'x'; BIG]);
    let app = http_app(move |request| {
        let body = if request.uri().path() == "/well" {
            bytes::Bytes::from_static(b"well")
        } else {
            big.clone()
        };
        async move { http::Response::new(Full::from(body)) }
    });
    let pod = rig.pod(10, app).await;
    rig.serve(Config::default().http(WEB, &[pod.address])).await;
    let mut neighbour = rig.http1(WEB).await;
    assert_eq!(fetch(&mut neighbour, "/well").await.0, StatusCode::OK);
    for (what, frames) in ATTACKS {
        for tunnel in [true, false] {
            let place = if tunnel { "in a tunnel" } else { "inside" };
            let (time, memory) = spent();
            let attacking = if tunnel {
                let io = raw_tunnel(&rig).await;
                tokio::spawn(attack(io, move |number| frames(true, number)))
            } else {
                let mut io = rig.open(WEB).await.unwrap().stream;
                io.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
                io.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
                tokio::spawn(attack(io, move |number| frames(false, number)))
            };
            let mut slowest = Duration::ZERO;
            let mut largest = memory;
            while !attacking.is_finished() {
                let asked = Instant::now();
                let answer = timeout(PATIENCE, fetch(&mut neighbour, "/well")).await;
                assert_eq!(
                    answer.unwrap_or_else(|_| panic!("{what} {place}: the neighbour waits")).0,
                    StatusCode::OK
                );
                slowest = slowest.max(asked.elapsed());
                largest = largest.max(spent().1);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            let (end, sent) = attacking.await.unwrap();
            let took = spent().0.saturating_sub(time);
            let grown = largest.saturating_sub(memory);
            println!("{what} {place}: {end:?} after {sent} frames, {took:?}, {grown} KiB, neighbour {slowest:?}");
            // A second for what else goes on meanwhile.
            assert!(
                took < Duration::from_secs(1) + TIME * sent,
                "{what} {place}: {took:?} for {sent} frames"
            );
            assert!(grown < MEMORY, "{what} {place}: {grown} KiB for {sent} frames");
            assert!(
                slowest < Duration::from_secs(2),
                "{what} {place}: its neighbour waited {slowest:?}"
            );
        }
    }
    drop(neighbour);
    rig.settled().await;
}
