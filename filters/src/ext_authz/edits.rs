//! Carrying out what an authorizer says: edits of the request and of its answer.
//!
//! All that it says is read before anything of it is done. What frames a message or binds it to its connection is this proxy's own and
//! not for an authorizer to write: its word about those fields is left out, as fields of its own message come along with an HTTP
//! authorizer's answer.

use cairn_exchange::{RequestHead, Scheme};
use cairn_policy::matcher::HeaderName as Name;
use http::{HeaderMap, HeaderName, HeaderValue, Method, header, uri::PathAndQuery};

use super::answer::{Allowed, Edit, How};
use crate::header_mutation::{QueryAction, QueryMutation, mutate_query};

/// What an authorizer says and nobody can do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// A name that is none.
    #[error("`{0}` is no header that it may write")]
    Name(String),
    /// A value that cannot be one.
    #[error("the value of {0} cannot stand there")]
    Value(String),
    /// Parameters that cannot stand in a query.
    #[error("the parameters of the query cannot stand there")]
    Query,
}

/// Edits of an answer.
#[derive(Debug, Default)]
pub struct ResponseEdits(Vec<(HeaderName, HeaderValue, How)>);

/// One edit of a request, read.
enum Write {
    Method(Method),
    Authority(HeaderValue),
    Path(PathAndQuery),
    Scheme(Scheme),
    Field(HeaderName, HeaderValue, How),
}

/// Fields that frame a message or bind it to its connection.
pub(super) fn frames(name: &HeaderName) -> bool {
    matches!(
        *name,
        header::CONTENT_LENGTH | header::TRANSFER_ENCODING | header::CONNECTION | header::UPGRADE | header::TRAILER | header::TE
    ) || matches!(name.as_str(), "keep-alive" | "proxy-connection" | "http2-settings")
}

fn value_of(edit: &Edit) -> Result<HeaderValue, Invalid> {
    HeaderValue::from_bytes(&edit.value).map_err(|_| Invalid::Value(edit.name.clone()))
}

/// A field of an answer; `None` for those that are left out.
fn field(edit: &Edit) -> Result<Option<(HeaderName, HeaderValue)>, Invalid> {
    let name = HeaderName::try_from(&edit.name).map_err(|_| Invalid::Name(edit.name.clone()))?;
    let value = value_of(edit)?;
    Ok((!frames(&name)).then_some((name, value)))
}

/// Fields of an answer of its own.
pub(super) fn fields(edits: Vec<Edit>) -> Result<Vec<(HeaderName, HeaderValue)>, Invalid> {
    edits.iter().filter_map(|edit| field(edit).transpose()).collect()
}

// === impl ResponseEdits ===

impl ResponseEdits {
    /// Those of an answer that allows a request.
    pub fn of(allowed: &Allowed) -> Result<Self, Invalid> {
        let read = |edit: &Edit| Ok(field(edit)?.map(|(name, value)| (name, value, edit.how)));
        let read = allowed.response.iter().filter_map(|edit| read(edit).transpose());
        read.collect::<Result<_, _>>().map(Self)
    }

    /// Makes them.
    pub fn apply(self, headers: &mut HeaderMap) {
        for (name, value, how) in self.0 {
            write(headers, name, value, how);
        }
    }
}

// === impl Allowed ===

impl Allowed {
    /// Edits a request; whether there was anything to edit. On an error nothing has been done.
    pub fn apply(&self, head: &mut RequestHead) -> Result<bool, Invalid> {
        let writes = self.request.iter().filter_map(|edit| Write::read(edit).transpose());
        let writes: Vec<Write> = writes.collect::<Result<_, _>>()?;
        let path = writes.iter().rev().find_map(|write| match write {
            Write::Path(path) => Some(path),
            _ => None,
        });
        let path = self.query_of(path.unwrap_or(&head.path))?;
        for write in writes {
            match write {
                Write::Method(method) => head.method = method,
                Write::Authority(authority) => head.authority = authority,
                Write::Path(path) => head.path = path,
                Write::Scheme(scheme) => head.scheme = scheme,
                Write::Field(name, value, how) => self::write(&mut head.headers, name, value, how),
            }
        }
        for name in &self.remove {
            // Neither pseudo-headers nor what frames the message: without them it is none.
            if let Ok(Name::Field(name)) = Name::parse(name)
                && !frames(&name)
            {
                head.headers.remove(name);
            }
        }
        if let Some(path) = path {
            head.path = path;
        }
        Ok(!(self.request.is_empty()
            && self.remove.is_empty()
            && self.set_parameters.is_empty()
            && self.remove_parameters.is_empty()))
    }

