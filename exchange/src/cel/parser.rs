//! From text to a tree, by CEL's grammar (github.com/google/cel-spec).
//!
//! What is nested deeper than [`super::DEEPEST`] is refused while it is read, rows of `.a.b.c` and `a + b + c` included, so that whoever
//! walks the tree may do so without a thought about the stack.

use super::{
    CelError, DEEPEST,
    lexer::{Token, Word, tokens},
    syntax::{Constant, Syntax, infix},
};

/// A tree and how deep it is.
type Parsed = Result<(Syntax, usize), CelError>;

struct Parser {
    tokens: std::iter::Peekable<std::vec::IntoIter<Token>>,
    end: usize,
    nesting: usize,
}

/// Words that CEL keeps for languages around it.
const RESERVED: [&str; 17] = [
    "as",
    "break",
    "const",
    "continue",
    "else",
    "for",
    "function",
    "if",
    "import",
    "let",
    "loop",
    "package",
    "namespace",
    "return",
    "var",
    "void",
    "while",
];

/// What walks over lists and maps.
const COMPREHENSIONS: [&str; 6] = ["all", "exists", "exists_one", "existsOne", "map", "filter"];

/// Reads an expression.
pub(super) fn parse(text: &str) -> Result<Syntax, CelError> {
    let mut parser = Parser {
        tokens: tokens(text)?.into_iter().peekable(),
        end: text.len(),
        nesting: 0,
    };
    let (syntax, _) = parser.expression()?;
    match parser.tokens.next() {
        None => Ok(syntax),
        Some(more) => Err(CelError::Syntax {
            position: more.position,
            what: "the expression is over here, but more follows".to_owned(),
        }),
    }
}

// === impl Parser ===

impl Parser {
    fn position(&mut self) -> usize {
        self.tokens.peek().map_or(self.end, |token| token.position)
    }

    fn wrong(&mut self, what: impl Into<String>) -> CelError {
        CelError::Syntax {
            position: self.position(),
            what: what.into(),
        }
    }

