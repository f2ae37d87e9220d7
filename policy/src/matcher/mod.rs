//! Matchers: does one fact of a request have the shape that configuration asks for?
//!
//! Each matcher is compiled once from configuration and then asked many times; it borrows what it looks at and allocates only
//! where several header fields of one name have to be joined. Semantics are Envoy's (contract xds §4.4), down to what a
//! missing header means to an inverted match, because routes and policies written for Envoy must decide the same here.
//!
//! Regular expressions are those of [`cairn_exchange::regex`]: RE2's dialect, linear time, size-limited ([`Regex`]).

mod header;
mod ip;
mod metadata;
mod path;
mod query;
mod string;

pub use cairn_exchange::regex::{REGEX_SIZE_LIMIT, Regex, RegexError, RegexRewrite};
pub use header::{HeaderMatch, HeaderMatcher, HeaderName, request_header};
pub(crate) use header::{any_value, joined};
pub use ip::CidrSet;
pub use metadata::{MetadataMatcher, ValueMatcher};
pub use path::{PathMatch, PathMatcher};
pub use query::{QueryMatch, QueryMatcher, first_query_value};
pub use string::{StringMatch, StringMatcher};
