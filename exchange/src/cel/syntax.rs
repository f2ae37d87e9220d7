//! An expression as it is written: the tree that text is parsed into and that configuration may carry ready-made.
//!
//! Operators are calls of the names that CEL's own trees give them (`_==_`, `@in`, …). `&&` and `||` may have more than two
//! arguments here, so that a long row of alternatives is not a deep tree.

use std::fmt::{self, Write};

/// One expression.
#[derive(Clone, Debug, PartialEq)]
pub enum Syntax {
    /// A value.
    Constant(Constant),
    /// The name of a variable.
    Name(Box<str>),
    /// A field of something, or with `test` whether it has the field.
    Select {
        /// Of what.
        of: Box<Syntax>,
        /// Which field.
        field: Box<str>,
        /// `has(of.field)`.
        test: bool,
    },
    /// A function or an operator.
    Call {
        /// Its name.
        function: Box<str>,
        /// What stands before the dot.
        on: Option<Box<Syntax>>,
        /// What stands in the parentheses.
        arguments: Vec<Syntax>,
    },
    /// `[a, b]`
    List(Vec<Syntax>),
    /// `{a: b}`
    Map(Vec<(Syntax, Syntax)>),
}

/// A value that stands in an expression.
#[derive(Clone, Debug, PartialEq)]
pub enum Constant {
    /// `null`
    Null,
    /// `true`, `false`
    Bool(bool),
    /// `1`
    Int(i64),
    /// `1u`
    Uint(u64),
    /// `1.0`
    Double(f64),
    /// `"a"`
    Text(Box<str>),
    /// `b"a"`
    Bytes(Box<[u8]>),
    /// A span of time, in nanoseconds; text has no words for it.
    Duration(i128),
    /// A moment, in nanoseconds since 1970; text has no words for it.
    Time(i128),
}

/// Operators with two sides: name, sign, how tightly it binds.
const INFIX: [(&str, &str, u8); 14] = [
    ("_||_", "||", 1),
    ("_&&_", "&&", 2),
    ("_==_", "==", 3),
    ("_!=_", "!=", 3),
    ("_<_", "<", 3),
    ("_<=_", "<=", 3),
    ("_>_", ">", 3),
    ("_>=_", ">=", 3),
    ("@in", "in", 3),
    ("_+_", "+", 4),
    ("_-_", "-", 4),
    ("_*_", "*", 5),
    ("_/_", "/", 5),
    ("_%_", "%", 5),
];
/// What needs no parentheses.
const TIGHTEST: u8 = 7;

/// A relation by its sign.
pub(super) fn infix(sign: &str) -> Option<(&'static str, u8)> {
    let found = INFIX.iter().find(|(_, known, _)| *known == sign)?;
    Some((found.0, found.2))
}

// === impl Syntax ===

impl Syntax {
    /// A call of an operator or a function.
    pub fn call(function: &str, arguments: Vec<Self>) -> Self {
        Self::Call {
            function: function.into(),
            on: None,
            arguments,
        }
    }

    fn binds(&self) -> u8 {
        match self {
            Self::Call {
                function,
                on: None,
                arguments,
            } => match (&**function, arguments.len()) {
                ("_?_:_", 3) => 0,
                ("!_" | "-_", 1) => 6,
                (name, 2..) => INFIX
                    .iter()
                    .find(|(known, ..)| *known == name)
                    .map_or(TIGHTEST, |found| found.2),
                _ => TIGHTEST,
            },
            _ => TIGHTEST,
        }
    }

    /// Writes it, in parentheses where it binds less than is needed there.
    fn write(&self, needed: u8, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.binds() < needed {
            f.write_char('(')?;
            self.write(0, f)?;
            return f.write_char(')');
        }
        match self {
            Self::Constant(constant) => write!(f, "{constant}"),
            Self::Name(name) => f.write_str(name),
            Self::Select { of, field, test } => {
                f.write_str(if *test { "has(" } else { "" })?;
                of.write(TIGHTEST, f)?;
                write!(f, ".{field}{}", if *test { ")" } else { "" })
            }
            Self::Call { function, on, arguments } => write_call(function, on.as_deref(), arguments, f),
            Self::List(items) => {
                f.write_char('[')?;
                write_list(items, f)?;
                f.write_char(']')
            }
            Self::Map(entries) => {
                f.write_char('{')?;
                for (index, (key, value)) in entries.iter().enumerate() {
                    f.write_str(if index == 0 { "" } else { ", " })?;
                    key.write(0, f)?;
                    f.write_str(": ")?;
                    value.write(0, f)?;
                }
                f.write_char('}')
            }
        }
    }
}

impl fmt::Display for Syntax {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(0, f)
    }
}

fn write_list(items: &[Syntax], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for (index, item) in items.iter().enumerate() {
        f.write_str(if index == 0 { "" } else { ", " })?;
        item.write(0, f)?;
    }
    Ok(())
}

fn write_call(function: &str, on: Option<&Syntax>, arguments: &[Syntax], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    match (function, on, arguments) {
        ("_?_:_", None, [condition, yes, no]) => {
            condition.write(1, f)?;
            f.write_str(" ? ")?;
            yes.write(1, f)?;
            f.write_str(" : ")?;
            no.write(0, f)
        }
        ("!_", None, [inner]) => {
            f.write_char('!')?;
            inner.write(6, f)
        }
        ("-_", None, [inner]) => {
            f.write_char('-')?;
            inner.write(6, f)
        }
        ("_[_]", None, [of, index]) => {
            of.write(TIGHTEST, f)?;
            f.write_char('[')?;
            index.write(0, f)?;
            f.write_char(']')
        }
        (name, None, [first, rest @ ..]) if let Some((_, sign, binds)) = INFIX.iter().find(|(known, ..)| *known == name) => {
            first.write(*binds, f)?;
            rest.iter().try_for_each(|next| {
                write!(f, " {sign} ")?;
                next.write(binds + 1, f)
            })
        }
        (name, on, arguments) => {
            if let Some(on) = on {
                on.write(TIGHTEST, f)?;
                f.write_char('.')?;
            }
            write!(f, "{name}(")?;
            write_list(arguments, f)?;
            f.write_char(')')
        }
    }
}

// === impl Constant ===

impl fmt::Display for Constant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("null"),
            Self::Bool(value) => write!(f, "{value}"),
            Self::Int(value) => write!(f, "{value}"),
            Self::Uint(value) => write!(f, "{value}u"),
            Self::Double(value) => write!(f, "{value:?}"),
            Self::Text(text) => write!(f, "{text:?}"),
            Self::Bytes(bytes) => write!(f, "b\"{}\"", bytes.escape_ascii()),
            Self::Duration(nanos) => write!(f, "duration(\"{nanos}ns\")"),
            Self::Time(nanos) => write!(f, "timestamp({nanos}ns)"),
        }
    }
}