    /// The next sign, if it is one of these.
    fn sign(&mut self, any: &[&'static str]) -> Option<&'static str> {
        match self.tokens.peek()?.word {
            Word::Sign(sign) if any.contains(&sign) => {
                self.tokens.next();
                Some(sign)
            }
            _ => None,
        }
    }

    fn expect(&mut self, sign: &'static str) -> Result<(), CelError> {
        match self.sign(&[sign]) {
            Some(_) => Ok(()),
            None => Err(self.wrong(format!("`{sign}` is missing"))),
        }
    }

    /// One level above trees of these depths.
    fn above(&mut self, depths: impl IntoIterator<Item = usize>) -> Result<usize, CelError> {
        let depth = depths.into_iter().max().unwrap_or(0) + 1;
        if depth > DEEPEST { Err(CelError::TooDeep) } else { Ok(depth) }
    }

    fn call(&mut self, function: &str, arguments: Vec<(Syntax, usize)>) -> Parsed {
        let depth = self.above(arguments.iter().map(|(_, depth)| *depth))?;
        let arguments = arguments.into_iter().map(|(syntax, _)| syntax).collect();
        Ok((Syntax::call(function, arguments), depth))
    }

    fn expression(&mut self) -> Parsed {
        self.nesting += 1;
        if self.nesting > DEEPEST {
            return Err(CelError::TooDeep);
        }
        let condition = self.row("||", |parser| parser.row("&&", Self::relation))?;
        let parsed = if self.sign(&["?"]).is_some() {
            let yes = self.row("||", |parser| parser.row("&&", Self::relation))?;
            self.expect(":")?;
            let no = self.expression()?;
            self.call("_?_:_", vec![condition, yes, no])?
        } else {
            condition
        };
        self.nesting -= 1;
        Ok(parsed)
    }

    /// A row of alternatives or conditions, which is one call however long it is.
    fn row(&mut self, sign: &'static str, next: impl Fn(&mut Self) -> Parsed) -> Parsed {
        let first = next(self)?;
        let mut all = vec![first];
        while self.sign(&[sign]).is_some() {
            all.push(next(self)?);
        }
        match <[_; 1]>::try_from(all) {
            Ok([only]) => Ok(only),
            Err(all) => self.call(infix(sign).map_or(sign, |found| found.0), all),
        }
    }

    fn relation(&mut self) -> Parsed {
        const SIGNS: [&str; 6] = ["==", "!=", "<", "<=", ">", ">="];
        let mut left = self.sum()?;
        loop {
            let is_in = matches!(self.tokens.peek(), Some(Token { word: Word::Name(name), .. }) if &**name == "in");
            let function = if is_in {
                self.tokens.next();
                "@in"
            } else {
                match self.sign(&SIGNS).and_then(infix) {
                    Some((function, _)) => function,
                    None => return Ok(left),
                }
            };
            let right = self.sum()?;
            left = self.call(function, vec![left, right])?;
        }
    }

    fn sum(&mut self) -> Parsed {
        self.left_to_right(&["+", "-"], |parser| parser.left_to_right(&["*", "/", "%"], Self::unary))
    }

    fn left_to_right(&mut self, signs: &[&'static str], next: impl Fn(&mut Self) -> Parsed) -> Parsed {
        let mut left = next(self)?;
        while let Some((function, _)) = self.sign(signs).and_then(infix) {
            let right = next(self)?;
            left = self.call(function, vec![left, right])?;
        }
        Ok(left)
    }

    fn unary(&mut self) -> Parsed {
        let mut nots = 0usize;
        while self.sign(&["!"]).is_some() {
            nots += 1;
        }
        if nots > 0 {
            let inner = self.member()?;
            // Twice turned round is as it was.
            return if nots.is_multiple_of(2) {
                Ok(inner)
            } else {
                self.call("!_", vec![inner])
            };
        }
        let mut minuses = 0usize;
        while self.sign(&["-"]).is_some() {
            minuses += 1;
        }
        if minuses == 0 {
            return self.member();
        }
        // The last minus belongs to a number that follows.
        let negative = match self.tokens.peek().map(|token| &token.word) {
            Some(Word::LeastInt) => Some(Constant::Int(i64::MIN)),
            Some(Word::Constant(Constant::Int(number))) => Some(Constant::Int(-number)),
            Some(Word::Constant(Constant::Double(number))) => Some(Constant::Double(-number)),
            _ => None,
        };
        let inner = match negative {
            Some(constant) => {
                self.tokens.next();
                minuses -= 1;
                self.members_of((Syntax::Constant(constant), 1))?
            }
            None => self.member()?,
        };
        if minuses.is_multiple_of(2) {
            Ok(inner)
        } else {
            self.call("-_", vec![inner])
        }
    }

    fn member(&mut self) -> Parsed {
        let primary = self.primary()?;
        self.members_of(primary)
    }

    /// Fields, calls and indexes behind something.
    fn members_of(&mut self, mut parsed: (Syntax, usize)) -> Parsed {
        loop {
            match self.sign(&[".", "["]) {
                Some(".") => {
                    let name = self.name()?;
                    if self.sign(&["("]).is_none() {
                        let depth = self.above([parsed.1])?;
                        let syntax = Syntax::Select {
                            of: Box::new(parsed.0),
                            field: name,
                            test: false,
                        };
                        parsed = (syntax, depth);
                        continue;
                    }
                    let arguments = self.list(")")?;
                    if COMPREHENSIONS.contains(&&*name) && arguments.len() >= 2 {
                        return Err(CelError::Comprehension);
                    }
                    let depth = self.above(arguments.iter().map(|(_, depth)| *depth).chain([parsed.1]))?;
                    let syntax = Syntax::Call {
                        function: name,
                        on: Some(Box::new(parsed.0)),
                        arguments: arguments.into_iter().map(|(syntax, _)| syntax).collect(),
                    };
                    parsed = (syntax, depth);
                }
                Some(_) => {
                    let index = self.expression()?;
                    self.expect("]")?;
                    parsed = self.call("_[_]", vec![parsed, index])?;
                }
                None => return Ok(parsed),
            }
        }
    }

    fn name(&mut self) -> Result<Box<str>, CelError> {
        let named = |token: &Token| matches!(token.word, Word::Name(_));
        match self.tokens.next_if(named) {
            Some(Token {
                word: Word::Name(name), ..
            }) => Ok(name),
            _ => Err(self.wrong("a name is missing")),
        }
    }

    fn primary(&mut self) -> Parsed {
        let Some(Token { word, position }) = self.tokens.next() else {
            return Err(self.wrong("an expression is missing"));
        };
        let wrong = |what: &str| CelError::Syntax {
            position,
            what: what.to_owned(),
        };
        match word {
            Word::Constant(constant) => Ok((Syntax::Constant(constant), 1)),
            Word::LeastInt => Err(wrong("this is no number of 64 bits")),
            Word::Sign("(") => {
                let inner = self.expression()?;
                self.expect(")")?;
                Ok(inner)
            }
            Word::Sign("[") => {
                let items = self.list("]")?;
                let depth = self.above(items.iter().map(|(_, depth)| *depth))?;
                Ok((Syntax::List(items.into_iter().map(|(syntax, _)| syntax).collect()), depth))
            }
            Word::Sign("{") => self.map(),
            // Names from the root: there are no others.
            Word::Sign(".") => {
                let name = self.name()?;
                self.named(name, position)
            }
            Word::Name(name) => self.named(name, position),
            Word::Sign(_) => Err(wrong("an expression is missing")),
        }
    }

    fn named(&mut self, name: Box<str>, position: usize) -> Parsed {
        let constant = match &*name {
            "true" => Some(Constant::Bool(true)),
            "false" => Some(Constant::Bool(false)),
            "null" => Some(Constant::Null),
            _ => None,
        };
        if let Some(constant) = constant {
            return Ok((Syntax::Constant(constant), 1));
        }
        if &*name == "in" || RESERVED.contains(&&*name) {
            return Err(CelError::Syntax {
                position,
                what: format!("`{name}` is a reserved word"),
            });
        }
        if self.sign(&["("]).is_none() {
            return Ok((Syntax::Name(name), 1));
        }
        let arguments = self.list(")")?;
        if &*name != "has" {
            return self.call(&name, arguments);
        }
        match <[_; 1]>::try_from(arguments) {
            Ok([(Syntax::Select { of, field, test: false }, depth)]) => Ok((Syntax::Select { of, field, test: true }, depth)),
            _ => Err(CelError::Syntax {
                position,
                what: "has() asks for a field: has(a.b)".to_owned(),
            }),
        }
    }

    /// Expressions up to the closing sign; a last comma is allowed where the grammar allows it, and harmless elsewhere.
    fn list(&mut self, end: &'static str) -> Result<Vec<(Syntax, usize)>, CelError> {
        let mut items = Vec::new();
        loop {
            if self.sign(&[end]).is_some() {
                return Ok(items);
            }
            items.push(self.expression()?);
            if self.sign(&[","]).is_none() {
                self.expect(end)?;
                return Ok(items);
            }
        }
    }

    fn map(&mut self) -> Parsed {
        let mut entries = Vec::new();
        let mut depths = Vec::new();
        loop {
            if self.sign(&["}"]).is_some() {
                break;
            }
            let (key, key_depth) = self.expression()?;
            self.expect(":")?;
            let (value, value_depth) = self.expression()?;
            entries.push((key, value));
            depths.extend([key_depth, value_depth]);
            if self.sign(&[","]).is_none() {
                self.expect("}")?;
                break;
            }
        }
        let depth = self.above(depths)?;
        Ok((Syntax::Map(entries), depth))
    }
}
