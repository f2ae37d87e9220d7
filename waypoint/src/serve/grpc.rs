//! Calls of gRPC methods for filters: one message to a cluster's endpoint, one message back.
//!
//! They have the fields that Envoy's own client adds.

use std::net::IpAddr;

use bytes::{BufMut, Bytes, BytesMut};
use cairn_exchange::{RequestHead, Scheme};
use cairn_filters::{GrpcCall, GrpcError, GrpcService};
use cairn_policy::timeout::grpc_timeout_value;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header, uri::PathAndQuery};
use http_body::Body as _;

use super::call::{self, Sent};
use crate::{proxy::Proxy, snapshot::Snapshot, upstream::Answer};

/// A frame's flag and length (gRPC over HTTP/2, "Length-Prefixed-Message").
const FRAME_HEAD: usize = 5;
/// Words of a status that are kept.
const MAX_WORDS: usize = 1024;

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// Calls a method; bounded in time by the caller.
pub async fn call(proxy: &Proxy, snapshot: &Snapshot, call: &GrpcCall) -> Result<Bytes, GrpcError> {
    let service = &*call.service;
    let head = head(call, proxy.settings.node.address)?;
    let sent = call::send(proxy, snapshot, &service.cluster, &head, frame(&call.message)?).await;
    let sent = sent.map_err(GrpcError::Unreachable)?;
    read(sent, service.max_answer).await
}

/// Calls a method whose answer says nothing, and may have no message at all; bounded in time by the caller.
pub async fn tell(proxy: &Proxy, snapshot: &Snapshot, call: &GrpcCall) -> Result<(), GrpcError> {
    let service = &*call.service;
    let head = head(call, proxy.settings.node.address)?;
    let sent = call::send(proxy, snapshot, &service.cluster, &head, frame(&call.message)?).await;
    read_frames(sent.map_err(GrpcError::Unreachable)?, service.max_answer).await?;
    Ok(())
}

fn head(call: &GrpcCall, own_address: Option<IpAddr>) -> Result<RequestHead, GrpcError> {
    let GrpcService {
        cluster: _,
        authority,
        timeout,
        metadata,
        max_answer: _,
        skip_envoy_headers,
    } = &*call.service;
    let mut headers = HeaderMap::new();
    headers.insert(header::TE, HeaderValue::from_static("trailers"));
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    if let Some(timeout) = timeout {
        headers.insert("grpc-timeout", grpc_timeout_value(*timeout));
    }
    if !skip_envoy_headers {
        headers.insert("x-envoy-internal", HeaderValue::from_static("true"));
        if let Some(address) = own_address.and_then(|address| HeaderValue::try_from(address.to_string()).ok()) {
            headers.insert("x-forwarded-for", address);
        }
        if let Some(milliseconds) = timeout.and_then(|timeout| u64::try_from(timeout.as_millis()).ok()) {
            headers.insert("x-envoy-expected-rq-timeout-ms", HeaderValue::from(milliseconds));
        }
    }
    for (name, value) in metadata.iter().chain(&call.metadata) {
        headers.append(name.clone(), value.clone());
    }
    Ok(RequestHead {
        method: Method::POST,
        path: PathAndQuery::from_static(call.method),
        authority: authority.clone(),
        scheme: Scheme::Http,
        headers,
    })
}

/// A message in its frame.
fn frame(message: &Bytes) -> Result<Bytes, GrpcError> {
    let length = u32::try_from(message.len()).map_err(|_| GrpcError::Malformed("the message is too long".into()))?;
    let mut framed = BytesMut::with_capacity(FRAME_HEAD + message.len());
    framed.put_u8(0);
    framed.put_u32(length);
    framed.put_slice(message);
    Ok(framed.freeze())
}

async fn read(sent: Sent, limit: usize) -> Result<Bytes, GrpcError> {
    unframe(read_frames(sent, limit).await?)
}

/// What an answer has before its status, which is good.
async fn read_frames(sent: Sent, limit: usize) -> Result<Bytes, GrpcError> {
    let Answer { head, mut body, .. } = sent.answer;
    if head.status != StatusCode::OK {
        return Err(GrpcError::Malformed(format!("the service answered {}", head.status.as_u16())));
    }
    if let Some(status) = status(&head.headers) {
        // Trailers only: there is no message.
        return status.map(|()| Bytes::new());
    }
    let mut bytes = BytesMut::new();
    let mut trailers = None;
    while let Some(frame) = std::future::poll_fn(|cx| std::pin::Pin::new(&mut body).poll_frame(cx)).await {
        let frame = frame.map_err(|error| GrpcError::Unreachable(format!("the answer was cut: {error}")))?;
        match frame.into_data() {
            Ok(data) if bytes.len() + data.len() > limit.saturating_add(FRAME_HEAD) => {
                return Err(GrpcError::Malformed(format!("the answer is longer than {limit} bytes")));
            }
            Ok(data) => bytes.extend_from_slice(&data),
            Err(frame) => trailers = frame.into_trailers().ok(),
        }
    }
    match trailers.as_ref().and_then(status) {
        Some(Ok(())) => Ok(bytes.freeze()),
        Some(Err(error)) => Err(error),
        None => Err(GrpcError::Malformed("the answer has no grpc-status".into())),
    }
}

/// What `grpc-status` says, where it is there.
fn status(headers: &HeaderMap) -> Option<Result<(), GrpcError>> {
    let code = headers.get(GRPC_STATUS)?;
    let code = code.to_str().ok().and_then(|code| code.parse().ok());
    Some(match code {
        Some(0) => Ok(()),
        None => Err(GrpcError::Malformed("grpc-status is no number".into())),
        Some(code) => {
            let words = headers.get(GRPC_MESSAGE).map(HeaderValue::as_bytes).unwrap_or_default();
            let words = words.get(..MAX_WORDS).unwrap_or(words);
            let message = percent_encoding::percent_decode(words).decode_utf8_lossy().into_owned();
            Err(GrpcError::Status { code, message })
        }
    })
}

/// The one message of an answer.
fn unframe(mut bytes: Bytes) -> Result<Bytes, GrpcError> {
    let malformed = |what: &str| Err(GrpcError::Malformed(format!("the answer {what}")));
    let (Some(flag), Some(length)) = (bytes.first().copied(), bytes.get(1..FRAME_HEAD)) else {
        return malformed("has no message");
    };
    if flag != 0 {
        return malformed("is compressed, which was not asked for");
    }
    let length = length.iter().fold(0usize, |length, byte| length << 8 | usize::from(*byte));
    if bytes.len() != FRAME_HEAD + length {
        return malformed("is not one message");
    }
    Ok(bytes.split_off(FRAME_HEAD))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_comes_out_of_its_frame_as_it_went_in() {
        for message in [&b""[..], b"x", &[7; 300]] {
            let message = Bytes::copy_from_slice(message);
            assert_eq!(unframe(frame(&message).unwrap()).unwrap(), message);
        }
        for broken in [&b""[..], b"\0\0\0", b"\x01\0\0\0\x01x", b"\0\0\0\0\x02x", b"\0\0\0\0\x01xy"] {
            assert!(unframe(Bytes::copy_from_slice(broken)).is_err(), "{broken:?}");
        }
    }
}
