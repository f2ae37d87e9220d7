//! Moves a body into an HTTP/2 stream, as fast as the peer takes it.

use std::{future::poll_fn, pin::Pin, task::Poll};

use bytes::Bytes;
use h2::{Reason, SendStream};

use crate::body::GivenUp;

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

/// Moves all of `body` into `stream`, with its trailers, and ends the stream. A body that fails, or is given up, resets the stream
/// with `failed`, so that the peer does not take a part for the whole; a peer that resets ends the body.
pub async fn pump<B>(mut body: B, mut stream: SendStream<Bytes>, failed: Reason) -> Result<(), PumpError<B::Error>>
where
    B: GivenUp<Data = Bytes> + Unpin,
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
                stream.send_reset(failed);
                return Err(PumpError::Body(error));
            }
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => {
                    let end = body.is_end_stream();
                    if let Err(error) = send(&mut body, &mut stream, data, end).await {
                        if matches!(error, PumpError::Body(_)) {
                            stream.send_reset(failed);
                        }
                        return Err(error);
                    }
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

/// Sends one piece, as the peer's window allows.
async fn send<B>(body: &mut B, stream: &mut SendStream<Bytes>, mut data: Bytes, end: bool) -> Result<(), PumpError<B::Error>>
where
    B: GivenUp + Unpin,
{
    if data.is_empty() {
        return stream.send_data(data, end).map_err(PumpError::Peer);
    }
    while !data.is_empty() {
        stream.reserve_capacity(data.len());
        let room = match stream.capacity() {
            0 => {
                let room = poll_fn(|cx| match stream.poll_capacity(cx) {
                    Poll::Ready(room) => Poll::Ready(Ok(room)),
                    Poll::Pending => body.poll_given_up(cx).map(Err),
                });
                match room.await.map_err(PumpError::Body)? {
                    Some(room) => room.map_err(PumpError::Peer)?,
                    None => return Err(PumpError::Peer(Reason::CANCEL.into())),
                }
            }
            room => room,
        };
        let chunk = data.split_to(room.min(data.len()));
        stream.send_data(chunk, end && data.is_empty()).map_err(PumpError::Peer)?;
    }
    Ok(())
}
