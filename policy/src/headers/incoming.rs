//! What is done to every request that is taken in, before a filter or a route sees it.
//!
//! Hop-by-hop headers go. `x-envoy-*` headers that steer a proxy go unless the request is internal: `x-forwarded-for` holds one
//! single address and it is one of ours. `x-forwarded-client-cert` goes unless the chain forwards it. `x-forwarded-proto`,
//! `x-forwarded-port` and `x-request-id` come where they are missing. Other headers, `x-envoy-original-path` among them, pass.

use std::net::IpAddr;

use cairn_exchange::{RequestHead, Scheme};
use http::{HeaderName, HeaderValue};

use super::{forwarded::forwarded_for, is_upgrade, remove_hop_by_hop};
use crate::matcher::CidrSet;

const INTERNAL: HeaderName = HeaderName::from_static("x-envoy-internal");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
const CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Headers that steer retries, timeouts and traces: believed only of internal requests.
const STEERING: [HeaderName; 14] = [
    HeaderName::from_static("x-envoy-retriable-status-codes"),
    HeaderName::from_static("x-envoy-retriable-header-names"),
    HeaderName::from_static("x-envoy-retry-on"),
    HeaderName::from_static("x-envoy-retry-grpc-on"),
    HeaderName::from_static("x-envoy-max-retries"),
    HeaderName::from_static("x-envoy-upstream-alt-stat-name"),
    HeaderName::from_static("x-envoy-upstream-rq-timeout-ms"),
    HeaderName::from_static("x-envoy-upstream-rq-per-try-timeout-ms"),
    HeaderName::from_static("x-envoy-upstream-rq-timeout-alt-response"),
    HeaderName::from_static("x-envoy-expected-rq-timeout-ms"),
    HeaderName::from_static("x-envoy-force-trace"),
    HeaderName::from_static("x-envoy-ip-tags"),
    HeaderName::from_static("x-envoy-original-url"),
    HeaderName::from_static("x-envoy-hedge-on-per-try-timeout"),
];

/// What a chain does to the requests that it takes in.
#[derive(Clone, Debug)]
pub struct Incoming {
    /// So many proxies before us wrote the last addresses of `x-forwarded-for`.
    pub trusted_hops: u32,
    /// Addresses whose requests are internal; none by default.
    pub internal: CidrSet,
    /// A request without an id gets one.
    pub generate_request_id: bool,
    /// A request without `x-forwarded-port` gets the port of the service.
    pub append_forwarded_port: bool,
    /// `x-forwarded-client-cert` of the client passes.
    pub forward_client_cert: bool,
}

/// How a request arrived.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// It came over TLS of its own inside the tunnel, which was ended here.
    pub tls: bool,
    /// The request named its scheme (HTTP/2, absolute form).
    pub scheme_given: bool,
    /// The port of the service.
    pub port: u16,
    /// The client's address.
    pub remote: IpAddr,
}

/// Where a request is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The client: by `x-forwarded-for`, else the connection's.
    pub address: IpAddr,
    /// It is believed what only trusted proxies may say.
    pub internal: bool,
}

impl Default for Incoming {
    fn default() -> Self {
        Self {
            trusted_hops: 0,
            internal: CidrSet::default(),
            generate_request_id: true,
            append_forwarded_port: false,
            forward_client_cert: false,
        }
    }
}

// === impl Incoming ===

impl Incoming {
    /// Does it all; `new_request_id` is asked for a UUID only when one is needed.
    pub fn prepare(&self, head: &mut RequestHead, arrival: Arrival, new_request_id: impl FnOnce() -> HeaderValue) -> Origin {
        let headers = &mut head.headers;
        let upgrade = is_upgrade(headers);
        remove_hop_by_hop(headers, upgrade);
        headers.remove(INTERNAL);
        if !self.forward_client_cert {
            headers.remove(CLIENT_CERT);
        }
        let forwarded = forwarded_for(headers, self.trusted_hops);
        let internal = forwarded.is_some_and(|client| client.alone && self.internal.contains(client.address));
        if internal {
            headers.insert(INTERNAL, HeaderValue::from_static("true"));
        } else if headers.keys().any(|name| name.as_str().starts_with("x-envoy-")) {
            for name in &STEERING {
                headers.remove(name);
            }
        }
        let proto = headers
            .entry(FORWARDED_PROTO)
            .or_insert(HeaderValue::from_static(if arrival.tls { "https" } else { "http" }));
        if !arrival.scheme_given {
            head.scheme = if proto.as_bytes().eq_ignore_ascii_case(b"https") {
                Scheme::Https
            } else {
                Scheme::Http
            };
        }
        if self.append_forwarded_port {
            headers.entry(FORWARDED_PORT).or_insert(HeaderValue::from(arrival.port));
        }
        if self.generate_request_id {
            headers.entry(REQUEST_ID).or_insert_with(new_request_id);
        }
        Origin {
            address: forwarded.map_or(arrival.remote, |client| client.address),
            internal,
        }
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, Method, uri::PathAndQuery};

