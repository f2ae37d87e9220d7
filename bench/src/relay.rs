//! The floor: a relay that copies TCP bytes and knows neither TLS nor HTTP.
//!
//! It runs as a process of its own, on one thread, so that its CPU is counted
//! as a proxy's is. What it costs is what the kernel takes for moving the same
//! requests twice, one connection each, without anything that a mesh adds.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};

/// Relays each connection to `listen` onward to `to`, until the process ends.
pub(crate) async fn run(listen: SocketAddr, to: SocketAddr) -> Result<()> {
    let listener = TcpListener::bind(listen)
        .await
        .with_context(|| format!("the relay cannot listen on {listen}"))?;
    loop {
        let (client, _) = listener.accept().await?;
        tokio::spawn(async move {
            // A connection that fails is seen, and counted, by the client.
            let _ = relay(client, to).await;
        });
    }
}

async fn relay(mut client: TcpStream, to: SocketAddr) -> Result<()> {
    client.set_nodelay(true)?;
    let mut server = TcpStream::connect(to).await?;
    server.set_nodelay(true)?;
    copy_bidirectional(&mut client, &mut server).await?;
    Ok(())
}
