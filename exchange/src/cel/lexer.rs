//! From text to words: names, numbers, quoted texts and signs.

use super::{CelError, syntax::Constant};

/// A word and where it stands.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Token {
    pub(super) word: Word,
    pub(super) position: usize,
}

/// A word.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Word {
    /// A name, `in` and reserved words included.
    Name(Box<str>),
    /// A number, a text, or bytes.
    Constant(Constant),
    /// A whole number without sign that is only one behind a minus: the least there is.
    LeastInt,
    /// `(`, `&&`, …
    Sign(&'static str),
}

/// Signs, longer ones first.
const SIGNS: [&str; 24] = [
    "&&", "||", "==", "!=", "<=", ">=", "(", ")", "[", "]", "{", "}", "?", ":", ".", ",", "!", "-", "+", "*", "/", "%", "<", ">",
];

struct Lexer<'a> {
    text: &'a str,
    position: usize,
}

/// The words of a text.
pub(super) fn tokens(text: &str) -> Result<Vec<Token>, CelError> {
    let mut lexer = Lexer { text, position: 0 };
    let mut tokens = Vec::new();
    loop {
        lexer.skip_blanks();
        let position = lexer.position;
        let Some(first) = lexer.rest().chars().next() else {
            return Ok(tokens);
        };
        let word = lexer.word(first)?;
        tokens.push(Token { word, position });
    }
}

// === impl Lexer ===

