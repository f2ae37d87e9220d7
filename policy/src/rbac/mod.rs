//! Role-based access control: may this client do this? (contract xds §3.4, §6; `envoy.config.rbac.v3`)
//!
//! An [`Rbac`] filter holds [`Rules`]: an action and policies by name, each a list of permissions (what is done) and a list of
//! principals (by whom), both trees of [`Condition`]s over the [`Facts`] of a request or connection. A policy matches when one
//! permission and one principal hold; the first that does, in the order of their names, is the one that is told.
//!
//! ALLOW lets pass what a policy matches and nothing else, so that ALLOW without policies denies everything; DENY stops what one
//! matches; LOG only marks it. Shadow rules are decided beside the others and never stop anything.
//!
//! Rules are compiled when they are made: alternatives that ask one fact for one of several shapes become one lookup, and of many
//! policies only those are asked that an index finds. What holds does not depend on it, which the tests prove against an interpreter
//! of the plain trees; that interpreter tells people why ([`Rules::explain`]).

mod compile;
mod condition;
mod explain;
mod facts;
mod filter;
mod index;
mod interpret;
mod rules;
mod shapes;
mod template;
#[cfg(test)]
mod tests;

pub use condition::{Address, Condition, Policy, Text};
pub use explain::{NEAREST, PolicyName, PolicyStory, RulesStory};
pub use facts::Facts;
pub use filter::{Denied, Filters, Outcome, Rbac, Shadow, details};
pub use rules::{Action, Decision, Rules};
pub use template::{InvalidTemplate, Reason as InvalidTemplateReason, UriTemplate};
