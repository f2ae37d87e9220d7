//! Regular expressions of configuration: RE2's dialect, whole strings or any part of them, bounded size.
//!
//! `regex` gives what RE2 promises: time linear in the input. Its dialect differs in details, which `re2` translates; what
//! RE2 refuses is refused here too where it could mean something else. A compiled expression may take [`REGEX_SIZE_LIMIT`] bytes;
//! larger ones are refused when configuration is read, never at a request. Matchers, routes and CEL share it.

mod re2;

use std::{fmt, sync::Arc};

use regex::bytes;

/// Bytes that a compiled regular expression may take.
///
/// Enough for alternations of thousands of words; counted repetitions of repetitions (`(a{1000}){1000}`) are refused.
pub const REGEX_SIZE_LIMIT: usize = 2 << 20;

/// Bytes of the tables that an expression builds while it matches; with more to keep it matches slower, still in linear time.
const TABLE_LIMIT: usize = 512 << 10;

/// Bytes that a set of them may take, and its tables.
const SET_SIZE_LIMIT: usize = 8 << 20;

/// Characters that a regular expression may have before it is compiled.
const PATTERN_LIMIT: usize = 64 << 10;

/// Why a regular expression is refused.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum RegexError {
    /// Not a regular expression as RE2 understands it.
    #[error("the regular expression `{pattern}` is malformed: {reason}")]
    Malformed {
        /// The expression, shortened.
        pattern: String,
        /// What is wrong.
        reason: String,
    },
    /// It would take too much memory.
    #[error(
        "the regular expression `{pattern}` takes more than {limit} bytes when compiled; write it with fewer or smaller repetitions"
    )]
    TooLarge {
        /// The expression, shortened.
        pattern: String,
        /// The limit.
        limit: usize,
    },
    /// A substitution names a group that the expression does not have, or ends in a lone backslash.
    #[error("the substitution `{substitution}` is malformed: {reason}")]
    Substitution {
        /// The substitution.
        substitution: String,
        /// What is wrong.
        reason: String,
    },
}

/// A compiled regular expression that must match a whole string.
#[derive(Clone)]
pub struct Regex {
    pattern: Arc<str>,
    whole: bytes::Regex,
}

/// A compiled regular expression that may match any part of a string.
#[derive(Clone)]
pub struct RegexSearch {
    pattern: Arc<str>,
    anywhere: bytes::Regex,
}

/// Regular expressions that must match a whole string, asked together: one pass over the string tells which of them do.
#[derive(Clone)]
pub struct RegexSet {
    set: bytes::RegexSet,
}

/// A regular expression with what to put in the place of each match.
#[derive(Clone, Debug)]
pub struct RegexRewrite {
    pattern: Arc<str>,
    anywhere: bytes::Regex,
    substitution: Box<[Piece]>,
}

/// A part of a substitution.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Literal(Box<str>),
    Group(usize),
}

// === impl Regex ===

impl Regex {
    /// Compiles a pattern.
    pub fn new(pattern: &str) -> Result<Self, RegexError> {
        let translated = translate(pattern)?;
        // The translation has checked that the parentheses are balanced: `a)|(b` would be well-formed between these.
        let whole = compile(pattern, &format!("\\A(?:{translated})\\z"))?;
        Ok(Self {
            pattern: pattern.into(),
            whole,
        })
    }

    /// As configured.
    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    /// What every match begins with, as far as the pattern's ordinary characters tell.
    pub fn literal_prefix(&self) -> &str {
        re2::literal_prefix(&self.pattern)
    }

    /// A text that every match has in it, as far as the pattern's ordinary characters tell.
    pub fn required_literal(&self) -> String {
        re2::required_literal(&self.pattern)
    }

    /// Whether all of `value` matches.
    pub fn matches(&self, value: &[u8]) -> bool {
        self.whole.is_match(value)
    }
}

impl fmt::Debug for Regex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Regex({:?})", self.pattern)
    }
}

// === impl RegexSearch ===

impl RegexSearch {
    /// Compiles a pattern.
    pub fn new(pattern: &str) -> Result<Self, RegexError> {
        Ok(Self {
            pattern: pattern.into(),
            anywhere: compile(pattern, &translate(pattern)?)?,
        })
    }

    /// As configured.
    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    /// Whether a part of `value` matches.
    pub fn matches(&self, value: &[u8]) -> bool {
        self.anywhere.is_match(value)
    }
}

impl fmt::Debug for RegexSearch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RegexSearch({:?})", self.pattern)
    }
}

// === impl RegexSet ===

