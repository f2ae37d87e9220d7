//! Lines of JSON, by the rules of Envoy's `json_format`.
//!
//! Keys stand in order of the alphabet, whatever order was configured. A value that is one operator alone keeps its type and is
//! `null` when absent; one of several operators is a string, with `-` for what is absent. `omit_empty_values` leaves out absent
//! values and objects without content (but not empty lists), and prints nothing for absent parts of a string.

use std::io::Write;

use cairn_exchange::format::{Absent, FormatError, Kind, Template, View};

/// A compiled JSON format.
#[derive(Clone, Debug, PartialEq)]
pub struct JsonFormat {
    root: Fields,
    omit_empty: bool,
}

/// A value as configured: a `google.protobuf.Value`.
#[derive(Clone, Debug, PartialEq)]
pub enum JsonValue {
    /// `null`
    Null,
    /// `true` or `false`
    Bool(bool),
    /// A number.
    Number(f64),
    /// A string: a format when there is a percent sign in it.
    Text(String),
    /// An object.
    Object(Vec<(String, JsonValue)>),
    /// A list.
    List(Vec<JsonValue>),
}

/// Which value of a format cannot be compiled, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("JSON log format, field {field}: {source}")]
pub struct JsonFormatError {
    /// The keys down to the value.
    pub field: String,
    /// What is wrong with it.
    pub source: FormatError,
}

/// Keys, quoted and escaped, and values of an object.
type Fields = Vec<(Box<[u8]>, Node)>;

#[derive(Clone, Debug, PartialEq)]
enum Node {
    Null,
    /// JSON already.
    Constant(Box<[u8]>),
    Template(Template),
    Object(Fields),
    List(Vec<Node>),
}

// === impl JsonFormat ===

impl JsonFormat {
    /// Compiles the fields of an object.
    pub fn new(fields: Vec<(String, JsonValue)>, omit_empty: bool) -> Result<Self, JsonFormatError> {
        Ok(Self {
            root: object(fields, "")?,
            omit_empty,
        })
    }

    /// Appends an object and a line break.
    pub fn render(&self, view: &View<'_>, out: &mut Vec<u8>) {
        if !self.object(&self.root, view, out) {
            out.extend_from_slice(b"{}");
        }
        out.push(b'\n');
    }

    pub(super) fn templates(&self) -> Vec<&Template> {
        let mut found = Vec::new();
        for (_, node) in &self.root {
            node.templates(&mut found);
        }
        found
    }

    /// Appends an object, unless it would be empty and may be left out.
    fn object(&self, fields: &[(Box<[u8]>, Node)], view: &View<'_>, out: &mut Vec<u8>) -> bool {
        let start = out.len();
        out.push(b'{');
        let mut empty = true;
        for (key, node) in fields {
            let before = out.len();
            if !empty {
                out.push(b',');
            }
            out.extend_from_slice(key);
            out.push(b':');
            if self.node(node, view, out) {
                empty = false;
            } else {
                out.truncate(before);
            }
        }
        if empty && self.omit_empty {
            out.truncate(start);
            return false;
        }
        out.push(b'}');
        true
    }

    /// Appends a value, unless it is left out.
    fn node(&self, node: &Node, view: &View<'_>, out: &mut Vec<u8>) -> bool {
        match node {
            Node::Null if self.omit_empty => return false,
            Node::Null => out.extend_from_slice(b"null"),
            Node::Constant(json) => out.extend_from_slice(json),
            Node::Object(fields) => return self.object(fields, view, out),
            Node::List(values) => {
                out.push(b'[');
                let mut empty = true;
                for value in values {
                    let before = out.len();
                    if !empty {
                        out.push(b',');
                    }
                    if self.node(value, view, out) {
                        empty = false;
                    } else {
                        out.truncate(before);
                    }
                }
                out.push(b']');
            }
            Node::Template(template) => {
                let absent = if self.omit_empty { Absent::Empty } else { Absent::Dash };
                let value = template.evaluate(view, absent);
                match value.kind() {
                    Kind::Absent if self.omit_empty => return false,
                    Kind::Absent => out.extend_from_slice(b"null"),
                    Kind::Raw => value.write(out),
                    Kind::Text => quoted(|text| value.write(text), out),
                }
            }
        }
        true
    }
}

impl Node {
    fn templates<'a>(&'a self, found: &mut Vec<&'a Template>) {
        match self {
            Self::Null | Self::Constant(_) => {}
            Self::Template(template) => found.push(template),
            Self::Object(fields) => fields.iter().for_each(|(_, node)| node.templates(found)),
            Self::List(values) => values.iter().for_each(|node| node.templates(found)),
        }
    }
}

fn object(mut fields: Vec<(String, JsonValue)>, above: &str) -> Result<Fields, JsonFormatError> {
    fields.sort_by(|(one, _), (other, _)| one.cmp(other));
    fields
        .into_iter()
        .map(|(key, value)| {
            let field = if above.is_empty() {
                key.clone()
            } else {
                format!("{above}.{key}")
            };
            Ok((json_string(&key), node(value, &field)?))
        })
        .collect()
}

fn node(value: JsonValue, field: &str) -> Result<Node, JsonFormatError> {
    Ok(match value {
        JsonValue::Null => Node::Null,
        JsonValue::Bool(value) => Node::Constant(value.to_string().into_bytes().into()),
        JsonValue::Number(value) if value.is_finite() => Node::Constant(value.to_string().into_bytes().into()),
        JsonValue::Number(_) => Node::Constant((*b"null").into()),
        JsonValue::Text(text) if !text.contains('%') => Node::Constant(json_string(&text)),
        JsonValue::Text(text) => Node::Template(Template::parse_log(&text).map_err(|source| JsonFormatError {
            field: field.to_owned(),
            source,
        })?),
        JsonValue::Object(fields) => Node::Object(object(fields, field)?),
        JsonValue::List(values) => Node::List(
            values
                .into_iter()
                .enumerate()
                .map(|(at, value)| node(value, &format!("{field}[{at}]")))
                .collect::<Result<_, _>>()?,
        ),
    })
}

fn json_string(text: &str) -> Box<[u8]> {
    let mut out = Vec::new();
    quoted(|inner| inner.extend_from_slice(text.as_bytes()), &mut out);
    out.into()
}

/// Appends what `write` appends as a JSON string; bytes that are no UTF-8 become replacement characters.
fn quoted(write: impl FnOnce(&mut Vec<u8>), out: &mut Vec<u8>) {
    out.push(b'"');
    let start = out.len();
    write(out);
    let plain = |byte: &u8| matches!(byte, b' '..=b'~') && *byte != b'"' && *byte != b'\\';
    if !out.iter().skip(start).all(plain) {
        let raw = out.split_off(start);
        escape(&String::from_utf8_lossy(&raw), out);
    }
    out.push(b'"');
}

fn escape(text: &str, out: &mut Vec<u8>) {
    for c in text.chars() {
        match c {
            '"' => out.extend_from_slice(b"\\\""),
            '\\' => out.extend_from_slice(b"\\\\"),
            '\n' => out.extend_from_slice(b"\\n"),
            '\r' => out.extend_from_slice(b"\\r"),
            '\t' => out.extend_from_slice(b"\\t"),
            '\u{8}' => out.extend_from_slice(b"\\b"),
            '\u{c}' => out.extend_from_slice(b"\\f"),
            '\0'..='\u{1f}' => write!(out, "\\u{:04x}", u32::from(c)).expect("writing to a vector does not fail"),
            _ => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
}
