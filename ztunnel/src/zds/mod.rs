//! The pods of this node, as istio-cni tells them over a Unix socket (contract ztunnel §5).
//!
//! We connect, say hello, and are told: first every pod that there is, then that this was all, then what comes and goes. Each message is
//! answered before the next one is sent. A pod that cannot be served now is answered with an error and tried again by ourselves. Losing the
//! connection takes nothing away from pods; the next one says which of them are still there.

mod pods;
mod wire;

use std::{path::PathBuf, time::Duration};

pub use pods::Pods;
use tokio::time::sleep;
pub use wire::{Message, Received, WireError, read_message};

use crate::readiness::Task;

/// Pauses between attempts to connect: the first, and the longest. istio-cni takes five connections a second.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Follows istio-cni for ever; `ready` is done with the first snapshot.
pub async fn run(socket: PathBuf, mut pods: Pods, ready: Task) {
    let mut ready = Some(ready);
    let mut pause = FIRST_PAUSE;
    loop {
        match one_connection(&socket, &mut pods, &mut ready, &mut pause).await {
            Ok(()) => tracing::info!(socket = %socket.display(), "istio-cni has closed the connection; pods go on"),
            Err(error) => tracing::warn!(again_in = ?pause, "istio-cni at {}: {error}", socket.display()),
        }
        let wait = sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
        tokio::pin!(wait);
        loop {
            tokio::select! {
                () = &mut wait => break,
                () = pods.retry() => {}
            }
        }
    }
}

async fn one_connection(
    path: &std::path::Path,
    pods: &mut Pods,
    ready: &mut Option<Task>,
    pause: &mut Duration,
) -> Result<(), WireError> {
    let socket = wire::Socket::connect(path)?;
    socket.send_hello().await?;
    pods.connected();
    loop {
        let received = tokio::select! {
            received = socket.receive() => received?,
            () = pods.retry() => continue,
        };
        let Some(Received { bytes, fds }) = received else {
            return Ok(());
        };
        // A message that nobody can read is answered, like one that nobody can obey: the next one may be good.
        let done = match wire::read_message(&bytes, fds) {
            Ok(Message::Snapshot) => {
                pods.snapshot();
                *ready = None;
                *pause = FIRST_PAUSE;
                Ok(())
            }
            Ok(message) => pods.apply(message).await,
            Err(error) => Err(error.to_string()),
        };
        if let Err(words) = &done {
            tracing::warn!("istio-cni: {words}");
        }
        socket.send_ack(done.err().as_deref()).await?;
    }
}
