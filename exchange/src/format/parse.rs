//! From text to operators: the grammar of Envoy's format strings and the table of names.

use http::HeaderName;

use super::{
    MetadataOf, Part,
    fact::Fact,
    fields::{Field, Fields},
    operator::{GrpcStatusForm, Operator, PathOf},
    span::{Moment, Unit},
    time::{self, TimeFormat},
    unrecorded,
};
use crate::cel::{CelError, Options, Program};

/// Why a format string cannot be compiled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("format string, at byte {position} ({token}): {problem}")]
pub struct FormatError {
    /// Where the operator starts.
    pub position: usize,
    /// The operator as written, or the rest of the text where no operator could be made out.
    pub token: String,
    /// What is wrong.
    pub problem: FormatProblem,
}

/// What is wrong with an operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatProblem {
    /// A percent sign starts no operator.
    #[error(
        "no operator starts here; an operator is %NAME%, %NAME(parameter)% or %NAME(parameter):LENGTH%, a percent sign is %%"
    )]
    NoOperator,
    /// No operator has this name.
    #[error("there is no operator {0}")]
    UnknownOperator(String),
    /// Parameters for an operator without any.
    #[error("{0} takes no parameters and no length")]
    TakesNothing(String),
    /// A missing parameter.
    #[error("{0} needs a parameter")]
    NeedsParameter(String),
    /// A length where none may be given.
    #[error("{0} takes no length")]
    TakesNoLength(String),
    /// A length that is no number.
    #[error("the length {0} is too large")]
    Length(String),
    /// A text that cannot name a header.
    #[error("{0:?} is not a header name")]
    HeaderName(String),
    /// `X?Y?Z`.
    #[error("only one alternative header may be named")]
    Alternatives,
    /// A parameter outside of what the operator knows.
    #[error("the parameter {given:?} is not {wanted}")]
    Parameter {
        /// What was given.
        given: String,
        /// What may be given.
        wanted: &'static str,
    },
    /// An expression that is none.
    #[error("the expression means nothing: {0}")]
    Cel(CelError),
    /// A time format with an unknown specifier.
    #[error("the time format has {0:?}, which is no specifier that may be used here")]
    TimeFormat(String),
}

/// Longest excerpt of the text in an error.
const MAX_EXCERPT: usize = 60;

/// What becomes of an operator that has no name here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unknown {
    /// The text is refused.
    Refused,
    /// Its value is always absent.
    Absent,
}

pub(super) fn template(text: &str, unknown: Unknown) -> Result<Box<[Part]>, FormatError> {
    let mut parts = Vec::new();
    let mut literal = String::new();
    let mut position = 0;
    while let Some(rest) = text.get(position..).filter(|rest| !rest.is_empty()) {
        let Some(after) = rest.strip_prefix('%') else {
            let end = rest.find('%').unwrap_or(rest.len());
            literal.push_str(&rest[..end]);
            position += end;
            continue;
        };
        if after.starts_with('%') {
            literal.push('%');
            position += 2;
            continue;
        }
        let fail = |token: &str, problem| FormatError {
            position,
            token: token.chars().take(MAX_EXCERPT).collect(),
            problem,
        };
        let Some(command) = Command::read(after) else {
            return Err(fail(rest, FormatProblem::NoOperator));
        };
        let token = &after[..command.length];
        if !literal.is_empty() {
            parts.push(Part::Literal(std::mem::take(&mut literal).into()));
        }
        let (operator, max) = match command.compile() {
            Err(FormatProblem::UnknownOperator(_)) if unknown == Unknown::Absent => (Operator::Unrecorded, None),
            compiled => compiled.map_err(|problem| fail(token, problem))?,
        };
        parts.push(Part::Operator {
            operator,
            max,
            token: token.into(),
        });
        position += command.length + 2;
    }
    if !literal.is_empty() {
        parts.push(Part::Literal(literal.into()));
    }
    Ok(parts.into())
}

/// `NAME(parameter):LENGTH`, taken apart.
struct Command<'a> {
    name: &'a str,
    parameter: &'a str,
    max: Option<&'a str>,
    /// Bytes up to the closing percent sign.
    length: usize,
}

