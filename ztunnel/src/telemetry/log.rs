//! The line of a connection: `key=value` fields with dots in their names, or the same as JSON.
//!
//! Lines go to standard output by a thread of their own, over a bounded queue: a reader that is slow costs lines, never connections.

use std::{
    fmt::{Display, Write as _},
    io::Write as _,
    sync::mpsc::{SyncSender, TrySendError, sync_channel},
    time::Duration,
};

use cairn_exchange::clock;
use cairn_telemetry::{Registry, registry::Counter};
use serde_json::{Map, Value, json};
use time::{OffsetDateTime, macros::format_description};

use super::{Parties, Reporter};

/// Lines that wait for the writer.
const QUEUE: usize = 8_192;

/// How lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// Words, tabs and fields.
    #[default]
    Plain,
    /// One object a line.
    Json,
}

/// Writes lines; clones write to the same place.
#[derive(Clone, Debug)]
pub struct AccessLog {
    lines: SyncSender<String>,
    format: LogFormat,
    also_opened: bool,
    lost: Counter,
}

// === impl AccessLog ===

impl AccessLog {
    /// Lines to standard output; `also_opened` tells of connections when they begin, too.
    pub fn to_stdout(format: LogFormat, also_opened: bool, registry: &Registry) -> std::io::Result<Self> {
        let (lines, queue) = sync_channel::<String>(QUEUE);
        std::thread::Builder::new().name("access-log".to_owned()).spawn(move || {
            let mut out = std::io::stdout().lock();
            while let Ok(line) = queue.recv() {
                // Nobody reads it any more; the connections go on.
                let _ = out.write_all(line.as_bytes());
                while let Ok(line) = queue.try_recv() {
                    let _ = out.write_all(line.as_bytes());
                }
                let _ = out.flush();
            }
        })?;
        Ok(Self {
            lines,
            format,
            also_opened,
            lost: registry.counter(
                "cairn_access_log_lines_lost_total",
                "Lines that were not written, since the writer was too slow",
                &[],
            ),
        })
    }

    pub(super) fn opened(&self, parties: &Parties) {
        if self.also_opened {
            self.write("debug", "connection opened", fields(parties));
        }
    }

    pub(super) fn closed(
        &self,
        parties: &Parties,
        (received, sent): (u64, u64),
        duration: Duration,
        error: Option<&dyn Display>,
    ) {
        let mut fields = fields(parties);
        // From where it is told: what the client sends is sent to the source's proxy and received by the destination's.
        let (out, back) = match parties.reporter {
            Reporter::Source => (received, sent),
            Reporter::Destination => (sent, received),
        };
        fields.push(("bytes_sent", json!(out)));
        fields.push(("bytes_recv", json!(back)));
        fields.push(("duration", json!(format!("{}ms", duration.as_millis()))));
        let level = if error.is_some() { "error" } else { "info" };
        fields.extend(error.map(|error| ("error", json!(error.to_string()))));
        self.write(level, "connection complete", fields);
    }

    /// A connection that ended before its parties were known.
    pub fn refused(
        &self,
        source: std::net::SocketAddr,
        destination: std::net::SocketAddr,
        reporter: Reporter,
        error: &dyn Display,
    ) {
        let fields = vec![
            ("src.addr", json!(source.to_string())),
            ("dst.addr", json!(destination.to_string())),
            ("direction", json!(direction(reporter))),
            ("error", json!(error.to_string())),
        ];
        self.write("warn", "connection failed", fields);
    }

    fn write(&self, level: &str, message: &str, fields: Vec<(&str, Value)>) {
        let time = format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:6]Z");
        let now = OffsetDateTime::from(clock::wall()).format(time).unwrap_or_default();
        let line = match self.format {
            LogFormat::Plain => {
                let mut line = format!("{now}\t{level}\taccess\t{message}\t");
                for (at, (name, value)) in fields.iter().enumerate() {
                    let space = if at == 0 { "" } else { " " };
                    let _ = match value {
                        // Addresses and the like stand without quotes.
                        Value::String(text) if name.ends_with("addr") => write!(line, "{space}{name}={text}"),
                        value => write!(line, "{space}{name}={value}"),
                    };
                }
                line.push('\n');
                line
            }
            LogFormat::Json => {
                let mut object = Map::from_iter([
                    ("level".to_owned(), json!(level)),
                    ("time".to_owned(), json!(now)),
                    ("scope".to_owned(), json!("access")),
                    ("message".to_owned(), json!(message)),
                ]);
                object.extend(fields.into_iter().map(|(name, value)| (name.to_owned(), value)));
                format!("{}\n", Value::Object(object))
            }
        };
        if let Err(TrySendError::Full(_)) = self.lines.try_send(line) {
            self.lost.inc();
        }
    }
}

fn direction(reporter: Reporter) -> &'static str {
    match reporter {
        Reporter::Source => "outbound",
        Reporter::Destination => "inbound",
    }
}

fn fields(parties: &Parties) -> Vec<(&'static str, Value)> {
    let mut fields = vec![("src.addr", json!(parties.source_address.to_string()))];
    let text = |name: &'static str, text: Option<&str>| text.filter(|text| !text.is_empty()).map(|text| (name, json!(text)));
    let claimed = parties.claimed.as_deref();
    let source = parties.source.as_ref().map(|workload| &workload.facts);
    let destination = parties.destination.as_ref().map(|workload| &workload.facts);
    let name = source
        .map(|workload| &*workload.name)
        .or(claimed.map(|claimed| &*claimed.workload));
    let namespace = source
        .map(|workload| &*workload.namespace)
        .or(claimed.map(|claimed| &*claimed.namespace));
    let identity = |id: &Option<cairn_exchange::SpiffeId>| id.as_ref().map(|id| id.as_str().to_owned());
    fields.extend(text("src.workload", name));
    fields.extend(text("src.namespace", namespace));
    fields.extend(text("src.identity", identity(&parties.source_identity).as_deref()));
    fields.push(("dst.addr", json!(parties.destination_address.to_string())));
    fields.extend(text("dst.hbone_addr", parties.hbone.as_deref()));
    fields.extend(text(
        "dst.service",
        parties.service.as_ref().map(|service| &*service.hostname),
    ));
    fields.extend(text("dst.workload", destination.map(|workload| &*workload.name)));
    fields.extend(text("dst.namespace", destination.map(|workload| &*workload.namespace)));
    fields.extend(text("dst.identity", identity(&parties.destination_identity).as_deref()));
    fields.push(("direction", json!(direction(parties.reporter))));
    fields
}
