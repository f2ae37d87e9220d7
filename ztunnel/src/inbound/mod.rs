//! Connections that come to pods: in tunnels ([`hbone`]) or as they are ([`plaintext`]). Policy decides about both.

pub mod hbone;
pub mod plaintext;

use std::{
    net::SocketAddr,
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream},
    time::sleep,
};

use crate::{
    bypass,
    mesh::Workload,
    open::Ticket,
    pod::Pod,
    policies::Denied,
    sockets::{canonical, prepare},
};

/// Pause after an accept that failed for want of file descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Connections that are still accepted after a drain has begun: what the kernel may have kept for us.
const MOST_LATE: u32 = 4096;

/// Accepts connections until the drain, each served by a task that ends with the pod.
pub async fn accept_all<F>(pod: Arc<Pod>, listener: TcpListener, serve: impl Fn(Arc<Pod>, TcpStream, SocketAddr) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let mut stop = pod.listening();
    let mut late = 0;
    loop {
        // What has come before the drain is served: closing the socket would reset it.
        let accepted = tokio::select! {
            biased;
            accepted = listener.accept() => accepted,
            () = stop.drained() => return,
        };
        if stop.is_draining() {
            late += 1;
            if late > MOST_LATE {
                return;
            }
        }
        match accepted {
            Ok((stream, source)) if prepare(&stream).is_ok() => {
                let work = serve(pod.clone(), stream, canonical(source));
                pod.spawn(work);
            }
            // It is gone already.
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Looks at open connections again whenever policies or the pod change.
pub async fn watch(pod: Weak<Pod>) {
    let Some((mut policies, mut pushes)) = pod.upgrade().map(|pod| (pod.node.policies.watch(), pod.node.mesh.watch())) else {
        return;
    };
    let mut seen: Option<(Arc<Workload>, u64)> = None;
    loop {
        let changed = tokio::select! {
            changed = policies.changed() => changed,
            changed = pushes.changed() => changed,
        };
        let Some(pod) = pod.upgrade().filter(|_| changed.is_ok()) else {
            return;
        };
        let Some(workload) = seen
            .as_ref()
            .map_or_else(
                || pod.node.mesh.workload(&pod.uid),
                |(workload, _)| pod.node.mesh.workload(workload.uid()),
            )
            .or_else(|| pod.open.all().iter().find_map(|open| pod.workload_at(open.actual.ip())))
        else {
            continue;
        };
        let version = pod.node.policies.version();
        if seen
            .as_ref()
            .is_some_and(|(before, of)| Arc::ptr_eq(before, &workload) && *of == version)
        {
            continue;
        }
        let ruling = pod.ruling(&workload);
        let closed = pod.open.close_denied(|asked| ruling.1.decide_known(asked));
        if closed > 0 {
            tracing::info!(pod = %pod.uid, closed, "open connections are denied by a changed policy");
        }
        seen = Some((workload, version));
    }
}

/// Whether a connection may come in.
async fn authorize(pod: &Pod, workload: &Arc<Workload>, ticket: &Ticket) -> Result<(), Denied> {
    let ruling = pod.complete_ruling(workload).await;
    let asked = ticket.connection().asked();
    if let Some(would) = ruling.1.try_out(asked) {
        let policy = would.policy.as_deref().unwrap_or_default();
        tracing::info!(source = %asked.source, destination = %asked.destination, allowed = would.allowed, policy, "dry run");
    }
    ruling.1.decide(asked)
}

/// Notes a connection that should have come through a waypoint and did not.
fn watch_waypoint(pod: &Pod, workload: &Workload, ticket: &Ticket, source: Option<&Workload>) {
    let connection = ticket.connection();
    if let Some(around) = bypass::went_around(&pod.node.mesh, workload, connection.actual.port(), source) {
        pod.node.metrics.bypassed.inc();
        let identity = connection
            .peer
            .as_ref()
            .or_else(|| source.and_then(|source| source.identity()));
        pod.node.bypasses.seen(identity, around);
    }
}

/// The one service that a port of the pod stands for.
fn service_of(pod: &Pod, workload: &Workload, port: u16) -> Option<Arc<crate::mesh::Service>> {
    let mut services = workload
        .services
        .iter()
        .filter(|(_, ports)| ports.iter().any(|(_, target)| *target == port));
    let (key, _) = services.next()?;
    // Several would be a guess; the one of the shortest key is at least always the same.
    let key = services.fold(key, |best, (other, _)| if other < best { other } else { best });
    pod.node.mesh.service(key)
}