impl<'a> Command<'a> {
    /// Reads up to the closing percent sign. A parameter ends at the first `)` after which an operator may end, so that it may
    /// hold percent signs and brackets itself; it holds no line break.
    fn read(text: &'a str) -> Option<Self> {
        let name_end = text.find(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'))?;
        let (name, rest) = text.split_at(name_end);
        if name.is_empty() {
            return None;
        }
        let finish = |parameter: &'a str, tail: &'a str| {
            let (max, tail) = match tail.strip_prefix(':') {
                Some(digits) => {
                    let end = digits.find(|c: char| !c.is_ascii_digit())?;
                    (
                        Some(digits.get(..end).filter(|digits| !digits.is_empty())?),
                        digits.get(end..)?,
                    )
                }
                None => (None, tail),
            };
            let length = text.len() - tail.len();
            tail.starts_with('%').then_some(Self {
                name,
                parameter,
                max,
                length,
            })
        };
        let Some(inner) = rest.strip_prefix('(') else {
            return finish("", rest);
        };
        inner
            .bytes()
            .enumerate()
            .take_while(|(_, byte)| *byte != b'\n')
            .filter(|(_, byte)| *byte == b')')
            .find_map(|(close, _)| finish(&inner[..close], &inner[close + 1..]))
    }

    fn compile(&self) -> Result<(Operator, Option<usize>), FormatProblem> {
        let name = self.name;
        let max = self
            .max
            .map(|digits| digits.parse().map_err(|_| FormatProblem::Length(digits.to_owned())))
            .transpose()?;
        if let Some(fact) = Fact::named(name) {
            self.nothing()?;
            return Ok((Operator::Fact(fact), None));
        }
        if unrecorded::PLAIN.contains(&name) {
            self.nothing()?;
            return Ok((Operator::Unrecorded, None));
        }
        if unrecorded::WITH_PARAMETERS.contains(&name) {
            return Ok((Operator::Unrecorded, max));
        }
        let operator = match name {
            "CEL" => self.cel(false)?,
            "TYPED_CEL" => self.cel(true)?,
            "REQ" => Operator::Request(self.fields()?),
            "RESP" => Operator::Response(self.fields()?),
            "TRAILER" => Operator::Trailer(self.fields()?),
            "REQ_WITHOUT_QUERY" => Operator::RequestWithoutQuery(self.fields()?),
            "PATH" => self.path()?,
            "QUERY_PARAM" => Operator::QueryParameter(self.required()?.into()),
            "ENVIRONMENT" => Operator::Environment(environment(self.required()?)),
            "FILTER_STATE" | "UPSTREAM_FILTER_STATE" => self.filter_state()?,
            "PER_REQUEST_STATE" => {
                let key = self.required()?;
                Operator::FilterState {
                    key: key.into(),
                    field: None,
                    lookup: key.into(),
                }
            }
            "DYNAMIC_METADATA" => self.metadata(MetadataOf::Dynamic)?,
            "CLUSTER_METADATA" => self.metadata(MetadataOf::Cluster)?,
            "UPSTREAM_METADATA" => self.metadata(MetadataOf::Upstream)?,
            "METADATA" => self.metadata_of()?,
            _ => {
                // What follows takes no length.
                let operator = match name {
                    "START_TIME" | "START_TIME_LOCAL" => Operator::StartTime(self.time()?),
                    "EMIT_TIME" | "EMIT_TIME_LOCAL" => Operator::EmitTime(self.time()?),
                    "RESPONSE_CODE_DETAILS" => Operator::CodeDetails {
                        whitespace: self.one_of(&[("", false), ("ALLOW_WHITESPACES", true)], "ALLOW_WHITESPACES")?,
                    },
                    "GRPC_STATUS" => Operator::GrpcStatus(self.one_of(
                        &[
                            ("", GrpcStatusForm::Camel),
                            ("CAMEL_STRING", GrpcStatusForm::Camel),
                            ("SNAKE_STRING", GrpcStatusForm::Snake),
                            ("NUMBER", GrpcStatusForm::Number),
                        ],
                        "CAMEL_STRING, SNAKE_STRING or NUMBER",
                    )?),
                    "GRPC_STATUS_NUMBER" => {
                        self.nothing()?;
                        Operator::GrpcStatus(GrpcStatusForm::Number)
                    }
                    "COMMON_DURATION" => self.common_duration()?,
                    _ => return Err(FormatProblem::UnknownOperator(name.to_owned())),
                };
                if max.is_some() {
                    return Err(FormatProblem::TakesNoLength(name.to_owned()));
                }
                operator
            }
        };
        Ok((operator, max))
    }

    fn nothing(&self) -> Result<(), FormatProblem> {
        if self.parameter.is_empty() && self.max.is_none() {
            Ok(())
        } else {
            Err(FormatProblem::TakesNothing(self.name.to_owned()))
        }
    }

    fn required(&self) -> Result<&'a str, FormatProblem> {
        if self.parameter.is_empty() {
            Err(FormatProblem::NeedsParameter(self.name.to_owned()))
        } else {
            Ok(self.parameter)
        }
    }

