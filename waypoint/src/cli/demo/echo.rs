//! The application of the demonstration: says what it was asked, and by which of its pods.
//!
//! Over HTTP/1.1 and HTTP/2 it answers any request with JSON; below `/slow` it takes its time. Over TCP it sends back what it gets.
//! It knows nothing of the mesh: it sees what an application in a pod sees.

use std::{collections::BTreeMap, convert::Infallible, io, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite},
    time::{sleep, timeout},
};

/// How an HTTP/2 connection begins (RFC 9113 §3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Bytes of a request's body that are read; a longer one is answered 413.
const MAX_BODY: usize = 1 << 20;
/// Streams of one HTTP/2 connection.
const MAX_STREAMS: u32 = 100;
/// How long `/slow` takes: longer than the route of the demonstration waits.
const SLOW: Duration = Duration::from_secs(3);
/// How long a connection may take to say its first bytes.
const FIRST_BYTES: Duration = Duration::from_secs(60);

/// One running copy of the application.
#[derive(Debug, PartialEq, Eq)]
pub struct App {
    /// The pod's name.
    pub pod: String,
    /// The version that it is.
    pub version: String,
}

/// What it answers.
#[derive(Serialize)]
struct Answer<'a> {
    version: &'a str,
    pod: &'a str,
    method: &'a str,
    path: &'a str,
    protocol: &'static str,
    host: &'a str,
    headers: BTreeMap<&'a str, String>,
    body_bytes: usize,
}

// === impl App ===

impl App {
    /// Serves HTTP/1.1 or HTTP/2, whichever the connection begins with, until it ends.
    pub async fn http(self: Arc<Self>, mut io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let mut held = BytesMut::with_capacity(PREFACE.len());
        let first = timeout(FIRST_BYTES, async {
            while held.len() < PREFACE.len() && PREFACE.starts_with(&held) {
                if io.read_buf(&mut held).await? == 0 {
                    break;
                }
            }
            io::Result::Ok(held.starts_with(PREFACE))
        });
        let Ok(Ok(is_http2)) = first.await else { return };
        let (read, write) = tokio::io::split(io);
        let io = tokio::io::join(io::Cursor::new(held).chain(read), write);
        if is_http2 {
            self.http2(io).await;
        } else {
            self.http1(io).await;
        }
    }

    async fn http1(self: Arc<Self>, io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let service = service_fn(|request: Request<Incoming>| {
            let app = self.clone();
            async move {
                let (head, body) = request.into_parts();
                let body = Limited::new(body, MAX_BODY).collect().await.map(|body| body.to_bytes().len());
                let (status, text) = app
                    .answer("HTTP/1.1", &head.method, &head.uri, &head.headers, body.ok())
                    .await;
                Ok::<_, Infallible>(json(status, Full::new(text)))
            }
        });
        // A connection that breaks is the caller's to notice.
        let _ = hyper::server::conn::http1::Builder::new()
            .serve_connection(TokioIo::new(io), service)
            .await;
    }

    async fn http2(self: Arc<Self>, io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let mut builder = h2::server::Builder::new();
        let Ok(mut connection) = builder.max_concurrent_streams(MAX_STREAMS).handshake::<_, Bytes>(io).await else {
            return;
        };
        while let Some(Ok((request, mut respond))) = connection.accept().await {
            let app = self.clone();
            tokio::spawn(async move {
                let (head, mut body) = request.into_parts();
                let mut length = Some(0);
                while let (Some(sum), Some(piece)) = (length, body.data().await) {
                    let Ok(piece) = piece else { return };
                    // Fails only when the stream is gone, which sending the answer finds out.
                    let _ = body.flow_control().release_capacity(piece.len());
                    length = Some(sum + piece.len()).filter(|sum| *sum <= MAX_BODY);
                }
                let (status, text) = app.answer("HTTP/2", &head.method, &head.uri, &head.headers, length).await;
                if let Ok(mut stream) = respond.send_response(json(status, ()), false) {
                    let _ = stream.send_data(text, true);
                }
            });
        }
    }

    /// Status and text of an answer; `body` is the length of the request's body, `None` when it was too long or broke off.
    async fn answer(
        &self,
        protocol: &'static str,
        method: &Method,
        uri: &Uri,
        headers: &HeaderMap,
        body: Option<usize>,
    ) -> (StatusCode, Bytes) {
        let Some(body_bytes) = body else {
            return (
                StatusCode::PAYLOAD_TOO_LARGE,
                Bytes::from_static(b"{\"error\": \"the body is too long\"}\n"),
            );
        };
        if uri.path().starts_with("/slow") {
            sleep(SLOW).await;
        }
        let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
        let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
        let answer = Answer {
            version: &self.version,
            pod: &self.pod,
            method: method.as_str(),
            path: uri.path_and_query().map_or("/", |path| path.as_str()),
            protocol,
            host: uri.authority().map(|authority| authority.as_str()).or(host).unwrap_or(""),
            headers: headers.iter().map(|(name, value)| (name.as_str(), text(value))).collect(),
            body_bytes,
        };
        match serde_json::to_vec_pretty(&answer) {
            Ok(mut bytes) => {
                bytes.push(b'\n');
                (StatusCode::OK, bytes.into())
            }
            Err(error) => (
                StatusCode::INTERNAL_SERVER_ERROR,
                format!("{{\"error\": \"{error}\"}}\n").into(),
            ),
        }
    }
}

fn json<B>(status: StatusCode, body: B) -> Response<B> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Sends back what it gets, until the caller has said everything.
pub async fn tcp(io: impl AsyncRead + AsyncWrite + Unpin) {
    let (mut read, mut write) = tokio::io::split(io);
    if tokio::io::copy(&mut read, &mut write).await.is_ok() {
        let _ = tokio::io::AsyncWriteExt::shutdown(&mut write).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn app() -> Arc<App> {
        Arc::new(App {
            pod: "shop-v2-a".into(),
            version: "v2".into(),
        })
    }

    #[tokio::test]
    async fn it_says_what_it_was_asked() {
        let (near, far) = tokio::io::duplex(4096);
        tokio::spawn(app().http(far));
        let (mut client, connection) = hyper::client::conn::http1::handshake(TokioIo::new(near)).await.unwrap();
        tokio::spawn(connection);
        let request = Request::get("/cart?id=1")
            .header("host", "shop")
            .header("x-version", "v2")
            .body(String::new())
            .unwrap();
        let body = client
            .send_request(request)
            .await
            .unwrap()
            .into_body()
            .collect()
            .await
            .unwrap()
            .to_bytes();
        let answer: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(
            (
                &answer["version"],
                &answer["path"],
                &answer["host"],
                &answer["headers"]["x-version"]
            ),
            (&"v2".into(), &"/cart?id=1".into(), &"shop".into(), &"v2".into())
        );
    }

    #[tokio::test]
    async fn it_speaks_http2_when_spoken_to_so() {
        let (near, far) = tokio::io::duplex(4096);
        tokio::spawn(app().http(far));
        let (mut client, connection) = h2::client::handshake(near).await.unwrap();
        tokio::spawn(connection);
        let request = Request::get("http://shop/cart").body(()).unwrap();
        let mut body = client.send_request(request, true).unwrap().0.await.unwrap().into_body();
        let answer: serde_json::Value = serde_json::from_slice(&body.data().await.unwrap().unwrap()).unwrap();
        assert_eq!((&answer["host"], &answer["protocol"]), (&"shop".into(), &"HTTP/2".into()));
    }
}
