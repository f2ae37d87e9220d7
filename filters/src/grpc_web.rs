//! gRPC for browsers (the gRPC-Web protocol): requests become gRPC, and trailers of answers the end of their bodies, for a browser sees
//! no trailers. Its second form, `grpc-web-text`, is base64 in both directions.
//!
//! What is answered to a request that is not gRPC-Web passes as it is.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::{BufMut as _, Bytes, BytesMut};
use cairn_exchange::Exchange;
use http::{HeaderMap, HeaderName, HeaderValue, header};

use crate::{
    contract::{BodyNeed, BodyRefusal, HttpFilter, Needs, ResponseHead, Slot, Verdict},
    on_route::Scope,
};

const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");
const BINARY: HeaderValue = HeaderValue::from_static("application/grpc-web+proto");
const TEXT: HeaderValue = HeaderValue::from_static("application/grpc-web-text+proto");
const ACCEPT_ENCODING: HeaderName = HeaderName::from_static("grpc-accept-encoding");

/// The flag of a frame that holds trailers.
const TRAILERS: u8 = 0x80;
/// Characters of base64 that stand for bytes together.
const GROUP: usize = 4;

/// The answer to text that is no base64.
const NO_BASE64: BodyRefusal = BodyRefusal {
    details: "grpc_base_64_decode_failed",
    body: "Bad gRPC-web request, invalid base64 data.",
};

/// The filter.
#[derive(Clone, Copy, Debug, Default)]
pub struct GrpcWeb;

/// What it keeps for a request.
#[derive(Default)]
struct Kept {
    /// The request's body is base64.
    text_in: bool,
    /// The answer's body is to be.
    text_out: bool,
    /// The answer is gRPC.
    answered: bool,
    /// Characters that wait for others of their group.
    rest: Vec<u8>,
    /// What came was no base64: nothing of it goes on.
    broken: bool,
}

/// `Some(text)` for gRPC-Web.
fn kind(content_type: Option<&HeaderValue>) -> Option<bool> {
    let rest = content_type?.as_bytes().strip_prefix(b"application/grpc-web")?;
    let (text, rest) = match rest.strip_prefix(b"-text") {
        Some(rest) => (true, rest),
        None => (false, rest),
    };
    matches!(rest, b"" | b"+proto").then_some(text)
}

fn kept(slot: &mut Slot) -> Option<&mut Kept> {
    match slot {
        Slot::Other(kept) => kept.downcast_mut(),
        _ => None,
    }
}

// === impl GrpcWeb ===

impl HttpFilter for GrpcWeb {
    fn name(&self) -> &str {
        "envoy.filters.http.grpc_web"
    }

    fn needs(&self) -> Needs {
        Needs {
            request: BodyNeed::Observe,
            observe_response: true,
        }
    }

    fn decode_head(&self, slot: &mut Slot, exchange: &mut Exchange, _: &Scope<'_>) -> Verdict {
        let Some(head) = &mut exchange.request else {
            return Verdict::Continue;
        };
        let Some(text_in) = kind(head.headers.get(header::CONTENT_TYPE)) else {
            return Verdict::Continue;
        };
        let text_out = head
            .headers
            .get(header::ACCEPT)
            .and_then(|accept| kind(Some(accept)))
            .unwrap_or(false);
        // The length is that of this form.
        head.headers.remove(header::CONTENT_LENGTH);
        head.headers.insert(header::CONTENT_TYPE, GRPC);
        head.headers.insert(header::TE, HeaderValue::from_static("trailers"));
        head.headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        *slot = Slot::Other(Box::new(Kept {
            text_in,
            text_out,
            ..Kept::default()
        }));
        Verdict::Continue
    }

    fn watches(&self, slot: &Slot) -> bool {
        matches!(slot, Slot::Other(_))
    }

    fn decode_data(&self, slot: &mut Slot, data: &mut Bytes, end: bool) {
        let Some(kept) = kept(slot).filter(|kept| kept.text_in) else {
            return;
        };
        let decoded = decoded(&mut kept.rest, data, end).filter(|_| !kept.broken);
        kept.broken = decoded.is_none();
        *data = decoded.unwrap_or_default();
    }

    fn refused_body(&self, slot: &Slot) -> Option<BodyRefusal> {
        match slot {
            Slot::Other(kept) if kept.downcast_ref::<Kept>().is_some_and(|kept| kept.broken) => Some(NO_BASE64),
            _ => None,
        }
    }