    /// The path with the query as it is to be; `None` where nothing is said of it.
    fn query_of(&self, path: &PathAndQuery) -> Result<Option<PathAndQuery>, Invalid> {
        if self.set_parameters.is_empty() && self.remove_parameters.is_empty() {
            return Ok(None);
        }
        let stands = |text: &str| !text.bytes().any(|byte| matches!(byte, b'&' | b'#'));
        let set = self.set_parameters.iter().map(|(key, value)| {
            let stands = stands(key) && !key.contains('=') && stands(value);
            stands.then(|| QueryMutation::Add {
                key: key.as_str().into(),
                value: value.as_str().into(),
                action: QueryAction::OverwriteOrAdd,
            })
        });
        let remove = self.remove_parameters.iter();
        let remove = remove.map(|key| Some(QueryMutation::Remove(key.as_str().into())));
        let mutations: Option<Vec<_>> = set.chain(remove).collect();
        let mutated = mutations.and_then(|mutations| mutate_query(path, &mutations));
        mutated.map(Some).ok_or(Invalid::Query)
    }
}

// === impl Write ===

impl Write {
    fn read(edit: &Edit) -> Result<Option<Self>, Invalid> {
        let value = value_of(edit)?;
        let bad = || Invalid::Value(edit.name.clone());
        Ok(Some(
            match Name::parse(&edit.name).map_err(|_| Invalid::Name(edit.name.clone()))? {
                Name::Field(name) if frames(&name) => return Ok(None),
                Name::Field(name) => Self::Field(name, value, edit.how),
                Name::Method => Self::Method(Method::from_bytes(value.as_bytes()).map_err(|_| bad())?),
                Name::Authority => {
                    let authority = http::uri::Authority::try_from(value.as_bytes());
                    authority.map(|_| Self::Authority(value)).map_err(|_| bad())?
                }
                Name::Path => {
                    let path = Some(value.as_bytes()).filter(|path| path.starts_with(b"/"));
                    Self::Path(path.and_then(|path| PathAndQuery::try_from(path).ok()).ok_or_else(bad)?)
                }
                Name::Scheme => match value.as_bytes() {
                    b"http" => Self::Scheme(Scheme::Http),
                    b"https" => Self::Scheme(Scheme::Https),
                    _ => return Err(bad()),
                },
                Name::Status => return Err(Invalid::Name(edit.name.clone())),
            },
        ))
    }
}

