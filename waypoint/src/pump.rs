//! Moves a body into an HTTP/2 stream, as fast as the peer takes it.

use std::{future::poll_fn, pin::Pin, task::Poll};

use bytes::Bytes;
use h2::{Reason, SendStream};
use http_body::Body;

/// Why a body did not arrive.
#[derive(Debug, thiserror::Error)]
pub enum PumpError<E> {
    /// The body itself failed; the peer was told by a reset.
    #[error("the body ended early: {0}")]
    Body(E),
    /// The peer takes no more.
    #[error("the peer takes no more: {0}")]
    Peer(h2::Error),
}

/// Moves all of `body` into `stream`, with its trailers, and ends the stream. A body that fails resets the stream, so that the peer
/// does not take a part for the whole; a peer that resets ends the body.
pub async fn pump<B>(mut body: B, mut stream: SendStream<Bytes>) -> Result<(), PumpError<B::Error>>
where
    B: Body<Data = Bytes> + Unpin,
{
    loop {
        let frame = poll_fn(|cx| {
            if let Poll::Ready(reset) = stream.poll_reset(cx) {
                return Poll::Ready(Err(PumpError::Peer(match reset {
                    Ok(reason) => reason.into(),
                    Err(error) => error,
                })));
            }
            Pin::new(&mut body).poll_frame(cx).map(Ok)
        })
        .await?;
        match frame {
            None => return stream.send_data(Bytes::new(), true).map_err(PumpError::Peer),
            Some(Err(error)) => {
                stream.send_reset(Reason::INTERNAL_ERROR);
                return Err(PumpError::Body(error));
            }
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => {
                    let end = body.is_end_stream();
                    send(&mut stream, data, end).await.map_err(PumpError::Peer)?;
                    if end {
                        return Ok(());
                    }
                }
                Err(frame) => {
                    if let Ok(trailers) = frame.into_trailers() {
                        return stream.send_trailers(trailers).map_err(PumpError::Peer);
                    }
                }
            },
        }
    }
}

async fn send(stream: &mut SendStream<Bytes>, mut data: Bytes, end: bool) -> Result<(), h2::Error> {
    if data.is_empty() {
        return stream.send_data(data, end);
    }
    while !data.is_empty() {
        stream.reserve_capacity(data.len());
        let room = match stream.capacity() {
            0 => match poll_fn(|cx| stream.poll_capacity(cx)).await {
                Some(room) => room?,
                None => return Err(Reason::CANCEL.into()),
            },
            room => room,
        };
        let chunk = data.split_to(room.min(data.len()));
        stream.send_data(chunk, end && data.is_empty())?;
    }
    Ok(())
}
