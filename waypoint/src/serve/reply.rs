//! Answers of our own, in the words that Envoy uses.

use bytes::Bytes;
use cairn_exchange::ResponseFlags;
use cairn_filters::{LocalReply, ResponseHead};
use http::{HeaderMap, HeaderValue, StatusCode, header};

const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");
const TEXT: HeaderValue = HeaderValue::from_static("text/plain");

/// Bytes that may stand in `grpc-message` as they are; all others are percent-encoded (gRPC over HTTP/2, "Status-Message").
const GRPC_MESSAGE: &percent_encoding::AsciiSet = &percent_encoding::CONTROLS.add(b'%');

/// Refused by a chain that cannot be enforced.
pub fn refused_chain() -> LocalReply {
    LocalReply::new(
        StatusCode::FORBIDDEN,
        ResponseFlags::NONE,
        "chain_not_supported",
        "this service has a rule that its waypoint does not support, so it refuses\n",
    )
}

/// No route.
pub fn route_not_found() -> LocalReply {
    LocalReply::new(
        StatusCode::NOT_FOUND,
        ResponseFlags::NO_ROUTE_FOUND,
        "route_not_found",
        Bytes::new(),
    )
}

/// The chain is gone.
pub fn chain_not_found() -> LocalReply {
    LocalReply::new(
        StatusCode::SERVICE_UNAVAILABLE,
        ResponseFlags::NO_ROUTE_FOUND,
        "filter_chain_not_found",
        "this address and port are no longer served by this waypoint\n",
    )
}

/// The route names a cluster that does not exist.
pub fn cluster_not_found(status: StatusCode) -> LocalReply {
    LocalReply::new(status, ResponseFlags::NO_CLUSTER_FOUND, "cluster_not_found", Bytes::new())
}

/// Nobody to send to.
pub fn no_healthy_upstream() -> LocalReply {
    LocalReply::new(
        StatusCode::SERVICE_UNAVAILABLE,
        ResponseFlags::NO_HEALTHY_UPSTREAM,
        "no_healthy_upstream",
        "no healthy upstream",
    )
}

/// A request that is not acceptable, with Envoy's reason.
pub fn bad_request(details: &'static str) -> LocalReply {
    LocalReply::new(StatusCode::BAD_REQUEST, ResponseFlags::NONE, details, Bytes::new())
}

/// The head and body of an answer of ours, for a caller that does or does not speak gRPC.
pub fn render(reply: LocalReply, grpc: bool) -> (ResponseHead, Bytes) {
    let LocalReply {
        status,
        details: _,
        flags: _,
        headers: fields,
        body,
        grpc_status,
        as_it_is,
    } = reply;
    let mut headers = HeaderMap::with_capacity(fields.len() + 4);
    headers.extend(fields);
    if grpc && !as_it_is {
        headers.insert(header::CONTENT_TYPE, GRPC);
        headers.insert(
            "grpc-status",
            HeaderValue::from(grpc_status.unwrap_or_else(|| grpc_equivalent(status))),
        );
        if !body.is_empty() {
            let message = percent_encoding::percent_encode(body.trim_ascii_end(), GRPC_MESSAGE).to_string();
            if let Ok(message) = HeaderValue::try_from(message) {
                headers.insert("grpc-message", message);
            }
        }
        return (
            ResponseHead {
                status: StatusCode::OK,
                headers,
            },
            Bytes::new(),
        );
    }
    if !body.is_empty() {
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
        if !headers.contains_key(header::CONTENT_TYPE) {
            headers.insert(header::CONTENT_TYPE, TEXT);
        }
    }
    (ResponseHead { status, headers }, body)
}

/// gRPC's equivalent of a status (gRPC's "HTTP to gRPC Status Code Mapping", as Envoy applies it).
fn grpc_equivalent(status: StatusCode) -> u32 {
    match status.as_u16() {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502 | 503 | 504 => 14,
        _ => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_callers_are_told_in_grpc() {
        let (head, body) = render(no_healthy_upstream(), true);
        assert_eq!(head.status, StatusCode::OK);
        assert_eq!(head.headers["grpc-status"], "14");
        assert_eq!(head.headers["grpc-message"], "no healthy upstream");
        assert!(body.is_empty());
    }

    #[test]
    fn others_get_status_and_text() {
        let (head, body) = render(no_healthy_upstream(), false);
        assert_eq!(
            (head.status.as_u16(), &head.headers["content-length"], &body[..]),
            (503, &HeaderValue::from(19), &b"no healthy upstream"[..])
        );
        assert!(!render(route_not_found(), false).0.headers.contains_key("content-type"));
        let page = || no_healthy_upstream().with_header(header::CONTENT_TYPE, HeaderValue::from_static("text/html"));
        let types = |grpc| {
            render(page(), grpc)
                .0
                .headers
                .get_all("content-type")
                .iter()
                .cloned()
                .collect::<Vec<_>>()
        };
        assert_eq!(
            (types(false), types(true)),
            (vec![HeaderValue::from_static("text/html")], vec![GRPC])
        );
    }
}
