//! Rewrites: the path and the authority that a cluster sees instead of the client's.
//!
//! Called after the header edits, host first, then path, as Envoy does. What was replaced is kept in `x-envoy-original-host` and
//! `x-envoy-original-path`, unless the chain suppresses Envoy's headers.

use cairn_exchange::RequestHead;
use http::{HeaderMap, HeaderName, HeaderValue, uri::PathAndQuery};

use super::{Forward, HostRewrite, PathRewrite, WeightedCluster};
use crate::matcher::PathMatcher;

const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const ORIGINAL_HOST: HeaderName = HeaderName::from_static("x-envoy-original-host");
const ORIGINAL_PATH: HeaderName = HeaderName::from_static("x-envoy-original-path");

/// A rewrite made a path that no request can have.
#[derive(Debug, thiserror::Error)]
#[error("the route rewrites the path to `{path}`, which no request can have; correct the rewrite")]
pub struct InvalidRewrite {
    /// The path.
    pub path: String,
    /// Why not.
    #[source]
    pub source: http::uri::InvalidUri,
}

// === impl PathRewrite ===

impl PathRewrite {
    /// The new path for a path (both without query) that took its route by `matched`; `None` when it does not match any more.
    pub fn apply(&self, matched: &PathMatcher, path: &str) -> Option<String> {
        let new = match self {
            Self::Prefix(prefix) => format!("{prefix}{}", path.get(matched.matched(path)?..)?),
            Self::Regex(rewrite) => rewrite.replace_all(path),
            Self::Full(full) => full.to_string(),
        };
        Some(if new.starts_with('/') { new } else { format!("/{new}") })
    }
}

/// The path that is sent to the cluster, with the query; `None` when it stays.
pub fn rewrite_path(
    rewrite: &PathRewrite,
    matched: &PathMatcher,
    path: &PathAndQuery,
) -> Result<Option<PathAndQuery>, InvalidRewrite> {
    let Some(mut new) = rewrite.apply(matched, path.path()) else {
        return Ok(None);
    };
    if let Some(query) = path.query() {
        new.push('?');
        new.push_str(query);
    }
    match PathAndQuery::from_maybe_shared(bytes::Bytes::from(new.clone())) {
        Ok(path) => Ok(Some(path)),
        Err(source) => Err(InvalidRewrite { path: new, source }),
    }
}

/// Sends another authority. With `append_forwarded`, the replaced one is added to `x-forwarded-host`, unless it is the last there.
pub fn rewrite_host(head: &mut RequestHead, host: HeaderValue, append_forwarded: bool, keep_original: bool) {
    if append_forwarded {
        append_forwarded_host(&mut head.headers, &head.authority);
    }
    let replaced = std::mem::replace(&mut head.authority, host);
    if keep_original && !replaced.is_empty() {
        head.headers.insert(ORIGINAL_HOST, replaced);
    }
}

fn append_forwarded_host(headers: &mut HeaderMap, authority: &HeaderValue) {
    if authority.is_empty() {
        return;
    }
    let known = headers.get(FORWARDED_HOST).map_or(&b""[..], HeaderValue::as_bytes);
    let last = known.rsplit(|byte| *byte == b',').find(|part| !part.is_empty());
    if last == Some(authority.as_bytes()) {
        return;
    }
    let mut all = known.to_vec();
    if !all.is_empty() {
        all.push(b',');
    }
    all.extend_from_slice(authority.as_bytes());
    // Both parts are header values and a comma is allowed in one, so this cannot fail; if it did, the old value would stay.
    if let Ok(all) = HeaderValue::from_bytes(&all) {
        headers.insert(FORWARDED_HOST, all);
    }
}

// === impl WeightedCluster ===

impl WeightedCluster {
    /// Sends this cluster's authority: after its own header edits and before those of the route.
    pub fn rewrite_host(&self, head: &mut RequestHead, keep_original: bool) {
        if let Some(host) = &self.host_rewrite {
            rewrite_host(head, host.clone(), false, keep_original);
        }
    }
}

// === impl Forward ===

