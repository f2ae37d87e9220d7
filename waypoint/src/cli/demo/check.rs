//! `cairn demo --check`: asks for everything that the demonstration shows, and says whether each answer is right.
//!
//! What is asked and what must come is a table. An answer is right when the client saw what it should, and the waypoint's own record
//! of the request names the route that should have decided.

mod cases;

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use Expect::{Echoed, Header, Refused, Route, SeenHeader, SeenPath, SeenProtocol, Share, Status, Version};
use cairn_exchange::clock;
use cases::{Ask, CASES, Case, Expect};
use tokio::{sync::mpsc, time::timeout};

use super::{
    client::{self, Seen},
    mesh::Mesh,
    told::{Answer, Paint, Told, millis},
};

/// Time for one request, answer and record.
const LIMIT: Duration = Duration::from_secs(10);

/// How a case went.
pub struct Outcome {
    /// The case.
    shows: &'static str,
    /// What was not right.
    wrong: Vec<String>,
    /// What the waypoint told of its last request.
    told: Option<Told>,
    /// How often each version answered, where it was asked many times.
    shares: Option<String>,
}

/// What came of asking.
#[derive(Default)]
struct Came {
    /// What the client saw of the last answer; `None` when there was none.
    seen: Option<Seen>,
    /// What the waypoint told of it.
    told: Option<Told>,
    /// How often each version answered.
    versions: BTreeMap<String, u32>,
    /// Answers in all.
    times: u32,
}

/// Asks everything, one after another.
pub async fn run(mesh: &mut Mesh) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    for case in CASES {
        outcomes.push(case.run(mesh).await);
    }
    outcomes
}

/// Whether all went well.
pub fn all_right(outcomes: &[Outcome]) -> bool {
    outcomes.iter().all(|outcome| outcome.wrong.is_empty())
}

/// The table that people read.
pub fn table(outcomes: &[Outcome], paint: Paint) -> String {
    let mut rows = vec![["", "what it shows", "request", "answer", "route", "endpoint", "time"].map(str::to_owned)];
    for outcome in outcomes {
        let told = outcome.told.as_ref();
        let of = |f: fn(&Told) -> Option<String>| told.and_then(f).unwrap_or_else(|| "-".to_owned());
        rows.push([
            if outcome.wrong.is_empty() { "ok" } else { "WRONG" }.to_owned(),
            outcome.shows.to_owned(),
            of(|told| Some(told.what.clone())),
            outcome
                .shares
                .clone()
                .unwrap_or_else(|| of(|told| Some(told.answer.to_string()))),
            of(|told| told.route.clone()),
            of(|told| told.endpoint.clone()),
            of(|told| Some(millis(told.took))),
        ]);
    }
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..7).map(width).collect();
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, width))| {
            let padded = format!("{cell:width$}");
            match (number, column, cell.as_str()) {
                (0, _, _) => paint.dim(&padded),
                (_, 0, "ok") => paint.good(&padded),
                (_, 0, _) => paint.bad(&padded),
                _ => padded,
            }
        });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
        for wrong in number
            .checked_sub(1)
            .and_then(|index| outcomes.get(index))
            .into_iter()
            .flat_map(|outcome| &outcome.wrong)
        {
            text.push_str(&format!("       {}\n", paint.bad(wrong)));
        }
    }
    text
}

// === impl Case ===

impl Case {
    async fn run(&self, mesh: &mut Mesh) -> Outcome {
        let mut came = Came::default();
        let mut wrong = Vec::new();
        match mesh.entrance(self.place) {
            Some(address) => {
                if let Err(why) = self.ask(address, &mut mesh.told, &mut came).await {
                    wrong.push(why);
                }
            }
            None => wrong.push(format!("there is no entrance to {}", self.place.authority())),
        }
        if wrong.is_empty() {
            wrong.extend(self.expect.iter().filter_map(|expect| expect.wrong(self.ask, &came)));
        }
        let shares = matches!(self.ask, Ask::Many(..)).then(|| came.shares());
        Outcome {
            shows: self.shows,
            wrong,
            told: came.told,
            shares,
        }
    }