    use super::{Arrival, HeaderName, HeaderValue, Incoming, Origin, RequestHead, Scheme};

    fn head(fields: &[(&'static str, &'static str)]) -> RequestHead {
        RequestHead {
            method: Method::GET,
            path: PathAndQuery::from_static("/"),
            authority: HeaderValue::from_static("web"),
            scheme: Scheme::Http,
            headers: map(fields),
        }
    }

    fn map(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        fields
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect()
    }

    fn arrival() -> Arrival {
        Arrival {
            tls: false,
            scheme_given: false,
            port: 8080,
            remote: "10.244.0.200".parse().unwrap(),
        }
    }

    fn uuid() -> HeaderValue {
        HeaderValue::from_static("6ba7b810-9dad-41d1-80b4-00c04fd430c8")
    }

    /// Golden case `forwarded-headers-from-the-client` of scenario 01.
    #[test]
    fn a_client_outside_is_not_believed() {
        let mut head = head(&[
            ("x-forwarded-for", "203.0.113.5"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "a.example.com"),
            ("x-forwarded-client-cert", "By=spiffe://x;URI=spiffe://y"),
            ("x-envoy-internal", "true"),
            ("x-request-id", "00000000-0000-4000-8000-000000000001"),
            ("via", "1.1 someone"),
            ("x-envoy-retry-on", "5xx"),
            ("x-envoy-max-retries", "5"),
            ("x-envoy-upstream-rq-timeout-ms", "100"),
            ("x-envoy-original-path", "/x"),
        ]);
        let origin = Incoming::default().prepare(&mut head, arrival(), || panic!("there is an id"));
        assert_eq!(
            origin,
            Origin {
                address: "203.0.113.5".parse().unwrap(),
                internal: false
            }
        );
        assert_eq!(head.scheme, Scheme::Https);
        let left = map(&[
            ("x-forwarded-for", "203.0.113.5"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "a.example.com"),
            ("x-request-id", "00000000-0000-4000-8000-000000000001"),
            ("via", "1.1 someone"),
            ("x-envoy-original-path", "/x"),
        ]);
        assert_eq!(head.headers, left);
    }

    #[test]
    fn a_bare_request_gets_what_is_missing() {
        let incoming = Incoming {
            append_forwarded_port: true,
            ..Incoming::default()
        };
        let mut head = head(&[]);
        let origin = incoming.prepare(&mut head, arrival(), uuid);
        assert_eq!(
            origin,
            Origin {
                address: arrival().remote,
                internal: false
            }
        );
        let added = map(&[
            ("x-forwarded-proto", "http"),
            ("x-forwarded-port", "8080"),
            ("x-request-id", "6ba7b810-9dad-41d1-80b4-00c04fd430c8"),
        ]);
        assert_eq!(head.headers, added);
    }

    #[test]
    fn without_generated_ids_none_comes() {
        let incoming = Incoming {
            generate_request_id: false,
            ..Incoming::default()
        };
        let mut head = head(&[]);
        incoming.prepare(&mut head, arrival(), || panic!("no id is wanted"));
        assert_eq!(head.headers, map(&[("x-forwarded-proto", "http")]));
    }

    #[test]
    fn only_one_single_internal_address_makes_a_request_internal() {
        let internal = ["10.0.0.0/8".parse().unwrap()].into_iter().collect();
        let incoming = Incoming {
            internal,
            ..Incoming::default()
        };
        for (forwarded, expected) in [
            (Some("10.1.2.3"), true),
            (Some("203.0.113.5"), false),
            (Some("10.1.2.3, 10.1.2.4"), false),
            (None, false),
        ] {
            let mut head = head(&[("x-envoy-retry-on", "5xx")]);
            if let Some(forwarded) = forwarded {
                head.headers.insert("x-forwarded-for", HeaderValue::from_static(forwarded));
            }
            let origin = incoming.prepare(&mut head, arrival(), uuid);
            assert_eq!(origin.internal, expected, "{forwarded:?}");
            assert_eq!(head.headers.contains_key("x-envoy-retry-on"), expected, "{forwarded:?}");
            assert_eq!(head.headers.contains_key("x-envoy-internal"), expected, "{forwarded:?}");
        }
    }

    #[test]
    fn a_scheme_that_the_request_named_stays() {
        let mut head = head(&[("x-forwarded-proto", "https")]);
        Incoming::default().prepare(
            &mut head,
            Arrival {
                scheme_given: true,
                ..arrival()
            },
            uuid,
        );
        assert_eq!(head.scheme, Scheme::Http);
    }
}
