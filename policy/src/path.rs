//! The one form that a path takes before anything looks at it.
//!
//! Policies and routes compare paths; a client must not be able to write one path in two ways. As Envoy does (with the rules that
//! Chromium has for URLs): dot segments are resolved, also when their dots are escaped, escapes of letters, digits and `-._~` are
//! resolved, other escapes stay as they were written, `\` becomes `/`, and characters that have no place in a path are escaped.
//! Escaped slashes and runs of slashes are treated as the chain says. The query is not touched.
//!
//! Where resolving an escape would make a new one of a stray `%` before it (`/%%32e/`), that `%` is escaped: normalizing twice is
//! normalizing once.

use http::uri::PathAndQuery;

/// What happens to `%2F` and `%5C`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EscapedSlashes {
    /// They stay.
    #[default]
    Keep,
    /// The request is refused: 400.
    Reject,
    /// The client is sent to the path without them: 307.
    Redirect,
    /// They become slashes, and the request goes on.
    Unescape,
}

/// How a chain normalizes paths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PathNormalization {
    /// Dot segments and escapes are resolved.
    pub normalize: bool,
    /// Runs of slashes become one.
    pub merge_slashes: bool,
    /// What happens to escaped slashes.
    pub escaped_slashes: EscapedSlashes,
}

/// What becomes of a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Normalized {
    /// It stays.
    Same,
    /// The request goes on with this one.
    Changed(PathAndQuery),
    /// The client is sent to this one.
    Redirect(PathAndQuery),
    /// The request is refused: 400, `path_normalization_failed`.
    Reject,
}

// === impl PathNormalization ===

impl PathNormalization {
    /// Normalizes the path of a request. `*` (of OPTIONS) stays.
    pub fn apply(&self, original: &PathAndQuery) -> Normalized {
        if original.path() == "*" {
            return Normalized::Same;
        }
        let mut path = original.path().to_owned();
        let mut redirect = false;
        if self.escaped_slashes != EscapedSlashes::Keep
            && let Some(unescaped) = unescape_slashes(&path)
        {
            if self.escaped_slashes == EscapedSlashes::Reject {
                return Normalized::Reject;
            }
            redirect = self.escaped_slashes == EscapedSlashes::Redirect;
            path = unescaped;
        }
        if self.normalize {
            match canonical(&path) {
                Some(canonical) => path = canonical,
                None => return Normalized::Reject,
            }
        }
        if self.merge_slashes {
            path = merge_slashes(&path);
        }
        if path == original.path() {
            return Normalized::Same;
        }
        if let Some(query) = original.query() {
            path.push('?');
            path.push_str(query);
        }
        match PathAndQuery::try_from(path) {
            Ok(path) if redirect => Normalized::Redirect(path),
            Ok(path) => Normalized::Changed(path),
            Err(_) => Normalized::Reject,
        }
    }
}

/// The path with `%2F` and `%5C` resolved, or `None` when there are none.
fn unescape_slashes(path: &str) -> Option<String> {
    if !path.contains('%') {
        return None;
    }
    let mut out = String::with_capacity(path.len());
    let mut rest = path;
    while let Some((before, escape)) = rest.split_once('%') {
        out.push_str(before);
        match escape.get(..2) {
            Some(code) if code.eq_ignore_ascii_case("2f") => out.push('/'),
            Some(code) if code.eq_ignore_ascii_case("5c") => out.push('\\'),
            _ => {
                out.push('%');
                rest = escape;
                continue;
            }
        }
        rest = escape.get(2..).unwrap_or_default();
    }
    out.push_str(rest);
    (out != path).then_some(out)
}

/// Runs of slashes as one.
fn merge_slashes(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    for character in path.chars() {
        if character != '/' || !out.ends_with('/') {
            out.push(character);
        }
    }
    out
}

