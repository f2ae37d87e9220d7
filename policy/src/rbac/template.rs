//! Templates of paths: `/users/*/orders/**` (contract xds §6.4; the configuration `envoy.extensions.path.match.uri_template.v3`).
//!
//! `*` stands for one segment that is not empty, `**` for any number of them, `{name}` and `{name=pattern}` for the same with a
//! name; text may follow the last of them (`/**.css`). After `**` no other of them may come. What can stand in a segment is RFC
//! 3986's `pchar`.

use crate::matcher::{Regex, RegexError};

/// What can stand in a segment, for the inside of a class of characters.
const SEGMENT: &str = "a-zA-Z0-9\\-._~%!$&'()+,;:@=*";
/// Most variables in a template.
const MOST_VARIABLES: usize = 5;
/// Longest name of a variable.
const LONGEST_NAME: usize = 16;

/// A compiled template.
#[derive(Clone, Debug)]
pub struct UriTemplate {
    template: Box<str>,
    regex: Regex,
}

/// What is wrong with a template.
#[derive(Debug, thiserror::Error)]
#[error("`{template}` is no template of paths: {reason}")]
pub struct InvalidTemplate {
    /// The template.
    pub template: String,
    /// What is wrong.
    pub reason: Reason,
}

/// Why a template means nothing.
#[derive(Debug, thiserror::Error)]
pub enum Reason {
    /// It does not begin at the root.
    #[error("it does not begin with `/`")]
    NoRoot,
    /// A segment has a character that no path has.
    #[error("`{0}` cannot stand in a segment")]
    Literal(String),
    /// A variable is not closed, has no name or no proper one.
    #[error("`{0}` is no variable")]
    Variable(String),
    /// Two variables have one name.
    #[error("variable `{0}` is there twice")]
    Repeated(String),
    /// There are too many.
    #[error("there are more than {MOST_VARIABLES} variables")]
    TooManyVariables,
    /// After `**` nothing can be told apart.
    #[error("after `**` only text may follow")]
    AfterText,
    /// Segments follow text that follows a wildcard.
    #[error("after a wildcard with text nothing may follow")]
    AfterSuffix,
    /// It is too large.
    #[error(transparent)]
    Regex(#[from] RegexError),
}

/// A template being read.
#[derive(Default)]
struct Reader<'a> {
    pattern: String,
    names: Vec<&'a str>,
    seen_text: bool,
}

// === impl UriTemplate ===

impl UriTemplate {
    /// Compiles a template.
    pub fn new(template: &str) -> Result<Self, InvalidTemplate> {
        let refuse = |reason| InvalidTemplate {
            template: template.to_owned(),
            reason,
        };
        let mut reader = Reader::default();
        reader.read(template).map_err(refuse)?;
        let regex = Regex::new(&reader.pattern).map_err(|error| refuse(error.into()))?;
        Ok(Self {
            template: template.into(),
            regex,
        })
    }

    /// As configured.
    pub fn template(&self) -> &str {
        &self.template
    }

    /// Whether a path, without its query, matches.
    pub fn matches(&self, path: &str) -> bool {
        self.regex.matches(path.as_bytes())
    }
}

// === impl Reader ===

impl<'a> Reader<'a> {
    fn read(&mut self, template: &'a str) -> Result<(), Reason> {
        let mut rest = template.strip_prefix('/').ok_or(Reason::NoRoot)?;
        self.pattern.push('/');
        while !rest.is_empty() {
            rest = self.segment(rest)?;
            if let Some(next) = rest.strip_prefix('/') {
                self.pattern.push('/');
                rest = next;
            } else if !rest.is_empty() {
                if self.literal(rest)?.is_empty() {
                    return Ok(());
                }
                return Err(Reason::AfterSuffix);
            }
        }
        Ok(())
    }

