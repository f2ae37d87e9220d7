//! From a tree as it is written to one that is quickly asked: names looked up, header names checked, regular expressions compiled.

use http::HeaderName;

use super::{
    CelError, DEEPEST, Options,
    attribute::{Headers, Root},
    evaluate::{Node, Relation, Sum},
    function::Function,
    syntax::{Constant, Syntax},
    time,
};
use crate::regex::RegexSearch;

/// A compiled tree, and what is to be said of it.
#[derive(Clone)]
pub(super) struct Compiled {
    pub(super) node: Node,
    pub(super) unrecorded: Box<[Box<str>]>,
    pub(super) response_headers: Box<[HeaderName]>,
}

#[derive(Default)]
struct Compiler {
    options: Options,
    unrecorded: Vec<Box<str>>,
    response_headers: Vec<HeaderName>,
}

/// Names of types.
const TYPES: [&str; 12] = [
    "bool",
    "bytes",
    "double",
    "int",
    "list",
    "map",
    "null_type",
    "string",
    "type",
    "uint",
    "google.protobuf.Duration",
    "google.protobuf.Timestamp",
];

// === impl Compiled ===

impl Compiled {
    pub(super) fn new(syntax: &Syntax, options: Options) -> Result<Self, CelError> {
        let mut compiler = Compiler {
            options,
            ..Compiler::default()
        };
        let node = compiler.node(syntax, DEEPEST)?;
        Ok(Self {
            node,
            unrecorded: compiler.unrecorded.into(),
            response_headers: compiler.response_headers.into(),
        })
    }
}

/// Calls `f` with each attribute that a tree asks for, as far down as its fields are written out.
pub(super) fn attributes(syntax: &Syntax, f: &mut impl FnMut(&Syntax)) {
    if root_of(syntax).is_some() {
        return f(syntax);
    }
    match syntax {
        Syntax::Constant(_) | Syntax::Name(_) => {}
        Syntax::Select { of, field, test: true } if root_of(of).is_some() => f(&Syntax::Select {
            of: of.clone(),
            field: field.clone(),
            test: false,
        }),
        Syntax::Select { of, .. } => attributes(of, f),
        Syntax::Call { on, arguments, .. } => on.as_deref().into_iter().chain(arguments).for_each(|one| attributes(one, f)),
        Syntax::List(items) => items.iter().for_each(|item| attributes(item, f)),
        Syntax::Map(entries) => entries.iter().for_each(|(key, value)| {
            attributes(key, f);
            attributes(value, f);
        }),
    }
}

/// The variable whose field, or field of a field, this is.
fn root_of(syntax: &Syntax) -> Option<Root> {
    let mut at = syntax;
    loop {
        at = match at {
            Syntax::Name(name) => return Root::named(name),
            _ => step(at)?.0,
        };
    }
}

/// `a.b` and `a["b"]` into `a` and `b`.
fn step(syntax: &Syntax) -> Option<(&Syntax, &str)> {
    match syntax {
        Syntax::Select { of, field, test: false } => Some((of, field)),
        Syntax::Call {
            function,
            on: None,
            arguments,
        } if &**function == "_[_]" => match &**arguments {
            [of, Syntax::Constant(Constant::Text(field))] => Some((of, field)),
            _ => None,
        },
        _ => None,
    }
}

// === impl Compiler ===

impl Compiler {
    fn node(&mut self, syntax: &Syntax, levels: usize) -> Result<Node, CelError> {
        let levels = levels.checked_sub(1).ok_or(CelError::TooDeep)?;
        if let Some((of, field)) = step(syntax)
            && let Some(node) = self.known(of, field)
        {
            return Ok(node);
        }
        Ok(match syntax {
            Syntax::Constant(constant) => Node::Constant(constant.clone()),
            Syntax::Name(name) => self.name(name),
            Syntax::Select { of, field, test: false } => match type_name(syntax) {
                Some(name) => Node::Type(name),
                None => Node::At(Box::new([self.node(of, levels)?, text(field)])),
            },
            Syntax::Select { of, field, test: true } => {
                let inner = match self.known(of, field) {
                    Some(known) => known,
                    None => Node::At(Box::new([self.node(of, levels)?, text(field)])),
                };
                Node::IsThere(Box::new(inner))
            }
            Syntax::List(items) => Node::List(self.all(items, levels)?),
            Syntax::Map(entries) => {
                let entries = entries
                    .iter()
                    .map(|(key, value)| Ok((self.node(key, levels)?, self.node(value, levels)?)));
                Node::Map(entries.collect::<Result<_, CelError>>()?)
            }
            Syntax::Call { function, on, arguments } => self.call(function, on.as_deref(), arguments, levels)?,
        })
    }

