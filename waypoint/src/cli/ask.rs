//! Asks the administration of a running proxy.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use http::{Request, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use tokio::{net::TcpStream, time::timeout};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How large it may be.
const MOST: usize = 16 << 20;

/// A text as it may stand in a query.
pub fn encoded(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

/// What a page says.
pub fn get(admin: &str, path: &str) -> Result<Bytes> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // The timer wants the runtime around it.
    let answer = runtime.block_on(async { timeout(PATIENCE, page(admin, path)).await });
    answer.with_context(|| format!("{admin} does not answer within {PATIENCE:?}"))?
}

async fn page(admin: &str, path: &str) -> Result<Bytes> {
    let stream = TcpStream::connect(admin)
        .await
        .with_context(|| format!("{admin} cannot be reached; forward port 15000 of the waypoint's pod"))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // It ends with the answer, and the runtime with it.
    tokio::spawn(connection);
    let request = Request::get(path).header(header::HOST, admin).body(Empty::<Bytes>::new())?;
    let answer = sender.send_request(request).await?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), MOST).collect().await;
    let body = body
        .map_err(|error| anyhow::anyhow!("the answer of {admin}: {error}"))?
        .to_bytes();
    if !status.is_success() {
        bail!("{admin} says: {}", String::from_utf8_lossy(&body).trim_end());
    }
    Ok(body)
}
