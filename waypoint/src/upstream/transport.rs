//! What is put between us and the endpoint's application, inside the tunnel or on the plain connection (contract xds §5.9): nothing, TLS,
//! or a PROXY protocol header, which may itself have TLS behind it.
//!
//! Some of it is of the request and not of the cluster: the server name that follows the request's host, and the addresses that a PROXY
//! header tells. Together they are a connection's [`Purpose`]; a connection is used only for requests of the same one.

use std::{net::SocketAddr, sync::Arc};

use cairn_identity::{OriginationTerms, Originator, PeerName};
use tokio::io::AsyncWriteExt as _;

use super::{ConnectError, UpstreamIo, proxy_protocol::ProxyHeader};

/// What is put between us and the endpoint's application.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum TransportTerms {
    /// Nothing.
    Raw,
    /// TLS.
    Tls(Arc<OriginationTerms>),
    /// A PROXY protocol header, and then this.
    Proxied(ProxyHeader, Box<TransportTerms>),
    /// Something that we cannot do; requests to the cluster are refused with these words.
    Unsupported(Arc<str>),
}

/// What of a request's host goes into TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct NamesByHost {
    /// It is the server name (`auto_sni`).
    pub server_name: bool,
    /// It has to be in the certificate (`auto_san_validation`).
    pub verify: bool,
}

/// What a connection is made for, beyond what its cluster says of all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Purpose {
    /// Whom TLS is with.
    pub peer: PeerName,
    /// What a PROXY header tells: where the client is, and where it wanted to go.
    pub told: Option<(SocketAddr, SocketAddr)>,
}

// === impl Purpose ===

impl Purpose {
    /// The purpose of a connection for a request with this authority, or for bytes when there is none. Most clusters know no purposes.
    pub fn of(
        mut terms: &TransportTerms,
        names: NamesByHost,
        authority: Option<&[u8]>,
        client: SocketAddr,
        destination: Option<SocketAddr>,
    ) -> Option<Arc<Self>> {
        let mut purpose = Self::default();
        loop {
            match terms {
                TransportTerms::Proxied(_, inner) => {
                    purpose.told = destination.map(|destination| (client, destination));
                    terms = inner;
                }
                TransportTerms::Tls(_) => {
                    let NamesByHost { server_name, verify } = names;
                    let host = authority.filter(|_| server_name || verify).and_then(host);
                    if let Some((host, is_address)) = host {
                        let host: Arc<str> = host.into();
                        purpose.peer = PeerName {
                            server_name: (server_name && !is_address).then(|| host.clone()),
                            verify: verify.then_some(host),
                        };
                    }
                    break;
                }
                TransportTerms::Raw | TransportTerms::Unsupported(_) => break,
            }
        }
        (purpose != Self::default()).then(|| Arc::new(purpose))
    }
}

/// The host of an authority, without port, and whether it is an address.
fn host(authority: &[u8]) -> Option<(&str, bool)> {
    let (host, _) = host_and_port(authority)?;
    Some((host, host.parse::<std::net::IpAddr>().is_ok()))
}

/// The host of an authority, and its port where it has one.
pub(crate) fn host_and_port(authority: &[u8]) -> Option<(&str, Option<u16>)> {
    let authority = std::str::from_utf8(authority).ok()?;
    if let Some(rest) = authority.strip_prefix('[') {
        let (host, port) = rest.split_once(']')?;
        return Some((host, port.strip_prefix(':').and_then(|port| port.parse().ok())));
    }
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) => (host, Some(port.parse().ok()?)),
        None => (authority, None),
    };
    (!host.is_empty()).then_some((host, port))
}

/// Puts onto a byte stream what the terms say. `speak` is the application protocol that is going to be spoken.
pub(super) async fn put_on(
    originator: &Originator,
    mut io: UpstreamIo,
    mut terms: &TransportTerms,
    purpose: Option<&Purpose>,
    speak: Option<&'static [u8]>,
    address: Option<SocketAddr>,
) -> Result<UpstreamIo, ConnectError> {
    loop {
        match terms {
            TransportTerms::Raw => return Ok(io),
            TransportTerms::Unsupported(reason) => return Err(ConnectError::Unsupported(reason.clone())),
            TransportTerms::Proxied(header, inner) => {
                let header = header.bytes(purpose.and_then(|purpose| purpose.told));
                let sent = async {
                    io.write_all(&header).await?;
                    io.flush().await
                };
                sent.await.map_err(|error| ConnectError::Failed(error.to_string()))?;
                terms = inner;
            }
            TransportTerms::Tls(terms) => {
                let nobody = PeerName::default();
                let peer = purpose.map_or(&nobody, |purpose| &purpose.peer);
                let shaken = originator
                    .connect(io, terms, peer, speak, address.map(|address| address.ip()))
                    .await;
                return match shaken {
                    Ok(stream) => Ok(UpstreamIo::Tls(Box::new(stream))),
                    Err(error) => {
                        tracing::debug!(%error, "TLS to an application failed");
                        Err(ConnectError::Failed(error.to_string()))
                    }
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_named_without_its_port() {
        for (authority, expected) in [
            ("web.example.com", Some(("web.example.com", false))),
            ("web.example.com:8443", Some(("web.example.com", false))),
            ("10.0.0.1:80", Some(("10.0.0.1", true))),
            ("10.0.0.1", Some(("10.0.0.1", true))),
            ("[2001:db8::1]:80", Some(("2001:db8::1", true))),
            ("[2001:db8::1", None),
            ("", None),
            (":80", None),
        ] {
            assert_eq!(host(authority.as_bytes()), expected, "{authority}");
        }
    }
}
