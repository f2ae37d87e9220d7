//! Redirects: the `location` that a client is sent to (contract xds §4.7).

use cairn_exchange::{RequestHead, Scheme};
use http::{HeaderValue, StatusCode, header::InvalidHeaderValue};

use super::PathRewrite;
use crate::matcher::PathMatcher;

/// Tell the client to go elsewhere.
#[derive(Clone, Debug)]
pub struct Redirect {
    /// 301, 302, 303, 307 or 308.
    pub status: StatusCode,
    /// Another scheme.
    pub scheme: Option<Scheme>,
    /// Another host, with a port if it should have one.
    pub host: Option<Box<str>>,
    /// Another port, beside the host.
    pub port: Option<u16>,
    /// Another path.
    pub path: Option<RedirectPath>,
    /// The request's query is dropped.
    pub strip_query: bool,
}

/// Another path for a redirect.
#[derive(Clone, Debug)]
pub enum RedirectPath {
    /// The whole path. A query in it replaces the request's.
    Full(Box<str>),
    /// A part of it, or what an expression matches.
    Rewrite(PathRewrite),
}

// === impl Redirect ===

impl Redirect {
    /// The `location` for a request that took this route by `matched`.
    pub fn location(&self, matched: &PathMatcher, head: &RequestHead) -> Result<HeaderValue, InvalidHeaderValue> {
        let scheme = self.scheme.unwrap_or(head.scheme);
        let port = self.port.map(|port| format!(":{port}")).unwrap_or_default();
        let mut location = format!("{}://", scheme_name(scheme)).into_bytes();
        match &self.host {
            Some(host) => location.extend_from_slice(host.as_bytes()),
            None => location.extend_from_slice(request_host(head, scheme, self.port.is_some())),
        }
        location.extend_from_slice(port.as_bytes());
        location.extend_from_slice(self.path_and_query(matched, head).as_bytes());
        HeaderValue::from_bytes(&location)
    }

    fn path_and_query(&self, matched: &PathMatcher, head: &RequestHead) -> String {
        let query = if self.strip_query { None } else { head.path.query() };
        let path = match &self.path {
            Some(RedirectPath::Full(path)) if path.contains('?') => return path.to_string(),
            Some(RedirectPath::Full(path)) => path.to_string(),
            Some(RedirectPath::Rewrite(rewrite)) => rewrite
                .apply(matched, head.path.path())
                .unwrap_or_else(|| head.path.path().to_owned()),
            None => head.path.path().to_owned(),
        };
        match query {
            Some(query) => format!("{path}?{query}"),
            None => path,
        }
    }
}

/// The request's own address, which a direct response of status 201 or 3xx names in `location`, as Envoy's does.
pub fn request_location(head: &RequestHead) -> Result<HeaderValue, InvalidHeaderValue> {
    let mut location = format!("{}://", scheme_name(head.scheme)).into_bytes();
    location.extend_from_slice(request_host(head, head.scheme, false));
    location.extend_from_slice(head.path.as_str().as_bytes());
    HeaderValue::from_bytes(&location)
}

/// The authority of the request; without its port when another is put there, or when the scheme changes and the port was the old
/// scheme's own.
fn request_host(head: &RequestHead, scheme: Scheme, other_port: bool) -> &[u8] {
    let authority = head.authority.as_bytes();
    let colon = if authority.first() == Some(&b'[') {
        authority
            .windows(2)
            .rposition(|pair| pair == b"]:")
            .map(|bracket| bracket + 1)
    } else {
        authority.iter().rposition(|byte| *byte == b':')
    };
    let Some((host, port)) = colon.and_then(|colon| authority.split_at_checked(colon)) else {
        return authority;
    };
    let forwarded = head.headers.get("x-forwarded-proto").map(HeaderValue::as_bytes);
    let proto = forwarded.unwrap_or(scheme_name(head.scheme).as_bytes());
    let changes = proto != scheme_name(scheme).as_bytes();
    let own = (proto == b"https" && port == b":443") || (proto == b"http" && port == b":80");
    if other_port || (changes && own) { host } else { authority }
}

