//! Access logs: one line for each exchange, as text or JSON, to files and standard output.
//!
//! A chain has an [`AccessLog`], compiled from its configuration: sinks with a filter, and a format and a file or a collector. [`AccessLog::log`]
//! renders into a buffer that the thread keeps and hands the line to the file's queue; it never waits. The files themselves belong
//! to the process ([`LogFiles`]), because several chains write to the same one. Formats are Envoy's (contract runtime §7.5), and
//! so are the rules of JSON: keys in order of the alphabet, a value of one operator alone keeps its type, what is absent is
//! `null` or left out.

mod files;
mod filter;
mod json;
pub mod otlp;
#[cfg(test)]
mod tests;

use std::{cell::RefCell, fmt, sync::Arc};

use cairn_exchange::format::{Absent, Template, View};
use http::HeaderName;

use crate::export::Exporter;

pub use self::{
    files::{FLUSH_BYTES, FLUSH_INTERVAL, LogFile, LogFileError, LogFiles, MAX_FILES, QUEUE_BYTES},
    filter::{Comparison, Filter, Sampled, When},
    json::{JsonFormat, JsonFormatError, JsonValue},
};

/// Istio's text format where none is configured.
pub const DEFAULT_TEXT_FORMAT: &str = concat!(
    "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" ",
    "%RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% ",
    "\"%UPSTREAM_TRANSPORT_FAILURE_REASON%\" %BYTES_RECEIVED% %BYTES_SENT% %DURATION% ",
    "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" ",
    "\"%REQ(X-REQUEST-ID)%\" \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\" %UPSTREAM_CLUSTER_RAW% ",
    "%UPSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% ",
    "%REQUESTED_SERVER_NAME% %ROUTE_NAME%\n",
);

/// Istio's JSON format where none is configured.
pub const DEFAULT_JSON_FORMAT: [(&str, &str); 24] = [
    ("start_time", "%START_TIME%"),
    ("route_name", "%ROUTE_NAME%"),
    ("method", "%REQ(:METHOD)%"),
    ("path", "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%"),
    ("protocol", "%PROTOCOL%"),
    ("response_code", "%RESPONSE_CODE%"),
    ("response_flags", "%RESPONSE_FLAGS%"),
    ("response_code_details", "%RESPONSE_CODE_DETAILS%"),
    ("connection_termination_details", "%CONNECTION_TERMINATION_DETAILS%"),
    ("bytes_received", "%BYTES_RECEIVED%"),
    ("bytes_sent", "%BYTES_SENT%"),
    ("duration", "%DURATION%"),
    ("upstream_service_time", "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%"),
    ("x_forwarded_for", "%REQ(X-FORWARDED-FOR)%"),
    ("user_agent", "%REQ(USER-AGENT)%"),
    ("request_id", "%REQ(X-REQUEST-ID)%"),
    ("authority", "%REQ(:AUTHORITY)%"),
    ("upstream_host", "%UPSTREAM_HOST%"),
    ("upstream_cluster", "%UPSTREAM_CLUSTER_RAW%"),
    ("upstream_local_address", "%UPSTREAM_LOCAL_ADDRESS%"),
    ("downstream_local_address", "%DOWNSTREAM_LOCAL_ADDRESS%"),
    ("downstream_remote_address", "%DOWNSTREAM_REMOTE_ADDRESS%"),
    ("requested_server_name", "%REQUESTED_SERVER_NAME%"),
    ("upstream_transport_failure_reason", "%UPSTREAM_TRANSPORT_FAILURE_REASON%"),
];

/// What a thread keeps of its line buffer between lines.
const KEPT_LINE_BYTES: usize = 16 * 1024;

/// The access logs of a chain.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AccessLog {
    sinks: Box<[Sink]>,
    /// The fields of answers that they read.
    reads: Box<[HeaderName]>,
}

/// One log of a chain.
#[derive(Clone, Debug, PartialEq)]
pub struct Sink {
    /// Which exchanges it is about.
    pub filter: Filter,
    /// What is written, and where.
    pub output: Output,
}

/// What is written of an exchange, and where.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// A line to a file.
    File {
        /// How it looks.
        format: LogFormat,
        /// Where it goes.
        file: LogFile,
    },
    /// A record to a collector.
    Remote(Remote),
}