    fn all<'s>(&mut self, all: impl IntoIterator<Item = &'s Syntax>, levels: usize) -> Result<Box<[Node]>, CelError> {
        all.into_iter().map(|one| self.node(one, levels)).collect()
    }

    fn two(&mut self, first: &Syntax, second: &Syntax, levels: usize) -> Result<Box<[Node; 2]>, CelError> {
        Ok(Box::new([self.node(first, levels)?, self.node(second, levels)?]))
    }

    fn lacks(&mut self, name: String) {
        if !self.unrecorded.iter().any(|known| **known == *name) {
            self.unrecorded.push(name.into());
        }
    }

    /// A variable as such: which of its attributes is asked for shows only later.
    fn name(&mut self, name: &str) -> Node {
        match Root::named(name) {
            Some(root @ (Root::FilterState | Root::UpstreamFilterState)) => Node::Root(root),
            Some(root) => {
                self.lacks(format!("an attribute of {name} that is chosen by a value"));
                Node::Root(root)
            }
            None => TYPES
                .iter()
                .find(|known| **known == name)
                .map_or(Node::UnknownName, |name| Node::Type(name)),
        }
    }

    /// An attribute whose name is written out, or a header of the request or the answer.
    fn known(&mut self, of: &Syntax, field: &str) -> Option<Node> {
        if let Syntax::Name(name) = of {
            let root = Root::named(name)?;
            if root.lacks(field) {
                self.lacks(format!("{name}.{field}"));
            }
            return Some(Node::Attribute(root, field.into()));
        }
        let (of, map) = step(of)?;
        let Syntax::Name(name) = of else { return None };
        let headers = match (Root::named(name)?, map) {
            (Root::Request, "headers") => Headers::Request,
            (Root::Response, "headers") => Headers::Response,
            (Root::Response, "trailers") => Headers::Trailers,
            _ => return None,
        };
        if headers == Headers::Response
            && let Ok(name) = HeaderName::try_from(field)
            && !self.response_headers.contains(&name)
        {
            self.response_headers.push(name);
        }
        Some(Node::Header(headers, field.into()))
    }

    fn call(&mut self, name: &str, on: Option<&Syntax>, arguments: &[Syntax], levels: usize) -> Result<Node, CelError> {
        let relation = match name {
            "_==_" => Some(Relation::Equal),
            "_!=_" => Some(Relation::NotEqual),
            "_<_" => Some(Relation::Less),
            "_<=_" => Some(Relation::AtMost),
            "_>_" => Some(Relation::Greater),
            "_>=_" => Some(Relation::AtLeast),
            "@in" | "_in_" | "in" => Some(Relation::In),
            _ => None,
        };
        let sum = match name {
            "_+_" => Some(Sum::Add),
            "_-_" => Some(Sum::Subtract),
            "_*_" => Some(Sum::Multiply),
            "_/_" => Some(Sum::Divide),
            "_%_" => Some(Sum::Remainder),
            _ => None,
        };
        match (name, on, arguments) {
            ("_&&_", None, [_, _, ..]) => Ok(Node::All(self.all(arguments, levels)?)),
            ("_||_", None, [_, _, ..]) => Ok(Node::Any(self.all(arguments, levels)?)),
            ("!_", None, [inner]) => Ok(Node::Not(Box::new(self.node(inner, levels)?))),
            ("-_", None, [inner]) => Ok(Node::Negative(Box::new(self.node(inner, levels)?))),
            ("_?_:_", None, [condition, yes, no]) => Ok(Node::Choose(Box::new([
                self.node(condition, levels)?,
                self.node(yes, levels)?,
                self.node(no, levels)?,
            ]))),
            ("_[_]", None, [of, index]) => Ok(Node::At(self.two(of, index, levels)?)),
            (_, None, [left, right]) if let Some(relation) = relation => {
                Ok(Node::Relation(relation, self.two(left, right, levels)?))
            }
            (_, None, [left, right]) if let Some(sum) = sum => {
                let concat = self.options.string_concat;
                Ok(Node::Sum(sum, concat, self.two(left, right, levels)?))
            }
            ("re.extract" | "re.capture" | "re.captureN", ..) => Err(CelError::Unsupported(format!("the function {name}"))),
            _ => self.function(name, on, arguments, levels),
        }
    }

    fn function(&mut self, name: &str, on: Option<&Syntax>, arguments: &[Syntax], levels: usize) -> Result<Node, CelError> {
        let count = arguments.len() + usize::from(on.is_some());
        let function = Function::named(name, on.is_some(), count, self.options)?;
        let all: Vec<&Syntax> = on.into_iter().chain(arguments).collect();
        match (function, &*all) {
            (Function::Matches, [text, Syntax::Constant(Constant::Text(pattern))]) => {
                let search = RegexSearch::new(pattern)?;
                Ok(Node::Matches(Box::new(self.node(text, levels)?), search))
            }
            (Function::Matches, _) => Err(CelError::Unsupported(
                "a regular expression that is not written out".to_owned(),
            )),
            // The other parts of a moment take a zone, and nothing else takes two texts of which the second is one.
            (
                Function::FullYear
                | Function::Month
                | Function::Date
                | Function::DayOfMonth
                | Function::DayOfWeek
                | Function::DayOfYear
                | Function::Hours
                | Function::Minutes
                | Function::Seconds
                | Function::Milliseconds,
                [_, zone],
            ) if !matches!(zone, Syntax::Constant(Constant::Text(zone)) if time::offset(zone).is_some()) => {
                Err(CelError::Unsupported(format!("the time zone {zone}")))
            }
            _ => Ok(Node::Call(function, self.all(all, levels)?)),
        }
    }
}

fn text(field: &str) -> Node {
    Node::Constant(Constant::Text(field.into()))
}

/// `google.protobuf.Timestamp`
fn type_name(syntax: &Syntax) -> Option<&'static str> {
    let Syntax::Select { of, test: false, .. } = syntax else {
        return None;
    };
    if !matches!(&**of, Syntax::Select { of, .. } if matches!(&**of, Syntax::Name(name) if &**name == "google")) {
        return None;
    }
    let written = syntax.to_string();
    TYPES.iter().find(|known| **known == written).copied()
}
