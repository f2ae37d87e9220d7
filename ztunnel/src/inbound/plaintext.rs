//! Captured connections that are no tunnels: nobody has proved anything, so policies about identities do not match them.

use std::{net::SocketAddr, sync::Arc};

use cairn_exchange::clock;
use tokio::net::{TcpListener, TcpStream};

use super::{accept_all, authorize, service_of, watch_waypoint};
use crate::{
    pod::Pod,
    relay::{self, Side},
    sockets::{self, ports},
    telemetry::{Flag, Parties, Record, Reporter},
};

/// Accepts until the drain.
pub async fn accept(pod: Arc<Pod>, listener: TcpListener) {
    accept_all(pod, listener, |pod, stream, source| async move {
        serve(pod, stream, source).await
    })
    .await;
}

async fn serve(pod: Arc<Pod>, client: TcpStream, source: SocketAddr) {
    let begin = clock::now();
    let target = match sockets::original_destination(&client) {
        Ok(target) => target,
        Err(error) => {
            tracing::debug!(%source, "it is not known where a connection wants to go: {error}");
            return sockets::reset(client);
        }
    };
    let refuse = |error: &dyn std::fmt::Display| pod.node.log.refused(source, target, Reporter::Destination, error);
    // Who was not redirected here has come by our own port, and would come again.
    if ports::ALL.contains(&target.port()) {
        refuse(&"the connection leads to a port of this proxy");
        return sockets::reset(client);
    }
    let Some(workload) = pod.known(target.ip()).await else {
        refuse(&"unknown destination: the mesh does not know this pod");
        return sockets::reset(client);
    };
    if !workload.addresses.is_empty() && !workload.addresses.contains(&target.ip()) && !target.ip().is_loopback() {
        refuse(&format_args!("{} is not an address of this pod", target.ip()));
        return sockets::reset(client);
    }
    let sender = pod.node.mesh.workload_at(source.ip());
    let ticket = pod.open.enter(true, source, None, target.to_string(), target);
    let record = Record::open(
        Parties {
            reporter: Reporter::Destination,
            source_address: source,
            source: sender.clone(),
            claimed: None,
            source_identity: None,
            destination_address: target,
            hbone: None,
            service: service_of(&pod, &workload, target.port()),
            destination: Some(workload.clone()),
            destination_identity: None,
            mutual_tls: false,
        },
        begin,
        &pod.node.metrics,
        &pod.node.log,
    );
    if let Err(denied) = authorize(&pod, &workload, &ticket).await {
        record.close(Some(&denied), Flag::Denied);
        return sockets::reset(client);
    }
    watch_waypoint(&pod, &workload, &ticket, sender.as_deref());
    let server = match pod.sockets.connect(target, Some(source.ip())).await {
        Ok(server) => server,
        Err(error) => {
            record.close(Some(&format_args!("connection failed: {error}")), Flag::Connect);
            return sockets::reset(client);
        }
    };
    tokio::select! {
        ended = relay::run(Side::Tcp(client), Side::Tcp(server), &record) => {
            record.close(ended.as_ref().err().map(|error| error as &dyn std::fmt::Display), Flag::None);
        }
        _denied = ticket.denied() => record.close(Some(&"connection closed due to policy change"), Flag::None),
    }
}
