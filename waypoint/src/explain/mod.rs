//! "Why was I denied?": the story of a decision, from the tunnel to the cluster, over one configuration.
//!
//! * `question` is what is asked;
//! * `story` walks a request's way and notes what each part says of it; `filters` does so for the HTTP filters;
//! * `text` is the story for people; it is JSON as well;
//! * `offline` reads a configuration from files, `record` takes a recorded exchange as the question.
//!
//! What decides is what decides on the wire: the same configuration, the same matchers, filters without IO themselves. Policies are
//! read by the plain interpreter, which the compiled form is proven against. What only a live service can say (rate limits, external
//! authorization, keys that have not been fetched) is not guessed: the story says so and goes on.

mod filters;
pub mod offline;
pub mod question;
pub mod record;
pub mod story;
mod text;

pub use question::{Asked, Question, QuestionError};
pub use story::{Story, Verdict, explain};

#[cfg(test)]
mod tests;
