//! What two readers could read differently: every request is refused, or the endpoint reads of it just what the proxy read.
//!
//! The endpoint is a reader of its own, strict where it matters: it knows one Content-Length or chunks, ends lines with CRLF, and writes
//! down every request that it finds. `/smuggled` is the request that stands where only one of two readers would see it.

use std::sync::Arc;

use bytes::{Buf as _, BytesMut};
use cairn_hbone::TunnelStream;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};

use crate::{
    PATIENCE, WEB,
    rig::{App, Config, Pod, Rig},
    wire::{DATA, END_HEADERS, END_STREAM, HEADERS, field, frame},
};

/// The requests that the endpoint has read: `POST /a "body" host`.
type Seen = Arc<Mutex<Vec<String>>>;

/// What becomes of a vector.
#[derive(Clone, Copy)]
enum Becomes {
    /// 400, or another error of the client's, and nothing goes on.
    Refused,
    /// The endpoint reads these.
    Seen(&'static [&'static str]),
}
use Becomes::{Refused, Seen as Reads};

/// A reader that writes down what it reads, and answers each request.
fn recorder(seen: Seen) -> App {
    Arc::new(move |stream, _| {
        let seen = seen.clone();
        Box::pin(async move {
            if let Err(why) = record(stream, &seen).await {
                seen.lock().push(format!("UNREADABLE {why}"));
            }
        })
    })
}