fn scheme_name(scheme: Scheme) -> &'static str {
    match scheme {
        Scheme::Http => "http",
        Scheme::Https => "https",
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, Method, uri::PathAndQuery};

    use super::{
        HeaderValue, PathMatcher, PathRewrite, Redirect, RedirectPath, RequestHead, Scheme, StatusCode, request_location,
    };
    use crate::matcher::{PathMatch, RegexRewrite};

    fn head(scheme: Scheme, authority: &'static str, path: &'static str) -> RequestHead {
        RequestHead {
            method: Method::GET,
            path: PathAndQuery::from_static(path),
            authority: HeaderValue::from_static(authority),
            scheme,
            headers: HeaderMap::new(),
        }
    }

    fn redirect() -> Redirect {
        Redirect {
            status: StatusCode::MOVED_PERMANENTLY,
            scheme: None,
            host: None,
            port: None,
            path: None,
            strip_query: false,
        }
    }

    #[test]
    fn a_location_is_the_request_with_parts_replaced() {
        let full = |path: &str| Some(RedirectPath::Full(path.into()));
        let prefix = || Some(RedirectPath::Rewrite(PathRewrite::Prefix("/new".into())));
        let regex = || {
            let rewrite = RegexRewrite::new("/old/([a-z]+)", "/\\1").unwrap();
            Some(RedirectPath::Rewrite(PathRewrite::Regex(rewrite)))
        };
        let elsewhere = |path| Redirect {
            scheme: Some(Scheme::Https),
            host: Some("new.example.com".into()),
            port: Some(8443),
            path,
            ..redirect()
        };
        for (redirect, authority, path, location) in [
            (
                elsewhere(prefix()),
                "web",
                "/old/thing?q=1",
                "https://new.example.com:8443/new/thing?q=1",
            ),
            (elsewhere(prefix()), "web", "/old", "https://new.example.com:8443/new"),
            (elsewhere(prefix()), "web", "/old/", "https://new.example.com:8443/new/"),
            (
                elsewhere(regex()),
                "web",
                "/old/thing?q=1",
                "https://new.example.com:8443/thing?q=1",
            ),
            (
                elsewhere(full("/gone")),
                "web",
                "/old?a=1",
                "https://new.example.com:8443/gone?a=1",
            ),
            (
                elsewhere(full("/gone?b=2")),
                "web",
                "/old?a=1",
                "https://new.example.com:8443/gone?b=2",
            ),
            (
                Redirect {
                    path: full("/gone"),
                    ..redirect()
                },
                "web.app:80",
                "/old",
                "http://web.app:80/gone",
            ),
            (
                Redirect {
                    path: full("/gone"),
                    strip_query: true,
                    ..redirect()
                },
                "web",
                "/old?a=1",
                "http://web/gone",
            ),
            (
                Redirect {
                    path: full("/gone?b"),
                    strip_query: true,
                    ..redirect()
                },
                "web",
                "/old?a=1",
                "http://web/gone?b",
            ),
            (
                Redirect {
                    strip_query: true,
                    ..redirect()
                },
                "web",
                "/old?a=1",
                "http://web/old",
            ),
            (
                Redirect {
                    scheme: Some(Scheme::Https),
                    ..redirect()
                },
                "web:80",
                "/old",
                "https://web/old",
            ),
            (
                Redirect {
                    scheme: Some(Scheme::Https),
                    ..redirect()
                },
                "web:8080",
                "/old",
                "https://web:8080/old",
            ),
            (
                Redirect {
                    scheme: Some(Scheme::Http),
                    ..redirect()
                },
                "web:80",
                "/old",
                "http://web:80/old",
            ),
            (
                Redirect {
                    port: Some(81),
                    ..redirect()
                },
                "web:8080",
                "/old",
                "http://web:81/old",
            ),
            (
                Redirect {
                    port: Some(81),
                    ..redirect()
                },
                "[fd00::1]:80",
                "/old",
                "http://[fd00::1]:81/old",
            ),
            (
                Redirect {
                    port: Some(81),
                    ..redirect()
                },
                "[fd00::1]",
                "/old",
                "http://[fd00::1]:81/old",
            ),
            (
                Redirect {
                    host: Some("other:99".into()),
                    ..redirect()
                },
                "web:80",
                "/",
                "http://other:99/",
            ),
        ] {
            let matched = PathMatcher::new(PathMatch::SeparatedPrefix("/old".into()), false);
            let found = redirect.location(&matched, &head(Scheme::Http, authority, path)).unwrap();
            assert_eq!(found, location, "{redirect:?} {authority} {path}");
        }
    }

    #[test]
    fn a_port_is_elided_by_the_scheme_that_the_client_saw() {
        let redirect = Redirect {
            scheme: Some(Scheme::Http),
            ..redirect()
        };
        let mut head = head(Scheme::Http, "web:443", "/");
        head.headers.insert("x-forwarded-proto", HeaderValue::from_static("https"));
        assert_eq!(redirect.location(&PathMatcher::any(), &head).unwrap(), "http://web/");
    }

    #[test]
    fn a_direct_response_names_the_request_itself() {
        assert_eq!(
            request_location(&head(Scheme::Https, "web:443", "/a?b")).unwrap(),
            "https://web:443/a?b"
        );
    }
}
