//! An ADS server whose every answer a test writes, and a consumer whose every verdict a test chooses.

use std::pin::Pin;

use cairn_proto::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource,
    aggregated_discovery_service_server::{AggregatedDiscoveryService, AggregatedDiscoveryServiceServer},
};
use prost_types::Any;
use tokio::{
    io::DuplexStream,
    sync::mpsc::{self, UnboundedReceiver, UnboundedSender},
};
use tokio_stream::{Stream, StreamExt as _, wrappers::ReceiverStream, wrappers::UnboundedReceiverStream};
use tonic::{Request, Response, Status, Streaming, metadata::MetadataMap};

use crate::{Consumer, StreamError, Update, Verdict};

pub(super) const CDS: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
pub(super) const EDS: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";
pub(super) const LDS: &str = "type.googleapis.com/envoy.config.listener.v3.Listener";
pub(super) const WDS: &str = "type.googleapis.com/istio.workload.Workload";

/// One stream that the client has opened.
pub(super) struct Opened {
    pub(super) metadata: MetadataMap,
    pub(super) requests: Streaming<DeltaDiscoveryRequest>,
    answers: UnboundedSender<Result<DeltaDiscoveryResponse, Status>>,
}

impl Opened {
    pub(super) fn answer(&self, response: DeltaDiscoveryResponse) {
        self.answers.send(Ok(response)).expect("the client reads");
    }

    pub(super) fn fail(self, status: Status) {
        self.answers.send(Err(status)).expect("the client reads");
    }

    /// The next request; the test's own time limit ends a wait for one that never comes.
    pub(super) async fn request(&mut self) -> DeltaDiscoveryRequest {
        self.requests
            .message()
            .await
            .expect("the stream is whole")
            .expect("the stream is open")
    }
}

/// Hands each stream to the test.
struct Scripted {
    opened: UnboundedSender<Opened>,
    refuse: Option<Status>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Scripted {
    type StreamAggregatedResourcesStream = Answers<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = Answers<DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        _: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented("delta only"))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        if let Some(status) = &self.refuse {
            return Err(status.clone());
        }
        let (answers, stream) = mpsc::unbounded_channel();
        let (metadata, _, requests) = request.into_parts();
        let _ = self.opened.send(Opened {
            metadata,
            requests,
            answers,
        });
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(stream))))
    }
}

/// Serves connections that arrive on the returned sender; each stream arrives on the receiver.
pub(super) fn serve(refuse: Option<Status>) -> (mpsc::Sender<DuplexStream>, UnboundedReceiver<Opened>) {
    let (opened, streams) = mpsc::unbounded_channel();
    let (connect, connections) = mpsc::channel(4);
    let incoming = ReceiverStream::new(connections).map(Ok::<DuplexStream, std::io::Error>);
    let service = AggregatedDiscoveryServiceServer::new(Scripted { opened, refuse });
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming(incoming),
    );
    (connect, streams)
}

/// What the consumer was told.
#[derive(Debug)]
pub(super) enum Told {
    Connected,
    Applied(Update),
    Disconnected(String),
}

/// Decides by a function and passes everything on to the test.
pub(super) struct Recorder<F> {
    pub(super) told: UnboundedSender<Told>,
    pub(super) decide: F,
}

impl<F: FnMut(&Update) -> Verdict + Send + 'static> Consumer for Recorder<F> {
    fn apply(&mut self, update: Update) -> Verdict {
        let verdict = (self.decide)(&update);
        let _ = self.told.send(Told::Applied(update));
        verdict
    }

    fn connected(&mut self) {
        let _ = self.told.send(Told::Connected);
    }

    fn disconnected(&mut self, reason: &StreamError) {
        let _ = self.told.send(Told::Disconnected(reason.to_string()));
    }
}

/// What the client tells the consumer, as the test reads it.
pub(super) struct Heard(pub(super) UnboundedReceiver<Told>);

impl Heard {
    pub(super) async fn next(&mut self) -> Told {
        self.0.recv().await.expect("the client runs")
    }

    pub(super) async fn applied(&mut self) -> Update {
        loop {
            match self.next().await {
                Told::Applied(update) => return update,
                Told::Connected => {}
                Told::Disconnected(reason) => panic!("disconnected: {reason}"),
            }
        }
    }

    pub(super) async fn disconnected(&mut self) -> String {
        loop {
            if let Told::Disconnected(reason) = self.next().await {
                return reason;
            }
        }
    }
}

pub(super) fn response(kind: &str, nonce: &str, names: &[&str], removed: &[&str]) -> DeltaDiscoveryResponse {
    let resource = |name: &&str| Resource {
        name: (*name).into(),
        resource: Some(Any {
            type_url: kind.into(),
            value: vec![1; 10],
        }),
        ..Resource::default()
    };
    DeltaDiscoveryResponse {
        type_url: kind.into(),
        nonce: nonce.into(),
        resources: names.iter().map(resource).collect(),
        removed_resources: removed.iter().map(|name| (*name).into()).collect(),
        ..DeltaDiscoveryResponse::default()
    }
}

pub(super) fn names(update: &Update) -> Vec<&str> {
    update.changed.iter().map(|changed| changed.name.as_str()).collect()
}
