//! One delta ADS stream: opened, written, read, each within a deadline, each failure named.

use std::{error::Error as _, time::Duration};

use cairn_proto::envoy::service::discovery::v3::DeltaDiscoveryRequest;
use hyper_util::rt::TokioIo;
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tonic::{
    Code, Request, Status, Streaming,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    metadata::{AsciiMetadataKey, AsciiMetadataValue, MetadataMap},
    transport::{Channel, Endpoint, Uri},
};

use crate::{
    SettingsError, StreamError,
    codec::{AdsCodec, Arrival},
    connect::{Connection, LastHeard, Transport},
    file,
    settings::{Settings, Tls},
};

const METHOD: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
/// HTTP/2 windows of the stream and the connection, as pilot-agent sets them.
const WINDOW: u32 = 1024 * 1024;
/// Requests that wait for the connection; the client waits in turn.
const QUEUE: usize = 16;
/// How long istiod may leave the queue full.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);

/// An open stream.
#[derive(Debug)]
pub(crate) struct AdsStream {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<Arrival>,
    heard: LastHeard,
}

/// The call's constant metadata.
pub(crate) fn metadata(settings: &Settings) -> Result<MetadataMap, SettingsError> {
    let mut metadata = MetadataMap::new();
    for (name, value) in &settings.headers {
        let wrong = || SettingsError::Header { name: name.clone() };
        let key = name.to_ascii_lowercase().parse::<AsciiMetadataKey>().map_err(|_| wrong())?;
        metadata.append(key, AsciiMetadataValue::try_from(value.as_str()).map_err(|_| wrong())?);
    }
    Ok(metadata)
}

// === impl AdsStream ===

impl AdsStream {
    /// Connects, presents the token and the first requests, and waits until istiod has accepted the stream.
    pub(crate) async fn open(
        settings: &Settings,
        transport: &Transport,
        mut metadata: MetadataMap,
        first: Vec<DeltaDiscoveryRequest>,
    ) -> Result<Self, StreamError> {
        if let Some(token) = token(settings).await? {
            metadata.insert("authorization", token);
        }
        let connection = transport.connect(settings).await?;
        let heard = connection.last_heard();
        let channel = channel(settings, connection).await?;
        let mut grpc = Grpc::new(channel).max_decoding_message_size(settings.max_message);
        grpc.ready().await.map_err(|error| lost(settings, causes(&error)))?;
        let (requests, queue) = mpsc::channel(QUEUE);
        let stream = tokio_stream::iter(first).chain(ReceiverStream::new(queue));
        let mut request = Request::new(stream);
        *request.metadata_mut() = metadata;
        // gRPC servers in Go send their headers with the first message, so this waits for the first answer.
        let call = grpc.streaming(request, PathAndQuery::from_static(METHOD), AdsCodec);
        let response = timeout(settings.first_answer_timeout, call)
            .await
            .map_err(|_| no_answer(settings))?
            .map_err(|status| failure(settings, &heard, status))?;
        Ok(Self {
            requests,
            responses: response.into_inner(),
            heard,
        })
    }

    /// The next answer, within `deadline` if there is one.
    pub(crate) async fn receive(&mut self, settings: &Settings, deadline: Option<Duration>) -> Result<Arrival, StreamError> {
        let next = match deadline {
            Some(deadline) => timeout(deadline, self.responses.message())
                .await
                .map_err(|_| no_answer(settings))?,
            None => self.responses.message().await,
        };
        next.map_err(|status| failure(settings, &self.heard, status))?
            .ok_or_else(|| StreamError::Ended {
                address: settings.address.clone(),
            })
    }

    /// Queues requests. A stream that has ended takes them silently: the next read says why it ended.
    pub(crate) async fn send(&self, settings: &Settings, requests: Vec<DeltaDiscoveryRequest>) -> Result<(), StreamError> {
        for request in requests {
            let stuck = |_| StreamError::RequestsStuck {
                address: settings.address.clone(),
                after: SEND_TIMEOUT,
            };
            if timeout(SEND_TIMEOUT, self.requests.send(request))
                .await
                .map_err(stuck)?
                .is_err()
            {
                break;
            }
        }
        Ok(())
    }
}

/// The bearer token as it is in the file now.
async fn token(settings: &Settings) -> Result<Option<AsciiMetadataValue>, StreamError> {
    const WHAT: &str = "the token for istiod";
    let (Some(path), Tls::Verified(_)) = (&settings.token_file, &settings.tls) else {
        return Ok(None);
    };
    let content = file::read(WHAT, path).await?;
    let token = content.trim_ascii();
    if token.is_empty() {
        return Err(file::unusable(WHAT, path, "it is empty"));
    }
    let mut value = AsciiMetadataValue::try_from([b"Bearer ", token].concat().as_slice())
        .map_err(|_| file::unusable(WHAT, path, "it holds characters that no token has"))?;
    value.set_sensitive(true);
    Ok(Some(value))
}

async fn channel(settings: &Settings, connection: Connection) -> Result<Channel, StreamError> {
    let scheme = match settings.tls {
        Tls::Plaintext => "http",
        Tls::Verified(_) => "https",
    };
    let uri = |scheme| format!("{scheme}://{}", settings.address).parse::<Uri>();
    let (Ok(target), Ok(origin)) = (uri("http"), uri(scheme)) else {
        return Err(lost(settings, "its address is no URI".to_owned()));
    };
    // The connection is made already, so the endpoint's scheme is without meaning and only `origin` is seen.
    let endpoint = Endpoint::from(target)
        .origin(origin)
        .user_agent(concat!("cairn/", env!("CARGO_PKG_VERSION")))
        .map_err(|error| lost(settings, causes(&error)))?
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .http2_keep_alive_interval(settings.keepalive_interval)
        .keep_alive_timeout(settings.keepalive_timeout)
        .keep_alive_while_idle(true);
    let mut connection = Some(TokioIo::new(connection));
    // A channel would connect again when it breaks; one stream is all that this one serves.
    let once = tower::service_fn(move |_: Uri| {
        let connection = connection
            .take()
            .ok_or_else(|| std::io::Error::other("the connection was used up"));
        async move { connection }
    });
    timeout(settings.connect_timeout, endpoint.connect_with_connector(once))
        .await
        .map_err(|_| StreamError::ConnectTimeout {
            address: settings.address.clone(),
            after: settings.connect_timeout,
        })?
        .map_err(|error| lost(settings, causes(&error)))
}

/// What a gRPC status means: istiod's own words, or a failure on this side that tonic put into one.
fn failure(settings: &Settings, heard: &LastHeard, status: Status) -> StreamError {
    let address = settings.address.clone();
    if status.code() == Code::OutOfRange && status.message().contains("message length too large") {
        return StreamError::TooLarge {
            address,
            limit: settings.max_message,
            message: status.message().to_owned(),
        };
    }
    match (status.source(), heard.silence()) {
        (Some(_), after) if after >= settings.keepalive_timeout => StreamError::Silent { address, after },
        (Some(source), _) => lost(settings, causes(source)),
        (None, _) => StreamError::Refused {
            address,
            code: status.code(),
            message: status.message().to_owned(),
        },
    }
}

fn lost(settings: &Settings, reason: String) -> StreamError {
    StreamError::Lost {
        address: settings.address.clone(),
        reason,
    }
}

/// An error with all that caused it.
fn causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !words.contains(&text) {
            words = format!("{words}: {text}");
        }
        cause = error.source();
    }
    words
}

fn no_answer(settings: &Settings) -> StreamError {
    StreamError::NoAnswer {
        address: settings.address.clone(),
        after: settings.first_answer_timeout,
    }
}