/// The canonical form, or `None` when there is none.
fn canonical(path: &str) -> Option<String> {
    let bytes = path.as_bytes();
    let mut out = String::with_capacity(path.len() + 1);
    let mut at = 0;
    // Where in `out` the last `%` stands that begins no escape.
    let mut stray = None;
    if !is_slash(bytes.first()) {
        out.push('/');
    }
    while let Some(&byte) = bytes.get(at) {
        if let Some(dot) = dot_length(bytes, at) {
            at += if out.ends_with('/') {
                after_slash(bytes, at, dot, &mut out)
            } else {
                plain_dot(dot, &mut out)
            };
            continue;
        }
        at += match byte {
            b'/' | b'\\' => {
                out.push('/');
                1
            }
            b'%' => match escaped(bytes, at) {
                Some(0) => return None,
                Some(value) if is_unreserved(value) => {
                    out.push(char::from(value));
                    if let Some(stray) = stray {
                        guard(stray, bytes.get(at + 3), &mut out);
                    }
                    3
                }
                Some(_) => {
                    out.push_str(path.get(at..at + 3)?);
                    3
                }
                None => {
                    stray = Some(out.len());
                    out.push('%');
                    1
                }
            },
            byte if has_no_place(byte) => {
                out.push_str(&format!("%{byte:02X}"));
                1
            }
            byte => {
                out.push(char::from(byte));
                1
            }
        };
    }
    Some(out)
}

/// Escapes a stray `%` when what was just resolved, or that and the next byte of the input, would make an escape of it.
fn guard(stray: usize, next: Option<&u8>, out: &mut String) {
    let mut tail = out.as_bytes().get(stray..).unwrap_or_default().to_vec();
    if tail.len() == 2 {
        tail.extend(next);
    }
    if tail.len() == 3 && escaped(&tail, 0).is_some() {
        out.insert_str(stray + 1, "25");
    }
}

fn plain_dot(length: usize, out: &mut String) -> usize {
    out.push('.');
    length
}

/// A dot that begins a segment: `.` and `..` are resolved, other segments stay. Tells how much of the input it took.
fn after_slash(bytes: &[u8], at: usize, dot: usize, out: &mut String) -> usize {
    let ends = |at: usize| bytes.get(at).is_none() || is_slash(bytes.get(at));
    let slash = |at: usize| usize::from(is_slash(bytes.get(at)));
    if ends(at + dot) {
        return dot + slash(at + dot);
    }
    match dot_length(bytes, at + dot) {
        Some(second) if ends(at + dot + second) => {
            // `out` ends in the slash before this segment: go back to the one before it, never above the root.
            out.pop();
            let parent = out.rfind('/').unwrap_or_default();
            out.truncate(parent);
            out.push('/');
            dot + second + slash(at + dot + second)
        }
        _ => plain_dot(dot, out),
    }
}

/// The length of a dot, escaped or not.
fn dot_length(bytes: &[u8], at: usize) -> Option<usize> {
    match bytes.get(at)? {
        b'.' => Some(1),
        b'%' if escaped(bytes, at) == Some(b'.') => Some(3),
        _ => None,
    }
}

/// The value of an escape; `None` when it is malformed.
fn escaped(bytes: &[u8], at: usize) -> Option<u8> {
    let digit = |at: usize| char::from(*bytes.get(at)?).to_digit(16);
    u8::try_from(digit(at + 1)? * 16 + digit(at + 2)?).ok()
}

fn is_slash(byte: Option<&u8>) -> bool {
    matches!(byte, Some(b'/' | b'\\'))
}

/// RFC 3986 §2.3: characters whose escapes mean the same.
fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')
}

