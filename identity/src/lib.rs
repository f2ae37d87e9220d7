//! Who we are and whom we believe: certificates, trust bundles, and the rustls configurations made of them.
//!
//! An [`Identity`] keeps one workload's [`Credentials`] fresh from a [`Source`]: istiod's certificate authority (a new key and
//! CSR for every certificate), mounted files, a SPIFFE socket, or fixed ones. Whenever credentials, trust bundle or revocation
//! list change, a new *generation* begins, and with it new rustls configurations: [`Identity::server_config`] and
//! [`Identity::client_config`] always answer for the newest one, so a handshake that starts after a rotation uses it and a
//! session of an older trust bundle cannot be resumed. Connections that stand are not touched; whether their peers are believed still,
//! [`ClientTrust`] says.
//!
//! TLS to applications outside of the mesh is another matter: [`Originator`] and the [`Secrets`] that clusters name.
//!
//! Peers of the mesh are known by the URI SAN of their certificate, never by a host name: the chain must lead to the trust bundle, and the
//! SPIFFE ID must start with one of the prefixes that [`ServerTerms`] and [`ClientTerms`] name. When our own certificate has
//! expired there is no configuration at all: the proxy fails closed and [`Identity::status`] says why.
//!
//! Nothing here knows about tunnels, listeners, or where settings come from.

mod backoff;
mod ca;
mod compliance;
mod config;
mod credentials;
mod files;
pub mod generate;
mod identity;
mod origination;
mod peer;
mod read;
mod revocation;
mod rotation;
mod sds;
mod terms;
#[cfg(test)]
mod testing;
mod trust;
mod verify;
mod wall;

pub use ca::{AnswerError, CaSettings, ConnectError, IssueError, SYSTEM_ROOTS, TokenError, Turn, Turns, Urgency};
pub use compliance::{Compliance, NoPolicy, Parameters};
pub use config::{ConfigError, server_name};
pub use credentials::{Credentials, CredentialsError, Pem};
pub use files::FilesError;
pub use identity::{Identity, Options, Source, Status, Unavailable};
pub use origination::{
    NameKind, NameMatcher, NamePattern, OriginatedStream, OriginationError, OriginationTerms, Originator, PatternError, PeerName,
    SYSTEM_ROOTS_SECRET, SecretError, Secrets,
};
pub use peer::{PeerError, peer_id};
pub use read::ReadError;
pub use revocation::RevocationError;
pub use sds::SdsError;
pub use terms::{ClientTerms, ServerTerms, TlsVersion, unsupported_ciphers, unsupported_curves};
pub use trust::{ClientTrust, Distrusted, root_name};
pub use wall::WallClock;
