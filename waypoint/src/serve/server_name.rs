//! The server name that a client asks for in TLS, read from its first bytes and passed on as they came.
//!
//! Only chains whose destination or policies depend on it wait for it (contract xds §3.14, §6). Bytes that are no TLS have no name. A
//! first message of TLS that cannot be read ends the connection: a name that we did not understand is none that a policy has judged.

use std::{future::poll_fn, io, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use cairn_exchange::Connection;
use cairn_hbone::{Connect, TunnelStream};
use rustls::server::Acceptor;
use tokio::time::timeout;

use super::{Inner, tcp, tunnel};
use crate::snapshot::{Chain, Snapshot};

/// First byte of a handshake record.
const HANDSHAKE: u8 = 22;
/// Time for the first message (Envoy's `listener_filters_timeout` as istiod sets it).
const HELLO_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest first message that is waited for: four full records.
const MAX_HELLO: usize = 64 * 1024;

/// What the first bytes say.
#[derive(Debug, PartialEq, Eq)]
enum Hello {
    /// This name, in lower case; `None` when they name none, or are no TLS.
    Name(Option<Arc<str>>),
    /// More is needed.
    More,
    /// TLS that cannot be read.
    Unreadable,
}

/// A port that is declared as TLS or TCP: answers, and passes the bytes when the name is known.
pub async fn declared(inner: Inner, snapshot: Arc<Snapshot>, chain: Arc<Chain>, connect: Connect) {
    let Ok(stream) = connect.accept(tunnel::answer_headers(&inner)) else {
        return;
    };
    passed(Arc::new(inner), snapshot, chain, stream, Bytes::new()).await;
}

/// A connection that has been answered, and has said `held`.
pub async fn passed(inner: Arc<Inner>, snapshot: Arc<Snapshot>, chain: Arc<Chain>, mut stream: TunnelStream, mut held: Bytes) {
    let name = match timeout(HELLO_TIMEOUT, read(&mut stream, &mut held)).await {
        Ok(Ok(name)) => name,
        // A silent client is refused too: it could name later what no policy has judged.
        Ok(Err(_)) | Err(_) => {
            tracing::info!(authority = %inner.connection.authority, client = %inner.connection.remote_address, "no first message of TLS, or none that can be read; the connection is refused");
            stream.reset(h2::Reason::CONNECT_ERROR);
            return;
        }
    };
    let connection = Connection {
        requested_server_name: name,
        ..Connection::clone(&inner.connection)
    };
    let inner = Arc::new(inner.with_connection(Arc::new(connection)));
    tcp::detected(inner, snapshot, chain, stream, held).await;
}

/// Reads until the name is known; what was read is kept.
async fn read(stream: &mut TunnelStream, held: &mut Bytes) -> io::Result<Option<Arc<str>>> {
    loop {
        match look(held) {
            Hello::Name(name) => return Ok(name),
            Hello::Unreadable => return Err(io::ErrorKind::InvalidData.into()),
            Hello::More => {}
        }
        match poll_fn(|cx| stream.poll_data(cx)).await {
            None => return Ok(None),
            Some(next) => {
                let next = next?;
                let mut joined = BytesMut::with_capacity(held.len() + next.len());
                joined.extend_from_slice(held);
                joined.extend_from_slice(&next);
                *held = joined.freeze();
            }
        }
    }
}

fn look(bytes: &[u8]) -> Hello {
    match bytes.first() {
        None => return Hello::More,
        Some(&HANDSHAKE) => {}
        Some(_) => return Hello::Name(None),
    }
    let mut acceptor = Acceptor::default();
    let mut rest = bytes;
    loop {
        match acceptor.read_tls(&mut rest) {
            Ok(0) => break,
            Ok(_) => {}
            Err(_) => return Hello::Unreadable,
        }
        match acceptor.accept() {
            Ok(Some(accepted)) => {
                let hello = accepted.client_hello();
                return Hello::Name(hello.server_name().map(|name| name.to_ascii_lowercase().into()));
            }
            Ok(None) => {}
            Err(_) => return Hello::Unreadable,
        }
    }
    if bytes.len() >= MAX_HELLO {
        Hello::Unreadable
    } else {
        Hello::More
    }
}

#[cfg(test)]
mod tests {
    use rustls::{ClientConfig, ClientConnection, RootCertStore, crypto::aws_lc_rs};

    use super::*;

    fn hello(name: &'static str) -> Vec<u8> {
        let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        let mut connection = ClientConnection::new(Arc::new(config), name.try_into().unwrap()).unwrap();
        let mut bytes = Vec::new();
        connection.write_tls(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn the_name_is_known_with_the_last_byte_of_the_first_message() {
        let whole = hello("Two.example.com");
        for end in 0..whole.len() {
            assert_eq!(look(&whole[..end]), Hello::More, "{end}");
        }
        assert_eq!(look(&whole), Hello::Name(Some("two.example.com".into())));
        let more = [whole, b"early data".to_vec()].concat();
        assert_eq!(look(&more), Hello::Name(Some("two.example.com".into())));
    }

    #[test]
    fn what_names_nobody_has_no_name_and_what_is_broken_is_refused() {
        assert_eq!(look(&hello("10.0.0.1")), Hello::Name(None));
        assert_eq!(look(b"not tls\r\n"), Hello::Name(None));
        let mut broken = hello("two.example.com");
        broken[5] = 2;
        assert_eq!(look(&broken), Hello::Unreadable);
        let endless = [&[HANDSHAKE, 3, 1, 0x40, 0, 1, 1, 0, 0][..], &vec![0; MAX_HELLO]].concat();
        assert_eq!(look(&endless), Hello::Unreadable);
    }
}