impl RegexSet {
    /// Puts expressions together; they are known by their place. Many large ones may take too much memory together.
    pub fn new<'r>(expressions: impl IntoIterator<Item = &'r Regex>) -> Result<Self, RegexError> {
        let patterns: Vec<_> = expressions.into_iter().map(|regex| regex.whole.as_str()).collect();
        let set = bytes::RegexSetBuilder::new(&patterns)
            .size_limit(SET_SIZE_LIMIT)
            .dfa_size_limit(SET_SIZE_LIMIT)
            .build();
        let too_large = |_| RegexError::TooLarge {
            pattern: format!("{} expressions", patterns.len()),
            limit: SET_SIZE_LIMIT,
        };
        Ok(Self {
            set: set.map_err(too_large)?,
        })
    }

    /// Whether one matches all of `value`.
    pub fn any(&self, value: &[u8]) -> bool {
        self.set.is_match(value)
    }

    /// Calls `f` with the place of each that matches all of `value`.
    pub fn each(&self, value: &[u8], f: impl FnMut(usize)) {
        self.set.matches(value).into_iter().for_each(f);
    }
}

impl fmt::Debug for RegexSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RegexSet({})", self.set.len())
    }
}

// === impl RegexRewrite ===

impl RegexRewrite {
    /// Compiles a pattern and a substitution, in which `\0` is the match, `\1`…`\9` are groups and `\\` is a backslash.
    pub fn new(pattern: &str, substitution: &str) -> Result<Self, RegexError> {
        let anywhere = compile(pattern, &translate(pattern)?)?;
        let substitution = parse_substitution(substitution, anywhere.captures_len())?;
        Ok(Self {
            pattern: pattern.into(),
            anywhere,
            substitution,
        })
    }

    /// As configured.
    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    /// `text` with every match replaced; groups that took no part are empty.
    pub fn replace_all(&self, text: &str) -> String {
        let mut out = Vec::with_capacity(text.len());
        let mut rest = 0;
        for captures in self.anywhere.captures_iter(text.as_bytes()) {
            let Some(whole) = captures.get(0) else { continue };
            out.extend_from_slice(text.as_bytes().get(rest..whole.start()).unwrap_or_default());
            for piece in &self.substitution {
                match piece {
                    Piece::Literal(literal) => out.extend_from_slice(literal.as_bytes()),
                    Piece::Group(group) => out.extend_from_slice(captures.get(*group).map_or(b"", |found| found.as_bytes())),
                }
            }
            rest = whole.end();
        }
        out.extend_from_slice(text.as_bytes().get(rest..).unwrap_or_default());
        // An empty match may fall inside a character of several bytes only if the pattern leaves Unicode mode, which RE2 cannot.
        String::from_utf8_lossy(&out).into_owned()
    }
}

/// The pattern in the dialect of `regex`.
fn translate(pattern: &str) -> Result<String, RegexError> {
    if pattern.len() > PATTERN_LIMIT {
        return Err(RegexError::TooLarge {
            pattern: shortened(pattern),
            limit: REGEX_SIZE_LIMIT,
        });
    }
    re2::translate(pattern).map_err(|reason| RegexError::Malformed {
        pattern: shortened(pattern),
        reason: reason.to_owned(),
    })
}

fn compile(pattern: &str, translated: &str) -> Result<bytes::Regex, RegexError> {
    bytes::RegexBuilder::new(translated)
        .size_limit(REGEX_SIZE_LIMIT)
        .dfa_size_limit(TABLE_LIMIT)
        .build()
        .map_err(|error| match error {
            regex::Error::CompiledTooBig(limit) => RegexError::TooLarge {
                pattern: shortened(pattern),
                limit,
            },
            other => RegexError::Malformed {
                pattern: shortened(pattern),
                reason: last_line(&other.to_string()),
            },
        })
}

/// The sentence at the end of `regex`'s many-lined message, without the picture of the pattern.
fn last_line(message: &str) -> String {
    let line = message.lines().last().unwrap_or(message);
    line.trim_start_matches("error: ").to_owned()
}

/// At most the first hundred characters, for messages.
fn shortened(pattern: &str) -> String {
    match pattern.char_indices().nth(100) {
        Some((end, _)) => format!("{}…", pattern.get(..end).unwrap_or_default()),
        None => pattern.to_owned(),
    }
}

