//! Bytes: from a client's tunnel to an endpoint and back, until both sides have ended.
//!
//! The decision comes before the connection, and the connection before the answer to a declared port's CONNECT: a client that may not
//! enter is never seen by the endpoint, and one whose endpoint is not there is told so. Half-closes are passed on as such; a reset of
//! one side resets the other.

use std::{future::poll_fn, sync::Arc, task::Poll, time::Duration};

use bytes::Bytes;
use cairn_hbone::{Connect, TunnelStream};
use tokio::time::timeout;

use super::{
    Inner,
    detect::FirstBytes,
    passage::{IDLE_TIMEOUT, Passage, Refused, Tells},
    relay::End,
    tunnel,
};
use crate::snapshot::{Chain, Serves, Snapshot, matcher::Spoken};

/// A port that is declared as TCP: connects first, then answers.
pub async fn declared(inner: Arc<Inner>, snapshot: Arc<Snapshot>, chain: Arc<Chain>, connect: Connect) {
    let mut connect = connect;
    let opened = tokio::select! {
        opened = Box::pin(Passage::open(&inner, &snapshot, &chain, Tells::Failure)) => opened,
        () = connect.cancelled() => {
            tracing::info!(authority = %inner.connection.authority, client = %inner.connection.remote_address, "CONNECT cancelled before its endpoint was connected");
            return;
        }
    };
    drop((snapshot, chain));
    let mut passage = match opened {
        Ok(passage) => passage,
        Err(refused) => {
            match refused.denied {
                true => tunnel::deny(&inner, connect, &refused.why),
                false => tunnel::refuse(&inner, connect, refused.status, &refused.why),
            }
            return;
        }
    };
    match connect.accept(tunnel::answer_headers(&inner)) {
        Ok(stream) => passage.run(stream, Bytes::new()).await,
        Err(_) => passage.close(End::ClientGone),
    }
}

/// A port whose protocol was found out: the CONNECT has been answered.
pub async fn detected(inner: Arc<Inner>, snapshot: Arc<Snapshot>, chain: Arc<Chain>, stream: TunnelStream, held: Bytes) {
    let mut stream = stream;
    let opened = tokio::select! {
        opened = Box::pin(Passage::open(&inner, &snapshot, &chain, Tells::Failure)) => opened,
        error = poll_fn(|cx| stream.poll_reset(cx)) => {
            tracing::debug!(%error, authority = %inner.connection.authority, "the client went away before its endpoint was connected");
            return;
        }
    };
    drop((snapshot, chain));
    match opened {
        Ok(passage) => passage.run(stream, held).await,
        Err(refused) => {
            tracing::info!(authority = %inner.connection.authority, client = %inner.connection.remote_address, why = %refused.why, "connection refused");
            stream.reset(h2::Reason::CONNECT_ERROR);
        }
    }
}

/// Who said the first byte on a port of unknown protocol.
pub enum FirstToSpeak {
    /// The client, this.
    Client(Spoken),
    /// The endpoint: bytes, whatever the client will say.
    Endpoint(Box<Passage>),
}

/// A port of unknown protocol whose client is silent: connects to the endpoint that bytes would go to, if that chain allows it, and
/// waits for the first byte of either side. A client that speaks HTTP after all leaves that connection unused.
pub async fn whoever_speaks_first(
    inner: &Inner,
    stream: &mut TunnelStream,
    first: &mut FirstBytes,
) -> std::io::Result<FirstToSpeak> {
    let as_bytes = Arc::new(inner.also_speaking(Spoken::Other));
    let mut opening = Box::pin(open_for_bytes(&as_bytes));
    // What the client says meanwhile may be HTTP: then nobody waits for an endpoint of bytes.
    let mut passage = None;
    let mut opened = false;
    loop {
        let waited = timeout(
            patience(first),
            poll_fn(|cx| {
                let before = first.len();
                if let Poll::Ready(spoken) = first.poll(cx, stream) {
                    return Poll::Ready(spoken.map(Some));
                }
                if !opened && let Poll::Ready(done) = opening.as_mut().poll(cx) {
                    (opened, passage) = (true, done);
                }
                let greeted = passage
                    .as_mut()
                    .is_some_and(|passage: &mut Passage| passage.poll_greeting(cx).is_ready());
                // What the client has begun to say is waited for with another patience.
                if greeted || first.len() > before {
                    Poll::Ready(Ok(None))
                } else {
                    Poll::Pending
                }
            }),
        );
        match waited.await {
            Ok(Ok(Some(spoken))) => return Ok(FirstToSpeak::Client(spoken)),
            Ok(Ok(None)) => match passage.take() {
                Some(spoken) if spoken.is_greeted() => return Ok(FirstToSpeak::Endpoint(Box::new(spoken))),
                waiting => passage = waiting,
            },
            Ok(Err(error)) => return Err(error),
            Err(_) => return Ok(FirstToSpeak::Client(Spoken::Other)),
        }
    }
}

/// How long a client of which this is known may say nothing more.
fn patience(first: &FirstBytes) -> Duration {
    if first.is_empty() {
        IDLE_TIMEOUT
    } else {
        tunnel::UNFINISHED_TIMEOUT
    }
}

/// Connects to the endpoint that bytes would go to, if their chain allows it.
async fn open_for_bytes(inner: &Arc<Inner>) -> Option<Passage> {
    let (snapshot, serves) = inner.serves();
    let Serves::Tcp(chain) = serves else { return None };
    if chain.reads_server_name() {
        // Nobody can be connected before its name is known.
        return None;
    }
    match Passage::open(inner, &snapshot, &chain, Tells::Nothing).await {
        Ok(passage) => Some(passage),
        Err(Refused { why, .. }) => {
            tracing::info!(authority = %inner.connection.authority, client = %inner.connection.remote_address, %why, "no endpoint for a silent client; it may still speak HTTP");
            None
        }
    }
}
