//! Lines, filters, and files that are slow, gone or full.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    time::Duration,
};

use cairn_exchange::{
    ResponseFlags,
    format::{Absent, FormatProblem, Template, View},
};
use http::{HeaderValue, StatusCode};
use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::{
    AccessLog, Comparison, DEFAULT_TEXT_FORMAT, FLUSH_BYTES, Filter, JsonFormat, JsonValue, LogFiles, LogFormat, Output,
    QUEUE_BYTES, Sink,
};
use crate::{Registry, testing};

/// Long enough for a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

fn rendered(format: &LogFormat) -> String {
    let mut out = Vec::new();
    format.render(&View::new(&testing::exchange()), &mut out);
    String::from_utf8(out).unwrap()
}

#[test]
fn the_default_text_is_istios() {
    assert_eq!(
        rendered(&LogFormat::istio_text()),
        concat!(
            r#"[2022-04-01T03:23:12.736Z] "GET /x HTTP/1.1" 200 - via_upstream - "-" 10 600 4 - "-" "-" "-" "web" "#,
            r#""envoy://connect_originate/10.244.0.31:8080" inbound-vip|80|http|web.app.svc.cluster.local "#,
            "envoy://internal_client_address/ 10.96.1.10:80 10.244.0.5:41616 - -\n"
        )
    );
}

#[test]
fn the_default_json_has_sorted_keys_and_types() {
    assert_eq!(
        rendered(&LogFormat::istio_json()),
        concat!(
            r#"{"authority":"web","bytes_received":10,"bytes_sent":600,"connection_termination_details":null,"#,
            r#""downstream_local_address":"10.96.1.10:80","downstream_remote_address":"10.244.0.5:41616","duration":4,"#,
            r#""method":"GET","path":"/x","protocol":"HTTP/1.1","request_id":null,"requested_server_name":null,"#,
            r#""response_code":200,"response_code_details":"via_upstream","response_flags":"-","route_name":null,"#,
            r#""start_time":"2022-04-01T03:23:12.736Z","#,
            r#""upstream_cluster":"inbound-vip|80|http|web.app.svc.cluster.local","#,
            r#""upstream_host":"envoy://connect_originate/10.244.0.31:8080","#,
            r#""upstream_local_address":"envoy://internal_client_address/","upstream_service_time":null,"#,
            r#""upstream_transport_failure_reason":null,"user_agent":null,"x_forwarded_for":null}"#,
            "\n"
        )
    );
}

fn text(text: &str) -> JsonValue {
    JsonValue::Text(text.to_owned())
}

fn nested() -> Vec<(String, JsonValue)> {
    let own = |fields: Vec<(&str, JsonValue)>| fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    own(vec![
        ("z", JsonValue::Number(2.0)),
        ("a", JsonValue::Bool(true)),
        ("null", JsonValue::Null),
        ("plain", text("te\"xt")),
        ("both", text("%RESPONSE_CODE%/%REQ(x-none)%")),
        (
            "list",
            JsonValue::List(vec![text("%REQ(x-none)%"), JsonValue::Number(0.5), text("%PROTOCOL%")]),
        ),
        ("empty", JsonValue::Object(own(vec![("x", text("%REQ(x-none)%"))]))),
        ("odd", text("%REQ(odd)%")),
        ("nothing", JsonValue::List(vec![text("%REQ(x-none)%")])),
    ])
}

#[test]
fn json_follows_envoys_rules_for_types_and_absence() {
    let mut exchange = testing::exchange();
    let odd = HeaderValue::from_bytes(b"a\"\\\t\xff\xc3\xa4").unwrap();
    exchange.request.as_mut().unwrap().headers.insert("odd", odd);
    for (omit, line) in [
        (
            false,
            "{\"a\":true,\"both\":\"200/-\",\"empty\":{\"x\":null},\"list\":[null,0.5,\"HTTP/1.1\"],\"nothing\":[null],\
             \"null\":null,\"odd\":\"a\\\"\\\\\\t\u{fffd}ä\",\"plain\":\"te\\\"xt\",\"z\":2}\n",
        ),
        (
            true,
            "{\"a\":true,\"both\":\"200/\",\"list\":[0.5,\"HTTP/1.1\"],\"nothing\":[],\"odd\":\"a\\\"\\\\\\t\u{fffd}ä\",\
             \"plain\":\"te\\\"xt\",\"z\":2}\n",
        ),
    ] {
        let mut out = Vec::new();
        JsonFormat::new(nested(), omit)
            .unwrap()
            .render(&View::new(&exchange), &mut out);
        assert_eq!(String::from_utf8(out.clone()).unwrap(), line);
        serde_json::from_slice::<serde_json::Value>(&out).unwrap();
    }
}

#[test]
fn an_object_of_absent_values_is_an_empty_line() {
    let mut out = Vec::new();
    let fields = vec![("x".to_owned(), text("%REQ(x-none)%"))];
    JsonFormat::new(fields, true)
        .unwrap()
        .render(&View::new(&testing::exchange()), &mut out);
    assert_eq!(out, b"{}\n");
}

