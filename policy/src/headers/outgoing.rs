//! What is done to every answer before the client sees it: hop-by-hop headers go, `server` comes.

use http::{HeaderMap, HeaderValue, header};

use super::{is_upgrade, remove_hop_by_hop};

/// What becomes of the `server` header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerHeader {
    /// Ours replaces the backend's.
    Overwrite(HeaderValue),
    /// Ours comes where the backend sent none.
    IfAbsent(HeaderValue),
    /// The backend's passes.
    PassThrough,
}

impl Default for ServerHeader {
    fn default() -> Self {
        Self::Overwrite(HeaderValue::from_static("istio-envoy"))
    }
}

// === impl ServerHeader ===

impl ServerHeader {
    /// Prepares the headers of an answer; `to_upgrade` says that the request asked for an upgrade.
    pub fn prepare(&self, headers: &mut HeaderMap, to_upgrade: bool) {
        let upgraded = to_upgrade && is_upgrade(headers);
        remove_hop_by_hop(headers, upgraded);
        match self {
            Self::Overwrite(server) => {
                headers.insert(header::SERVER, server.clone());
            }
            Self::IfAbsent(server) => {
                headers.entry(header::SERVER).or_insert_with(|| server.clone());
            }
            Self::PassThrough => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{HeaderMap, HeaderValue, ServerHeader};

    #[test]
    fn the_server_header_follows_the_setting() {
        let ours = || HeaderValue::from_static("ours");
        for (setting, backend, expected) in [
            (ServerHeader::default(), Some("nginx"), Some("istio-envoy")),
            (ServerHeader::default(), None, Some("istio-envoy")),
            (ServerHeader::IfAbsent(ours()), Some("nginx"), Some("nginx")),
            (ServerHeader::IfAbsent(ours()), None, Some("ours")),
            (ServerHeader::PassThrough, Some("nginx"), Some("nginx")),
            (ServerHeader::PassThrough, None, None),
        ] {
            let mut headers = HeaderMap::new();
            if let Some(backend) = backend {
                headers.insert("server", HeaderValue::from_static(backend));
            }
            setting.prepare(&mut headers, false);
            assert_eq!(headers.get("server").map(HeaderValue::as_bytes), expected.map(str::as_bytes));
        }
    }

    #[test]
    fn an_upgrade_is_granted_only_to_a_request_that_asked() {
        for (asked, kept) in [(true, true), (false, false)] {
            let mut headers = HeaderMap::new();
            headers.insert("connection", HeaderValue::from_static("Upgrade"));
            headers.insert("upgrade", HeaderValue::from_static("websocket"));
            headers.insert("keep-alive", HeaderValue::from_static("timeout=4"));
            ServerHeader::PassThrough.prepare(&mut headers, asked);
            assert_eq!(headers.len(), if kept { 2 } else { 0 });
        }
    }
}
