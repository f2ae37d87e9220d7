//! Hop-by-hop headers: those that concern one connection and go no further (RFC 9110 §7.6.1).
//!
//! An upgrade keeps `connection` and `upgrade`, which the other side needs to see. `te` goes on as `trailers`, when the client
//! accepts trailers.

use http::{HeaderMap, HeaderName, HeaderValue, header};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// Headers that `connection` may name without effect: removing them would change what the request is, not how it travels.
const NEVER_NOMINATED: [HeaderName; 5] = [
    header::HOST,
    header::AUTHORIZATION,
    HeaderName::from_static("x-forwarded-for"),
    HeaderName::from_static("x-forwarded-host"),
    HeaderName::from_static("x-forwarded-proto"),
];

/// Whether the message asks for, or grants, an upgrade.
pub fn is_upgrade(headers: &HeaderMap) -> bool {
    headers.contains_key(header::UPGRADE)
        && tokens(headers, &header::CONNECTION).any(|token| token.eq_ignore_ascii_case("upgrade"))
}

/// What it upgrades to: `websocket`.
pub fn upgrade_kind(headers: &HeaderMap) -> Option<&str> {
    if !is_upgrade(headers) {
        return None;
    }
    headers.get(header::UPGRADE)?.to_str().ok().map(str::trim)
}

/// Removes hop-by-hop headers from a request or an answer, and what `connection` names. `upgrade` keeps those of an upgrade.
pub fn remove_hop_by_hop(headers: &mut HeaderMap, upgrade: bool) {
    let te_trailers = tokens(headers, &header::TE).any(|token| {
        let coding = token.split(';').next().unwrap_or_default();
        coding.trim().eq_ignore_ascii_case("trailers")
    });
    let nominated: Vec<HeaderName> = tokens(headers, &header::CONNECTION)
        .filter_map(|token| HeaderName::from_bytes(token.as_bytes()).ok())
        .filter(|name| !(NEVER_NOMINATED.contains(name) || upgrade && name == header::UPGRADE))
        .collect();
    for name in nominated {
        headers.remove(name);
    }
    if !upgrade {
        headers.remove(header::CONNECTION);
        headers.remove(header::UPGRADE);
    }
    for name in [KEEP_ALIVE, PROXY_CONNECTION, header::TRANSFER_ENCODING, header::TE] {
        headers.remove(name);
    }
    if te_trailers {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
    }
}

/// The comma-separated items of all fields of a name.
pub(super) fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|token| !token.is_empty())
}

#[cfg(test)]
mod tests {
    use super::{HeaderMap, HeaderName, HeaderValue, is_upgrade, remove_hop_by_hop, upgrade_kind};

    fn headers(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        let fields = fields
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
        fields.collect()
    }

    #[test]
    fn hop_by_hop_headers_go_no_further() {
        let mut request = headers(&[
            ("connection", "x-drop, close"),
            ("x-drop", "1"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("te", "trailers, deflate"),
            ("transfer-encoding", "chunked"),
            ("upgrade-insecure-requests", "1"),
        ]);
        remove_hop_by_hop(&mut request, false);
        assert_eq!(request, headers(&[("te", "trailers"), ("upgrade-insecure-requests", "1")]));
    }

    #[test]
    fn te_goes_on_only_for_trailers() {
        for (te, left) in [
            ("trailers", true),
            ("gzip, Trailers;q=0.5", true),
            ("gzip", false),
            ("trailersx", false),
        ] {
            let mut request = headers(&[("te", te)]);
            remove_hop_by_hop(&mut request, false);
            assert_eq!(request.contains_key("te"), left, "{te}");
        }
    }

    #[test]
    fn an_upgrade_keeps_what_makes_it_one() {
        let upgrade = headers(&[("connection", "Upgrade, x-drop"), ("upgrade", "websocket"), ("x-drop", "1")]);
        assert_eq!(upgrade_kind(&upgrade), Some("websocket"));
        let mut kept = upgrade.clone();
        remove_hop_by_hop(&mut kept, true);
        assert_eq!(kept, headers(&[("connection", "Upgrade, x-drop"), ("upgrade", "websocket")]));
        let mut removed = upgrade;
        remove_hop_by_hop(&mut removed, false);
        assert!(removed.is_empty());
        assert!(!is_upgrade(&headers(&[("upgrade", "h2c")])));
        assert!(!is_upgrade(&headers(&[("connection", "upgrade")])));
    }

    #[test]
    fn connection_cannot_take_away_who_the_client_is() {
        let mut request = headers(&[
            ("connection", "x-forwarded-for, authorization"),
            ("authorization", "x"),
            ("x-forwarded-for", "y"),
        ]);
        remove_hop_by_hop(&mut request, false);
        assert_eq!(request.len(), 2);
    }
}
