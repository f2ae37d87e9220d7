//! Header edits of configuration: names to remove, then values to set, then values to append.
//!
//! One list is one level (weighted cluster, route, virtual host, table); levels are applied one after the other. Inside a level all
//! values are made from the headers as they are after removal, then those that overwrite are written, then those that append, as
//! Envoy does: the order of the list matters only among edits of one kind.

use cairn_exchange::{
    Exchange,
    format::{FormatError, Template, View},
};
use http::{HeaderMap, HeaderName, HeaderValue, header::InvalidHeaderName};

/// What happens when the header is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EditAction {
    /// One more field.
    AppendOrAdd,
    /// The old one stays.
    AddIfAbsent,
    /// It is replaced.
    OverwriteOrAdd,
    /// It is replaced; when it is not there, nothing happens.
    OverwriteIfExists,
}

/// One header to add.
#[derive(Clone, Debug)]
pub struct HeaderEdit {
    name: HeaderName,
    value: EditValue,
    action: EditAction,
    keep_empty: bool,
}

#[derive(Clone, Debug)]
enum EditValue {
    Literal(HeaderValue),
    Template(Template),
}

/// Edits of one level.
#[derive(Clone, Debug, Default)]
pub struct HeaderEdits {
    add: Vec<HeaderEdit>,
    remove: Vec<HeaderName>,
}

/// Why an edit is refused.
#[derive(Clone, Debug, thiserror::Error)]
pub enum HeaderEditError {
    /// Not a header name.
    #[error("`{name}` is not a header name")]
    Name {
        /// The name.
        name: String,
        /// Why not.
        #[source]
        source: std::sync::Arc<InvalidHeaderName>,
    },
    /// Pseudo-headers and `host` have rewrites of their own.
    #[error("`{name}` cannot be edited as a header; use a rewrite of host or path")]
    Pseudo {
        /// The name.
        name: String,
    },
    /// Not a format string.
    #[error("the value of header `{name}` is malformed")]
    Format {
        /// The name.
        name: HeaderName,
        /// What is wrong with it.
        #[source]
        source: FormatError,
    },
}

/// Makes a view of a record: usually [`record_alone`], else one with metadata or filter state.
pub type ViewOf<'f> = &'f dyn for<'a> Fn(&'a Exchange) -> View<'a>;

/// A view of the record and nothing else.
pub fn record_alone(exchange: &Exchange) -> View<'_> {
    View::new(exchange)
}

// === impl HeaderEdit ===

impl HeaderEdit {
    /// An edit as configured; `value` is a format string.
    pub fn new(name: &str, value: &str, action: EditAction, keep_empty: bool) -> Result<Self, HeaderEditError> {
        let name = parse_name(name)?;
        let template = match Template::parse(value) {
            Ok(template) => template,
            Err(source) => return Err(HeaderEditError::Format { name, source }),
        };
        let value = match template.is_literal() {
            Some(literal) => EditValue::Literal(header_value(literal.as_bytes())),
            None => EditValue::Template(template),
        };
        Ok(Self {
            name,
            value,
            action,
            keep_empty,
        })
    }

    /// Sets a header.
    pub fn set(name: &str, value: &str) -> Result<Self, HeaderEditError> {
        Self::new(name, value, EditAction::OverwriteOrAdd, false)
    }

    /// Adds one more field of a header.
    pub fn append(name: &str, value: &str) -> Result<Self, HeaderEditError> {
        Self::new(name, value, EditAction::AppendOrAdd, false)
    }

    /// The header's name.
    pub fn name(&self) -> &HeaderName {
        &self.name
    }

    /// The format string, where it is one that reads the request.
    pub fn template(&self) -> Option<&Template> {
        match &self.value {
            EditValue::Literal(_) => None,
            EditValue::Template(template) => Some(template),
        }
    }

    /// The value now, or `None` when there is nothing to write. Without a view only literals have one.
    fn evaluate(&self, headers: &HeaderMap, view: Option<&View<'_>>) -> Option<HeaderValue> {
        let there = headers.contains_key(&self.name);
        match self.action {
            EditAction::AddIfAbsent if there => return None,
            EditAction::OverwriteIfExists if !there => return None,
            _ => {}
        }
        let value = match &self.value {
            EditValue::Literal(value) => value.clone(),
            EditValue::Template(template) => {
                let mut text = Vec::new();
                template.render_header(view?, &mut text);
                header_value(&text)
            }
        };
        (self.keep_empty || !value.is_empty()).then_some(value)
    }
}