    fn encode_head(&self, slot: &mut Slot, _: &mut Exchange, head: &mut ResponseHead) {
        let Some(kept) = kept(slot) else { return };
        let content_type = head.headers.get(header::CONTENT_TYPE);
        kept.answered = content_type.is_some_and(|value| cairn_exchange::is_grpc_content_type(value.as_bytes()));
        if kept.answered {
            head.headers.remove(header::CONTENT_LENGTH);
            head.headers
                .insert(header::CONTENT_TYPE, if kept.text_out { TEXT } else { BINARY });
        }
    }

    fn encode_data(&self, slot: &mut Slot, data: &mut Bytes, _: bool) {
        if let Some(Kept {
            answered: true,
            text_out: true,
            ..
        }) = kept(slot)
        {
            *data = STANDARD.encode(&*data).into();
        }
    }

    fn encode_trailers(&self, slot: &mut Slot, trailers: &mut HeaderMap) -> Option<Bytes> {
        let Kept {
            answered: true,
            text_out,
            ..
        } = kept(slot)?
        else {
            return None;
        };
        let mut block = BytesMut::new();
        for (name, value) in &*trailers {
            block.put_slice(name.as_str().as_bytes());
            block.put_u8(b':');
            block.put_slice(value.as_bytes());
            block.put_slice(b"\r\n");
        }
        let mut frame = BytesMut::with_capacity(block.len() + 5);
        frame.put_u8(TRAILERS);
        // Trailers are bounded by what a head may have.
        frame.put_u32(u32::try_from(block.len()).unwrap_or(u32::MAX));
        frame.put_slice(&block);
        let frame = frame.freeze();
        Some(if *text_out { STANDARD.encode(&frame).into() } else { frame })
    }
}

/// The bytes of whole groups; what is left of the last one waits, or, at the end, counts as it is. `None` for what is no base64.
fn decoded(rest: &mut Vec<u8>, data: &[u8], end: bool) -> Option<Bytes> {
    rest.extend_from_slice(data);
    let whole = if end { rest.len() } else { rest.len() / GROUP * GROUP };
    let groups: Vec<u8> = rest.drain(..whole).collect();
    let mut bytes = Vec::with_capacity(groups.len());
    // A client may end each of its messages with padding.
    for group in groups.chunks(GROUP) {
        bytes.extend(STANDARD.decode(group).ok()?);
    }
    Some(bytes.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_content_type_says_which_form() {
        for (content_type, form) in [
            ("application/grpc-web", Some(false)),
            ("application/grpc-web+proto", Some(false)),
            ("application/grpc-web-text", Some(true)),
            ("application/grpc-web-text+proto", Some(true)),
            ("application/grpc", None),
            ("application/grpc-webx", None),
            ("application/grpc-web+json", None),
        ] {
            assert_eq!(kind(Some(&HeaderValue::from_static(content_type))), form, "{content_type}");
        }
    }

    #[test]
    fn text_is_decoded_wherever_it_is_cut() {
        let text = [STANDARD.encode([0, 0, 0, 0, 5]), STANDARD.encode("hello")].concat();
        for piece in 1..=text.len() {
            let (mut rest, mut bytes) = (Vec::new(), Vec::new());
            for chunk in text.as_bytes().chunks(piece) {
                bytes.extend(decoded(&mut rest, chunk, false).unwrap());
                assert!(rest.len() < GROUP);
            }
            assert_eq!(bytes, b"\0\0\0\0\x05hello", "pieces of {piece}");
        }
        assert_eq!(decoded(&mut Vec::new(), b"!!!!", false), None);
        assert_eq!(decoded(&mut Vec::new(), b"AAA", true), None);
    }

    #[test]
    fn trailers_become_the_end_of_the_body() {
        for (text_out, expected) in [
            (false, &b"\x80\0\0\0\x0fgrpc-status:0\r\n"[..]),
            (true, b"gAAAAA9ncnBjLXN0YXR1czowDQo="),
        ] {
            let mut slot = Slot::Other(Box::new(Kept {
                text_out,
                answered: true,
                ..Kept::default()
            }));
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", HeaderValue::from_static("0"));
            assert_eq!(GrpcWeb.encode_trailers(&mut slot, &mut trailers).unwrap(), expected);
        }
        assert_eq!(GrpcWeb.encode_trailers(&mut Slot::Empty, &mut HeaderMap::new()), None);
    }
}