async fn more(stream: &mut TunnelStream, buffer: &mut BytesMut) -> Result<(), String> {
    match stream.read_buf(buffer).await {
        Ok(0) => Err("it ended in a request".into()),
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

/// A line without its CRLF.
async fn line(stream: &mut TunnelStream, buffer: &mut BytesMut) -> Result<String, String> {
    loop {
        if let Some(end) = buffer.windows(2).position(|two| two == b"\r\n") {
            let line = String::from_utf8_lossy(&buffer.split_to(end)).into_owned();
            buffer.advance(2);
            if line.contains(['\r', '\n', '\0']) {
                return Err(format!("a line with a control character: {line:?}"));
            }
            return Ok(line);
        }
        more(stream, buffer).await?;
    }
}

async fn take(stream: &mut TunnelStream, buffer: &mut BytesMut, count: usize) -> Result<Vec<u8>, String> {
    while buffer.len() < count {
        more(stream, buffer).await?;
    }
    Ok(buffer.split_to(count).to_vec())
}

async fn record(mut stream: TunnelStream, seen: &Seen) -> Result<(), String> {
    let mut buffer = BytesMut::new();
    loop {
        if buffer.is_empty() && matches!(stream.read_buf(&mut buffer).await, Ok(0) | Err(_)) {
            return Ok(());
        }
        let first = line(&mut stream, &mut buffer).await?;
        let mut words = first.split(' ');
        let (Some(method), Some(path), Some("HTTP/1.1"), None) = (words.next(), words.next(), words.next(), words.next()) else {
            return Err(format!("no request line: {first:?}"));
        };
        let (mut lengths, mut codings, mut hosts) = (Vec::new(), Vec::new(), Vec::new());
        loop {
            let field = line(&mut stream, &mut buffer).await?;
            if field.is_empty() {
                break;
            }
            let (name, value) = field.split_once(": ").ok_or(format!("no field: {field:?}"))?;
            if !name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
            {
                return Err(format!("no name: {name:?}"));
            }
            match name.to_ascii_lowercase().as_str() {
                "content-length" => lengths.push(value.to_owned()),
                "transfer-encoding" => codings.push(value.to_owned()),
                "host" => hosts.push(value.to_owned()),
                "upgrade" | "http2-settings" => return Err(format!("{name} was passed on")),
                _ => {}
            }
        }
        let body = match (lengths.as_slice(), codings.as_slice()) {
            ([], []) => Vec::new(),
            ([length], []) if length.bytes().all(|digit| digit.is_ascii_digit()) => {
                take(&mut stream, &mut buffer, length.parse().map_err(|_| "a long length")?).await?
            }
            ([], [coding]) if coding == "chunked" => {
                let mut body = Vec::new();
                loop {
                    let size = line(&mut stream, &mut buffer).await?;
                    let size = usize::from_str_radix(&size, 16).map_err(|_| format!("no size: {size:?}"))?;
                    body.extend(take(&mut stream, &mut buffer, size).await?);
                    if !line(&mut stream, &mut buffer).await?.is_empty() {
                        return Err("a chunk without its end".into());
                    }
                    if size == 0 {
                        break body;
                    }
                }
            }
            other => return Err(format!("doubtful framing: {other:?}")),
        };
        let body = String::from_utf8_lossy(&body).into_owned();
        seen.lock().push(format!("{method} {path} {body:?} {}", hosts.join(" and ")));
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
        stream.write_all(answer).await.map_err(|error| error.to_string())?;
    }
}

async fn mesh() -> (Rig, Pod, Seen) {
    let rig = Rig::start().await;
    let seen = Seen::default();
    let pod = rig.pod(10, recorder(seen.clone())).await;
    rig.serve(Config::default().http(WEB, &[pod.address])).await;
    (rig, pod, seen)
}

/// Everything that comes back, while something comes.
async fn heard(what: &str, stream: &mut TunnelStream, until: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    let mut heard = Vec::new();
    let reading = async { while !until(&heard) && stream.read_buf(&mut heard).await.is_ok_and(|count| count > 0) {} };
    timeout(PATIENCE, reading)
        .await
        .unwrap_or_else(|_| panic!("{what}: neither an answer nor the end"));
    heard
}

/// Sends a vector, and says what became of it.
async fn becomes(rig: &Rig, seen: &Seen, what: &str, bytes: &[u8], expected: Becomes) {
    seen.lock().clear();
    let mut stream = rig.open(WEB).await.unwrap().stream;
    let _ = stream.write_all(bytes).await;
    let answers = match expected {
        Refused => 0,
        Reads(requests) => requests.len(),
    };
    let count = |heard: &[u8]| heard.windows(13).filter(|word| word == b"HTTP/1.1 200 ").count();
    let heard = heard(what, &mut stream, |heard| {
        answers > 0 && count(heard) >= answers && heard.ends_with(b"ok")
    })
    .await;
    drop(stream);
    rig.settled().await;
    let heard = String::from_utf8_lossy(&heard).into_owned();
    let read = seen.lock().clone();
    match expected {
        Refused => {
            assert!(read.is_empty(), "{what}: it went on as {read:?}; heard {heard:?}");
            let refused = ["HTTP/1.1 4", "HTTP/1.1 501 "].iter().any(|status| heard.starts_with(status));
            assert!(heard.is_empty() || refused, "{what}: {heard:?}");
        }
        Reads(requests) => assert_eq!(read, requests, "{what}: heard {heard:?}"),
    }
}

/// A POST with these fields and what stands behind its head.
fn post(fields: &str, behind: &str) -> Vec<u8> {
    format!("POST /a HTTP/1.1\r\nhost: web\r\n{fields}\r\n{behind}").into_bytes()
}

const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nhost: web\r\n\r\n";

#[tokio::test]
async fn lengths_and_codings_that_disagree_are_refused() {
    let (rig, _pod, seen) = mesh().await;
    let chunks = format!("0\r\n\r\n{SMUGGLED}");
    let both = |coding: &str| post(&format!("content-length: 42\r\n{coding}\r\n"), &chunks);
    let vectors = [
        ("CL.TE", both("transfer-encoding: chunked")),
        ("CL.TE, a space before the colon", both("transfer-encoding : chunked")),
        ("CL.TE, a tab", both("transfer-encoding:\tchunked")),
        ("CL.TE, a vertical tab", both("transfer-encoding:\x0bchunked")),
        ("CL.TE, spelled in capitals", both("TRANSFER-ENCODING: CHUNKED")),
        ("CL.TE, a line that is folded", both("transfer-encoding:\r\n chunked")),
        ("CL.TE, behind a bare line feed", both("x: x\ntransfer-encoding: chunked")),
        (
            "CL.TE, behind a bare carriage return",
            both("x: x\rtransfer-encoding: chunked"),
        ),
        ("CL.TE, in quotes", both("transfer-encoding: \"chunked\"")),
        ("CL.TE, a word too much", both("transfer-encoding: xchunked")),
        ("CL.TE, an empty one", both("transfer-encoding:")),
        ("CL.TE, identity", both("transfer-encoding: identity")),
        (
            "TE.CL",
            post(
                "transfer-encoding: chunked\r\ncontent-length: 4\r\n",
                "25\r\nGET /smuggled HTTP/1.1\r\nhost: web\r\n\r\n\r\n0\r\n\r\n",
            ),
        ),
        (
            "TE.TE, the second is no coding",
            post("transfer-encoding: chunked\r\ntransfer-encoding: cow\r\n", &chunks),
        ),
        (
            "TE.TE, the first is no coding",
            post("transfer-encoding: cow\r\ntransfer-encoding: chunked\r\n", &chunks),
        ),
        (
            "TE.TE, identity behind",
            post("transfer-encoding: chunked, identity\r\n", &chunks),
        ),
        ("TE.TE, a NUL", post("transfer-encoding: chunked\0\r\n", &chunks)),
        (
            "TE in HTTP/1.0",
            format!("POST /a HTTP/1.0\r\nhost: web\r\ntransfer-encoding: chunked\r\n\r\n{chunks}").into_bytes(),
        ),
        ("two lengths", post("content-length: 0\r\ncontent-length: 37\r\n", SMUGGLED)),
        ("a list of lengths", post("content-length: 0, 37\r\n", SMUGGLED)),
        ("a plus", post("content-length: +0\r\n", SMUGGLED)),
        ("a minus", post("content-length: -0\r\n", SMUGGLED)),
        ("a space within", post("content-length: 3 7\r\n", SMUGGLED)),
        ("hexadecimal", post("content-length: 0x25\r\n", SMUGGLED)),
        (
            "a length that overflows",
            post("content-length: 18446744073709551653\r\n", SMUGGLED),
        ),
        ("an empty length", post("content-length:\r\n", SMUGGLED)),
        ("a space before the colon", post("content-length : 37\r\n", SMUGGLED)),
        ("a folded line", post("x: y\r\n content-length: 37\r\n", SMUGGLED)),
        (
            "a first line that is folded",
            b"GET /a HTTP/1.1\r\n host: web\r\n\r\n".to_vec(),
        ),
        ("a NUL in a name", post("content-length\0: 37\r\n", SMUGGLED)),
        ("a NUL in a value", post("x: a\0b\r\n", "")),
        ("a bare carriage return in a value", post("x: a\rb\r\n", "")),
        (
            "a bare carriage return as a line",
            b"GET /a HTTP/1.1\rhost: web\r\n\r\n".to_vec(),
        ),
        ("a parenthesis in a name", post("content(length: 37\r\n", SMUGGLED)),
        ("no colon", post("content-length 37\r\n", SMUGGLED)),
        ("no host", b"GET /a HTTP/1.1\r\n\r\n".to_vec()),
        (
            "a space in the target",
            b"GET /a /smuggled HTTP/1.1\r\nhost: web\r\n\r\n".to_vec(),
        ),
        (
            "a control character in the target",
            b"GET /a\x01 HTTP/1.1\r\nhost: web\r\n\r\n".to_vec(),
        ),
    ];
    for (what, bytes) in vectors {
        becomes(&rig, &seen, what, &bytes, Refused).await;
    }
}

#[tokio::test]
async fn chunks_that_could_be_read_in_two_ways_never_become_two_requests() {
    let (rig, _pod, seen) = mesh().await;
    let chunked = |chunks: &str| post("transfer-encoding: chunked\r\n", chunks);
    for (what, chunks) in [
        ("a size with a sign", "+3\r\nabc\r\n0\r\n\r\n"),
        ("a negative size", "-1\r\nabc\r\n0\r\n\r\n"),
        ("a size with 0x", "0x3\r\nabc\r\n0\r\n\r\n"),
        ("no size", "\r\nabc\r\n0\r\n\r\n"),
        ("a size that overflows", "10000000000000003\r\nabc\r\n0\r\n\r\n"),
        ("a size of many digits", "fffffffffffffffff\r\nabc\r\n0\r\n\r\n"),
        ("a chunk that is longer than it says", "3\r\nabcd\r\n0\r\n\r\n"),
        ("a chunk that ends with a bare line feed", "3\r\nabc\n0\r\n\r\n"),
    ] {
        seen.lock().clear();
        let mut stream = rig.open(WEB).await.unwrap().stream;
        let _ = stream.write_all(&[&chunked(chunks)[..], SMUGGLED.as_bytes()].concat()).await;
        let heard = heard(what, &mut stream, |_| false).await;
        drop(stream);
        rig.settled().await;
        let heard = String::from_utf8_lossy(&heard).into_owned();
        // The head may have gone on before the chunk came: then the endpoint sees a request that breaks off.
        let read = seen.lock().clone();
        assert!(
            read.iter().all(|request| request.starts_with("UNREADABLE ")),
            "{what}: {read:?}"
        );
        assert!(!heard.contains("HTTP/1.1 200 "), "{what}: {heard:?}");
    }
}

#[tokio::test]
async fn what_is_allowed_is_read_in_the_one_way_that_there_is() {
    let (rig, _pod, seen) = mesh().await;
    let vectors: [(&str, Vec<u8>, Becomes); 19] = [
        ("a body and a request behind it", post("content-length: 3\r\n", &format!("abc{SMUGGLED}")), Reads(&["POST /a \"abc\" web", "GET /smuggled \"\" web"])),
        ("chunks and a request behind them", post("transfer-encoding: chunked\r\n", &format!("3\r\nabc\r\n0\r\n\r\n{SMUGGLED}")), Reads(&["POST /a \"abc\" web", "GET /smuggled \"\" web"])),
        ("a request within chunks", post("transfer-encoding: chunked\r\n", "25\r\nGET /smuggled HTTP/1.1\r\nhost: web\r\n\r\n\r\n0\r\n\r\n"), Reads(&["POST /a \"GET /smuggled HTTP/1.1\\r\\nhost: web\\r\\n\\r\\n\" web"])),
        ("extensions of chunks", post("transfer-encoding: chunked\r\n", "3;a=b;c=\"d\"\r\nabc\r\n0;x\r\n\r\n"), Reads(&["POST /a \"abc\" web"])),
        ("a size with zeros", post("transfer-encoding: chunked\r\n", "0000000003\r\nabc\r\n0\r\n\r\n"), Reads(&["POST /a \"abc\" web"])),
        ("trailers that would be framing", post("transfer-encoding: chunked\r\n", "3\r\nabc\r\n0\r\ncontent-length: 37\r\ntransfer-encoding: chunked\r\n\r\n"), Reads(&["POST /a \"abc\" web"])),
        ("white space around a length", post("content-length: \t3 \r\n", "abc"), Reads(&["POST /a \"abc\" web"])),
        ("the same length twice", post("content-length: 3\r\ncontent-length: 3\r\n", "abc"), Reads(&["POST /a \"abc\" web"])),
        ("lines that end with a line feed", b"POST /a HTTP/1.1\nhost: web\ncontent-length: 3\n\nabc".to_vec(), Reads(&["POST /a \"abc\" web"])),
        ("empty lines before a request", b"\r\n\r\nGET /a HTTP/1.1\r\nhost: web\r\n\r\n".to_vec(), Reads(&["GET /a \"\" web"])),
        ("a body of GET", b"GET /a HTTP/1.1\r\nhost: web\r\ncontent-length: 3\r\n\r\nabc".to_vec(), Reads(&["GET /a \"abc\" web"])),
        ("an absolute target and another host", b"GET http://inside/a HTTP/1.1\r\nhost: web\r\n\r\n".to_vec(), Reads(&["GET /a \"\" inside"])),
        ("an underscore is not a hyphen", post("content_length: 37\r\n", SMUGGLED), Reads(&["POST /a \"\" web", "GET /smuggled \"\" web"])),
        ("a connection header that names the length", post("connection: content-length\r\ncontent-length: 3\r\n", "abc"), Reads(&["POST /a \"abc\" web"])),
        ("a connection header that names the host", b"GET /a HTTP/1.1\r\nhost: web\r\nconnection: host\r\n\r\n".to_vec(), Reads(&["GET /a \"\" web"])),
        ("a connection header that names the coding", post("connection: transfer-encoding\r\ntransfer-encoding: chunked\r\n", "3\r\nabc\r\n0\r\n\r\n"), Reads(&["POST /a \"abc\" web"])),
        ("an offer of h2c", b"GET /a HTTP/1.1\r\nhost: web\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n\r\n".to_vec(), Reads(&["GET /a \"\" web"])),
        ("an offer of h2c with a request behind it", format!("GET /a HTTP/1.1\r\nhost: web\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n{SMUGGLED}").into_bytes(), Reads(&["GET /a \"\" web", "GET /smuggled \"\" web"])),
        ("two hosts are one that no host has", b"GET /a HTTP/1.1\r\nhost: web\r\nhost: inside\r\n\r\n".to_vec(), Reads(&["GET /a \"\" web,inside"])),
    ];
    for (what, bytes, expected) in vectors {
        becomes(&rig, &seen, what, &bytes, expected).await;
    }
}

/// The four fields of a request; the indexes are those of HPACK's static table.
fn head(method: &[u8], path: &[u8], authority: &[u8], more: &[(&str, &[u8])]) -> Vec<u8> {
    let mut head = [
        field(2, "", method),
        field(6, "", b"http"),
        field(4, "", path),
        field(1, "", authority),
    ]
    .concat();
    for (name, value) in more {
        head.extend(field(0, name, value));
    }
    head
}

#[tokio::test]
async fn nothing_of_http2_becomes_more_in_http1_than_it_was() {
    let (rig, _pod, seen) = mesh().await;
    let get = |more: &[(&str, &[u8])]| (head(b"GET", b"/a", b"web", more), None);
    let with = |method: &[u8], path: &[u8], authority: &[u8]| (head(method, path, authority, &[]), None);
    let body =
        |length: &'static [u8], body: &'static [u8]| (head(b"POST", b"/a", b"web", &[("content-length", length)]), Some(body));
    let good = Reads(&["GET /a \"\" web"]);
    let plain = || head(b"GET", b"/a", b"web", &[]);
    type Vector = (&'static str, (Vec<u8>, Option<&'static [u8]>), Becomes);
    let vectors: Vec<Vector> = vec![
        ("nothing special", get(&[]), good),
        ("CRLF in a value", get(&[("x", b"a\r\ntransfer-encoding: chunked")]), Refused),
        ("LF in a value", get(&[("x", b"a\nx: y")]), Refused),
        ("NUL in a value", get(&[("x", b"a\0b")]), Refused),
        ("a colon in a name", get(&[("x: y\r\nz", b"a")]), Refused),
        ("a name with a colon", get(&[("x:y", b"a")]), Refused),
        ("a space in a name", get(&[("x y", b"a")]), Refused),
        ("an empty name", get(&[("", b"a")]), Refused),
        ("capitals in a name", get(&[("Content-Length", b"3")]), Refused),
        ("transfer-encoding", get(&[("transfer-encoding", b"chunked")]), Refused),
        ("connection", get(&[("connection", b"close")]), Refused),
        ("keep-alive", get(&[("keep-alive", b"1")]), Refused),
        ("proxy-connection", get(&[("proxy-connection", b"close")]), Refused),
        ("upgrade", get(&[("upgrade", b"h2c")]), Refused),
        ("te other than trailers", get(&[("te", b"gzip")]), Refused),
        (
            "a method of several words",
            with(b"GET /smuggled HTTP/1.1\r\nhost: web\r\n\r\nGET", b"/a", b"web"),
            Refused,
        ),
        ("a method with a space", with(b"GET /smuggled", b"/a", b"web"), Refused),
        ("a path with a space", with(b"GET", b"/smuggled HTTP/1.1", b"web"), Refused),
        (
            "a path with CRLF",
            with(b"GET", b"/smuggled HTTP/1.1\r\nhost: web\r\n\r\nGET /a", b"web"),
            Refused,
        ),
        ("an empty path", with(b"GET", b"", b"web"), Refused),
        ("a path that does not begin with a slash", with(b"GET", b"a", b"web"), Refused),
        ("an authority with CRLF", with(b"GET", b"/a", b"web\r\nx: y"), Refused),
        ("an authority with a space", with(b"GET", b"/a", b"web inside"), Refused),
        ("an authority with a path", with(b"GET", b"/a", b"web/smuggled?"), Refused),
        ("two paths", ([plain(), field(4, "", b"/smuggled")].concat(), None), Refused),
        ("two methods", ([plain(), field(2, "", b"POST")].concat(), None), Refused),
        (
            "two authorities",
            ([plain(), field(1, "", b"inside")].concat(), None),
            Refused,
        ),
        (
            "a pseudo header behind a field",
            (
                [
                    field(2, "", b"GET"),
                    field(6, "", b"http"),
                    field(1, "", b"web"),
                    field(0, "x", b"y"),
                    field(4, "", b"/a"),
                ]
                .concat(),
                None,
            ),
            Refused,
        ),
        ("an unknown pseudo header", get(&[(":x", b"y")]), Refused),
        ("a pseudo header of answers", get(&[(":status", b"200")]), Refused),
        (
            "no path",
            (
                [field(2, "", b"GET"), field(6, "", b"http"), field(1, "", b"web")].concat(),
                None,
            ),
            Refused,
        ),
        (
            "no method",
            (
                [field(6, "", b"http"), field(4, "", b"/a"), field(1, "", b"web")].concat(),
                None,
            ),
            Refused,
        ),
        ("another host beside the authority", get(&[("host", b"inside")]), good),
        ("a length and that much", body(b"3", b"abc"), Reads(&["POST /a \"abc\" web"])),
        ("a length that is no number", body(b"3x", b"abc"), Refused),
        (
            "two lengths",
            (
                head(b"POST", b"/a", b"web", &[("content-length", b"3"), ("content-length", b"4")]),
                Some(b"abc"),
            ),
            Refused,
        ),
    ];
    for (what, (head, body), expected) in vectors {
        let read = spoken(&rig, &seen, &head, body).await;
        match expected {
            Refused => assert!(read.is_empty(), "{what}: it went on as {read:?}"),
            Reads(requests) => assert_eq!(read, requests, "{what}"),
        }
    }
    for (what, length, body) in [
        (
            "a body longer than it says",
            &b"3"[..],
            &b"abcGET /smuggled HTTP/1.1\r\nhost: web\r\n\r\n"[..],
        ),
        ("a body shorter than it says", b"41", b"abc"),
        ("no body where there should be one", b"3", b""),
    ] {
        let read = spoken(&rig, &seen, &head_of_post(length), Some(body)).await;
        assert!(
            read.iter().all(|request| request.starts_with("UNREADABLE ")),
            "{what}: {read:?}"
        );
    }
}

fn head_of_post(length: &[u8]) -> Vec<u8> {
    head(b"POST", b"/a", b"web", &[("content-length", length)])
}

/// Sends a request by hand in an HTTP/2 connection of its own; what the endpoint has read when it was answered.
async fn spoken(rig: &Rig, seen: &Seen, head: &[u8], body: Option<&[u8]>) -> Vec<String> {
    seen.lock().clear();
    let mut stream = rig.open(WEB).await.unwrap().stream;
    let end = if body.is_none() { END_STREAM } else { 0 };
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(4, 0, 0, &[]));
    bytes.extend(frame(HEADERS, END_HEADERS | end, 1, head));
    if let Some(body) = body {
        bytes.extend(frame(DATA, END_STREAM, 1, body));
    }
    stream.write_all(&bytes).await.unwrap();
    let answered = async {
        loop {
            let mut head = [0; 9];
            if stream.read_exact(&mut head).await.is_err() {
                return;
            }
            let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
            if stream.read_exact(&mut payload).await.is_err()
                || matches!(head[3], 3 | 7)
                || head[4] & END_STREAM != 0 && head[3] < 2
            {
                return;
            }
        }
    };
    timeout(PATIENCE, answered).await.expect("an answer, a reset or the end");
    drop(stream);
    rig.settled().await;
    seen.lock().clone()
}
