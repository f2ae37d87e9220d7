//! Names in a peer's certificate, and which of them is believed.

use std::hash::{Hash, Hasher};

use rustls::pki_types::CertificateDer;
use x509_parser::{
    certificate::X509Certificate,
    extensions::{GeneralName, ParsedExtension},
    prelude::FromDer as _,
};

/// Largest compiled form of a regular expression.
const MAX_REGEX: usize = 1 << 20;

/// A kind of subject alternative name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NameKind {
    /// A host name.
    Dns,
    /// A URI, such as a SPIFFE ID.
    Uri,
    /// A mailbox.
    Email,
    /// An IP address.
    Ip,
}

/// One alternative of the names that are believed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NameMatcher {
    /// Names of this kind; `None`: of any.
    pub kind: Option<NameKind>,
    /// How they look.
    pub pattern: NamePattern,
    /// Whether case plays no part.
    pub ignore_case: bool,
}

/// How a name looks.
#[derive(Clone, Debug)]
pub enum NamePattern {
    /// This. A host name in the certificate may have a wildcard for its first label.
    Exact(String),
    /// It begins so.
    Prefix(String),
    /// It ends so.
    Suffix(String),
    /// It has this in it.
    Contains(String),
    /// The whole of it fits this.
    Regex(regex::Regex),
}

/// A regular expression that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the regular expression {pattern:?} cannot be used: {source}")]
pub struct PatternError {
    pattern: String,
    source: regex::Error,
}

// === impl NamePattern ===

impl NamePattern {
    /// The whole of a name has to fit this.
    pub fn regex(pattern: &str) -> Result<Self, PatternError> {
        regex::RegexBuilder::new(&format!("^(?:{pattern})$"))
            .size_limit(MAX_REGEX)
            .build()
            .map(Self::Regex)
            .map_err(|source| PatternError {
                pattern: pattern.to_owned(),
                source,
            })
    }

    fn text(&self) -> (u8, &str) {
        match self {
            Self::Exact(text) => (0, text),
            Self::Prefix(text) => (1, text),
            Self::Suffix(text) => (2, text),
            Self::Contains(text) => (3, text),
            Self::Regex(regex) => (4, regex.as_str()),
        }
    }
}

impl PartialEq for NamePattern {
    fn eq(&self, other: &Self) -> bool {
        self.text() == other.text()
    }
}

impl Eq for NamePattern {}

impl Hash for NamePattern {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.text().hash(state);
    }
}

// === impl NameMatcher ===

impl NameMatcher {
    fn fits(&self, kind: NameKind, name: &str) -> bool {
        if self.kind.is_some_and(|wanted| wanted != kind) {
            return false;
        }
        // Host names have no case, and their exact form understands the certificate's wildcard.
        if let (NameKind::Dns, NamePattern::Exact(wanted)) = (kind, &self.pattern) {
            return is_host(wanted, name);
        }
        let (wanted, name) = match self.ignore_case {
            true => (self.pattern.text().1.to_lowercase(), name.to_lowercase()),
            false => (self.pattern.text().1.to_owned(), name.to_owned()),
        };
        match &self.pattern {
            NamePattern::Exact(_) => name == wanted,
            NamePattern::Prefix(_) => name.starts_with(&wanted),
            NamePattern::Suffix(_) => name.ends_with(&wanted),
            NamePattern::Contains(_) => name.contains(&wanted),
            NamePattern::Regex(regex) => regex.is_match(&name),
        }
    }
}

/// The alternative names in a certificate; none if it is not readable.
pub(super) fn of(certificate: &CertificateDer<'_>) -> Vec<(NameKind, String)> {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else {
        return Vec::new();
    };
    let names = certificate
        .extensions()
        .iter()
        .filter_map(|extension| match extension.parsed_extension() {
            ParsedExtension::SubjectAlternativeName(names) => Some(&names.general_names),
            _ => None,
        });
    names.flatten().filter_map(name).collect()
}

fn name(name: &GeneralName<'_>) -> Option<(NameKind, String)> {
    match name {
        GeneralName::DNSName(name) => Some((NameKind::Dns, (*name).to_owned())),
        GeneralName::URI(name) => Some((NameKind::Uri, (*name).to_owned())),
        GeneralName::RFC822Name(name) => Some((NameKind::Email, (*name).to_owned())),
        GeneralName::IPAddress(bytes) => address(bytes).map(|address| (NameKind::Ip, address.to_string())),
        _ => None,
    }
}