impl<'a> Lexer<'a> {
    fn rest(&self) -> &'a str {
        self.text.get(self.position..).unwrap_or_default()
    }

    /// Takes what a predicate holds of.
    fn take(&mut self, holds: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        let end = rest.find(|letter| !holds(letter)).unwrap_or(rest.len());
        self.position += end;
        rest.get(..end).unwrap_or_default()
    }

    fn wrong(&self, position: usize, what: impl Into<String>) -> CelError {
        CelError::Syntax {
            position,
            what: what.into(),
        }
    }

    fn skip_blanks(&mut self) {
        loop {
            self.take(|letter| " \t\n\r\u{c}".contains(letter));
            if !self.rest().starts_with("//") {
                return;
            }
            self.take(|letter| letter != '\n');
        }
    }

    fn word(&mut self, first: char) -> Result<Word, CelError> {
        if let Some((prefix, raw, bytes)) = quoted(self.rest()) {
            self.position += prefix;
            return self.quoted(raw, bytes);
        }
        if first.is_ascii_alphabetic() || first == '_' {
            return Ok(Word::Name(self.take(|c| c.is_ascii_alphanumeric() || c == '_').into()));
        }
        let next = self.rest().chars().nth(1);
        if first.is_ascii_digit() || (first == '.' && next.is_some_and(|c| c.is_ascii_digit())) {
            return self.number();
        }
        let rest = self.rest();
        match SIGNS.iter().find(|sign| rest.starts_with(**sign)) {
            Some(sign) => {
                self.position += sign.len();
                Ok(Word::Sign(sign))
            }
            None => Err(self.wrong(self.position, format!("{first:?} stands for nothing"))),
        }
    }

    fn number(&mut self) -> Result<Word, CelError> {
        let start = self.position;
        let rest = self.rest();
        let refuse = |lexer: &Self, what: &str| lexer.wrong(start, what);
        if rest.starts_with("0x") || rest.starts_with("0X") {
            self.position += 2;
            let digits = self.take(|c| c.is_ascii_hexdigit());
            return self.whole(digits, 16, start);
        }
        let digits = self.take(|c| c.is_ascii_digit());
        let fraction = self
            .rest()
            .strip_prefix('.')
            .is_some_and(|tail| tail.starts_with(|c: char| c.is_ascii_digit()));
        if fraction {
            self.position += 1;
            self.take(|c| c.is_ascii_digit());
        }
        let exponent = self.rest().starts_with(['e', 'E']);
        if exponent {
            self.position += 1;
            if self.rest().starts_with(['+', '-']) {
                self.position += 1;
            }
            if self.take(|c| c.is_ascii_digit()).is_empty() {
                return Err(refuse(self, "an exponent has no digits"));
            }
        }
        if !fraction && !exponent {
            return self.whole(digits, 10, start);
        }
        let text = self.text.get(start..self.position).unwrap_or_default();
        let number = text.parse().map_err(|_| refuse(self, "this is no number"))?;
        Ok(Word::Constant(Constant::Double(number)))
    }

    fn whole(&mut self, digits: &str, radix: u32, start: usize) -> Result<Word, CelError> {
        let too_large = |lexer: &Self| lexer.wrong(start, "this is no number of 64 bits");
        let number = u64::from_str_radix(digits, radix).map_err(|_| too_large(self))?;
        if self.rest().starts_with(['u', 'U']) {
            self.position += 1;
            return Ok(Word::Constant(Constant::Uint(number)));
        }
        match i64::try_from(number) {
            Ok(number) => Ok(Word::Constant(Constant::Int(number))),
            Err(_) if number == i64::MIN.unsigned_abs() => Ok(Word::LeastInt),
            Err(_) => Err(too_large(self)),
        }
    }

    /// A quoted text whose opening quote is next.
    fn quoted(&mut self, raw: bool, bytes: bool) -> Result<Word, CelError> {
        let start = self.position;
        let rest = self.rest();
        let single = rest.get(..1).unwrap_or_default();
        let triple = ["\"\"\"", "'''"].into_iter().find(|quote| rest.starts_with(quote));
        let quote = triple.unwrap_or(single);
        self.position += quote.len();
        let mut out = Vec::new();
        loop {
            let rest = self.rest();
            if rest.starts_with(quote) {
                self.position += quote.len();
                break;
            }
            let Some(letter) = rest.chars().next() else {
                return Err(self.wrong(start, "this text does not end"));
            };
            if triple.is_none() && matches!(letter, '\n' | '\r') {
                return Err(self.wrong(start, "this text does not end on its line"));
            }
            if letter == '\\' && !raw {
                self.escape(bytes, &mut out)?;
            } else {
                self.position += letter.len_utf8();
                out.extend_from_slice(letter.encode_utf8(&mut [0; 4]).as_bytes());
            }
        }
        if bytes {
            return Ok(Word::Constant(Constant::Bytes(out.into())));
        }
        let text = String::from_utf8(out).map_err(|_| self.wrong(start, "this is no UTF-8"))?;
        Ok(Word::Constant(Constant::Text(text.into())))
    }

    fn escape(&mut self, bytes: bool, out: &mut Vec<u8>) -> Result<(), CelError> {
        let start = self.position;
        let refuse = |lexer: &Self| lexer.wrong(start, "this escape stands for nothing");
        self.position += 1;
        let Some(letter) = self.rest().chars().next() else {
            return Err(refuse(self));
        };
        let (digits, radix) = match letter {
            'x' | 'X' => (2, 16),
            'u' if !bytes => (4, 16),
            'U' if !bytes => (8, 16),
            '0'..='3' => (3, 8),
            _ => {
                let plain = match letter {
                    'a' => 0x07,
                    'b' => 0x08,
                    't' => b'\t',
                    'n' => b'\n',
                    'v' => 0x0b,
                    'f' => 0x0c,
                    'r' => b'\r',
                    '\\' => b'\\',
                    '"' => b'"',
                    '\'' => b'\'',
                    '`' => b'`',
                    '?' => b'?',
                    _ => return Err(refuse(self)),
                };
                self.position += 1;
                out.push(plain);
                return Ok(());
            }
        };
        self.position += usize::from(radix == 16);
        let code = self
            .rest()
            .get(..digits)
            .filter(|code| code.chars().all(|c| c.is_digit(radix)));
        let code = code
            .and_then(|code| u32::from_str_radix(code, radix).ok())
            .ok_or_else(|| refuse(self))?;
        self.position += digits;
        if bytes {
            out.push(u8::try_from(code).map_err(|_| refuse(self))?);
        } else {
            let letter = char::from_u32(code).ok_or_else(|| refuse(self))?;
            out.extend_from_slice(letter.encode_utf8(&mut [0; 4]).as_bytes());
        }
        Ok(())
    }
}

/// Whether a quoted text begins here: length of what stands before the quote, whether escapes mean nothing, whether it is bytes.
fn quoted(rest: &str) -> Option<(usize, bool, bool)> {
    let mut raw = false;
    let mut bytes = false;
    for (at, letter) in rest.char_indices().take(3) {
        match letter {
            '"' | '\'' => return Some((at, raw, bytes)),
            'r' | 'R' if !raw => raw = true,
            'b' | 'B' if !bytes && !raw => bytes = true,
            _ => return None,
        }
    }
    None
}