/// Writes the record of an exchange.
pub type Write = Arc<dyn Fn(&View<'_>) -> Vec<u8> + Send + Sync>;

/// Records for a collector.
#[derive(Clone)]
pub struct Remote {
    /// The way there.
    pub exporter: Exporter,
    /// Writes the record of an exchange.
    pub write: Write,
    /// The fields of the answer that it reads.
    pub reads: Vec<HeaderName>,
}

/// How a line looks.
#[derive(Clone, Debug, PartialEq)]
pub enum LogFormat {
    /// Text, which ends the line itself.
    Text {
        /// The line.
        template: Template,
        /// What stands for absent values.
        absent: Absent,
    },
    /// An object and a line break.
    Json(JsonFormat),
}

// === impl AccessLog ===

impl AccessLog {
    /// Logs to all of `sinks`.
    pub fn new(sinks: impl IntoIterator<Item = Sink>) -> Self {
        let sinks: Box<[Sink]> = sinks.into_iter().collect();
        let mut reads: Vec<HeaderName> = Vec::new();
        for name in sinks.iter().flat_map(Sink::response_headers) {
            if !reads.contains(name) {
                reads.push(name.clone());
            }
        }
        Self {
            sinks,
            reads: reads.into(),
        }
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.sinks.is_empty()
    }

    /// Writes a line to each sink whose filter agrees; never waits.
    pub fn log(&self, view: &View<'_>) {
        thread_local! {
            static LINE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        for sink in self.sinks.iter().filter(|sink| sink.filter.matches(view)) {
            match &sink.output {
                Output::File { format, file } => LINE.with_borrow_mut(|line| {
                    line.clear();
                    format.render(view, line);
                    file.push(line);
                    line.shrink_to(KEPT_LINE_BYTES);
                }),
                Output::Remote(remote) => remote.exporter.push((remote.write)(view)),
            }
        }
    }

    /// The fields of the answer that the formats read, so that the chain can keep them in the record.
    pub fn response_headers(&self) -> impl Iterator<Item = &HeaderName> {
        self.reads.iter()
    }

    /// Operators that are accepted but always absent, as they were written.
    pub fn unrecorded(&self) -> impl Iterator<Item = &str> {
        self.formats().flat_map(LogFormat::unrecorded)
    }

    fn formats(&self) -> impl Iterator<Item = &LogFormat> {
        self.sinks.iter().filter_map(|sink| match &sink.output {
            Output::File { format, .. } => Some(format),
            Output::Remote(_) => None,
        })
    }
}

// === impl Sink ===

impl Sink {
    fn response_headers(&self) -> Vec<&HeaderName> {
        let mut reads = match &self.output {
            Output::File { format, .. } => format.templates().into_iter().flat_map(Template::response_headers).collect(),
            Output::Remote(remote) => remote.reads.iter().collect::<Vec<_>>(),
        };
        reads.extend(self.filter.response_headers());
        reads
    }
}

// === impl Remote ===

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Remote")
            .field("exporter", &self.exporter)
            .finish_non_exhaustive()
    }
}

impl PartialEq for Remote {
    fn eq(&self, other: &Self) -> bool {
        self.exporter == other.exporter && Arc::ptr_eq(&self.write, &other.write)
    }
}

// === impl LogFormat ===

impl LogFormat {
    /// Istio's default text.
    pub fn istio_text() -> Self {
        Self::Text {
            template: Template::parse(DEFAULT_TEXT_FORMAT).expect("a test compiles the default format"),
            absent: Absent::Dash,
        }
    }

    /// Istio's default JSON.
    pub fn istio_json() -> Self {
        let fields = DEFAULT_JSON_FORMAT.map(|(key, format)| (key.to_owned(), JsonValue::Text(format.to_owned())));
        Self::Json(JsonFormat::new(fields.into(), false).expect("a test compiles the default format"))
    }

    /// Operators that are accepted but always absent, as they were written.
    pub fn unrecorded(&self) -> impl Iterator<Item = &str> {
        self.templates().into_iter().flat_map(Template::unrecorded)
    }

    fn templates(&self) -> Vec<&Template> {
        match self {
            Self::Text { template, .. } => vec![template],
            Self::Json(format) => format.templates(),
        }
    }

    /// Appends a line.
    pub fn render(&self, view: &View<'_>, out: &mut Vec<u8>) {
        match self {
            Self::Text { template, absent } => template.render_with(view, *absent, out),
            Self::Json(format) => format.render(view, out),
        }
    }
}