/// Characters that are escaped when they come bare.
fn has_no_place(byte: u8) -> bool {
    byte <= b' ' || byte >= 0x7f || matches!(byte, b'"' | b'#' | b'<' | b'>' | b'?' | b'^' | b'`' | b'{' | b'|' | b'}')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{EscapedSlashes, Normalized, PathAndQuery, PathNormalization};

    const BASE: PathNormalization = PathNormalization {
        normalize: true,
        merge_slashes: false,
        escaped_slashes: EscapedSlashes::Keep,
    };
    const ALL: PathNormalization = PathNormalization {
        normalize: true,
        merge_slashes: true,
        escaped_slashes: EscapedSlashes::Unescape,
    };

    fn path(text: &str) -> PathAndQuery {
        PathAndQuery::try_from(text).unwrap()
    }

    fn goes_on(rules: PathNormalization, text: &str) -> String {
        match rules.apply(&path(text)) {
            Normalized::Same => path(text).to_string(),
            Normalized::Changed(path) => path.to_string(),
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn a_path_takes_one_form() {
        for (before, after) in [
            ("/", "/"),
            ("/a/./b/../c//d/%2e%2e/e%2Ff?x=/../y", "/a/c//e%2Ff?x=/../y"),
            ("/a?b=1#frag", "/a?b=1"),
            ("/../../etc/passwd", "/etc/passwd"),
            ("/a/..", "/"),
            ("/a/.", "/a/"),
            ("/a/b/..", "/a/"),
            ("/a/.b/..c/d./e../...", "/a/.b/..c/d./e../..."),
            ("/a/%2e./b", "/b"),
            ("/a/.%2E", "/"),
            ("/a\\b\\..\\c", "/a/c"),
            ("/%61%2D%7e%5F%41", "/a-~_A"),
            ("/%2f%25%20%c3%A9", "/%2f%25%20%c3%A9"),
            ("/a%b%zz", "/a%b%zz"),
            ("/%%32%65%%32e/x", "/%252e%252e/x"),
            ("/%a%62/%%6", "/%25ab/%%6"),
            ("/a/%252e%252e/b", "/a/%252e%252e/b"),
            ("/{id}|x", "/%7Bid%7D%7Cx"),
            ("/a//../b", "/a/b"),
            ("/a:b@c!$&'()*+,;=", "/a:b@c!$&'()*+,;="),
        ] {
            assert_eq!(goes_on(BASE, before), after, "{before}");
        }
    }

    #[test]
    fn escaped_slashes_and_runs_of_slashes_are_treated_as_the_chain_says() {
        for (before, after) in [
            ("/a%2Fb%5Cc//d/../e", "/a/b/c/e"),
            ("//a///b", "/a/b"),
            ("/a//?b=//", "/a/?b=//"),
            ("/a%2f..%2fb", "/b"),
            ("/a%252fb", "/a%252fb"),
        ] {
            assert_eq!(goes_on(ALL, before), after, "{before}");
        }
        let rules = |escaped_slashes| PathNormalization { escaped_slashes, ..BASE };
        assert_eq!(rules(EscapedSlashes::Reject).apply(&path("/a%2fb")), Normalized::Reject);
        assert_eq!(rules(EscapedSlashes::Reject).apply(&path("/a/b?c=%2f")), Normalized::Same);
        assert_eq!(
            rules(EscapedSlashes::Redirect).apply(&path("/a%2fb?c")),
            Normalized::Redirect(path("/a/b?c"))
        );
        assert_eq!(
            rules(EscapedSlashes::Redirect).apply(&path("/a/./b")),
            Normalized::Changed(path("/a/b"))
        );
        assert_eq!(rules(EscapedSlashes::Keep).apply(&path("/a%2fb")), Normalized::Same);
    }

    #[test]
    fn without_normalization_nothing_changes() {
        for text in ["/a/../b", "//", "/%2e", "*"] {
            assert_eq!(PathNormalization::default().apply(&path(text)), Normalized::Same, "{text}");
        }
        assert_eq!(ALL.apply(&path("*")), Normalized::Same);
    }

    #[test]
    fn an_escaped_zero_is_refused() {
        assert_eq!(BASE.apply(&path("/a%00b")), Normalized::Reject);
    }

    proptest! {
        #[test]
        fn normalizing_twice_is_normalizing_once(text in "/[%./\\\\a2e5fFC?{~-]{0,24}") {
            for rules in [BASE, ALL] {
                if let Normalized::Changed(once) = rules.apply(&path(&text)) {
                    prop_assert_eq!(rules.apply(&once), Normalized::Same, "{} became {}", text, once);
                }
            }
        }

        #[test]
        fn no_dot_segment_is_left(text in "/([./a]|%2e|%2E|\\\\|%2f){0,24}") {
            let after = goes_on(ALL, &text);
            prop_assert!(after.starts_with('/'));
            prop_assert!(after.split('/').all(|segment| segment != "." && segment != ".."), "{} became {}", text, after);
            prop_assert!(!after.contains("//"));
        }
    }
}