    fn wrong(&self, wanted: &'static str) -> FormatProblem {
        FormatProblem::Parameter {
            given: self.parameter.to_owned(),
            wanted,
        }
    }

    fn one_of<T: Copy>(&self, known: &[(&str, T)], wanted: &'static str) -> Result<T, FormatProblem> {
        known
            .iter()
            .find(|(word, _)| *word == self.parameter)
            .map(|(_, value)| *value)
            .ok_or_else(|| self.wrong(wanted))
    }

    fn fields(&self) -> Result<Fields, FormatProblem> {
        let mut names = self.required()?.split('?');
        let main = field(names.next().unwrap_or_default())?;
        let alternative = names.next().filter(|name| !name.is_empty()).map(field).transpose()?;
        if names.next().is_some() {
            return Err(FormatProblem::Alternatives);
        }
        Ok(Fields { main, alternative })
    }

    /// What is well-formed but cannot be done has no value. Whether a formatter turns functions on stands elsewhere; here all are.
    fn cel(&self, typed: bool) -> Result<Operator, FormatProblem> {
        match Program::parse(self.required()?, Options::ALL) {
            Ok(program) => Ok(Operator::Cel {
                program: program.into(),
                typed,
            }),
            Err(error) if error.is_unsupported() => Ok(Operator::Unrecorded),
            Err(error) => Err(FormatProblem::Cel(error)),
        }
    }

    fn path(&self) -> Result<Operator, FormatProblem> {
        const WANTED: &str = "WQ or NQ, then ORIG, PATH or ORIG_OR_PATH after a colon";
        let (query, of) = self.parameter.split_once(':').unwrap_or((self.parameter, ""));
        let query = match query {
            "" | "WQ" => true,
            "NQ" => false,
            _ => return Err(self.wrong(WANTED)),
        };
        let of = match of {
            "" | "ORIG_OR_PATH" => PathOf::OriginalOrCurrent,
            "ORIG" => PathOf::Original,
            "PATH" => PathOf::Current,
            _ => return Err(self.wrong(WANTED)),
        };
        Ok(Operator::Path { of, query })
    }

    fn time(&self) -> Result<TimeFormat, FormatProblem> {
        time::parse(self.parameter).map_err(FormatProblem::TimeFormat)
    }

    fn common_duration(&self) -> Result<Operator, FormatProblem> {
        const WANTED: &str = "START:END or START:END:PRECISION, the precision being ms, us or ns";
        let mut words = self.required()?.split(':');
        let (Some(from), Some(to)) = (words.next(), words.next()) else {
            return Err(self.wrong(WANTED));
        };
        let unit = match words.next() {
            None | Some("ms") => Unit::Milliseconds,
            Some("us") => Unit::Microseconds,
            Some("ns") => Unit::Nanoseconds,
            Some(_) => return Err(self.wrong(WANTED)),
        };
        if words.next().is_some() {
            return Err(self.wrong(WANTED));
        }
        Ok(Operator::Between {
            from: moment(from),
            to: moment(to),
            unit,
        })
    }