fn parse_substitution(substitution: &str, groups: usize) -> Result<Box<[Piece]>, RegexError> {
    let refuse = |reason: String| RegexError::Substitution {
        substitution: shortened(substitution),
        reason,
    };
    let mut pieces = Vec::new();
    let mut literal = String::new();
    let mut characters = substitution.chars();
    while let Some(character) = characters.next() {
        if character != '\\' {
            literal.push(character);
            continue;
        }
        match characters.next() {
            Some('\\') => literal.push('\\'),
            Some(digit @ '0'..='9') => {
                let group = usize::from(digit as u8 - b'0');
                if group >= groups {
                    return Err(refuse(format!(
                        "`\\{group}` names a group, but the expression has {}",
                        groups - 1
                    )));
                }
                if !literal.is_empty() {
                    pieces.push(Piece::Literal(std::mem::take(&mut literal).into()));
                }
                pieces.push(Piece::Group(group));
            }
            Some(other) => return Err(refuse(format!("`\\{other}` is neither a group nor a backslash"))),
            None => return Err(refuse("it ends in a lone backslash".to_owned())),
        }
    }
    if !literal.is_empty() {
        pieces.push(Piece::Literal(literal.into()));
    }
    Ok(pieces.into())
}

#[cfg(test)]
mod tests {
    use super::{REGEX_SIZE_LIMIT, Regex, RegexError, RegexRewrite, RegexSearch, RegexSet};

    #[test]
    fn an_expression_that_would_take_too_much_memory_is_refused() {
        let limit = REGEX_SIZE_LIMIT;
        for pattern in ["(a{1000}){1000}".to_owned(), "x".repeat(100_000)] {
            match Regex::new(&pattern) {
                Err(RegexError::TooLarge { limit: told, pattern }) => {
                    assert_eq!(told, limit);
                    assert!(pattern.chars().count() <= 101);
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_malformed_expression_says_what_is_wrong_in_one_line() {
        for pattern in ["a(", "[a", "*", "a)|(b", "(?P<n", "\\1", "(?=x)"] {
            let error = Regex::new(pattern).unwrap_err();
            assert!(matches!(error, RegexError::Malformed { .. }), "{pattern}: {error:?}");
            assert_eq!(error.to_string().lines().count(), 1, "{error}");
        }
    }

    #[test]
    fn alternatives_are_anchored_together() {
        let regex = Regex::new("a|bc").unwrap();
        for (value, matches) in [("a", true), ("bc", true), ("ac", false), ("abc", false), ("a\n", false)] {
            assert_eq!(regex.matches(value.as_bytes()), matches, "{value}");
        }
    }

    #[test]
    fn a_search_finds_any_part() {
        let search = RegexSearch::new("b+c").unwrap();
        for (value, matches) in [("abbcd", true), ("bc", true), ("ac", false), ("", false)] {
            assert_eq!(search.matches(value.as_bytes()), matches, "{value}");
        }
    }

    #[test]
    fn a_set_tells_which_of_its_expressions_match_the_whole() {
        let all: Vec<_> = ["a.*", ".*b", "ab", "b"].map(|pattern| Regex::new(pattern).unwrap()).into();
        let set = RegexSet::new(&all).unwrap();
        for (value, places) in [("ab", &[0, 1, 2][..]), ("b", &[1, 3]), ("c", &[]), ("ba", &[])] {
            let mut found = Vec::new();
            set.each(value.as_bytes(), |place| found.push(place));
            assert_eq!(found, places, "{value}");
            assert_eq!(set.any(value.as_bytes()), !places.is_empty(), "{value}");
        }
        let large: Vec<_> = (0..100)
            .map(|n| Regex::new(&format!("(x{n}[a-z]{{1,500}}){{1,3}}")).unwrap())
            .collect();
        assert!(matches!(RegexSet::new(&large), Err(RegexError::TooLarge { .. })));
    }

    #[test]
    fn a_rewrite_replaces_every_match_and_knows_its_groups() {
        for (pattern, substitution, text, result) in [
            ("^/api(/?)(.*)", "/\\2", "/api/users", "/users"),
            ("^/api(/?)(.*)", "/\\2", "/api", "/"),
            ("^/users/([^/]+)(/.*)?$", "/by-id/\\1\\2", "/users/7", "/by-id/7"),
            ("^/users/([^/]+)(/.*)?$", "/by-id/\\1\\2", "/users/7/x", "/by-id/7/x"),
            ("/.*", "/items", "/v1/items/3", "/items"),
            ("a", "\\0\\0", "banana", "baanaanaa"),
            ("x*", "-", "abc", "-a-b-c-"),
            ("/", "\\\\", "/a/b", "\\a\\b"),
            ("/none", "/other", "/a", "/a"),
        ] {
            let rewrite = RegexRewrite::new(pattern, substitution).unwrap();
            assert_eq!(rewrite.replace_all(text), result, "{pattern} {substitution}");
        }
    }

    #[test]
    fn a_substitution_that_names_no_group_is_refused() {
        for substitution in ["\\1", "\\x", "a\\"] {
            let error = RegexRewrite::new("a", substitution).unwrap_err();
            assert!(matches!(error, RegexError::Substitution { .. }), "{substitution}: {error}");
        }
    }
}