    /// Takes a segment off, up to its end or to what follows a wildcard.
    fn segment(&mut self, rest: &'a str) -> Result<&'a str, Reason> {
        match rest.chars().next() {
            Some('*') => self.wildcard(rest),
            Some('{') => self.variable(rest),
            _ => self.literal(rest),
        }
    }

    fn wildcard(&mut self, rest: &'a str) -> Result<&'a str, Reason> {
        if self.seen_text {
            return Err(Reason::AfterText);
        }
        if let Some(rest) = rest.strip_prefix("**") {
            self.seen_text = true;
            self.pattern.push_str(&format!("[{SEGMENT}/]*"));
            return Ok(rest);
        }
        self.pattern.push_str(&format!("[{SEGMENT}]+"));
        Ok(rest.strip_prefix('*').unwrap_or(rest))
    }

    fn literal(&mut self, rest: &'a str) -> Result<&'a str, Reason> {
        let end = rest.find('/').unwrap_or(rest.len());
        let (literal, rest) = rest.split_at(end);
        let ordinary = |letter: char| letter.is_ascii_alphanumeric() || "-._~%!$&'()+,;:@=*".contains(letter);
        if literal.is_empty() || !literal.chars().all(ordinary) {
            return Err(Reason::Literal(literal.to_owned()));
        }
        for letter in literal.chars() {
            if "$()+.*".contains(letter) {
                self.pattern.push('\\');
            }
            self.pattern.push(letter);
        }
        Ok(rest)
    }

    fn variable(&mut self, rest: &'a str) -> Result<&'a str, Reason> {
        let refuse = || Reason::Variable(rest.to_owned());
        let (inside, after) = rest
            .strip_prefix('{')
            .and_then(|rest| rest.split_once('}'))
            .ok_or_else(refuse)?;
        let (name, pattern) = inside
            .split_once('=')
            .map_or((inside, None), |(name, pattern)| (name, Some(pattern)));
        let proper = name.starts_with(|first: char| first.is_ascii_alphabetic())
            && name.len() <= LONGEST_NAME
            && name.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_');
        if !proper {
            return Err(refuse());
        }
        if self.names.contains(&name) {
            return Err(Reason::Repeated(name.to_owned()));
        }
        self.names.push(name);
        if self.names.len() > MOST_VARIABLES {
            return Err(Reason::TooManyVariables);
        }
        let Some(mut pattern) = pattern else {
            self.wildcard("*")?;
            return Ok(after);
        };
        loop {
            pattern = match pattern.strip_prefix('*') {
                Some(_) => self.wildcard(pattern)?,
                None => self.literal(pattern)?,
            };
            if pattern.is_empty() {
                return Ok(after);
            }
            pattern = pattern.strip_prefix('/').ok_or_else(refuse)?;
            self.pattern.push('/');
        }
    }
}

#[cfg(test)]
mod tests {
    use super::UriTemplate;

    #[test]
    fn a_template_matches_whole_paths() {
        for (template, path, matches) in [
            ("/", "/", true),
            ("/", "/a", false),
            ("/users/*", "/users/7", true),
            ("/users/*", "/users/", false),
            ("/users/*", "/users/7/", false),
            ("/users/*", "/users/7/orders", false),
            ("/users/*/orders", "/users/a=b*c/orders", true),
            ("/users/*/orders", "/users//orders", false),
            ("/files/**", "/files/", true),
            ("/files/**", "/files/a/b/c", true),
            ("/files/**", "/files", false),
            ("/**/secret", "/a/b/secret", true),
            ("/**/secret", "/secret", false),
            ("/**.css", "/a/b.css", true),
            ("/**.css", "/a/bxcss", false),
            ("/*.html", "/index.html", true),
            ("/*.html", "/a/index.html", false),
            ("/a/", "/a/", true),
            ("/a/", "/a", false),
            ("/{id}/x", "/7/x", true),
            ("/{id=**}", "/7/x", true),
            ("/{id=a/*}/x", "/a/7/x", true),
            ("/{id=a/*}/x", "/b/7/x", false),
            ("/a.b(c)$", "/a.b(c)$", true),
            ("/a.b", "/aab", false),
            ("/users/*", "/users/a b", false),
            ("/users/*", "/users/a%20b", true),
            ("/users/*", "/users/ü", false),
        ] {
            assert_eq!(
                UriTemplate::new(template).unwrap().matches(path),
                matches,
                "{template} {path}"
            );
        }
    }

    #[test]
    fn what_envoy_does_not_take_is_refused() {
        for template in [
            "",
            "users",
            "/a b",
            "/ü",
            "/**/*",
            "/**/**",
            "/**/{id}",
            "/{id",
            "/{}",
            "/{1}",
            "/{a=}",
            "/{a=x/}",
            "/{a}/{a}",
            "/a{b}",
            "/*.b/c",
            "//",
            "/{seventeenletters_}",
            "/{a}/{b}/{c}/{d}/{e}/{f}",
            "/{a=*b}",
        ] {
            let error = UriTemplate::new(template).unwrap_err();
            assert!(error.to_string().contains(template), "{error}");
        }
    }
}