impl Forward {
    /// Rewrites a request that took its route by `matched`: authority, then path. `keep_originals` is off where the chain suppresses
    /// Envoy's headers. [`HostRewrite::Endpoint`] waits until an endpoint is chosen.
    pub fn rewrite(&self, matched: &PathMatcher, head: &mut RequestHead, keep_originals: bool) -> Result<(), InvalidRewrite> {
        let host = match &self.host_rewrite {
            Some(HostRewrite::Literal(host)) => Some(host.clone()),
            Some(HostRewrite::Header(name)) => head.headers.get(name).filter(|value| !value.is_empty()).cloned(),
            Some(HostRewrite::Endpoint) | None => None,
        };
        if let Some(host) = host {
            rewrite_host(head, host, self.append_x_forwarded_host, keep_originals);
        }
        let Some(rewrite) = &self.path_rewrite else { return Ok(()) };
        let Some(path) = rewrite_path(rewrite, matched, &head.path)? else {
            return Ok(());
        };
        let replaced = std::mem::replace(&mut head.path, path);
        if keep_originals && let Ok(original) = HeaderValue::from_str(replaced.as_str()) {
            head.headers.insert(ORIGINAL_PATH, original);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use cairn_exchange::Scheme;
    use http::Method;

    use super::{
        FORWARDED_HOST, Forward, HeaderMap, HeaderValue, HostRewrite, ORIGINAL_HOST, ORIGINAL_PATH, PathAndQuery, PathMatcher,
        PathRewrite, RequestHead, WeightedCluster, rewrite_path,
    };
    use crate::{
        matcher::{PathMatch, Regex, RegexRewrite},
        route::Target,
    };

    fn head(path: &'static str) -> RequestHead {
        RequestHead {
            method: Method::GET,
            path: PathAndQuery::from_static(path),
            authority: HeaderValue::from_static("web.app"),
            scheme: Scheme::Http,
            headers: HeaderMap::new(),
        }
    }

    #[test]
    fn paths_are_rewritten_as_envoy_rewrites_them() {
        let exact = || PathMatch::Exact("/users/7".into());
        let prefix = |prefix: &str| PathMatch::Prefix(prefix.into());
        let separated = || PathMatch::SeparatedPrefix("/api".into());
        let regex = || PathMatch::Regex(Regex::new("/v[0-9]+/items/.*").unwrap());
        let to = |new: &str| PathRewrite::Prefix(new.into());
        let expression = |pattern: &str, new: &str| PathRewrite::Regex(RegexRewrite::new(pattern, new).unwrap());
        for (matched, rewrite, path, new) in [
            (prefix("/files/"), to("/static/"), "/files/a/b.txt?x=1", "/static/a/b.txt?x=1"),
            (prefix("/files/"), to("/static/"), "/files/", "/static/"),
            (exact(), to("/there"), "/users/7?x", "/there?x"),
            (regex(), to("/all"), "/v1/items/3?q", "/all?q"),
            (separated(), to("/v2"), "/api", "/v2"),
            (separated(), to("/v2"), "/api/x", "/v2/x"),
            (
                separated(),
                expression("^/api(/?)(.*)", "/\\2"),
                "/api/users?id=1",
                "/users?id=1",
            ),
            (separated(), expression("^/api(/?)(.*)", "/\\2"), "/api", "/"),
            (separated(), expression("^/api(/?)(.*)", "/\\2"), "/api//x", "//x"),
            (prefix("/"), expression("/.*", "/items"), "/v1/items/3?q=/", "/items?q=/"),
            (prefix("/a"), to(""), "/a", "/"),
            (prefix("/a"), to(""), "/ab?c", "/b?c"),
            (prefix("/"), PathRewrite::Full("/one".into()), "/x/y?z", "/one?z"),
        ] {
            let matched = PathMatcher::new(matched, false);
            let found = rewrite_path(&rewrite, &matched, &PathAndQuery::from_static(path))
                .unwrap()
                .unwrap();
            assert_eq!(found, new, "{rewrite:?} {path}");
        }
    }

    #[test]
    fn a_prefix_in_other_letters_is_replaced_as_well() {
        let matched = PathMatcher::new(PathMatch::Prefix("/API".into()), true);
        assert_eq!(
            PathRewrite::Prefix("/x".into()).apply(&matched, "/api/y"),
            Some("/x/y".to_owned())
        );
        assert_eq!(PathRewrite::Prefix("/x".into()).apply(&matched, "/other"), None);
    }

    #[test]
    fn a_rewrite_to_no_path_is_an_error_that_names_it() {
        let rewrite = PathRewrite::Full("/a b".into());
        let error = rewrite_path(&rewrite, &PathMatcher::any(), &PathAndQuery::from_static("/")).unwrap_err();
        assert!(error.to_string().contains("`/a b`"));
    }

    #[test]
    fn what_was_replaced_is_kept_unless_suppressed() {
        for keep in [true, false] {
            let forward = Forward {
                host_rewrite: Some(HostRewrite::Literal(HeaderValue::from_static("files.internal"))),
                path_rewrite: Some(PathRewrite::Prefix("/static/".into())),
                append_x_forwarded_host: true,
                ..Forward::to(Target::Cluster("c".into()))
            };
            let matched = PathMatcher::new(PathMatch::Prefix("/files/".into()), false);
            let mut head = head("/files/a?x=1");
            forward.rewrite(&matched, &mut head, keep).unwrap();
            assert_eq!(
                (head.authority.as_bytes(), head.path.as_str()),
                (&b"files.internal"[..], "/static/a?x=1")
            );
            assert_eq!(head.headers[FORWARDED_HOST], "web.app");
            assert_eq!(head.headers.get(ORIGINAL_HOST).is_some_and(|host| host == "web.app"), keep);
            assert_eq!(
                head.headers.get(ORIGINAL_PATH).is_some_and(|path| path == "/files/a?x=1"),
                keep
            );
        }
    }

    #[test]
    fn a_forwarded_host_is_appended_once() {
        for (before, after) in [
            (None, "web.app"),
            (Some("client.example.com"), "client.example.com,web.app"),
            (Some("a,web.app"), "a,web.app"),
            (Some(""), "web.app"),
        ] {
            let mut head = head("/");
            if let Some(before) = before {
                head.headers.insert(FORWARDED_HOST, HeaderValue::from_static(before));
            }
            super::rewrite_host(&mut head, HeaderValue::from_static("other"), true, false);
            assert_eq!(head.headers[FORWARDED_HOST], after);
        }
    }

    #[test]
    fn the_route_rewrites_the_host_after_the_cluster() {
        let cluster = WeightedCluster {
            host_rewrite: Some(HeaderValue::from_static("cluster.internal")),
            ..WeightedCluster::new("c", 1)
        };
        let mut head = head("/");
        cluster.rewrite_host(&mut head, true);
        assert_eq!(head.authority, "cluster.internal");
        head.headers.insert("x-to", HeaderValue::from_static("by-header"));
        let forward = Forward {
            host_rewrite: Some(HostRewrite::Header(http::HeaderName::from_static("x-to"))),
            ..Forward::to(Target::Cluster("c".into()))
        };
        forward.rewrite(&PathMatcher::any(), &mut head, true).unwrap();
        assert_eq!(head.authority, "by-header");
        assert_eq!(head.headers[ORIGINAL_HOST], "cluster.internal");
    }
}
