//! Asking a compiled tree.
//!
//! A failure anywhere is the value of the whole, but for `&&` and `||`, where one side that decides makes up for a failure of the other,
//! and `has`, which asks whether there is a failure to be had.

use std::borrow::Cow;

use super::{
    attribute::{Headers, Root},
    function::{Function, concat, contained},
    syntax::Constant,
    time,
    value::{Failure, Map, Value},
};
use crate::{format::View, regex::RegexSearch};

/// A compiled expression.
#[derive(Clone)]
pub(super) enum Node {
    Constant(Constant),
    Type(&'static str),
    Root(Root),
    Attribute(Root, Box<str>),
    Header(Headers, Box<str>),
    UnknownName,
    At(Box<[Node; 2]>),
    IsThere(Box<Node>),
    All(Box<[Node]>),
    Any(Box<[Node]>),
    Not(Box<Node>),
    Negative(Box<Node>),
    Choose(Box<[Node; 3]>),
    Relation(Relation, Box<[Node; 2]>),
    /// With whether texts may be joined.
    Sum(Sum, bool, Box<[Node; 2]>),
    Matches(Box<Node>, RegexSearch),
    Call(Function, Box<[Node]>),
    List(Box<[Node]>),
    Map(Box<[(Node, Node)]>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Relation {
    Equal,
    NotEqual,
    Less,
    AtMost,
    Greater,
    AtLeast,
    In,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sum {
    Add,
    Subtract,
    Multiply,
    Divide,
    Remainder,
}

type Evaluated<'t> = Result<Value<'t>, Failure>;

// === impl Node ===

impl Node {
    pub(super) fn value<'t>(&'t self, view: &View<'t>) -> Evaluated<'t> {
        match self {
            Self::Constant(constant) => Ok(constant_value(constant)),
            Self::Type(name) => Ok(Value::Type(name)),
            Self::Root(root) => Ok(Value::Map(Map::Root(*root))),
            Self::Attribute(root, name) => root.get(name.as_bytes(), view).ok_or(Failure::NotThere),
            Self::Header(headers, name) => headers.get(name, view).ok_or(Failure::NotThere),
            Self::UnknownName => Err(Failure::UnknownName),
            Self::At(pair) => {
                let [of, key] = &**pair;
                of.value(view)?.at(&key.value(view)?, view)
            }
            Self::IsThere(inner) => {
                let found = match &**inner {
                    Self::At(pair) => {
                        let [of, key] = &**pair;
                        // That it is missing itself is another matter.
                        let of = of.value(view)?;
                        of.at(&key.value(view)?, view)
                    }
                    inner => inner.value(view),
                };
                match found {
                    Ok(_) => Ok(Value::Bool(true)),
                    Err(Failure::NotThere) => Ok(Value::Bool(false)),
                    Err(failure) => Err(failure),
                }
            }
            Self::All(all) => decide(all, false, view),
            Self::Any(any) => decide(any, true, view),
            Self::Not(inner) => Ok(Value::Bool(!inner.truth(view)?)),
            Self::Negative(inner) => match inner.value(view)? {
                Value::Int(number) => number.checked_neg().map(Value::Int).ok_or(Failure::OutOfRange),
                Value::Double(number) => Ok(Value::Double(-number)),
                _ => Err(Failure::NoOverload),
            },
            Self::Choose(three) => {
                let [condition, yes, no] = &**three;
                if condition.truth(view)? {
                    yes.value(view)
                } else {
                    no.value(view)
                }
            }
            Self::Relation(relation, pair) => {
                let [left, right] = &**pair;
                relation.holds(&left.value(view)?, &right.value(view)?, view)
            }
            Self::Sum(sum, joins, pair) => {
                let [left, right] = &**pair;
                sum.of(left.value(view)?, right.value(view)?, *joins)
            }
            Self::Matches(text, search) => match text.value(view)? {
                Value::Text(text) => Ok(Value::Bool(search.matches(&text))),
                _ => Err(Failure::NoOverload),
            },
            Self::Call(function, arguments) => {
                let arguments = arguments.iter().map(|argument| argument.value(view));
                function.call(arguments.collect::<Result<_, _>>()?, view)
            }
            Self::List(items) => Ok(Value::List(
                items.iter().map(|item| item.value(view)).collect::<Result<_, _>>()?,
            )),
            Self::Map(entries) => map(entries, view),
        }
    }

    fn truth<'t>(&'t self, view: &View<'t>) -> Result<bool, Failure> {
        match self.value(view)? {
            Value::Bool(truth) => Ok(truth),
            _ => Err(Failure::NoOverload),
        }
    }
}

/// The record for as long as the program lives.
pub(super) fn shortened<'t, 'a: 't>(view: &View<'a>) -> View<'t> {
    View {
        exchange: view.exchange,
        request: view.request,
        response: view.response,
        trailers: view.trailers,
        filter_state: None,
        metadata: None,
    }
}

/// `&&` (decided by false) or `||` (decided by true).
fn decide<'t>(nodes: &'t [Node], by: bool, view: &View<'t>) -> Evaluated<'t> {
    let mut failed = None;
    for node in nodes {
        match node.truth(view) {
            Ok(truth) if truth == by => return Ok(Value::Bool(by)),
            Ok(_) => {}
            Err(failure) => failed = failed.or(Some(failure)),
        }
    }
    failed.map_or(Ok(Value::Bool(!by)), Err)
}

fn constant_value(constant: &Constant) -> Value<'_> {
    match constant {
        Constant::Null => Value::Null,
        Constant::Bool(value) => Value::Bool(*value),
        Constant::Int(number) => Value::Int(*number),
        Constant::Uint(number) => Value::Uint(*number),
        Constant::Double(number) => Value::Double(*number),
        Constant::Text(text) => Value::text(text),
        Constant::Bytes(bytes) => Value::Bytes(Cow::Borrowed(bytes)),
        Constant::Duration(nanos) => Value::Duration(*nanos),
        Constant::Time(nanos) => Value::Time(*nanos),
    }
}

