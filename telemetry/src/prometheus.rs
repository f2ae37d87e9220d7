//! The text formats of a scrape: Prometheus text 0.0.4 and OpenMetrics 1.0.
//!
//! Names and numbers are printed as Envoy prints them, so that a series keeps its identity when the proxy is exchanged: bounds of
//! buckets as `le="1"`, never `le="1.0"` (in OpenMetrics too, where `istio_requests_total` must be the same series). What is not a
//! counter named `…_total` is `unknown` to OpenMetrics.

use std::io::Write;

/// A text format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// Prometheus text, version 0.0.4.
    #[default]
    Text,
    /// OpenMetrics, version 1.0.0.
    OpenMetrics,
}

/// What kind of metric a family is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Observations in buckets.
    Histogram,
}

/// Writes the families of one scrape.
#[derive(Debug)]
pub struct Writer {
    out: Vec<u8>,
    format: Format,
    name: String,
}

const INFALLIBLE: &str = "writing to a vector does not fail";

// === impl Format ===

impl Format {
    /// What a scraper that sent this `accept` header gets; OpenMetrics only where it is asked for at least as much as plain text.
    pub fn negotiate(accept: Option<&str>) -> Self {
        let mut open_metrics = 0.0_f32;
        let mut text = 0.0_f32;
        for entry in accept.unwrap_or_default().split(',') {
            let mut parts = entry.split(';').map(str::trim);
            let media = parts.next().unwrap_or_default();
            let mut quality = 1.0;
            let mut version = "";
            for parameter in parts {
                match parameter.split_once('=') {
                    Some(("q", value)) => quality = value.parse().unwrap_or(0.0),
                    Some(("version", value)) => version = value.trim_matches('"'),
                    _ => {}
                }
            }
            match media {
                "application/openmetrics-text" if matches!(version, "" | "0.0.1" | "1.0.0") => {
                    open_metrics = open_metrics.max(quality);
                }
                "text/plain" => text = text.max(quality),
                _ => {}
            }
        }
        if open_metrics > 0.0 && open_metrics >= text {
            Self::OpenMetrics
        } else {
            Self::Text
        }
    }

