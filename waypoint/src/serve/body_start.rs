//! The beginning of a request's body, for filters that decide by it; the body goes on from its first byte afterwards.

use bytes::{Bytes, BytesMut};
use cairn_exchange::ResponseFlags;
use cairn_filters::{BodyStart, LocalReply};
use http::{HeaderMap, StatusCode};
use http_body::Body as _;

use super::limits::Limits;
use crate::{body::Incoming, serve::reply};

/// Waits for so much of a body as is wanted, or all of it; whether it is all.
pub async fn begin(body: &mut Incoming, wanted: BodyStart, limits: Option<&Limits>) -> Result<(Bytes, bool), Box<LocalReply>> {
    if !wanted.partial {
        let (whole, trailers) = collect(body, wanted.limit, limits).await?;
        *body = Incoming::whole(whole.clone(), trailers);
        return Ok((whole, true));
    }
    let mut start = BytesMut::new();
    while start.len() < wanted.limit {
        let frame = std::future::poll_fn(|cx| std::pin::Pin::new(&mut *body).poll_frame(cx)).await;
        let Some(frame) = frame else {
            *body = Incoming::Empty;
            break;
        };
        let frame = frame.map_err(|_| Box::new(reply::bad_request("http1.codec_error")))?;
        if let Some(limits) = limits {
            limits.moved();
        }
        match frame.into_data() {
            Ok(data) if start.is_empty() => start = BytesMut::from(data),
            Ok(data) => start.extend_from_slice(&data),
            Err(frame) => {
                *body = Incoming::whole(Bytes::new(), frame.into_trailers().ok());
                let start = start.freeze();
                *body = std::mem::take(body).behind(start.clone());
                return Ok((start, true));
            }
        }
    }
    let (start, whole) = (start.freeze(), body.is_end_stream());
    *body = std::mem::take(body).behind(start.clone());
    Ok((start, whole))
}

/// Reads a whole body, and the trailers behind it.
pub async fn collect(
    body: &mut Incoming,
    limit: usize,
    limits: Option<&Limits>,
) -> Result<(Bytes, Option<HeaderMap>), Box<LocalReply>> {
    let too_large = || {
        let status = StatusCode::PAYLOAD_TOO_LARGE;
        Box::new(LocalReply::new(
            status,
            ResponseFlags::NONE,
            "request_payload_too_large",
            "Payload Too Large",
        ))
    };
    let mut whole = BytesMut::new();
    let mut trailers = None;
    while let Some(frame) = std::future::poll_fn(|cx| std::pin::Pin::new(&mut *body).poll_frame(cx)).await {
        let frame = frame.map_err(|_| Box::new(reply::bad_request("http1.codec_error")))?;
        if let Some(limits) = limits {
            limits.moved();
        }
        match frame.into_data() {
            Ok(data) if whole.len() + data.len() > limit => return Err(too_large()),
            Ok(data) if whole.is_empty() => whole = BytesMut::from(data),
            Ok(data) => whole.extend_from_slice(&data),
            Err(frame) => trailers = frame.into_trailers().ok(),
        }
    }
    Ok((whole.freeze(), trailers))
}

#[cfg(test)]
mod tests {
    use http::{HeaderValue, header};
    use http_body_util::BodyExt as _;

    use super::*;

    fn body(pieces: &[&'static [u8]], trailers: Option<HeaderMap>) -> Incoming {
        let last = Incoming::whole(Bytes::new(), trailers);
        let pieces = pieces.iter().rev();
        pieces.fold(last, |rest, piece| rest.behind(Bytes::from_static(piece)))
    }

    #[tokio::test]
    async fn the_body_goes_on_from_its_first_byte() {
        let trailers: HeaderMap = [(header::EXPIRES, HeaderValue::from_static("0"))].into_iter().collect();
        for (limit, start, whole) in [
            (1, "abc", false),
            (3, "abc", false),
            (4, "abcdef", true),
            (100, "abcdef", true),
        ] {
            for trailers in [None, Some(trailers.clone())] {
                let mut body = body(&[b"abc", b"def"], trailers.clone());
                let begun = begin(&mut body, BodyStart { limit, partial: true }, None).await.unwrap();
                // Whether trailers follow shows only behind the last byte.
                let whole = whole && (trailers.is_none() || limit > 6);
                assert_eq!(begun, (Bytes::from_static(start.as_bytes()), whole), "{limit}");
                let all = body.collect().await.unwrap();
                assert_eq!(all.trailers(), trailers.as_ref(), "{limit}");
                assert_eq!(all.to_bytes(), "abcdef", "{limit}");
            }
        }
    }

    #[tokio::test]
    async fn a_body_that_is_too_long_to_be_told_as_a_whole_is_refused() {
        let wanted = |limit| BodyStart { limit, partial: false };
        let mut long = body(&[b"abc", b"def"], None);
        assert_eq!(begin(&mut long, wanted(5), None).await.unwrap_err().status, 413);
        let mut fits = body(&[b"abc", b"def"], None);
        assert_eq!(
            begin(&mut fits, wanted(6), None).await.unwrap(),
            (Bytes::from_static(b"abcdef"), true)
        );
        assert_eq!(fits.collect().await.unwrap().to_bytes(), "abcdef");
        assert_eq!(
            begin(&mut Incoming::Empty, wanted(1), None).await.unwrap(),
            (Bytes::new(), true)
        );
    }
}
