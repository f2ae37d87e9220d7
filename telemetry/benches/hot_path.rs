//! What telemetry costs a request: `cargo bench -p cairn-telemetry`.

use std::{hint::black_box, sync::Arc};

use cairn_exchange::format::View;
use cairn_telemetry::{
    IstioStats, Registry,
    access_log::LogFormat,
    istio::{MessageReport, Settings},
    prometheus::Format,
};
use divan::Bencher;
use http::StatusCode;

#[allow(dead_code, clippy::unwrap_used, reason = "shared with the tests, which use all of it")]
#[path = "../src/testing.rs"]
mod testing;

fn main() {
    divan::main();
}

/// Counts a request in its series, from one thread and from two that share the series.
#[divan::bench(threads = [1, 2])]
fn count_a_request(bencher: Bencher<'_, '_>) {
    let stats = IstioStats::new(&Registry::new(), Settings::new("1.31.0"));
    let exchange = testing::exchange();
    bencher.bench(|| stats.report_http(&View::new(black_box(&exchange)), None, MessageReport::default()));
}

/// Renders Istio's default line.
#[divan::bench(args = ["text", "json"])]
fn render_a_line(bencher: Bencher<'_, '_>, format: &str) {
    let format = match format {
        "json" => LogFormat::istio_json(),
        _ => LogFormat::istio_text(),
    };
    let exchange = testing::exchange();
    let mut line = Vec::new();
    bencher.bench_local(|| {
        line.clear();
        format.render(&View::new(black_box(&exchange)), &mut line);
    });
}

/// Renders a scrape of 100 series of HTTP, which are 6,700 lines.
#[divan::bench]
fn scrape(bencher: Bencher<'_, '_>) {
    let registry = Registry::new();
    let stats = IstioStats::new(&registry, Settings::new("1.31.0"));
    let mut exchange = testing::exchange();
    for status in 200..300 {
        exchange.status = StatusCode::from_u16(status).ok();
        stats.report_http(&View::new(&exchange), None, MessageReport::default());
    }
    let registry = Arc::new(registry);
    bencher.bench(|| registry.render(Format::Text));
}
