//! HTTP/2 by hand.

use std::{sync::Arc, time::Duration};

use cairn_exchange::SpiffeId;
use cairn_identity::{ClientTerms, Identity, generate::Authority};
use rustls::ClientConfig;
use tokio::{io::AsyncWriteExt as _, net::TcpStream, time::timeout};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::rig::{Rig, id};

const PATIENCE: Duration = Duration::from_secs(10);

/// A client's TLS settings by the name that it goes by.
pub fn tls(authority: &Authority, as_: &SpiffeId) -> ClientConfig {
    let identity = Identity::fixed(authority.issue(as_).unwrap());
    ClientConfig::clone(
        &identity
            .client_config(&ClientTerms::hbone(["spiffe://cluster.local/"]))
            .unwrap(),
    )
}

pub async fn handshake(rig: &Rig, config: ClientConfig) -> std::io::Result<TlsStream<TcpStream>> {
    let name = rustls::pki_types::ServerName::from(rig.address.ip());
    timeout(PATIENCE, TlsConnector::from(Arc::new(config)).connect(name, rig.dial().await))
        .await
        .unwrap()
}

/// An HTTP/2 frame.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const CONTINUATION: u8 = 9;
pub const END_HEADERS: u8 = 4;
pub const END_STREAM: u8 = 1;

/// HPACK: a field whose name is in the static table (or, for 0, given), not to be indexed.
pub fn field(index: u8, name: &str, value: &[u8]) -> Vec<u8> {
    let mut out = vec![index];
    for text in [name.as_bytes(), value].into_iter().skip(usize::from(index != 0)) {
        match text.len() {
            short @ ..127 => out.push(short as u8),
            long => {
                out.push(127);
                let mut rest = long - 127;
                while rest >= 128 {
                    out.push((rest % 128) as u8 | 128);
                    rest /= 128;
                }
                out.push(rest as u8);
            }
        }
        out.extend_from_slice(text);
    }
    out
}

/// A tunnel connection on which HTTP/2 has begun.
pub async fn raw_tunnel(rig: &Rig) -> TlsStream<TcpStream> {
    let mut stream = handshake(rig, tls(&rig.authority, &id("client"))).await.unwrap();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    stream.write_all(&frame(4, 0, 0, &[])).await.unwrap();
    stream
}
