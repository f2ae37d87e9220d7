//! The client's requests: just enough HTTP to ask and to know that the answer is whole.
//!
//! [`Http1`] writes constant bytes and reads heads with `httparse`; [`Http2`]
//! is `h2` with prior knowledge over a channel. Both take only a 200 with the
//! destination's answer for success; anything else is an error with its reason.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::{Buf, Bytes, BytesMut};
use h2::client::SendRequest;
use http::{Method, Request, StatusCode, Version};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use crate::destination::ANSWER_SIZE;
use crate::tunnel::{Channel, STREAM_WINDOW};

/// The path is one that the mesh's policy allows.
const REQUEST: &[u8] =
    b"GET /bench/item HTTP/1.1\r\nhost: web.app.svc.cluster.local\r\nuser-agent: cairn-bench\r\naccept: */*\r\n\r\n";
const URI: &str = "http://web.app.svc.cluster.local/bench/item";
const USER_AGENT: &str = "cairn-bench";

const MAX_HEADERS: usize = 32;
/// An answer's head longer than this is a fault of the proxy.
const MAX_HEAD: usize = 16 << 10;
const READ_SIZE: usize = 4 << 10;
/// How long a proxy may take to end its side of a channel.
const CLOSE_DEADLINE: Duration = Duration::from_millis(250);

/// HTTP/1.1 with keep-alive on one channel.
pub(crate) struct Http1 {
    channel: Channel,
    received: BytesMut,
}

impl Http1 {
    pub(crate) fn new(channel: Channel) -> Self {
        Self {
            channel,
            received: BytesMut::with_capacity(READ_SIZE),
        }
    }

    /// One request and its whole answer.
    pub(crate) async fn get(&mut self) -> Result<()> {
        self.channel.write_all(REQUEST).await?;
        loop {
            if let Some(size) = answer_size(&self.received)?
                && self.received.len() >= size
            {
                self.received.advance(size);
                return Ok(());
            }
            self.received.reserve(READ_SIZE);
            let read = self.channel.read_buf(&mut self.received).await?;
            ensure!(read > 0, "the connection ended inside an answer");
        }
    }

    /// Ends the channel as a ztunnel does when its application hangs up: our
    /// end first, then the other's. A proxy that keeps its end open is left behind.
    pub(crate) async fn close(mut self) -> Result<()> {
        self.channel.shutdown().await?;
        let drained = async {
            let mut rest = [0; 64];
            while self.channel.read(&mut rest).await.is_ok_and(|size| size > 0) {}
        };
        // Whether it came in time changes nothing for the request that was answered.
        let _ = timeout(CLOSE_DEADLINE, drained).await;
        Ok(())
    }
}

/// The size of the answer that `received` begins with, once its head is there.
fn answer_size(received: &[u8]) -> Result<Option<usize>> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut answer = httparse::Response::new(&mut headers);
    let head = match answer.parse(received)? {
        httparse::Status::Complete(head) => head,
        httparse::Status::Partial if received.len() > MAX_HEAD => {
            bail!("an answer's head is longer than {MAX_HEAD} bytes")
        }
        httparse::Status::Partial => return Ok(None),
    };
    if answer.code != Some(200) {
        bail!("answered {}", answer.code.unwrap_or_default());
    }
    let length = answer
        .headers
        .iter()
        .find(|header| header.name.eq_ignore_ascii_case("content-length"))
        .and_then(|header| std::str::from_utf8(header.value).ok()?.parse::<usize>().ok())
        .context("an answer without the Content-Length that the destination sent")?;
    ensure!(
        length == ANSWER_SIZE,
        "an answer of {length} bytes, not the destination's {ANSWER_SIZE}"
    );
    Ok(Some(head + length))
}

/// HTTP/2 with prior knowledge on one channel; a clone shares the connection.
#[derive(Clone)]
pub(crate) struct Http2(SendRequest<Bytes>);

impl Http2 {
    pub(crate) async fn start(channel: Channel) -> Result<Self> {
        let (requests, connection) = h2::client::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .enable_push(false)
            .handshake(channel)
            .await?;
        // Its failure is seen by every request on it.
        tokio::spawn(connection);
        Ok(Self(requests))
    }

    /// One request and its whole answer.
    pub(crate) async fn get(&mut self) -> Result<()> {
        let request = Request::builder()
            .method(Method::GET)
            .version(Version::HTTP_2)
            .uri(URI)
            .header(http::header::USER_AGENT, USER_AGENT)
            .header(http::header::ACCEPT, "*/*")
            .body(())?;
        futures_util::future::poll_fn(|cx| self.0.poll_ready(cx)).await?;
        let (answer, _) = self.0.send_request(request, true)?;
        let answer = answer.await?;
        ensure!(answer.status() == StatusCode::OK, "answered {}", answer.status());
        let mut body = answer.into_body();
        let mut size = 0;
        while let Some(data) = body.data().await {
            let data = data?;
            size += data.len();
            body.flow_control().release_capacity(data.len())?;
        }
        ensure!(
            size == ANSWER_SIZE,
            "an answer of {size} bytes, not the destination's {ANSWER_SIZE}"
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: &str, length: usize) -> Vec<u8> {
        format!("HTTP/1.1 {status}\r\nServer: x\r\nContent-Length: {length}\r\n\r\n").into_bytes()
    }

    #[test]
    fn an_answer_is_its_head_and_its_body() {
        let head = answer("200 OK", ANSWER_SIZE);
        assert_eq!(answer_size(&head).unwrap(), Some(head.len() + ANSWER_SIZE));
        assert_eq!(answer_size(&head[..head.len() - 1]).unwrap(), None);
    }

    #[test]
    fn only_the_destinations_own_answer_counts() {
        for (bytes, reason) in [
            (answer("503 Service Unavailable", 91), "503"),
            (answer("200 OK", 5), "5 bytes"),
            (b"HTTP/1.1 200 OK\r\n\r\n".to_vec(), "Content-Length"),
        ] {
            let error = answer_size(&bytes).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn an_endless_head_is_refused() {
        let head = [b"HTTP/1.1 200 OK\r\nx: ".as_slice(), &vec![b'a'; MAX_HEAD]].concat();
        assert!(answer_size(&head).is_err());
    }
}
