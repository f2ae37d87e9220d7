//! Expressions of the Common Expression Language over the record of an exchange, as Envoy understands them: conditions of policies,
//! filters of logs, `%CEL(…)%` in formats, tags of metrics.
//!
//! A [`Program`] is compiled once, from text or from a tree that configuration carries ([`Syntax`]), and asked often. The names it knows
//! are Envoy's attributes (`request.headers`, `source.address`, `metadata` …), each looked up when it is asked for and not before. What
//! is missing is an error of the whole expression, as in Envoy: a condition does not hold, a format has no value.
//!
//! Asking costs no more than the expression is long times what it looks at: as in Envoy, nothing walks over lists (`all`, `map` …), and
//! joining texts, which would let them grow, is off unless [`Options`] turn it on, and bounded then. Text is at most [`LONGEST`] bytes,
//! trees are at most [`DEEPEST`] levels; regular expressions are written out in the expression and compiled with it.

mod attribute;
mod compile;
mod evaluate;
mod function;
mod lexer;
mod parser;
mod print;
mod syntax;
#[cfg(test)]
mod tests;
mod time;
mod value;

use std::fmt;

use http::HeaderName;

pub use syntax::{Constant, Syntax};
pub use value::{Failure, Map, Value};

use crate::{
    format::{Value as Formatted, View},
    regex::RegexError,
};
use compile::Compiled;
use evaluate::shortened;

/// Most bytes of an expression's text.
pub const LONGEST: usize = 16 << 10;
/// Most levels of an expression.
pub const DEEPEST: usize = 100;
/// Most bytes that an expression may make of texts.
pub const LONGEST_TEXT: usize = 64 << 10;

/// A compiled expression. Two are equal when they are written alike.
#[derive(Clone)]
pub struct Program {
    syntax: Syntax,
    options: Options,
    compiled: Compiled,
}

/// What is off unless configuration asks for it (`envoy.config.core.v3.CelExpressionConfig`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// `string(1)`
    pub string_conversion: bool,
    /// `"a" + "b"`
    pub string_concat: bool,
    /// `"a".replace("a", "b")` and the like.
    pub string_functions: bool,
}

/// Why an expression cannot be compiled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CelError {
    /// The text is no expression.
    #[error("at byte {position}: {what}")]
    Syntax {
        /// Where.
        position: usize,
        /// What is wrong.
        what: String,
    },
    /// The text is too long.
    #[error("the expression has more than {LONGEST} bytes")]
    TooLong,
    /// It is nested too deep.
    #[error("the expression is deeper than {DEEPEST} levels")]
    TooDeep,
    /// It walks over a list or a map.
    #[error("walking over lists and maps (all, exists, map, filter) is not allowed")]
    Comprehension,
    /// There is no such function.
    #[error("there is no function {name} that takes {arguments} arguments")]
    UnknownFunction {
        /// Its name.
        name: String,
        /// Of so many.
        arguments: usize,
    },
    /// A function is there, but off.
    #[error("{0} is off unless cel_config turns it on")]
    Off(&'static str),
    /// A regular expression is none.
    #[error(transparent)]
    Regex(#[from] RegexError),
    /// It is well-formed, but we cannot do it.
    #[error("{0} is not supported")]
    Unsupported(String),
}

/// What an expression came to, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Story {
    /// The value, or why there is none.
    pub result: String,
    /// Whether it is the truth value true.
    pub holds: bool,
    /// What it looked at, and what was there; each once.
    pub read: Vec<(String, Option<String>)>,
}

// === impl Options ===

impl Options {
    /// Everything on: what Istio's metrics understand.
    pub const ALL: Self = Self {
        string_conversion: true,
        string_concat: true,
        string_functions: true,
    };
}

// === impl CelError ===

impl CelError {
    /// Whether the expression means something that we cannot do; else Envoy refuses it too.
    pub fn is_unsupported(&self) -> bool {
        matches!(self, Self::Unsupported(_))
    }
}

// === impl Program ===

impl Program {
    /// Compiles a text.
    pub fn parse(text: &str, options: Options) -> Result<Self, CelError> {
        if text.len() > LONGEST {
            return Err(CelError::TooLong);
        }
        Self::compile(parser::parse(text)?, options)
    }

    /// Compiles a tree.
    pub fn compile(syntax: Syntax, options: Options) -> Result<Self, CelError> {
        let compiled = Compiled::new(&syntax, options)?;
        Ok(Self {
            syntax,
            options,
            compiled,
        })
    }

    /// What it comes to.
    pub fn evaluate<'t, 'a: 't>(&'t self, view: &View<'a>) -> Result<Value<'t>, Failure> {
        self.compiled.node.value(&shortened(view))
    }

    /// What it comes to as text; `None` for what fails, or has no text.
    pub fn text(&self, view: &View<'_>) -> Option<String> {
        let value = self.format(view);
        if matches!(value, Formatted::Absent) {
            return None;
        }
        let mut text = Vec::new();
        value.write(&mut text);
        Some(String::from_utf8_lossy(&text).into_owned())
    }

    /// Its text in a format.
    pub(crate) fn format<'t, 'a: 't>(&'t self, view: &View<'a>) -> Formatted<'t> {
        self.evaluate(view).map_or(Formatted::Absent, Value::formatted)
    }

    /// Its value in a format that keeps types.
    pub(crate) fn format_typed<'t, 'a: 't>(&'t self, view: &View<'a>) -> Formatted<'t> {
        let view = shortened(view);
        self.compiled
            .node
            .value(&view)
            .map_or(Formatted::Absent, |value| value.typed(&view))
    }

    /// Whether it comes to true. What fails, or is no truth value, does not.
    pub fn holds(&self, view: &View<'_>) -> bool {
        matches!(self.evaluate(view), Ok(Value::Bool(true)))
    }

    /// Attributes that it asks for and that the record does not hold: it finds them missing where Envoy may have a value.
    pub fn unrecorded(&self) -> impl Iterator<Item = &str> {
        self.compiled.unrecorded.iter().map(|name| &**name)
    }

    /// The fields of the answer that it reads, so that a chain can keep them in the record.
    pub fn response_headers(&self) -> impl Iterator<Item = &HeaderName> {
        self.compiled.response_headers.iter()
    }

    /// How it came to what it did.
    pub fn explain(&self, view: &View<'_>) -> Story {
        let view = &shortened(view);
        let result = self.compiled.node.value(view);
        let mut read = Vec::new();
        compile::attributes(&self.syntax, &mut |syntax| {
            let name = syntax.to_string();
            if read.iter().any(|(known, _)| *known == name) {
                return;
            }
            let value = Compiled::new(syntax, self.options).ok();
            let value = value.and_then(|compiled| {
                let view = &shortened(view);
                Some(compiled.node.value(view).ok()?.words(view))
            });
            read.push((name, value));
        });
        Story {
            holds: matches!(result, Ok(Value::Bool(true))),
            result: match result {
                Ok(value) => value.words(view),
                Err(failure) => failure.to_string(),
            },
            read,
        }
    }
}

impl PartialEq for Program {
    fn eq(&self, other: &Self) -> bool {
        self.syntax == other.syntax && self.options == other.options
    }
}

impl Eq for Program {}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.syntax.fmt(f)
    }
}

impl fmt::Debug for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Program({})", self.syntax)
    }
}
