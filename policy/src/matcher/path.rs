//! Matching the path of a request, without its query.
//!
//! A match tells how much of the path it stands for: that part is what a prefix rewrite replaces.

use super::{Regex, string::same};

/// How a path is compared.
#[derive(Clone, Debug)]
pub enum PathMatch {
    /// The whole path.
    Exact(Box<str>),
    /// Its beginning.
    Prefix(Box<str>),
    /// Its first segments: `/a` stands for `/a` and `/a/b`, not for `/ab`. Never ends in `/`.
    SeparatedPrefix(Box<str>),
    /// The whole path, by a regular expression.
    Regex(Regex),
    /// Any CONNECT request, which no other match accepts.
    Connect,
}

/// A compiled path matcher.
#[derive(Clone, Debug)]
pub struct PathMatcher {
    how: PathMatch,
    ignore_case: bool,
}

// === impl PathMatcher ===

impl PathMatcher {
    /// A matcher; `ignore_case` folds ASCII letters and does not concern regular expressions.
    pub fn new(how: PathMatch, ignore_case: bool) -> Self {
        Self { how, ignore_case }
    }

    /// Everything: the prefix `/`.
    pub fn any() -> Self {
        Self::new(PathMatch::Prefix("/".into()), false)
    }

    /// How it compares.
    pub fn how(&self) -> &PathMatch {
        &self.how
    }

    /// Whether upper and lower case are the same to it.
    pub fn ignores_case(&self) -> bool {
        self.ignore_case
    }

    /// How many bytes of the path (given without query) the match stands for, or `None` when it does not match.
    ///
    /// [`PathMatch::Connect`] is not about paths: it never matches here.
    pub fn matched(&self, path: &str) -> Option<usize> {
        let (path, fold) = (path.as_bytes(), self.ignore_case);
        let starts = |start: &str| path.get(..start.len()).is_some_and(|head| same(start.as_bytes(), head, fold));
        match &self.how {
            PathMatch::Exact(whole) => same(whole.as_bytes(), path, fold).then_some(path.len()),
            PathMatch::Prefix(start) => starts(start).then_some(start.len()),
            PathMatch::SeparatedPrefix(start) => {
                (starts(start) && matches!(path.get(start.len()), None | Some(b'/'))).then_some(start.len())
            }
            PathMatch::Regex(regex) => regex.matches(path).then_some(path.len()),
            PathMatch::Connect => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{PathMatch, PathMatcher, Regex};

    #[test]
    fn a_path_match_stands_for_a_part_of_the_path() {
        let exact = || PathMatch::Exact("/Api".into());
        let prefix = || PathMatch::Prefix("/Api".into());
        let separated = || PathMatch::SeparatedPrefix("/Api".into());
        let regex = || PathMatch::Regex(Regex::new("/v[0-9]+/.*").unwrap());
        for (how, ignore_case, path, matched) in [
            (exact(), false, "/Api", Some(4)),
            (exact(), false, "/api", None),
            (exact(), true, "/aPI", Some(4)),
            (exact(), false, "/Api/", None),
            (prefix(), false, "/Apis", Some(4)),
            (prefix(), false, "/apis", None),
            (prefix(), true, "/apis/x", Some(4)),
            (prefix(), true, "/ap", None),
            (separated(), false, "/Api", Some(4)),
            (separated(), false, "/Api/x", Some(4)),
            (separated(), false, "/Apis", None),
            (separated(), true, "/api/", Some(4)),
            (regex(), false, "/v1/x", Some(5)),
            (regex(), false, "/v1", None),
            (regex(), true, "/V1/x", None),
            (PathMatch::Connect, false, "/", None),
        ] {
            let matcher = PathMatcher::new(how, ignore_case);
            assert_eq!(matcher.matched(path), matched, "{matcher:?} {path}");
        }
    }
}