    /// The `content-type` of the answer.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

// === impl Kind ===

impl Kind {
    fn word(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

// === impl Writer ===

impl Writer {
    /// An empty scrape.
    pub fn new(format: Format) -> Self {
        Self {
            out: Vec::new(),
            format,
            name: String::new(),
        }
    }

    /// Begins a family; samples that follow are its own. Names of counters end in `_total`.
    pub fn family(&mut self, name: &str, kind: Kind, help: &str) {
        self.name.clear();
        self.name.push_str(name);
        let (family, word) = match (self.format, kind, name.strip_suffix("_total")) {
            (Format::OpenMetrics, Kind::Counter, Some(family)) => (family, kind.word()),
            (Format::OpenMetrics, Kind::Counter, None) => (name, "unknown"),
            _ => (name, kind.word()),
        };
        if !help.is_empty() {
            write!(self.out, "# HELP {family} ").expect(INFALLIBLE);
            // OpenMetrics escapes quotes here as well; text would take the backslash for one.
            escape(help, self.format == Format::OpenMetrics, &mut self.out);
            self.out.push(b'\n');
        }
        writeln!(self.out, "# TYPE {family} {word}").expect(INFALLIBLE);
    }

    /// A sample of a counter or of a gauge that counts; `labels` as [`labels`] renders them.
    pub fn count(&mut self, labels: &str, value: u64) {
        self.line("", labels, None);
        self.out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
        self.out.push(b'\n');
    }

    /// A sample of a gauge.
    pub fn value(&mut self, labels: &str, value: f64) {
        self.line("", labels, None);
        self.number(value);
        self.out.push(b'\n');
    }

    /// A histogram: bounds, and the observations in each bucket alone, one more than there are bounds.
    pub fn histogram(&mut self, labels: &str, bounds: &[f64], buckets: &[u64], sum: u64) {
        let mut total = 0;
        for (at, count) in buckets.iter().enumerate() {
            total += count;
            self.line("_bucket", labels, Some(bounds.get(at).copied()));
            writeln!(self.out, "{total}").expect(INFALLIBLE);
        }
        self.line("_sum", labels, None);
        writeln!(self.out, "{sum}").expect(INFALLIBLE);
        self.line("_count", labels, None);
        writeln!(self.out, "{total}").expect(INFALLIBLE);
    }

    /// The whole text.
    pub fn finish(mut self) -> Vec<u8> {
        if self.format == Format::OpenMetrics {
            self.out.extend_from_slice(b"# EOF\n");
        }
        self.out
    }

    /// Name and labels up to the value; `bound`: of a bucket, the last of which has none.
    fn line(&mut self, suffix: &str, labels: &str, bound: Option<Option<f64>>) {
        self.out.extend_from_slice(self.name.as_bytes());
        self.out.extend_from_slice(suffix.as_bytes());
        if !labels.is_empty() || bound.is_some() {
            self.out.push(b'{');
            self.out.extend_from_slice(labels.as_bytes());
            if let Some(bound) = bound {
                if !labels.is_empty() {
                    self.out.push(b',');
                }
                self.out.extend_from_slice(b"le=\"");
                self.number(bound.unwrap_or(f64::INFINITY));
                self.out.push(b'"');
            }
            self.out.push(b'}');
        }
        self.out.push(b' ');
    }

    fn number(&mut self, value: f64) {
        if value.is_infinite() {
            self.out.extend_from_slice(if value > 0.0 { b"+Inf" } else { b"-Inf" });
        } else {
            write!(self.out, "{value}").expect(INFALLIBLE);
        }
    }
}

/// Renders labels as they stand between the braces: `a="x",b="y"`, with quotes, backslashes and line breaks escaped.
pub fn labels<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Box<str> {
    let mut out = Vec::new();
    for (name, value) in pairs {
        if !out.is_empty() {
            out.push(b',');
        }
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(b"=\"");
        escape(value, true, &mut out);
        out.push(b'"');
    }
    String::from_utf8(out).expect("it is made of text and ASCII").into()
}

fn escape(text: &str, quotes: bool, out: &mut Vec<u8>) {
    for byte in text.bytes() {
        match byte {
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'"' if quotes => out.extend_from_slice(b"\\\""),
            _ => out.push(byte),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small(format: Format) -> String {
        let mut writer = Writer::new(format);
        writer.family("a_requests_total", Kind::Counter, "Requests, by \"way\".");
        writer.count(&labels([("way", "in"), ("odd", "q\"b\\n\n")]), 3);
        writer.family("b_odd_counter", Kind::Counter, "");
        writer.count("", 1);
        writer.family("c_ratio", Kind::Gauge, "");
        writer.value("", 0.25);
        writer.value(&labels([("k", "v")]), 7.0);
        writer.family("d_bytes", Kind::Histogram, "");
        writer.histogram("x=\"y\"", &[0.5, 1.0, 3_600_000.0], &[1, 2, 0, 4], 99);
        String::from_utf8(writer.finish()).unwrap()
    }

    #[test]
    fn text_is_printed_as_envoy_prints_it() {
        assert_eq!(
            small(Format::Text),
            r#"# HELP a_requests_total Requests, by "way".
# TYPE a_requests_total counter
a_requests_total{way="in",odd="q\"b\\n\n"} 3
# TYPE b_odd_counter counter
b_odd_counter 1
# TYPE c_ratio gauge
c_ratio 0.25
c_ratio{k="v"} 7
# TYPE d_bytes histogram
d_bytes_bucket{x="y",le="0.5"} 1
d_bytes_bucket{x="y",le="1"} 3
d_bytes_bucket{x="y",le="3600000"} 3
d_bytes_bucket{x="y",le="+Inf"} 7
d_bytes_sum{x="y"} 99
d_bytes_count{x="y"} 7
"#
        );
    }

    #[test]
    fn openmetrics_names_families_without_total_and_ends() {
        let text = small(Format::OpenMetrics);
        assert!(text.starts_with("# HELP a_requests Requests, by \\\"way\\\".\n# TYPE a_requests counter\na_requests_total{"));
        assert!(text.contains("# TYPE b_odd_counter unknown\n"));
        assert!(text.contains("le=\"1\"}"), "the same series in both formats");
        assert!(text.ends_with("d_bytes_count{x=\"y\"} 7\n# EOF\n"));
    }

    #[test]
    fn the_format_is_what_the_scraper_prefers() {
        let prometheus = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,\
                          application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
        for (accept, format) in [
            (None, Format::Text),
            (Some("*/*"), Format::Text),
            (Some(prometheus), Format::OpenMetrics),
            (Some("application/openmetrics-text"), Format::OpenMetrics),
            (Some("application/openmetrics-text; version=2.0.0"), Format::Text),
            (Some("text/plain;q=0.9, application/openmetrics-text;q=0.1"), Format::Text),
            (Some("application/openmetrics-text;q=0"), Format::Text),
            (Some("application/openmetrics-text;q=x"), Format::Text),
        ] {
            assert_eq!(Format::negotiate(accept), format, "{accept:?}");
        }
    }
}