fn address(bytes: &[u8]) -> Option<std::net::IpAddr> {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        return Some(four.into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(Into::into)
}

/// Whether one of the names is believed by one of the matchers.
pub(super) fn any_fits(names: &[(NameKind, String)], matchers: &[NameMatcher]) -> bool {
    names
        .iter()
        .any(|(kind, name)| matchers.iter().any(|matcher| matcher.fits(*kind, name)))
}

/// Whether one of the names is this host: a host name, or the text of an address.
pub(super) fn any_is_host(names: &[(NameKind, String)], host: &str) -> bool {
    names.iter().any(|(kind, name)| match kind {
        NameKind::Dns => is_host(host, name),
        NameKind::Ip => name == host,
        NameKind::Uri | NameKind::Email => name == host,
    })
}

/// Whether `host` is what a host name in a certificate says; its first label may hold one `*`.
fn is_host(host: &str, pattern: &str) -> bool {
    let (host, pattern) = (host.to_ascii_lowercase(), pattern.to_ascii_lowercase());
    if host == pattern {
        return true;
    }
    let (Some((label, rest)), Some((pattern, domain))) = (host.split_once('.'), pattern.split_once('.')) else {
        return false;
    };
    // An internationalized label means something else than its letters (RFC 6125 §6.4.3).
    if rest != domain || pattern.starts_with("xn--") || (pattern != "*" && label.starts_with("xn--")) {
        return false;
    }
    let Some((before, after)) = pattern.split_once('*') else {
        return false;
    };
    !after.contains('*')
        && !label.is_empty()
        && label.len() >= before.len() + after.len()
        && label.starts_with(before)
        && label.ends_with(after)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wildcard_stands_for_one_label() {
        for (host, pattern, is) in [
            ("a.example.com", "a.example.com", true),
            ("A.example.com", "a.EXAMPLE.com", true),
            ("a.example.com", "*.example.com", true),
            ("b.a.example.com", "*.example.com", false),
            ("example.com", "*.example.com", false),
            ("a.example.org", "*.example.com", false),
            ("web-1.example.com", "web-*.example.com", true),
            ("xn--abc.example.com", "x*.example.com", false),
            ("xn--abc.example.com", "*.example.com", true),
            ("a.b.c", "a.*.c", false),
            ("aa.b", "*a*.b", false),
        ] {
            assert_eq!(is_host(host, pattern), is, "{host} {pattern}");
        }
    }

    #[test]
    fn matchers_look_at_their_own_kind() {
        let matcher = |kind, pattern, ignore_case| NameMatcher {
            kind,
            pattern,
            ignore_case,
        };
        let uri = (NameKind::Uri, "spiffe://td/ns/a/sa/b".to_owned());
        let dns = (NameKind::Dns, "Web.example.com".to_owned());
        for (matcher, of_uri, of_dns) in [
            (
                matcher(None, NamePattern::Exact("web.example.com".into()), false),
                false,
                true,
            ),
            (
                matcher(Some(NameKind::Uri), NamePattern::Prefix("spiffe://td/".into()), false),
                true,
                false,
            ),
            (
                matcher(Some(NameKind::Dns), NamePattern::Prefix("spiffe://td/".into()), false),
                false,
                false,
            ),
            (matcher(None, NamePattern::Suffix("/SA/B".into()), false), false, false),
            (matcher(None, NamePattern::Suffix("/SA/B".into()), true), true, false),
            (matcher(None, NamePattern::Contains("example".into()), false), false, true),
            (
                matcher(None, NamePattern::regex("spiffe://td/.*").unwrap(), false),
                true,
                false,
            ),
            (matcher(None, NamePattern::regex("td").unwrap(), false), false, false),
        ] {
            assert_eq!(
                any_fits(std::slice::from_ref(&uri), std::slice::from_ref(&matcher)),
                of_uri,
                "{matcher:?}"
            );
            assert_eq!(
                any_fits(std::slice::from_ref(&dns), std::slice::from_ref(&matcher)),
                of_dns,
                "{matcher:?}"
            );
        }
    }

    #[test]
    fn a_regex_that_is_too_large_is_no_pattern() {
        assert!(NamePattern::regex("(a{1000}){1000}").is_err());
        assert!(NamePattern::regex("(").unwrap_err().to_string().contains("cannot be used"));
    }
}