// === impl HeaderEdits ===

impl HeaderEdits {
    /// Edits of one level.
    pub fn new(add: Vec<HeaderEdit>, remove: Vec<HeaderName>) -> Self {
        Self { add, remove }
    }

    /// A header to remove, by its configured name.
    pub fn removal(name: &str) -> Result<HeaderName, HeaderEditError> {
        parse_name(name)
    }

    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.add.is_empty() && self.remove.is_empty()
    }

    /// What it adds.
    pub fn additions(&self) -> &[HeaderEdit] {
        &self.add
    }

    /// What it removes.
    pub fn removals(&self) -> &[HeaderName] {
        &self.remove
    }

    /// Edits headers when no value has to be made from the request; `false`, and nothing done, when one has.
    pub fn apply_literal(&self, headers: &mut HeaderMap) -> bool {
        if self.add.iter().any(|edit| edit.template().is_some()) {
            return false;
        }
        self.remove_from(headers);
        let values = self.evaluate(headers, None);
        self.write(values, headers);
        true
    }

    /// Edits the headers of the record's request.
    pub fn apply_to_request(&self, exchange: &mut Exchange, view: ViewOf<'_>) {
        let Some(head) = exchange.request.as_mut() else { return };
        if self.apply_literal(&mut head.headers) {
            return;
        }
        self.remove_from(&mut head.headers);
        let values = match &exchange.request {
            Some(head) => self.evaluate(&head.headers, Some(&view(exchange))),
            None => Vec::new(),
        };
        if let Some(head) = exchange.request.as_mut() {
            self.write(values, &mut head.headers);
        }
    }

    /// Edits the headers of an answer.
    pub fn apply_to_response(&self, headers: &mut HeaderMap, exchange: &Exchange, view: ViewOf<'_>) {
        if self.apply_literal(headers) {
            return;
        }
        self.remove_from(headers);
        let values = self.evaluate(
            headers,
            Some(&View {
                response: Some(headers),
                ..view(exchange)
            }),
        );
        self.write(values, headers);
    }

    fn remove_from(&self, headers: &mut HeaderMap) {
        for name in &self.remove {
            headers.remove(name);
        }
    }

    fn evaluate(&self, headers: &HeaderMap, view: Option<&View<'_>>) -> Vec<Option<HeaderValue>> {
        self.add.iter().map(|edit| edit.evaluate(headers, view)).collect()
    }

    /// Writes the value of each edit, those that overwrite first.
    fn write(&self, values: Vec<Option<HeaderValue>>, headers: &mut HeaderMap) {
        let appends = |edit: &HeaderEdit| matches!(edit.action, EditAction::AppendOrAdd | EditAction::AddIfAbsent);
        let mut later = Vec::new();
        for (edit, value) in self.add.iter().zip(values) {
            match value {
                Some(value) if appends(edit) => later.push((edit.name.clone(), value)),
                Some(value) => {
                    headers.insert(edit.name.clone(), value);
                }
                None => {}
            }
        }
        for (name, value) in later {
            headers.append(name, value);
        }
    }
}

fn parse_name(name: &str) -> Result<HeaderName, HeaderEditError> {
    if name.starts_with(':') || name.eq_ignore_ascii_case("host") {
        return Err(HeaderEditError::Pseudo { name: name.to_owned() });
    }
    HeaderName::from_bytes(name.as_bytes()).map_err(|source| HeaderEditError::Name {
        name: name.to_owned(),
        source: std::sync::Arc::new(source),
    })
}

/// A value that can stand in a header: what cannot is a space (RFC 9110 §5.5).
fn header_value(text: &[u8]) -> HeaderValue {
    HeaderValue::from_bytes(text).unwrap_or_else(|_| {
        let allowed = |byte: u8| byte == b'\t' || (byte >= b' ' && byte != 0x7f);
        let cleaned: Vec<u8> = text.iter().map(|byte| if allowed(*byte) { *byte } else { b' ' }).collect();
        HeaderValue::from_bytes(&cleaned).unwrap_or_else(|_| HeaderValue::from_static(""))
    })
}

#[cfg(test)]
mod tests;