    /// Asks, and waits until the waypoint has told of it.
    async fn ask(&self, address: SocketAddr, told: &mut mpsc::Receiver<Told>, came: &mut Came) -> Result<(), String> {
        let times = if let Ask::Many(_, times) = self.ask { times } else { 1 };
        let begun = clock::now();
        // What is left of a case that went wrong is not this one's.
        while told.try_recv().is_ok() {}
        for _ in 0..times {
            let once = async {
                let seen = match self.ask {
                    Ask::Http1(path, headers) => client::http1(address, path, headers).await,
                    Ask::Many(path, _) => client::http1(address, path, &[]).await,
                    Ask::Http2(path) => client::http2(address, path).await,
                    Ask::Bytes(text) => client::bytes(address, text.as_bytes()).await,
                };
                (seen, told.recv().await)
            };
            let waited = timeout(LIMIT, once).await;
            let (seen, record) = waited.map_err(|_| {
                let after = clock::now().saturating_duration_since(begun);
                format!("neither answer nor record within {}", millis(after))
            })?;
            came.times += 1;
            // No answer is what some cases expect; the record says why there was none.
            came.seen = seen.ok();
            came.told = record;
            if let Some(version) = came.seen.as_ref().and_then(|seen| seen.application("version")) {
                *came.versions.entry(version).or_default() += 1;
            }
            if let (Ask::Many(..), Some(Status(expected))) = (self.ask, self.expect.first())
                && came.seen.as_ref().map(|seen| seen.status) != Some(*expected)
            {
                break;
            }
        }
        Ok(())
    }
}

// === impl Expect ===

impl Expect {
    /// What is not as expected.
    fn wrong(self, ask: Ask, came: &Came) -> Option<String> {
        let told = came.told.as_ref();
        let (what, expected, found) = match self {
            Status(status) => {
                let found = came.seen.as_ref().map(|seen| seen.status.to_string());
                ("status".to_owned(), status.to_string(), found.or_else(|| told?.why.clone()))
            }
            Header(name, value) => (
                format!("header {name}"),
                value.to_owned(),
                came.seen.as_ref().and_then(|seen| seen.header(name)),
            ),
            Version(version) => ("version".to_owned(), version.to_owned(), came.application("version")),
            SeenPath(path) => (
                "the path that the application saw".to_owned(),
                path.to_owned(),
                came.application("path"),
            ),
            SeenProtocol(protocol) => (
                "what the application spoke".to_owned(),
                protocol.to_owned(),
                came.application("protocol"),
            ),
            SeenHeader(name, value) => {
                let found = came.seen.as_ref().and_then(|seen| seen.application_header(name));
                (format!("the header {name} that the application saw"), value.to_owned(), found)
            }
            Route(route) => ("route".to_owned(), route.to_owned(), told.and_then(|told| told.route.clone())),
            Echoed => {
                let sent = if let Ask::Bytes(text) = ask { text } else { "" };
                let found = came
                    .seen
                    .as_ref()
                    .map(|seen| String::from_utf8_lossy(&seen.body).into_owned());
                ("what came back".to_owned(), sent.to_owned(), found)
            }
            Refused(status) => {
                let expected = Answer::Refused(Some(status)).to_string();
                ("tunnel".to_owned(), expected, told.map(|told| told.answer.to_string()))
            }
            Share(version, percent, tolerance) => {
                let share = 100 * came.versions.get(version).copied().unwrap_or(0) / came.times.max(1);
                if share.abs_diff(percent) <= tolerance {
                    return None;
                }
                return Some(format!(
                    "{version} answered {share} % of {} requests, expected {percent} % ± {tolerance}",
                    came.times
                ));
            }
        };
        let found = found.unwrap_or_else(|| "nothing".to_owned());
        (found != expected).then(|| format!("{what}: expected {expected:?}, found {found:?}"))
    }
}

// === impl Came ===

impl Came {
    fn application(&self, field: &str) -> Option<String> {
        self.seen.as_ref()?.application(field)
    }

