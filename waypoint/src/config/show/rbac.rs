//! Who may do what.

use std::fmt::{self, Write};

use cairn_policy::rbac::{Action, Rbac, Rules};

use super::indent;

/// One RBAC filter: its rules with the names of their policies, which are those that denials are told by.
pub(super) fn write(out: &mut String, filter: &Rbac, depth: usize) -> fmt::Result {
    let Rbac { rules, shadow } = filter;
    if let Some(rules) = rules {
        indent(out, depth)?;
        write_rules(out, rules)?;
    }
    if let Some(shadow) = shadow {
        indent(out, depth)?;
        if &*shadow.prefix == crate::config::rbac::EXTERNAL {
            return writeln!(out, "asks an authorizer about {}", names(&shadow.rules));
        }
        write!(out, "tried out ({}): ", shadow.prefix)?;
        write_rules(out, &shadow.rules)?;
    }
    Ok(())
}

fn names(rules: &Rules) -> String {
    let names: Vec<_> = rules.names().map(|name| &**name).collect();
    if names.is_empty() {
        "nothing".to_owned()
    } else {
        names.join(", ")
    }
}

fn write_rules(out: &mut String, rules: &Rules) -> fmt::Result {
    if rules.is_tree() {
        return writeln!(out, "decides by a tree of matchers, whose verdicts are {}", names(rules));
    }
    let action = match rules.action() {
        Action::Allow if rules.names().next().is_none() => return writeln!(out, "denies everything: ALLOW without policies"),
        Action::Allow => "allows only",
        Action::Deny => "denies",
        Action::Log => "marks for audit",
    };
    writeln!(out, "{action} {}", names(rules))
}