#[test]
fn an_error_names_the_field() {
    let fields = vec![("a".to_owned(), JsonValue::List(vec![JsonValue::Null, text("x %REQ()%")]))];
    let error = JsonFormat::new(fields, false).unwrap_err();
    assert_eq!((error.field.as_str(), error.source.position), ("a[1]", 2));
    assert_eq!(error.source.problem, FormatProblem::NeedsParameter("REQ".into()));
}

#[test]
fn an_operator_that_is_not_known_is_absent_and_named() {
    let format = LogFormat::Json(JsonFormat::new(vec![("a".to_owned(), text("%NO%"))], false).unwrap());
    assert_eq!(format.unrecorded().collect::<Vec<_>>(), ["NO"]);
    let mut out = Vec::new();
    format.render(&View::new(&testing::exchange()), &mut out);
    assert_eq!(out, b"{\"a\":null}\n");
}

#[test]
fn filters_choose() {
    let mut failed = testing::exchange();
    failed.status = Some(StatusCode::SERVICE_UNAVAILABLE);
    failed.flags = ResponseFlags::UPSTREAM_CONNECTION_FAILURE;
    let mut gone = testing::exchange();
    gone.status = None;
    let fine = testing::exchange();
    let any_flag = Filter::Flags(ResponseFlags::NONE);
    let server_error = Filter::Status(Comparison::AtLeast, 500);
    for (filter, matches) in [
        (Filter::Always, [true, true, true]),
        (Filter::Status(Comparison::AtLeast, 400), [false, true, false]),
        (Filter::Status(Comparison::AtMost, 200), [true, false, true]),
        (Filter::Status(Comparison::Equal, 0), [false, false, true]),
        (Filter::Status(Comparison::NotEqual, 200), [false, true, true]),
        (Filter::Duration(Comparison::AtLeast, 5), [false, false, false]),
        (
            Filter::Flags(ResponseFlags::UPSTREAM_CONNECTION_FAILURE),
            [false, true, false],
        ),
        (Filter::Flags(ResponseFlags::NO_ROUTE_FOUND), [false, false, false]),
        (any_flag.clone(), [false, true, false]),
        (
            Filter::All([any_flag.clone(), Filter::Status(Comparison::Equal, 200)].into()),
            [false, false, false],
        ),
        (
            Filter::Any([server_error, Filter::Status(Comparison::Equal, 0)].into()),
            [false, true, true],
        ),
    ] {
        assert_eq!(
            [&fine, &failed, &gone].map(|exchange| filter.matches(&View::new(exchange))),
            matches,
            "{filter:?}"
        );
    }
}

/// A folder that is taken away at the end of the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("cairn-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn log_to(files: &LogFiles, path: &Path, format: &str) -> AccessLog {
    AccessLog::new([Sink {
        filter: Filter::Always,
        output: Output::File {
            format: LogFormat::Text {
                template: Template::parse(format).unwrap(),
                absent: Absent::Dash,
            },
            file: files.open(path).unwrap(),
        },
    }])
}

#[tokio::test]
async fn lines_of_two_chains_reach_the_same_file() {
    let folder = Folder::new("shared-log");
    let path = folder.0.join("access.log");
    let files = LogFiles::new(Handle::current(), &Registry::new());
    let one = log_to(&files, &path, "one %RESPONSE_CODE%\n");
    let two = log_to(&files, &path, "two %PROTOCOL%\n");
    let exchange = testing::exchange();
    one.log(&View::new(&exchange));
    two.log(&View::new(&exchange));
    assert!(files.flush(PATIENCE).await);
    assert_eq!(fs::read_to_string(&path).unwrap(), "one 200\ntwo HTTP/1.1\n");
}

#[tokio::test]
async fn a_file_that_was_moved_away_is_opened_anew() {
    let folder = Folder::new("moved-log");
    let path = folder.0.join("access.log");
    let files = LogFiles::new(Handle::current(), &Registry::new());
    let log = log_to(&files, &path, "line\n");
    log.log(&View::new(&testing::exchange()));
    assert!(files.flush(PATIENCE).await);
    fs::rename(&path, folder.0.join("access.log.1")).unwrap();
    files.reopen();
    log.log(&View::new(&testing::exchange()));
    assert!(files.flush(PATIENCE).await);
    assert_eq!(fs::read_to_string(&path).unwrap(), "line\n");
}

#[tokio::test]
async fn a_file_that_cannot_be_opened_is_refused() {
    let files = LogFiles::new(Handle::current(), &Registry::new());
    let error = files.open("/nowhere/at/all.log").unwrap_err().to_string();
    assert!(
        error.starts_with("the access log /nowhere/at/all.log cannot be opened for appending: "),
        "{error}"
    );
}