fn write(headers: &mut HeaderMap, name: HeaderName, value: HeaderValue, how: How) {
    let there = headers.contains_key(&name);
    match how {
        How::AppendIfThere | How::ReplaceIfThere if !there => {}
        How::AddIfAbsent if there => {}
        How::Set | How::ReplaceIfThere => {
            headers.insert(name, value);
        }
        How::Add | How::AppendIfThere | How::AddIfAbsent => {
            headers.append(name, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head() -> RequestHead {
        let headers = [
            ("x-user", "client"),
            ("x-list", "a"),
            ("content-length", "3"),
            ("x-gone", "1"),
        ];
        RequestHead {
            method: Method::GET,
            path: PathAndQuery::from_static("/a?x=1&y=2"),
            authority: HeaderValue::from_static("web"),
            scheme: Scheme::Http,
            headers: headers
                .into_iter()
                .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
                .collect(),
        }
    }

    fn edit(name: &str, value: &str, how: How) -> Edit {
        Edit::new(name, value, how)
    }

    #[test]
    fn an_answer_edits_the_request_and_leaves_its_frame_alone() {
        let allowed = Allowed {
            request: vec![
                edit("X-User", "ann", How::Set),
                edit("x-list", "b", How::AppendIfThere),
                edit("x-none", "b", How::AppendIfThere),
                edit("x-user", "other", How::AddIfAbsent),
                edit("content-length", "100", How::Set),
                edit(":path", "/b?x=1&y=2", How::Set),
                edit("host", "api:80", How::Set),
                edit(":method", "PUT", How::Set),
            ],
            remove: vec!["X-Gone".into(), "content-length".into(), ":path".into(), "host".into()],
            set_parameters: vec![("x".into(), "9".into()), ("z".into(), "3".into())],
            remove_parameters: vec!["y".into()],
            response: Vec::new(),
        };
        let mut head = head();
        assert_eq!(allowed.apply(&mut head), Ok(true));
        assert_eq!(head.path.as_str(), "/b?x=9&z=3");
        assert_eq!((head.authority.as_bytes(), head.method.as_str()), (&b"api:80"[..], "PUT"));
        let all: Vec<_> = head
            .headers
            .iter()
            .map(|(name, value)| format!("{name}={}", value.to_str().unwrap()))
            .collect();
        assert_eq!(all.iter().filter(|field| field.starts_with("x-list")).count(), 2);
        for (name, value) in [
            ("x-user", Some("ann")),
            ("content-length", Some("3")),
            ("x-gone", None),
            ("x-none", None),
        ] {
            assert_eq!(head.headers.get(name).map(|value| value.to_str().unwrap()), value, "{name}");
        }
        assert_eq!(Allowed::default().apply(&mut head), Ok(false));
    }

    #[test]
    fn what_cannot_be_done_leaves_everything_undone() {
        let good = || edit("x-user", "ann", How::Set);
        for bad in [
            edit("x-a", "a\r\nx-admin: 1", How::Set),
            edit("x-a", "a\nb", How::Set),
            edit("x a", "a", How::Set),
            edit(":status", "200", How::Set),
            edit(":path", "no-slash", How::Set),
            edit(":path", "/a b", How::Set),
            edit(":authority", "a/b", How::Set),
            edit(":scheme", "ftp", How::Set),
            edit(":protocol", "websocket", How::Set),
        ] {
            let allowed = Allowed {
                request: vec![good(), bad.clone()],
                ..Allowed::default()
            };
            let mut head = head();
            assert!(allowed.apply(&mut head).is_err(), "{bad:?}");
            assert_eq!(head.headers["x-user"], "client", "{bad:?}");
        }
        for (key, value) in [("a", "b&admin=1"), ("a=b", "c"), ("a", "b#c"), ("a", "b c")] {
            let allowed = Allowed {
                request: vec![good()],
                set_parameters: vec![(key.into(), value.into())],
                ..Allowed::default()
            };
            let mut head = head();
            assert_eq!(allowed.apply(&mut head), Err(Invalid::Query), "{key} {value}");
            assert_eq!(head.headers["x-user"], "client");
        }
        let response = |name: &str, value: &str| Allowed {
            response: vec![edit(name, value, How::Set)],
            ..Allowed::default()
        };
        assert!(ResponseEdits::of(&response("x-a", "a\r\nb")).is_err());
        assert!(ResponseEdits::of(&response(":status", "200")).is_err());
    }

    #[test]
    fn an_answer_is_edited_as_it_says() {
        let all = [
            ("set", How::Set),
            ("set", How::Add),
            ("there", How::AddIfAbsent),
            ("new", How::AddIfAbsent),
            ("there", How::ReplaceIfThere),
            ("none", How::ReplaceIfThere),
            ("content-length", How::Set),
        ];
        let response = all.into_iter().map(|(name, how)| edit(name, "1", how));
        let allowed = Allowed {
            response: response.collect(),
            ..Allowed::default()
        };
        let mut headers: HeaderMap = [("set", "0"), ("there", "0")]
            .into_iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect();
        ResponseEdits::of(&allowed).unwrap().apply(&mut headers);
        for (name, values) in [("set", 2), ("there", 1), ("new", 1), ("none", 0), ("content-length", 0)] {
            assert_eq!(headers.get_all(name).iter().count(), values, "{name}");
            assert!(headers.get_all(name).iter().all(|value| value == "1"), "{name}");
        }
    }
}
