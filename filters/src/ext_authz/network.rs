//! External authorization of connections: an authorizer is asked before the destination is connected, and says yes or no.
//!
//! Envoy asks when the first bytes have come, by when it has connected the destination; here one that may not be reached is not.

use std::{future::Future, sync::Arc};

use cairn_exchange::{Exchange, ResponseFlags};
use cairn_policy::matcher::MetadataMatcher;

use super::{
    DENIED, ERROR,
    answer::{Answer, Decision},
    ask_grpc,
    question::{Question, Told, Wire},
};
use crate::services::{GrpcService, Services};

const NAME: &str = "envoy.filters.network.ext_authz";

/// The filter.
#[derive(Debug)]
pub struct OfConnections {
    /// Who is asked.
    pub service: Arc<GrpcService>,
    /// How the messages are written.
    pub wire: Wire,
    /// Connections pass when there is no answer.
    pub allow_on_failure: bool,
    /// Only those are asked about of which something was noted.
    pub enabled_by: Option<MetadataMatcher>,
    /// What is told of connections.
    pub told: Told,
    /// How many RBAC filters stand before it.
    pub after: usize,
}

/// A connection is not to be passed: why, in Envoy's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused(pub &'static str);

// === impl OfConnections ===

impl OfConnections {
    /// Asks about a connection, if it is one to ask about; what follows is written into its record.
    pub async fn decide(&self, exchange: &mut Exchange, services: &dyn Services) -> Result<(), Refused> {
        let Some(said) = self.ask(exchange, services) else {
            return Ok(());
        };
        let refused = match said.await {
            Ok(Answer { decision, notes }) => {
                for (key, value) in notes {
                    exchange.metadata.set(NAME.into(), key.into(), Arc::new(value));
                }
                match decision {
                    Decision::Allowed(_) => None,
                    Decision::Denied(_) => Some(DENIED),
                    Decision::Failed(_) => Some(ERROR),
                }
            }
            Err(error) => {
                tracing::debug!(%error, authorizer = %self.service.cluster, "an authorizer gave no answer about a connection");
                Some(ERROR)
            }
        };
        match refused {
            Some(why) if why == DENIED || !self.allow_on_failure => {
                exchange.because(ResponseFlags::UNAUTHORIZED_EXTERNAL_SERVICE, why);
                Err(Refused(why))
            }
            _ => Ok(()),
        }
    }

    fn ask(
        &self,
        exchange: &Exchange,
        services: &dyn Services,
    ) -> Option<impl Future<Output = Result<Answer, String>> + Send + use<>> {
        let asks = self.enabled_by.as_ref().is_none_or(|by| by.matches(&exchange.metadata));
        asks.then(|| {
            let question = Question::of_connection(exchange, &self.told);
            ask_grpc(&self.service, self.wire, &question, services)
        })
    }
}
