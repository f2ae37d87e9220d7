//! From RE2's dialect to that of `regex`.
//!
//! Both grew from the same roots; where a pattern would mean something else, or is accepted by one only, it is rewritten here:
//! Perl classes and `\b` are ASCII in RE2; inside brackets `[`, `&&`, `--` and `~~` are ordinary there; a `{` that begins no
//! repetition is an ordinary character (`/users/{id}`), `\<` is `<`, `\Q…\E` quotes, and repetitions stop at 1000.
//!
//! The pattern is read left to right once; nothing here knows what it will match.

use std::{iter::Peekable, str::Chars};

/// RE2's greatest count of a repetition.
const MOST_REPETITIONS: u32 = 1000;

type Source<'a> = Peekable<Chars<'a>>;

/// The same pattern for `regex`, or what is wrong with it.
pub(super) fn translate(pattern: &str) -> Result<String, &'static str> {
    let mut out = String::with_capacity(pattern.len() + 8);
    let mut source = pattern.chars().peekable();
    // Whether something stands before that a repetition could apply to.
    let mut repeatable = false;
    let mut open_groups = 0u32;
    while let Some(character) = source.next() {
        match character {
            '\\' => repeatable = escape(&mut source, &mut out, false)?,
            '[' => {
                class(&mut source, &mut out)?;
                repeatable = true;
            }
            '{' => match repetition(&source) {
                Some(counts) if repeatable => {
                    check(&counts)?;
                    out.push('{');
                }
                Some(_) => return Err("a repetition has nothing to repeat"),
                None => {
                    out.push_str("\\{");
                    repeatable = true;
                }
            },
            '(' => {
                out.push('(');
                let flags_alone = source.peek() == Some(&'?') && group(&mut source, &mut out)?;
                open_groups += u32::from(!flags_alone);
                repeatable = false;
            }
            ')' => {
                out.push(')');
                open_groups = open_groups
                    .checked_sub(1)
                    .ok_or("a parenthesis is closed that was not opened")?;
                repeatable = true;
            }
            '|' => {
                out.push('|');
                repeatable = false;
            }
            other => {
                out.push(other);
                repeatable = true;
            }
        }
    }
    if open_groups == 0 {
        Ok(out)
    } else {
        Err("a parenthesis is not closed")
    }
}

/// The ordinary characters that a pattern begins with, where every match begins with them too.
pub(super) fn literal_prefix(pattern: &str) -> &str {
    // An alternative may begin otherwise; inside a group or a bracket `|` is harmless, but telling those apart is not worth it.
    if pattern.contains('|') {
        return "";
    }
    let special = |character: char| "\\.+*?()[]{}^$".contains(character);
    let Some(end) = pattern.find(special) else { return pattern };
    let prefix = pattern.get(..end).unwrap_or_default();
    let repeated = pattern.get(end..).is_some_and(|rest| rest.starts_with(['*', '?', '{']));
    match prefix.char_indices().next_back() {
        Some((last, _)) if repeated => prefix.get(..last).unwrap_or_default(),
        _ => prefix,
    }
}

/// The longest row of ordinary characters that every match has in it; empty where none is seen.
///
/// Only what stands outside of groups is looked at. An alternative may go without any, and flags may change what a character means.
pub(super) fn required_literal(pattern: &str) -> String {
    let mut longest = String::new();
    let mut row = String::new();
    let mut depth = 0usize;
    let mut source = pattern.chars().peekable();
    let mut end = |row: &mut String| {
        if row.len() > longest.len() {
            longest.clone_from(row);
        }
        row.clear();
    };
    if pattern.contains("(?") {
        return String::new();
    }
    while let Some(character) = source.next() {
        match character {
            '\\' => match source.next() {
                Some(quoted) if depth == 0 && quoted.is_ascii_punctuation() => row.push(quoted),
                // A class, a place, or a character with a name.
                Some('d' | 'D' | 'w' | 'W' | 's' | 'S' | 'b' | 'B' | 'A' | 'z' | 'a' | 'f' | 't' | 'n' | 'r' | 'v') => {
                    end(&mut row)
                }
                Some(quoted) if quoted.is_ascii_punctuation() => {}
                // What follows the others belongs to them.
                _ => return String::new(),
            },
            '[' => {
                end(&mut row);
                // `]` is ordinary where it stands first.
                if source.peek() == Some(&'^') {
                    source.next();
                }
                if source.peek() == Some(&']') {
                    source.next();
                }
                loop {
                    match source.next() {
                        Some('\\') => drop(source.next()),
                        // `[:alpha:]` inside: not worth telling apart.
                        Some('[') | None => return String::new(),
                        Some(']') => break,
                        Some(_) => {}
                    }
                }
            }
            '(' => {
                end(&mut row);
                depth += 1;
            }
            ')' => depth = depth.saturating_sub(1),
            '|' if depth == 0 => return String::new(),
            '*' | '?' | '{' if depth == 0 => {
                // What stands before may be missing, and a repetition's counts are no text.
                row.pop();
                end(&mut row);
                if character == '{' {
                    if repetition(&source).is_none() {
                        return String::new();
                    }
                    source.by_ref().take_while(|inside| *inside != '}').for_each(drop);
                }
            }
            '.' | '+' | '^' | '$' => end(&mut row),
            ordinary if depth == 0 => row.push(ordinary),
            _ => {}
        }
    }
    end(&mut row);
    longest
}

