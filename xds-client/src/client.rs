//! The loop of a proxy's life: open a stream, hand out answers, give verdicts, lose the stream, wait, again.

use std::{any::Any, convert::Infallible, future::Future, sync::Arc, time::Duration};

use cairn_exchange::clock;
use parking_lot::Mutex;
use tokio::time::sleep;
use tonic::metadata::MetadataMap;
use tracing::{debug, error, info, warn};

use crate::{
    SettingsError, Status, StreamError,
    backoff::Waits,
    codec::Arrival,
    connect::Transport,
    consumer::{Consumer, Subscription, Update, Verdict},
    settings::Settings,
    state::{Received, State},
    stream::{self, AdsStream},
};

/// A delta ADS client for one consumer.
#[derive(Debug)]
pub struct Client<C> {
    settings: Settings,
    metadata: MetadataMap,
    transport: Transport,
    state: State,
    status: Status,
    /// Locked for one call at a time, by the thread that makes it, never across an await.
    consumer: Arc<Mutex<C>>,
}

// === impl Client ===

impl<C: Consumer> Client<C> {
    /// A client that will ask for `subscriptions` in their order, which should be the one of contract xds §1.8. Types that only
    /// verdicts will ask for keep their place with [`Subscription::by_name`].
    pub fn new(settings: Settings, subscriptions: Vec<Subscription>, consumer: C) -> Result<Self, SettingsError> {
        if settings.node.id.is_empty() {
            return Err(SettingsError::NodeWithoutId);
        }
        let metadata = stream::metadata(&settings)?;
        let state = State::new(settings.node.clone(), subscriptions);
        let (transport, status, consumer) = (Transport::Network, Status::default(), Arc::new(Mutex::new(consumer)));
        Ok(Self {
            settings,
            metadata,
            transport,
            state,
            status,
            consumer,
        })
    }

    /// How the client fares; valid as long as anybody keeps it.
    pub fn status(&self) -> Status {
        self.status.clone()
    }

    /// Runs until `shutdown` is done. An update that is being applied then is applied to its end on its blocking thread.
    pub async fn run(mut self, shutdown: impl Future<Output = ()>) {
        tokio::select! {
            () = shutdown => {}
            never = self.forever() => match never {},
        }
    }

    async fn forever(&mut self) -> Infallible {
        let mut waits = Waits::new(self.settings.backoff);
        loop {
            let (reason, lived) = self.one_stream().await;
            self.status.ended(&reason);
            waits.stream_ended(lived);
            let wait = waits.next(fastrand::f64());
            match reason {
                StreamError::Ended { .. } => info!(again_in = ?wait, "{reason}"),
                _ => warn!(again_in = ?wait, "no configuration stream: {reason}"),
            }
            sleep(wait).await;
        }
    }

    /// One stream from its opening to its end: why it ended, and how long it lived.
    async fn one_stream(&mut self) -> (StreamError, Duration) {
        let first = self.state.open();
        let mut stream = match AdsStream::open(&self.settings, &self.transport, self.metadata.clone(), first).await {
            Ok(stream) => stream,
            Err(reason) => return (reason, Duration::ZERO),
        };
        let opened = clock::now();
        info!(address = %self.settings.address, "configuration stream is open");
        self.status.opened();
        self.consumer.lock().connected();
        let mut deadline = Some(self.settings.first_answer_timeout);
        let reason = loop {
            let arrival = match stream.receive(&self.settings, deadline.take()).await {
                Ok(arrival) => arrival,
                Err(reason) => break reason,
            };
            if let Err(reason) = self.answer(&stream, arrival).await {
                break reason;
            }
        };
        self.consumer.lock().disconnected(&reason);
        (reason, clock::now().duration_since(opened))
    }

    /// Takes one answer to its ACK or NACK.
    async fn answer(&mut self, stream: &AdsStream, arrival: Arrival) -> Result<(), StreamError> {
        let Arrival {
            response,
            received,
            bytes,
        } = arrival;
        let address = || self.settings.address.clone();
        let response = response.map_err(|source| StreamError::Garbage {
            address: address(),
            bytes,
            source,
        })?;
        let (type_url, nonce, version) = (
            response.type_url.as_str().into(),
            response.nonce.clone(),
            response.system_version_info.clone(),
        );
        let requests = match self.state.receive(response, received, bytes) {
            Received::Unrequested => {
                self.status.unrequested();
                warn!(%type_url, "istiod sent a type that was not asked for; ignored");
                return Ok(());
            }
            Received::Malformed { words, request } => {
                warn!(%type_url, "answer refused: {words}");
                self.status.received(&type_url, &nonce, &version, bytes);
                self.status.settled(&type_url, Some(&words));
                vec![*request]
            }
            Received::Update(update, receipt) => {
                self.status.received(&type_url, &nonce, &version, bytes);
                let (changed, removed) = (update.changed.len(), update.removed.len());
                let verdict = self.apply(update).await;
                self.status.settled(&type_url, verdict.error.as_deref());
                match &verdict.error {
                    None => debug!(r#type = type_url.short(), changed, removed, bytes, "answer accepted"),
                    Some(words) => warn!(r#type = type_url.short(), changed, removed, bytes, "answer refused: {words}"),
                }
                self.state.settle(receipt, verdict)
            }
        };
        stream.send(&self.settings, requests).await
    }

    /// Asks the consumer on a blocking thread, so that the connection goes on answering pings meanwhile.
    async fn apply(&self, update: Update) -> Verdict {
        let consumer = Arc::clone(&self.consumer);
        let applied = tokio::task::spawn_blocking(move || consumer.lock().apply(update)).await;
        applied.unwrap_or_else(|failed| {
            let words = failed
                .try_into_panic()
                .map_or_else(|_| "it was cancelled".to_owned(), |panic| panic_words(panic.as_ref()));
            error!("applying an answer failed: {words}");
            Verdict::refused(format!("internal error while the answer was applied: {words}"))
        })
    }
}

fn panic_words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "panic without words".to_owned())
}

#[cfg(test)]
mod tests;