    fn filter_state(&self) -> Result<Operator, FormatProblem> {
        const WANTED: &str = "KEY, KEY:PLAIN, KEY:TYPED or KEY:FIELD:NAME";
        let mut words = self.required()?.splitn(3, ':');
        let key = words.next().filter(|key| !key.is_empty()).ok_or_else(|| self.wrong(WANTED))?;
        let (field, lookup) = match (words.next(), words.next()) {
            (None | Some("" | "PLAIN" | "TYPED"), None) => (None, key.to_owned()),
            (Some("FIELD"), Some(field)) if !field.is_empty() => (Some(field.into()), format!("{key}:{field}")),
            _ => return Err(self.wrong(WANTED)),
        };
        Ok(Operator::FilterState {
            key: key.into(),
            field,
            lookup: lookup.into(),
        })
    }

    /// `namespace:key:key`, or as a JSON list, which header formats of old have.
    fn metadata(&self, of: MetadataOf) -> Result<Operator, FormatProblem> {
        let parameter = self.required()?;
        let list = parameter.strip_prefix('[').and_then(|list| list.strip_suffix(']'));
        let words: Vec<Box<str>> = match list {
            Some(list) => list.split(',').map(|word| word.trim().trim_matches('"').into()).collect(),
            None => parameter.split(':').map(Box::from).collect(),
        };
        Ok(metadata(of, &words))
    }

    /// `ORIGIN:namespace:key:key`.
    fn metadata_of(&self) -> Result<Operator, FormatProblem> {
        let (origin, rest) = self.required()?.split_once(':').unwrap_or((self.parameter, ""));
        let of = match origin {
            "DYNAMIC" => MetadataOf::Dynamic,
            "CLUSTER" => MetadataOf::Cluster,
            "ROUTE" => MetadataOf::Route,
            "UPSTREAM_HOST" => MetadataOf::Upstream,
            "LISTENER" => MetadataOf::Listener,
            "VIRTUAL_HOST" => MetadataOf::VirtualHost,
            _ => return Err(self.wrong("DYNAMIC, CLUSTER, ROUTE, UPSTREAM_HOST, LISTENER or VIRTUAL_HOST before a colon")),
        };
        let words: Vec<Box<str>> = rest.split(':').map(Box::from).collect();
        Ok(metadata(of, &words))
    }
}

fn metadata(of: MetadataOf, words: &[Box<str>]) -> Operator {
    let (namespace, path) = words
        .split_first()
        .map_or((Box::from(""), &[][..]), |(first, rest)| (first.clone(), rest));
    Operator::Metadata {
        of,
        namespace,
        path: path.into(),
    }
}

fn field(name: &str) -> Result<Field, FormatProblem> {
    let lower = name.to_ascii_lowercase();
    Ok(match lower.as_str() {
        ":method" => Field::Method,
        ":path" => Field::Path,
        ":authority" | "host" => Field::Authority,
        ":scheme" => Field::Scheme,
        ":status" => Field::Status,
        ":protocol" => Field::Never,
        _ => Field::Name(HeaderName::try_from(lower).map_err(|_| FormatProblem::HeaderName(name.to_owned()))?),
    })
}

/// Points in time of Envoy's `COMMON_DURATION`; what it does not know is never reached, as with Envoy's custom points.
fn moment(name: &str) -> Moment {
    match name {
        "DS_RX_BEG" => Moment::Start,
        "DS_RX_END" => Moment::RequestReceived,
        "US_TX_BEG" => Moment::FirstUpstreamSent,
        "US_TX_END" => Moment::LastUpstreamSent,
        "US_RX_BEG" => Moment::FirstUpstreamReceived,
        "US_RX_END" => Moment::LastUpstreamReceived,
        "DS_TX_BEG" => Moment::FirstSent,
        "DS_TX_END" => Moment::LastSent,
        _ => Moment::Never,
    }
}

#[allow(
    clippy::disallowed_methods,
    reason = "the operator is the setting: a format string names a variable, read once when it is compiled"
)]
fn environment(name: &str) -> Option<Box<str>> {
    std::env::var(name).ok().map(Into::into)
}
