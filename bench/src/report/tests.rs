use super::*;

const CLOSED: Work = Work::Requests {
    tunnels: 2,
    streams: 8,
    inner: Inner::Http1,
    pace: Pace::Closed,
};
const OPEN: Work = Work::Requests {
    tunnels: 2,
    streams: 8,
    inner: Inner::Http1,
    pace: Pace::Rate(2000),
};

fn sample(micros: f64, p99: u64) -> Sample {
    Sample {
        cost: micros / 1e6,
        p99: Duration::from_micros(p99),
        resident: (micros * MIB) as u64,
        ..Sample::default()
    }
}

fn figures(costs: [(Kind, f64, u64); 3]) -> Vec<(Kind, Vec<Sample>)> {
    costs.map(|(kind, cost, p99)| (kind, vec![sample(cost, p99)])).to_vec()
}

fn full() -> Report {
    let mut report = Report::default();
    report.add_load(
        "h1-2x8",
        CLOSED,
        figures([(Kind::Cairn, 12.6, 300), (Kind::Envoy, 30.0, 600), (Kind::Relay, 11.5, 200)]),
    );
    report.add_load(
        "open-2000",
        OPEN,
        figures([(Kind::Cairn, 70.0, 900), (Kind::Envoy, 100.0, 600), (Kind::Relay, 20.0, 300)]),
    );
    let slope = |resident, allocated| Slope { resident, allocated };
    report.add_memory(
        Idle::Stream,
        vec![
            (Kind::Cairn, slope(5000.0, Some(4000.0))),
            (Kind::Envoy, slope(20_000.0, Some(15_000.0))),
        ],
    );
    report
}

#[test]
fn a_set_is_one_line_with_both_ratios() {
    let text = full().render(false);
    for line in [
        "SET h1-2x8 ratio-to-envoy 0.42 ratio-to-relay 1.10",
        "SET open-2000 ratio-to-envoy 0.70 ratio-to-relay 3.50",
        "SET open-2000-p99 ratio-to-envoy 1.50 ratio-to-relay 3.00",
        "SET memory-after-load ratio-to-envoy 0.70 ratio-to-relay -",
        "SET memory-stream ratio-to-envoy 0.25 ratio-to-relay -",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
}

#[test]
fn targets_are_judged_against_the_promises() {
    let verdicts: Vec<_> = full()
        .targets()
        .into_iter()
        .map(|target| (target.name.clone(), target.is_met()))
        .collect();
    let wanted = [
        ("cpu-geometric-mean", false), // √(0.42 × 0.70) = 0.54
        ("cpu-worst", false),
        ("open-2000-p99", false),
        ("memory-after-load", false),
        ("memory-stream-bytes", true), // the allocator's 4,000, not the resident 5,000
    ]
    .map(|(name, met)| (name.to_owned(), met));
    assert_eq!(verdicts, wanted);
}

#[test]
fn a_missing_proxy_is_a_dash_and_no_target() {
    let mut report = Report::default();
    report.add_load("h1-2x8", CLOSED, vec![(Kind::Envoy, vec![sample(30.0, 1)])]);
    let text = report.render(false);
    assert!(text.contains("SET h1-2x8 ratio-to-envoy - ratio-to-relay -"));
    assert_eq!(report.targets(), []);
}

#[test]
fn a_figure_is_the_median_of_its_runs() {
    let runs = [9.0, 1.0, 2.0].map(|cost| sample(cost, 1));
    assert!((median(&runs, |run| run.cost) - 2e-6).abs() < 1e-12);
    assert!((median(&runs[..2], |run| run.cost) - 5e-6).abs() < 1e-12);
    assert!(median(&[], |run| run.cost).abs() < f64::EPSILON);
}

#[test]
fn a_geometric_mean_is_that_of_ratios() {
    let mean = geometric_mean(&[0.25, 1.0]).unwrap();
    assert!((mean - 0.5).abs() < 1e-12);
    assert_eq!(geometric_mean(&[]), None);
}

#[test]
fn the_worst_waiting_for_the_core_is_noted_once() {
    let waited = |waited| {
        vec![Sample {
            waited,
            ..sample(30.0, 1)
        }]
    };
    let mut report = Report::default();
    report.add_load("h1-2x8", CLOSED, vec![(Kind::Envoy, waited(0.04))]);
    assert!(!report.render(false).contains("NOTE"));
    report.add_load("h1-4x32", CLOSED, vec![(Kind::Envoy, waited(0.2))]);
    report.add_load("open-2000", OPEN, vec![(Kind::Relay, waited(0.1))]);
    let text = report.render(false);
    assert!(text.contains("envoy waited 20 % of the time for its core in h1-4x32"));
    assert_eq!(text.matches("NOTE").count(), 1);
}

#[test]
fn tables_are_aligned_and_may_be_markdown() {
    let table = [vec!["set", "µs"], vec!["h1-2x8", "1"]].map(|row| row.into_iter().map(str::to_owned).collect());
    assert_eq!(render_table(&table, false), "set     µs\nh1-2x8  1\n");
    assert_eq!(
        render_table(&table, true),
        "| set    | µs |\n|--------|----|\n| h1-2x8 | 1  |\n"
    );
}
