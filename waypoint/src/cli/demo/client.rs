//! A client as plain as can be: one connection a request.

use std::{error::Error, net::SocketAddr};

use bytes::Bytes;
use http::{HeaderMap, Request, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// The host that is asked for.
const HOST: &str = "shop.demo";
/// Bytes of an answer.
const MAX_ANSWER: usize = 1 << 20;

/// An answer as the client sees it.
#[derive(Debug)]
pub struct Seen {
    /// Status; 0 where there is none.
    pub status: u16,
    /// Headers.
    pub headers: HeaderMap,
    /// Body, or all bytes.
    pub body: Bytes,
}

/// Why there is no answer.
type Failure = Box<dyn Error + Send + Sync>;

// === impl Seen ===

impl Seen {
    /// A header of the answer.
    pub fn header(&self, name: &str) -> Option<String> {
        Some(self.headers.get(name)?.to_str().ok()?.to_owned())
    }

    /// A field of what the application says of itself and of the request.
    pub fn application(&self, field: &str) -> Option<String> {
        let answer: serde_json::Value = serde_json::from_slice(&self.body).ok()?;
        Some(answer.get(field)?.as_str()?.to_owned())
    }

    /// A header that the application saw.
    pub fn application_header(&self, name: &str) -> Option<String> {
        let answer: serde_json::Value = serde_json::from_slice(&self.body).ok()?;
        Some(answer.get("headers")?.get(name)?.as_str()?.to_owned())
    }
}

/// A GET over HTTP/1.1.
pub async fn http1(address: SocketAddr, path: &str, headers: &[(&str, &str)]) -> Result<Seen, Failure> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let mut request = Request::get(path).header(header::HOST, HOST);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let (head, body) = sender.send_request(request.body(Empty::<Bytes>::new())?).await?.into_parts();
    let body = Limited::new(body, MAX_ANSWER).collect().await?.to_bytes();
    connection.abort();
    Ok(Seen {
        status: head.status.as_u16(),
        headers: head.headers,
        body,
    })
}

/// A GET over HTTP/2 with prior knowledge.
pub async fn http2(address: SocketAddr, path: &str) -> Result<Seen, Failure> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) = h2::client::handshake(stream).await?;
    let connection = tokio::spawn(connection);
    let request = Request::get(format!("http://{HOST}{path}")).body(())?;
    let (head, mut body) = sender.send_request(request, true)?.0.await?.into_parts();
    let mut all = Vec::new();
    while let Some(piece) = body.data().await {
        let piece = piece?;
        body.flow_control().release_capacity(piece.len())?;
        all.extend_from_slice(&piece);
        if all.len() > MAX_ANSWER {
            return Err("the answer is too long".into());
        }
    }
    connection.abort();
    Ok(Seen {
        status: head.status.as_u16(),
        headers: head.headers,
        body: all.into(),
    })
}

/// Sends bytes and the end, and reads what comes back.
pub async fn bytes(address: SocketAddr, send: &[u8]) -> Result<Seen, Failure> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(send).await?;
    stream.shutdown().await?;
    let mut body = Vec::new();
    stream.take(MAX_ANSWER as u64).read_to_end(&mut body).await?;
    Ok(Seen {
        status: 0,
        headers: HeaderMap::new(),
        body: body.into(),
    })
}
