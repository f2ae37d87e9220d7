//! Matching one string: exact, prefix, suffix, contains, or a regular expression over the whole.
//!
//! Values are bytes, since header values need not be UTF-8. Folding case is ASCII's, as in Envoy; it has no effect on regular
//! expressions, which fold with `(?i)` on their own.

use std::sync::Arc;

use memchr::memmem;

use super::Regex;

/// How a string is compared.
#[derive(Clone, Debug)]
pub enum StringMatch {
    /// The whole string.
    Exact(Arc<str>),
    /// Its beginning.
    Prefix(Arc<str>),
    /// Its end.
    Suffix(Arc<str>),
    /// Any part of it.
    Contains(Arc<str>),
    /// The whole string, by a regular expression.
    Regex(Regex),
}

/// A compiled string matcher.
#[derive(Clone, Debug)]
pub struct StringMatcher {
    how: StringMatch,
    ignore_case: bool,
}

// === impl StringMatcher ===

impl StringMatcher {
    /// A matcher; `ignore_case` folds ASCII letters and does not concern regular expressions.
    pub fn new(how: StringMatch, ignore_case: bool) -> Self {
        let how = match how {
            StringMatch::Contains(part) if ignore_case => StringMatch::Contains(part.to_ascii_lowercase().into()),
            how => how,
        };
        Self { how, ignore_case }
    }

    /// The whole string, letters as they are.
    pub fn exact(value: &str) -> Self {
        Self::new(StringMatch::Exact(value.into()), false)
    }

    /// The beginning, letters as they are.
    pub fn prefix(value: &str) -> Self {
        Self::new(StringMatch::Prefix(value.into()), false)
    }

    /// How it compares.
    pub fn how(&self) -> &StringMatch {
        &self.how
    }

    /// Whether upper and lower case are the same to it.
    pub fn ignores_case(&self) -> bool {
        self.ignore_case
    }

    /// Whether `value` matches.
    pub fn matches(&self, value: &[u8]) -> bool {
        let fold = self.ignore_case;
        match &self.how {
            StringMatch::Exact(whole) => same(whole.as_bytes(), value, fold),
            StringMatch::Prefix(start) => {
                let start = start.as_bytes();
                value.get(..start.len()).is_some_and(|head| same(start, head, fold))
            }
            StringMatch::Suffix(end) => {
                let end = end.as_bytes();
                let from = value.len().checked_sub(end.len());
                from.and_then(|from| value.get(from..))
                    .is_some_and(|tail| same(end, tail, fold))
            }
            StringMatch::Contains(part) if fold => memmem::find(&value.to_ascii_lowercase(), part.as_bytes()).is_some(),
            StringMatch::Contains(part) => memmem::find(value, part.as_bytes()).is_some(),
            StringMatch::Regex(regex) => regex.matches(value),
        }
    }
}

/// Equality, with ASCII letters folded on demand.
pub(super) fn same(a: &[u8], b: &[u8], fold: bool) -> bool {
    if fold { a.eq_ignore_ascii_case(b) } else { a == b }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Regex, StringMatch, StringMatcher};

    fn regex(pattern: &str) -> StringMatch {
        StringMatch::Regex(Regex::new(pattern).unwrap())
    }

    #[test]
    fn each_kind_matches_what_envoy_matches() {
        let exact = || StringMatch::Exact("Gold".into());
        let prefix = || StringMatch::Prefix("Go".into());
        let suffix = || StringMatch::Suffix("Ld".into());
        let contains = || StringMatch::Contains("oL".into());
        for (how, ignore_case, value, matches) in [
            (exact(), false, "Gold", true),
            (exact(), false, "gold", false),
            (exact(), true, "gOLD", true),
            (exact(), true, "golden", false),
            (prefix(), false, "Golf", true),
            (prefix(), false, "golf", false),
            (prefix(), true, "golf", true),
            (prefix(), true, "g", false),
            (suffix(), false, "goLd", true),
            (suffix(), false, "gold", false),
            (suffix(), true, "gold", true),
            (suffix(), true, "d", false),
            (contains(), false, "goLd", true),
            (contains(), false, "gold", false),
            (contains(), true, "gold", true),
            (contains(), true, "", false),
            (regex("v[0-9]+"), false, "v12", true),
            (regex("v[0-9]+"), false, "v12x", false),
            (regex("v[0-9]+"), false, "xv12", false),
            (regex("v[0-9]+"), true, "V12", false),
            (regex("(?i)v[0-9]+"), false, "V12", true),
        ] {
            let matcher = StringMatcher::new(how.clone(), ignore_case);
            assert_eq!(matcher.matches(value.as_bytes()), matches, "{how:?} {ignore_case} {value}");
        }
    }

    #[test]
    fn values_need_not_be_utf8() {
        let matcher = StringMatcher::new(StringMatch::Suffix("x".into()), true);
        assert!(matcher.matches(b"\xff\xfeX"));
    }

    proptest! {
        #[test]
        fn a_string_matches_its_own_parts(a in "\\PC{0,8}", b in "\\PC{0,8}", c in "\\PC{0,8}", fold in any::<bool>()) {
            let whole = format!("{a}{b}{c}");
            let of = |how: StringMatch| StringMatcher::new(how, fold).matches(whole.as_bytes());
            prop_assert!(of(StringMatch::Exact(whole.as_str().into())));
            prop_assert!(of(StringMatch::Prefix(a.as_str().into())));
            prop_assert!(of(StringMatch::Contains(b.as_str().into())));
            prop_assert!(of(StringMatch::Suffix(c.as_str().into())));
        }

        #[test]
        fn ignoring_case_never_matches_less(pattern in "[a-zA-Z]{0,3}", value in "[a-zA-Z]{0,6}") {
            for how in [
                StringMatch::Exact(pattern.as_str().into()),
                StringMatch::Prefix(pattern.as_str().into()),
                StringMatch::Suffix(pattern.as_str().into()),
                StringMatch::Contains(pattern.as_str().into()),
            ] {
                let strict = StringMatcher::new(how.clone(), false).matches(value.as_bytes());
                let loose = StringMatcher::new(how.clone(), true).matches(value.as_bytes());
                prop_assert!(!strict || loose);
                let upper = value.to_ascii_uppercase();
                prop_assert_eq!(loose, StringMatcher::new(how, true).matches(upper.as_bytes()));
            }
        }

        #[test]
        fn exact_is_prefix_and_suffix_of_the_same_length(pattern in "[ab]{0,4}", value in "[ab]{0,4}") {
            let of = |how: StringMatch| StringMatcher::new(how, false).matches(value.as_bytes());
            let exact = of(StringMatch::Exact(pattern.as_str().into()));
            let both = of(StringMatch::Prefix(pattern.as_str().into()))
                && of(StringMatch::Suffix(pattern.as_str().into()))
                && pattern.len() == value.len();
            prop_assert_eq!(exact, both);
        }
    }
}