/// A file whose writes wait until the test lets them go on.
struct Gate {
    begun: mpsc::Sender<usize>,
    go_on: mpsc::Receiver<io::Result<()>>,
    written: Arc<Mutex<Vec<u8>>>,
}

impl Write for Gate {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.begun.send(bytes.len()).unwrap();
        self.go_on.recv().unwrap_or(Ok(()))?;
        self.written.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test(start_paused = true)]
async fn a_file_that_hangs_costs_lines_but_never_time_and_they_are_counted() {
    let registry = Registry::new();
    let files = LogFiles::new(Handle::current(), &registry);
    let (begun, begins) = mpsc::channel();
    let (let_go, go_on) = mpsc::channel();
    let written = Arc::new(Mutex::new(Vec::new()));
    let gate = Gate {
        begun,
        go_on,
        written: Arc::clone(&written),
    };
    let file = files.start(Path::new("/slow"), Box::new(gate));

    let line = [b'x'; 1_024];
    for _ in 0..FLUSH_BYTES / line.len() {
        file.push(&line);
    }
    // The threshold wakes the writer, without any timer.
    let first = tokio::task::spawn_blocking(move || {
        let size = begins.recv_timeout(PATIENCE).unwrap();
        (size, begins)
    });
    let (size, begins) = first.await.unwrap();
    assert_eq!(size, FLUSH_BYTES);

    // The write hangs; one thread may leave an eighth of the queue, and what is beyond is dropped.
    let part = QUEUE_BYTES / 8 / line.len();
    for _ in 0..part + 3 {
        file.push(&line);
    }
    assert_eq!(file.dropped(), 3);

    drop(let_go);
    file.flush().await;
    assert_eq!(written.lock().len(), FLUSH_BYTES + part * line.len());
    drop(begins);
    file.push(&line);
    assert_eq!(file.dropped(), 3, "there is room again");
}

#[tokio::test(start_paused = true)]
async fn a_write_that_fails_is_counted_and_the_next_one_tried() {
    let registry = Registry::new();
    let files = LogFiles::new(Handle::current(), &registry);
    let (begun, _begins) = mpsc::channel();
    let (let_go, go_on) = mpsc::channel();
    let written = Arc::new(Mutex::new(Vec::new()));
    let gate = Gate {
        begun,
        go_on,
        written: Arc::clone(&written),
    };
    let file = files.start(Path::new("/full"), Box::new(gate));
    let_go.send(Err(io::Error::from(io::ErrorKind::StorageFull))).unwrap();
    let_go.send(Ok(())).unwrap();
    file.push(b"lost\n");
    file.flush().await;
    file.push(b"kept\n");
    file.flush().await;
    assert_eq!(&*written.lock(), b"kept\n");
    let failed = registry.counter("cairn_access_log_failed_writes_total", "", &[("path", "/full")]);
    assert_eq!(failed.get(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_lone_line_is_written_within_a_second() {
    let files = LogFiles::new(Handle::current(), &Registry::new());
    let (begun, begins) = mpsc::channel();
    let (_let_go, go_on) = mpsc::channel();
    drop(_let_go);
    let gate = Gate {
        begun,
        go_on,
        written: Arc::default(),
    };
    let file = files.start(Path::new("/lone"), Box::new(gate));
    let before = tokio::time::Instant::now();
    file.push(b"line\n");
    let size = tokio::task::spawn_blocking(move || begins.recv_timeout(PATIENCE));
    // The paused clock moves when nothing else can happen, which a blocking task hides; so it is moved here.
    tokio::task::yield_now().await;
    tokio::time::advance(super::FLUSH_INTERVAL).await;
    assert_eq!(size.await.unwrap().unwrap(), 5);
    assert!(before.elapsed() <= super::FLUSH_INTERVAL);
}

#[test]
fn a_log_tells_what_to_keep_of_the_answer() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let files = LogFiles::new(runtime.handle().clone(), &Registry::new());
    let sink = |format| Sink {
        filter: Filter::Always,
        output: Output::File {
            format,
            file: files.open("/dev/stderr").unwrap(),
        },
    };
    let json = vec![(
        "a".to_owned(),
        JsonValue::List(vec![text("%RESP(x-a)% %TLS_JA3_FINGERPRINT%")]),
    )];
    let log = AccessLog::new([
        sink(LogFormat::istio_text()),
        sink(LogFormat::Json(JsonFormat::new(json, false).unwrap())),
    ]);
    let names: Vec<_> = log.response_headers().map(|name| name.as_str()).collect();
    assert_eq!(names, ["x-envoy-upstream-service-time", "x-a"]);
    assert_eq!(log.unrecorded().collect::<Vec<_>>(), ["TLS_JA3_FINGERPRINT"]);
    assert!(!log.is_empty() && AccessLog::default().is_empty());
    assert_eq!(Template::parse(DEFAULT_TEXT_FORMAT).unwrap().unrecorded().count(), 0);
}
