//! The head of the PROXY protocol, version 2, with the peer's identity in a field of its own (`0xd0`).

use std::{io, net::SocketAddr};

use cairn_exchange::SpiffeId;
use tokio::{io::AsyncWriteExt as _, net::TcpStream};

const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// The field that carries the identity.
const IDENTITY: u8 = 0xd0;

/// Writes the head.
pub async fn write(
    stream: &mut TcpStream,
    source: SocketAddr,
    destination: SocketAddr,
    peer: Option<&SpiffeId>,
) -> io::Result<()> {
    stream.write_all(&head(source, destination, peer)?).await
}

fn head(source: SocketAddr, destination: SocketAddr, peer: Option<&SpiffeId>) -> io::Result<Vec<u8>> {
    let mut body = Vec::with_capacity(128);
    let family = match (source, destination) {
        (SocketAddr::V4(source), SocketAddr::V4(destination)) => {
            body.extend(source.ip().octets());
            body.extend(destination.ip().octets());
            0x11
        }
        (SocketAddr::V6(source), SocketAddr::V6(destination)) => {
            body.extend(source.ip().octets());
            body.extend(destination.ip().octets());
            0x21
        }
        _ => return Err(io::Error::other("the two ends have addresses of different families")),
    };
    body.extend(source.port().to_be_bytes());
    body.extend(destination.port().to_be_bytes());
    if let Some(peer) = peer {
        let text = peer.as_str().as_bytes();
        body.push(IDENTITY);
        body.extend(u16::try_from(text.len()).map_err(io::Error::other)?.to_be_bytes());
        body.extend(text);
    }
    let mut head = SIGNATURE.to_vec();
    head.extend([0x21, family]);
    head.extend(u16::try_from(body.len()).map_err(io::Error::other)?.to_be_bytes());
    head.extend(body);
    Ok(head)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_head_carries_both_ends_and_the_identity() {
        let peer: SpiffeId = "spiffe://td/ns/a/sa/b".parse().unwrap();
        let head = head("10.1.0.5:258".parse().unwrap(), "10.1.0.1:80".parse().unwrap(), Some(&peer)).unwrap();
        assert_eq!(&head[..16], b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x24");
        assert_eq!(&head[16..28], [10, 1, 0, 5, 10, 1, 0, 1, 1, 2, 0, 80]);
        assert_eq!(&head[28..], b"\xd0\x00\x15spiffe://td/ns/a/sa/b");
    }
}