/// The rest of a repetition whose `{` was just read, without the `}`; `None` when it is none.
fn repetition(source: &Source<'_>) -> Option<String> {
    let inside: String = source.clone().take(16).take_while(|character| *character != '}').collect();
    let closed = source.clone().nth(inside.chars().count()) == Some('}');
    let (least, most) = inside.split_once(',').unwrap_or((&inside, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    (closed && !least.is_empty() && digits(least) && digits(most)).then_some(inside)
}

fn check(counts: &str) -> Result<(), &'static str> {
    let fits = |count: &str| count.is_empty() || count.parse().is_ok_and(|count: u32| count <= MOST_REPETITIONS);
    let (least, most) = counts.split_once(',').unwrap_or((counts, ""));
    if fits(least) && fits(most) {
        Ok(())
    } else {
        Err("a repetition counts to more than 1000")
    }
}

/// What follows `(?`: flags that RE2 knows, or a name. Tells whether the group ended with them.
fn group(source: &mut Source<'_>, out: &mut String) -> Result<bool, &'static str> {
    for character in source.by_ref() {
        out.push(character);
        match character {
            ')' => return Ok(true),
            ':' | '<' => return Ok(false),
            '?' | 'P' | 'i' | 'm' | 's' | 'U' | '-' => {}
            _ => return Err("a group begins with flags that RE2 does not know"),
        }
    }
    Err("a group is not closed")
}

/// What follows a backslash; tells whether a repetition may apply to it.
fn escape(source: &mut Source<'_>, out: &mut String, in_class: bool) -> Result<bool, &'static str> {
    let character = source.next().ok_or("it ends in a lone backslash")?;
    match character {
        'd' => out.push_str("[0-9]"),
        'D' => out.push_str("[^0-9]"),
        's' => out.push_str("[\\t\\n\\f\\r ]"),
        'S' => out.push_str("[^\\t\\n\\f\\r ]"),
        'w' => out.push_str("[0-9A-Za-z_]"),
        'W' => out.push_str("[^0-9A-Za-z_]"),
        'b' | 'B' if in_class => return Err("`\\b` has no meaning inside brackets"),
        'b' => out.push_str("(?-u:\\b)"),
        'B' => out.push_str("(?-u:\\B)"),
        'Q' if !in_class => return Ok(quoted(source, out)),
        'E' if !in_class => return Ok(!out.is_empty()),
        'C' if in_class => return Err("`\\C` has no meaning inside brackets"),
        'C' => out.push_str("(?s-u:.)"),
        'A' | 'z' if !in_class => {
            out.push('\\');
            out.push(character);
        }
        'a' | 'f' | 't' | 'n' | 'r' | 'v' => {
            out.push('\\');
            out.push(character);
        }
        'x' => {
            out.push_str("\\x");
        }
        'p' | 'P' => {
            out.push('\\');
            out.push(character);
            if source.peek() == Some(&'{') {
                for inside in source.by_ref() {
                    out.push(inside);
                    if inside == '}' {
                        break;
                    }
                }
            } else if let Some(letter) = source.next() {
                out.push(letter);
            }
        }
        '0' => octal(source, out),
        '1'..='9' => return Err("back-references are not regular"),
        other if other.is_ascii_alphanumeric() => return Err("an escape that RE2 does not know"),
        other => literal(other, out),
    }
    if character == 'x' {
        hexadecimal(source, out)?;
    }
    Ok(true)
}

/// The digits after `\x`: two, or any number in braces.
fn hexadecimal(source: &mut Source<'_>, out: &mut String) -> Result<(), &'static str> {
    let braced = source.peek() == Some(&'{');
    let mut digits = 0;
    for character in source.by_ref() {
        out.push(character);
        match character {
            '{' if digits == 0 && braced => {}
            '}' if braced && digits > 0 => return Ok(()),
            digit if digit.is_ascii_hexdigit() => digits += 1,
            _ => break,
        }
        if !braced && digits == 2 {
            return Ok(());
        }
    }
    Err("`\\x` wants two hexadecimal digits, or some in braces")
}

/// The digits after `\0`: up to two octal ones.
fn octal(source: &mut Source<'_>, out: &mut String) {
    let mut value = 0;
    for _ in 0..2 {
        let Some(digit) = source.peek().and_then(|character| character.to_digit(8)) else {
            break;
        };
        value = value * 8 + digit;
        source.next();
    }
    out.push_str(&format!("\\x{{{value:x}}}"));
}

/// Up to `\E` or the end, taken literally.
fn quoted(source: &mut Source<'_>, out: &mut String) -> bool {
    let before = out.len();
    while let Some(character) = source.next() {
        if character == '\\' && source.peek() == Some(&'E') {
            source.next();
            break;
        }
        literal(character, out);
    }
    out.len() > before
}

/// One character that means itself.
fn literal(character: char, out: &mut String) {
    out.push_str(&regex::escape(character.encode_utf8(&mut [0; 4])));
}

/// A bracketed class whose `[` was just read.
fn class(source: &mut Source<'_>, out: &mut String) -> Result<(), &'static str> {
    out.push('[');
    if source.peek() == Some(&'^') {
        source.next();
        out.push('^');
    }
    let mut first = true;
    while let Some(character) = source.next() {
        match character {
            ']' if !first => {
                out.push(']');
                return Ok(());
            }
            '[' if source.peek() == Some(&':') => posix(source, out)?,
            '\\' => {
                escape(source, out, true)?;
            }
            // Ordinary in RE2, but set operations or nested classes in `regex`.
            ']' | '[' | '&' | '~' => {
                out.push('\\');
                out.push(character);
            }
            // A range's dash stays; one that stands for itself must not look like the operator `--`.
            '-' if first || source.peek() == Some(&']') => out.push_str("\\-"),
            '-' => {
                out.push('-');
                if source.peek() == Some(&'-') {
                    source.next();
                    out.push_str("\\-");
                }
            }
            other => out.push(other),
        }
        first = false;
    }
    Err("a bracket is not closed")
}

/// `[:name:]` inside brackets, whose `[` was just read.
fn posix(source: &mut Source<'_>, out: &mut String) -> Result<(), &'static str> {
    out.push('[');
    let mut last = '[';
    for character in source.by_ref() {
        out.push(character);
        if character == ']' && last == ':' {
            return Ok(());
        }
        last = character;
    }
    Err("a named class is not closed")
}

#[cfg(test)]
mod tests {
    use super::super::Regex;

    #[test]
    fn patterns_mean_what_they_mean_to_re2() {
        for (pattern, value, matches) in [
            (r"\d+", "12", true),
            (r"\d+", "١٢", false),
            (r"\D", "é", true),
            (r"\w+", "a_9", true),
            (r"\w", "é", false),
            (r"\W", "é", true),
            (r"[\d\-x]+", "1-x", true),
            (r"[^\d]", "a", true),
            (r"\s", "\u{b}", false),
            (r"[\s]", "\t", true),
            (r".", "é", true),
            (r".", "\n", false),
            (r"(?s).", "\n", true),
            (r"/users/{id}", "/users/{id}", true),
            (r"/users/{id}/x{2}", "/users/{id}/xx", true),
            (r"a{,2}", "a{,2}", true),
            (r"a{2,}", "aaa", true),
            (r"a{1,2}", "aaa", false),
            (r"[[]x[]]", "[x]", true),
            (r"[a&&b]+", "a&b", true),
            (r"[a~~b]+", "a~b", true),
            (r"[+--]+", "+,-", true),
            (r"[-a]+", "-a", true),
            (r"[a-]+", "-a", true),
            (r"[]a]+", "]a", true),
            (r"[^]a]", "b", true),
            (r"[[:alpha:]_]+", "a_B", true),
            (r"\Qa.b\E+", "a.bb", true),
            (r"\Qa.b", "a.b", true),
            (r"\Qa.b", "axb", false),
            (r"\<a\>", "<a>", true),
            (r"\/a\-b\.c", "/a-b.c", true),
            (r"\x41\x{42}\0", "AB\0", true),
            (r"\pL\p{Greek}", "éα", true),
            (r"(?i)ABC", "abc", true),
            (r"(?i:A)B", "aB", true),
            (r"(?i:A)B", "ab", false),
            (r"(?P<n>a)(?<m>b)", "ab", true),
            (r"\bword\b", "word", true),
            (r"a\z|\Ab", "b", true),
            (r"^a$", "a", true),
        ] {
            let regex = Regex::new(pattern).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(
                regex.matches(value.as_bytes()),
                matches,
                "{pattern} on {value:?} as {regex:?}"
            );
        }
    }

    #[test]
    fn every_match_begins_with_the_literal_prefix() {
        for (pattern, prefix) in [
            ("/abc", "/abc"),
            ("/v[0-9]+/x", "/v"),
            ("/ab?c", "/a"),
            ("/ab*", "/a"),
            ("/ab+", "/ab"),
            ("/ab{0,1}c", "/a"),
            ("/a.*", "/a"),
            (r"/a\.b", "/a"),
            ("/a|b", ""),
            ("(?i)/a", ""),
            ("^/a", ""),
            ("é?", ""),
            ("", ""),
        ] {
            assert_eq!(super::literal_prefix(pattern), prefix, "{pattern}");
        }
    }

    #[test]
    fn every_match_has_the_required_literal_in_it() {
        for (pattern, literal) in [
            ("/abc", "/abc"),
            ("/[a-z]+/item-7/.*", "/item-7/"),
            ("/v[0-9]+/xyz?", "/xy"),
            (r"/a\.b\d+cd", "/a.b"),
            ("(/a|/bcd)/ef", "/ef"),
            ("(abc)?d", "d"),
            ("ab{2}cd", "cd"),
            ("ab+c", "ab"),
            ("[]a]bc[^]x]d", "bc"),
            (r"[\]]x", "x"),
            (r"\x4142", ""),
            (r"\pLabc", ""),
            (r"\Qa.b\E", ""),
            ("/users/{id}", ""),
            ("/a|/b", ""),
            ("(?i)/abc", ""),
            ("[[:alpha:]]abc", ""),
            (".*", ""),
            ("", ""),
        ] {
            assert_eq!(super::required_literal(pattern), literal, "{pattern}");
        }
    }

    proptest::proptest! {
        #[test]
        fn what_matches_has_the_required_literal(
            pattern in r"([ab]|\\[.d]|[.]|[ab][*+?]|[ab]\{1,2\}|\(a\|b\)|\(ab\)[?*]|\[ab\]|\[\^a\]){0,6}(\|b)?",
            values in proptest::collection::vec("[ab.1]{0,6}", 20),
        ) {
            let regex = Regex::new(&pattern).unwrap();
            let (literal, prefix) = (regex.required_literal(), regex.literal_prefix());
            for value in values.iter().filter(|value| regex.matches(value.as_bytes())) {
                proptest::prop_assert!(value.contains(&literal), "{} {}", pattern, value);
                proptest::prop_assert!(value.starts_with(prefix), "{} {}", pattern, value);
            }
        }
    }

    #[test]
    fn what_re2_refuses_is_refused() {
        for pattern in [
            "a{1001}",
            "a{1,2000}",
            "{2}",
            "(|{2})",
            r"\1",
            r"\y",
            r"\x4",
            "(?x) a",
            "(?u:a)",
            "[a",
            "(?=a)",
            "[b-a]",
            r"[\b]",
            r"[\C]",
            "a)",
            "(a",
            "(?i)a)",
            "a)|(b",
            "a\\",
        ] {
            assert!(Regex::new(pattern).is_err(), "{pattern}");
        }
    }
}
