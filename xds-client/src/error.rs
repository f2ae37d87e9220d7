//! Why there is no stream, in words that say what to do.
//!
//! [`SettingsError`] ends the start; [`StreamError`] never ends anything: the client logs it once, waits, and tries again.

use std::{io, path::PathBuf, time::Duration};

use tonic::Code;

use crate::settings::Address;

/// A setting that can never work.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// Not `host:port`.
    #[error("the discovery address {text:?} is not HOST:PORT, as in istiod.istio-system.svc:15012")]
    Address {
        /// What was given.
        text: String,
    },
    /// Something that gRPC does not allow as metadata.
    #[error("{name:?} cannot be sent to istiod as a header: names are letters, digits, '-', '_' and '.', values visible ASCII")]
    Header {
        /// The header's name.
        name: String,
    },
    /// istiod refuses such a node.
    #[error("the node has no id, so istiod would refuse it")]
    NodeWithoutId,
}

/// Why a stream could not be opened, or why it ended.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// A file that the connection needs.
    #[error("{what} {} cannot be used: {reason}", path.display())]
    File {
        /// What the file is for.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// No TCP connection.
    #[error("no connection to {address}: {source}")]
    Connect {
        /// Where istiod should be.
        address: Address,
        /// What the system says.
        source: io::Error,
    },
    /// Nobody answered in time.
    #[error("no connection to {address} within {after:?}")]
    ConnectTimeout {
        /// Where istiod should be.
        address: Address,
        /// The deadline.
        after: Duration,
    },
    /// No TLS.
    #[error("{address} did not prove to be {server_name:?}: {source} (trusted roots: {})", roots.display())]
    Handshake {
        /// Where istiod should be.
        address: Address,
        /// The name that its certificate must carry.
        server_name: String,
        /// The file of the roots.
        roots: PathBuf,
        /// What rustls says.
        source: io::Error,
    },
    /// istiod says no.
    #[error("{address} answered {code:?}: {message}{}", hint(*code))]
    Refused {
        /// Where istiod is.
        address: Address,
        /// The gRPC code.
        code: Code,
        /// istiod's words.
        message: String,
    },
    /// The connection broke.
    #[error("the connection to {address} broke: {reason}")]
    Lost {
        /// Where istiod is.
        address: Address,
        /// The chain of causes.
        reason: String,
    },
    /// The connection is half-open.
    #[error("{address} gave no sign of life for {after:?}")]
    Silent {
        /// Where istiod is.
        address: Address,
        /// How long nothing came.
        after: Duration,
    },
    /// The stream is open and nothing comes.
    #[error("{address} accepted the stream but sent no answer within {after:?}")]
    NoAnswer {
        /// Where istiod is.
        address: Address,
        /// The deadline.
        after: Duration,
    },
    /// istiod does not read what is sent.
    #[error("{address} took no request for {after:?}")]
    RequestsStuck {
        /// Where istiod is.
        address: Address,
        /// The deadline.
        after: Duration,
    },
    /// An answer over the limit.
    #[error("{address} sent an answer larger than {limit} bytes ({message}); the old configuration stays")]
    TooLarge {
        /// Where istiod is.
        address: Address,
        /// The limit.
        limit: usize,
        /// The size, in gRPC's words.
        message: String,
    },
    /// Bytes that are no answer.
    #[error("{address} sent {bytes} bytes that are no discovery answer: {source}")]
    Garbage {
        /// Where istiod is.
        address: Address,
        /// The size of the message.
        bytes: usize,
        /// What the decoder says.
        source: prost::DecodeError,
    },
    /// istiod ended the stream without an error: it restarts, or the stream reached its age.
    #[error("{address} ended the stream")]
    Ended {
        /// Where istiod is.
        address: Address,
    },
}

/// What a person can do about a refusal.
fn hint(code: Code) -> &'static str {
    match code {
        Code::Unauthenticated => {
            " (is the token file projected with audience istio-ca, not expired, and of this pod's service account?)"
        }
        Code::PermissionDenied => " (the node's NAMESPACE and SERVICE_ACCOUNT must be those of the token or client certificate)",
        Code::Unavailable => " (istiod is not ready, or going down)",
        Code::ResourceExhausted => " (istiod limits new streams, or a request was too large for it)",
        Code::Unimplemented => " (no istiod at this address and port?)",
        _ => "",
    }
}
