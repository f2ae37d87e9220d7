//! CEL trees (`google.api.expr.v1alpha1`) into programs: conditions of policies and inputs of matchers carry them ready-made.
//!
//! What Envoy would not compile is malformed. What it would compile and we cannot evaluate as it would is refused, for it decides.

use std::sync::Arc;

use cairn_exchange::cel::{CelError, Constant, DEEPEST, Options, Program, Syntax};
use cairn_proto::{
    envoy::config::core::v3::CelExpressionConfig,
    google::api::expr::v1alpha1::{
        CheckedExpr, Constant as EnvoyConstant, Expr,
        constant::ConstantKind,
        expr::{
            Call, CreateList, CreateStruct, ExprKind, Ident, Select,
            create_struct::{Entry, entry::KeyKind},
        },
    },
};

use super::report::{Malformed, Notes, unneeded};

const NANOS: i128 = 1_000_000_000;

/// Why a tree means nothing.
#[derive(Debug, thiserror::Error)]
enum Bad {
    #[error("a part of it is empty")]
    Empty,
    #[error(transparent)]
    Cel(#[from] CelError),
}

/// What is turned on.
pub(crate) fn options(config: Option<CelExpressionConfig>) -> Options {
    let CelExpressionConfig {
        enable_string_conversion,
        enable_string_concat,
        enable_string_functions,
    } = config.unwrap_or_default();
    Options {
        string_conversion: enable_string_conversion,
        string_concat: enable_string_concat,
        string_functions: enable_string_functions,
    }
}

/// The same of an expression as text.
pub(crate) fn deciding_text(
    field: &str,
    text: &str,
    options: Options,
    notes: &mut Notes,
) -> Result<Option<Arc<Program>>, Malformed> {
    judged(field, Program::parse(text, options).map_err(Bad::Cel), notes)
}

/// An expression that decides; `None` for one that is refused, and listed.
pub(crate) fn deciding(
    field: &str,
    expression: Expr,
    options: Options,
    notes: &mut Notes,
) -> Result<Option<Arc<Program>>, Malformed> {
    let program = syntax(expression, DEEPEST).and_then(|syntax| Ok(Program::compile(syntax, options)?));
    judged(field, program, notes)
}

fn judged(field: &str, program: Result<Program, Bad>, notes: &mut Notes) -> Result<Option<Arc<Program>>, Malformed> {
    match program {
        Ok(program) => {
            let lacks: Vec<_> = program.unrecorded().collect();
            if !lacks.is_empty() {
                notes.refuse(
                    field,
                    format!("`{program}` asks for {}, which is not known here", lacks.join(", ")),
                );
                return Ok(None);
            }
            Ok(Some(program.into()))
        }
        Err(Bad::Cel(error)) if error.is_unsupported() => {
            notes.refuse(field, error.to_string());
            Ok(None)
        }
        Err(error) => Err(notes.malformed(field, format!("the expression means nothing: {error}"))),
    }
}

/// The expression of one that was checked: what the checker found out is not needed to evaluate it.
pub(crate) fn checked(checked: CheckedExpr) -> Expr {
    let CheckedExpr {
        expr,
        reference_map,
        type_map,
        source_info,
        expr_version,
    } = checked;
    unneeded!(reference_map, type_map, source_info, expr_version);
    expr.unwrap_or_default()
}

fn syntax(expression: Expr, levels: usize) -> Result<Syntax, Bad> {
    let levels = levels.checked_sub(1).ok_or(CelError::TooDeep)?;
    let Expr { id: _, expr_kind } = expression;
    let one = |inner: Option<Box<Expr>>| syntax(*inner.ok_or(Bad::Empty)?, levels);
    let each = |all: Vec<Expr>| all.into_iter().map(|one| syntax(one, levels)).collect::<Result<Vec<_>, _>>();
    Ok(match expr_kind.ok_or(Bad::Empty)? {
        ExprKind::ConstExpr(constant) => Syntax::Constant(self::constant(constant)?),
        ExprKind::IdentExpr(Ident { name }) => named(&name),
        ExprKind::SelectExpr(select) => {
            let Select {
                operand,
                field,
                test_only,
            } = *select;
            Syntax::Select {
                of: Box::new(one(operand)?),
                field: field.into(),
                test: test_only,
            }
        }
        ExprKind::CallExpr(call) => {
            let Call { target, function, args } = *call;
            let on = target.map(|target| one(Some(target))).transpose()?.map(Box::new);
            Syntax::Call {
                function: function.into(),
                on,
                arguments: each(args)?,
            }
        }
        ExprKind::ListExpr(CreateList {
            elements,
            optional_indices,
        }) => {
            if !optional_indices.is_empty() {
                return Err(CelError::Unsupported("an optional item".to_owned()).into());
            }
            Syntax::List(each(elements)?)
        }
        ExprKind::StructExpr(CreateStruct { message_name, entries }) => {
            if !message_name.is_empty() {
                return Err(CelError::Unsupported(format!("making a message ({message_name})")).into());
            }
            let entry = |entry: Entry| {
                let Entry {
                    id: _,
                    value,
                    optional_entry,
                    key_kind,
                } = entry;
                if optional_entry {
                    return Err(CelError::Unsupported("an optional entry".to_owned()).into());
                }
                let key = match key_kind.ok_or(Bad::Empty)? {
                    KeyKind::FieldKey(field) => Syntax::Constant(Constant::Text(field.into())),
                    KeyKind::MapKey(key) => syntax(key, levels)?,
                };
                Ok((key, syntax(value.ok_or(Bad::Empty)?, levels)?))
            };
            Syntax::Map(entries.into_iter().map(entry).collect::<Result<_, Bad>>()?)
        }
        ExprKind::ComprehensionExpr(_) => return Err(CelError::Comprehension.into()),
    })
}

/// A checker may write `request.path` as one name.
fn named(name: &str) -> Syntax {
    let mut parts = name.trim_start_matches('.').split('.');
    let first = Syntax::Name(parts.next().unwrap_or_default().into());
    parts.fold(first, |of, field| Syntax::Select {
        of: Box::new(of),
        field: field.into(),
        test: false,
    })
}

fn constant(constant: EnvoyConstant) -> Result<Constant, Bad> {
    let EnvoyConstant { constant_kind } = constant;
    let nanos = |seconds: i64, nanos: i32| i128::from(seconds) * NANOS + i128::from(nanos);
    Ok(match constant_kind.ok_or(Bad::Empty)? {
        ConstantKind::NullValue(_) => Constant::Null,
        ConstantKind::BoolValue(value) => Constant::Bool(value),
        ConstantKind::Int64Value(number) => Constant::Int(number),
        ConstantKind::Uint64Value(number) => Constant::Uint(number),
        ConstantKind::DoubleValue(number) => Constant::Double(number),
        ConstantKind::StringValue(text) => Constant::Text(text.into()),
        ConstantKind::BytesValue(bytes) => Constant::Bytes(bytes.into()),
        ConstantKind::DurationValue(span) => Constant::Duration(nanos(span.seconds, span.nanos)),
        ConstantKind::TimestampValue(moment) => Constant::Time(nanos(moment.seconds, moment.nanos)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expression(kind: ExprKind) -> Expr {
        Expr {
            id: 1,
            expr_kind: Some(kind),
        }
    }

    fn text(text: &str) -> Expr {
        constant(ConstantKind::StringValue(text.into()))
    }

    fn constant(kind: ConstantKind) -> Expr {
        expression(ExprKind::ConstExpr(EnvoyConstant {
            constant_kind: Some(kind),
        }))
    }

    fn name(name: &str) -> Expr {
        expression(ExprKind::IdentExpr(Ident { name: name.into() }))
    }

    fn field(of: Expr, field: &str, test_only: bool) -> Expr {
        expression(ExprKind::SelectExpr(Box::new(Select {
            operand: Some(Box::new(of)),
            field: field.into(),
            test_only,
        })))
    }

    fn call(target: Option<Expr>, function: &str, args: Vec<Expr>) -> Expr {
        expression(ExprKind::CallExpr(Box::new(Call {
            target: target.map(Box::new),
            function: function.into(),
            args,
        })))
    }

    fn path() -> Expr {
        field(name("request"), "path", false)
    }

    fn entry(key: KeyKind, value: Expr) -> Entry {
        Entry {
            id: 2,
            value: Some(value),
            optional_entry: false,
            key_kind: Some(key),
        }
    }

    fn structure(message_name: &str) -> Expr {
        expression(ExprKind::StructExpr(CreateStruct {
            message_name: message_name.into(),
            entries: vec![
                entry(KeyKind::MapKey(constant(ConstantKind::Int64Value(1))), text("a")),
                entry(KeyKind::FieldKey("b".into()), constant(ConstantKind::NullValue(0))),
            ],
        }))
    }

    /// The expression as text, `refused: why`, or `malformed: why`.
    fn outcome(expression: Expr) -> String {
        let mut notes = Notes::of("x");
        match deciding("condition", expression, Options::default(), &mut notes) {
            Ok(Some(program)) => program.to_string(),
            Ok(None) => format!("refused: {}", notes.refusal().unwrap()),
            Err(error) => format!("malformed: {error}"),
        }
    }

    #[test]
    fn trees_of_every_kind_become_programs() {
        let list = expression(ExprKind::ListExpr(CreateList {
            elements: vec![
                constant(ConstantKind::BoolValue(true)),
                constant(ConstantKind::Uint64Value(1)),
                constant(ConstantKind::DoubleValue(0.5)),
                constant(ConstantKind::BytesValue(b"a".to_vec())),
            ],
            optional_indices: Vec::new(),
        }));
        for (tree, written) in [
            (call(None, "_==_", vec![path(), text("/a")]), r#"request.path == "/a""#),
            (
                call(None, "_[_]", vec![field(name("request"), "headers", false), text("x")]),
                r#"request.headers["x"]"#,
            ),
            (
                call(Some(path()), "startsWith", vec![text("/a")]),
                r#"request.path.startsWith("/a")"#,
            ),
            (
                call(
                    None,
                    "_&&_",
                    vec![field(name("request"), "referer", true), call(None, "!_", vec![name("a")])],
                ),
                "has(request.referer) && !a",
            ),
            (name("request.url_path"), "request.url_path"),
            (list, r#"[true, 1u, 0.5, b"a"]"#),
            (structure(""), r#"{1: "a", "b": null}"#),
        ] {
            assert_eq!(outcome(tree), written);
        }
        let both = CheckedExpr {
            expr: Some(path()),
            ..CheckedExpr::default()
        };
        assert_eq!(outcome(checked(both)), "request.path");
    }

    #[test]
    fn what_cannot_be_evaluated_refuses_and_what_envoy_rejects_is_malformed() {
        let mut deep = path();
        for _ in 0..DEEPEST {
            deep = call(None, "-_", vec![deep]);
        }
        let node = field(field(name("xds"), "node", false), "id", false);
        for (tree, told) in [
            (
                node,
                "refused: condition: `xds.node.id` asks for xds.node, which is not known here",
            ),
            (
                structure("a.B"),
                "refused: condition: making a message (a.B) is not supported",
            ),
            (
                call(Some(path()), "matches", vec![path()]),
                "refused: condition: a regular expression that is not written out is not supported",
            ),
            (
                call(None, "string", vec![path()]),
                "malformed: condition: the expression means nothing: string() is off unless cel_config turns it on",
            ),
            (
                call(Some(path()), "matches", vec![text("(")]),
                "malformed: condition: the expression means nothing: the regular expression `(` is malformed",
            ),
            (
                call(None, "nothing", vec![]),
                "malformed: condition: the expression means nothing: there is no function nothing that takes 0 arguments",
            ),
            (
                expression(ExprKind::ComprehensionExpr(Box::default())),
                "malformed: condition: the expression means nothing: walking over lists and maps",
            ),
            (
                Expr::default(),
                "malformed: condition: the expression means nothing: a part of it is empty",
            ),
            (
                call(None, "-_", vec![Expr::default()]),
                "malformed: condition: the expression means nothing: a part of it is empty",
            ),
            (
                deep,
                "malformed: condition: the expression means nothing: the expression is deeper than 100 levels",
            ),
        ] {
            let outcome = outcome(tree);
            assert!(outcome.starts_with(told), "{outcome}\n{told}");
        }
    }
}