    /// How often each version answered: `v1 241, v2 59`.
    fn shares(&self) -> String {
        let shares = self.versions.iter().map(|(version, times)| format!("{version} {times}"));
        shares.collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::{super::mesh::Settings, *};

    fn told(answer: Answer) -> Told {
        Told {
            who: "visitor".into(),
            what: "GET /".into(),
            answer,
            route: Some("everyone".into()),
            endpoint: None,
            took: Duration::from_millis(1),
            why: None,
        }
    }

    fn came(status: u16, body: &str) -> Came {
        Came {
            seen: Some(Seen {
                status,
                headers: http::HeaderMap::new(),
                body: body.to_owned().into(),
            }),
            told: Some(told(Answer::Status(status))),
            versions: [("v1".to_owned(), 80), ("v2".to_owned(), 20)].into(),
            times: 100,
        }
    }

    #[test]
    fn what_is_not_as_expected_is_said() {
        let came = came(200, r#"{"version": "v1", "path": "/cart", "headers": {"x-a": "b"}}"#);
        let ask = Ask::Bytes("hello");
        for (expect, wrong) in [
            (Status(200), None),
            (Status(404), Some(r#"status: expected "404", found "200""#)),
            (Version("v1"), None),
            (Version("v2"), Some(r#"version: expected "v2", found "v1""#)),
            (SeenPath("/cart"), None),
            (
                SeenPath("/"),
                Some(r#"the path that the application saw: expected "/", found "/cart""#),
            ),
            (SeenHeader("x-a", "b"), None),
            (
                SeenHeader("x-b", "b"),
                Some(r#"the header x-b that the application saw: expected "b", found "nothing""#),
            ),
            (
                Header("location", "/new"),
                Some(r#"header location: expected "/new", found "nothing""#),
            ),
            (Route("everyone"), None),
            (Route("api"), Some(r#"route: expected "api", found "everyone""#)),
            (Refused(503), Some(r#"tunnel: expected "refused 503", found "200""#)),
            (Share("v2", 20, 5), None),
            (
                Share("v2", 50, 5),
                Some("v2 answered 20 % of 100 requests, expected 50 % ± 5"),
            ),
        ] {
            assert_eq!(expect.wrong(ask, &came).as_deref(), wrong, "{expect:?}");
        }
        assert!(Echoed.wrong(ask, &came).is_some());
    }

    #[test]
    fn no_answer_is_never_right_unless_expected() {
        let came = Came {
            told: Some(told(Answer::Refused(Some(503)))),
            ..Came::default()
        };
        for expect in CASES.iter().flat_map(|case| case.expect) {
            let right = matches!(expect, Refused(503) | Route("everyone"));
            assert_eq!(expect.wrong(Ask::Bytes("x"), &came).is_none(), right, "{expect:?}");
        }
    }

    #[test]
    fn the_table_says_what_was_wrong() {
        let right = Outcome {
            shows: "one",
            wrong: Vec::new(),
            told: Some(told(Answer::Status(200))),
            shares: None,
        };
        let wrong = Outcome {
            shows: "two",
            wrong: vec!["status: expected 200".into()],
            told: None,
            shares: None,
        };
        assert!(all_right(std::slice::from_ref(&right)));
        let outcomes = [right, wrong];
        assert!(!all_right(&outcomes));
        let table = table(&outcomes, Paint::PLAIN);
        let lines: Vec<_> = table.lines().collect();
        assert_eq!(
            lines.get(1),
            Some(&"ok     one            GET /    200     everyone  -         1.0 ms")
        );
        assert_eq!(
            lines.get(2),
            Some(&"WRONG  two            -        -       -         -         -")
        );
        assert_eq!(lines.get(3), Some(&"       status: expected 200"));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn every_answer_of_the_demonstration_is_right() {
        // Another run of this test, or a demonstration, may have some of the addresses.
        let start = |octet| {
            Mesh::start(&Settings {
                listen: "127.0.0.1:0".parse().unwrap(),
                octet,
                config: None,
            })
        };
        let mut mesh = (1..10)
            .rev()
            .map(start)
            .find_map(Result::ok)
            .expect("no addresses are free, or no mesh starts");
        let outcomes = run(&mut mesh).await;
        assert!(all_right(&outcomes), "\n{}", table(&outcomes, Paint::PLAIN));
    }
}