fn map<'t>(entries: &'t [(Node, Node)], view: &View<'t>) -> Evaluated<'t> {
    let mut found: Vec<(Value<'t>, Value<'t>)> = Vec::with_capacity(entries.len());
    for (key, value) in entries {
        let key = key.value(view)?;
        if !matches!(key, Value::Bool(_) | Value::Int(_) | Value::Uint(_) | Value::Text(_)) {
            return Err(Failure::NoOverload);
        }
        if found.iter().any(|(known, _)| known.equals(&key, view)) {
            return Err(Failure::RepeatedKey);
        }
        found.push((key, value.value(view)?));
    }
    Ok(Value::Map(Map::Entries(found)))
}

// === impl Relation ===

impl Relation {
    fn holds<'t>(self, left: &Value<'t>, right: &Value<'t>, view: &View<'t>) -> Evaluated<'t> {
        let order = || {
            if left.is_comparable(right) {
                Ok(left.compare(right))
            } else {
                Err(Failure::NoOverload)
            }
        };
        Ok(Value::Bool(match self {
            Self::In => return contained(left, right, view),
            Self::Equal => left.equals(right, view),
            Self::NotEqual => !left.equals(right, view),
            Self::Less => order()?.is_some_and(|order| order.is_lt()),
            Self::AtMost => order()?.is_some_and(|order| order.is_le()),
            Self::Greater => order()?.is_some_and(|order| order.is_gt()),
            Self::AtLeast => order()?.is_some_and(|order| order.is_ge()),
        }))
    }
}

// === impl Sum ===

/// Arithmetic of whole numbers that stays within 64 bits.
macro_rules! checked {
    ($sum:expr, $a:expr, $b:expr) => {{
        let (a, b) = ($a, $b);
        match $sum {
            Sum::Divide | Sum::Remainder if b == 0 => Err(Failure::DivisionByZero),
            Sum::Add => a.checked_add(b).ok_or(Failure::OutOfRange),
            Sum::Subtract => a.checked_sub(b).ok_or(Failure::OutOfRange),
            Sum::Multiply => a.checked_mul(b).ok_or(Failure::OutOfRange),
            Sum::Divide => a.checked_div(b).ok_or(Failure::OutOfRange),
            Sum::Remainder => a.checked_rem(b).ok_or(Failure::OutOfRange),
        }
    }};
}

impl Sum {
    fn of<'t>(self, left: Value<'t>, right: Value<'t>, joins: bool) -> Evaluated<'t> {
        let out = Failure::OutOfRange;
        match (left, right) {
            (Value::Int(a), Value::Int(b)) => checked!(self, a, b).map(Value::Int),
            (Value::Uint(a), Value::Uint(b)) => checked!(self, a, b).map(Value::Uint),
            (Value::Double(a), Value::Double(b)) => match self {
                Self::Add => Ok(Value::Double(a + b)),
                Self::Subtract => Ok(Value::Double(a - b)),
                Self::Multiply => Ok(Value::Double(a * b)),
                Self::Divide => Ok(Value::Double(a / b)),
                Self::Remainder => Err(Failure::NoOverload),
            },
            (Value::Text(a), Value::Text(b)) if joins && self == Self::Add => concat(a.into_owned(), &b),
            (Value::Time(a), Value::Duration(b)) if self == Self::Add => time::moment(a.checked_add(b).ok_or(out)?),
            (Value::Duration(a), Value::Time(b)) if self == Self::Add => time::moment(a.checked_add(b).ok_or(out)?),
            (Value::Time(a), Value::Duration(b)) if self == Self::Subtract => time::moment(a.checked_sub(b).ok_or(out)?),
            (Value::Time(a), Value::Time(b)) if self == Self::Subtract => time::span(a.checked_sub(b).ok_or(out)?),
            (Value::Duration(a), Value::Duration(b)) if self == Self::Add => time::span(a.checked_add(b).ok_or(out)?),
            (Value::Duration(a), Value::Duration(b)) if self == Self::Subtract => time::span(a.checked_sub(b).ok_or(out)?),
            _ => Err(Failure::NoOverload),
        }
    }
}
