//! `/exchanges`: what the flight recorder holds; `/explain` and `/exchanges/ID/story`: why something is decided so.

use axum::{
    extract::{Path, Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde_json::json;

use super::{
    Pages,
    envoy::{heavy, json_answer},
};
use crate::{
    explain::{Question, Story, explain, record},
    recorder::{Record, Recorder},
};

/// Records that a page shows unless it is asked for more.
const PAGE: usize = 100;
/// Most that it shows.
const MOST_PAGE: usize = 10_000;

type Pairs = Query<Vec<(String, String)>>;

/// Which records are wanted.
#[derive(Debug, Default)]
struct Filter {
    service: Option<String>,
    code: Option<String>,
    principal: Option<String>,
    id: Option<String>,
    most: usize,
}

// === impl Filter ===

impl Filter {
    fn parse(pairs: Vec<(String, String)>) -> Result<Self, String> {
        let mut filter = Self {
            most: PAGE,
            ..Self::default()
        };
        for (name, value) in pairs {
            match &*name {
                "service" => filter.service = Some(value),
                "code" => filter.code = Some(value),
                "principal" => filter.principal = Some(value),
                "id" => filter.id = Some(value),
                "limit" => {
                    let most: usize = value.parse().map_err(|_| format!("limit={value:?} is no number"))?;
                    filter.most = most.min(MOST_PAGE);
                }
                other => return Err(format!("{other:?} is none of service, code, principal, id, limit")),
            }
        }
        Ok(filter)
    }

    fn wants(&self, record: &Record) -> bool {
        let Self {
            service,
            code,
            principal,
            id,
            most: _,
        } = self;
        let of_service = |wanted: &String| {
            let cluster = record
                .cluster
                .as_ref()
                .is_some_and(|cluster| cluster.name.contains(wanted.as_str()));
            cluster || record.chain.contains(wanted.as_str())
        };
        let of_code = |wanted: &String| {
            let code = record.status.unwrap_or(0).to_string();
            // 4xx is all of them.
            code == *wanted || (wanted.len() == 3 && wanted.ends_with("xx") && code.get(..1) == wanted.get(..1))
        };
        let peer = record.connection.peer.as_ref().map_or("", |peer| peer.as_str());
        service.as_ref().is_none_or(of_service)
            && code.as_ref().is_none_or(of_code)
            && principal.as_ref().is_none_or(|wanted| peer.contains(wanted.as_str()))
            && id.as_ref().is_none_or(|wanted| record.is(wanted))
    }
}

fn problem(status: StatusCode, text: impl AsRef<str>) -> Response {
    (status, format!("{}\n", text.as_ref())).into_response()
}

fn recorder(pages: &Pages) -> Result<std::sync::Arc<Recorder>, Box<Response>> {
    let off = || Box::new(problem(StatusCode::NOT_FOUND, "nothing is recorded: CAIRN_EXCHANGES is 0"));
    pages.recorder.clone().ok_or_else(off)
}

/// `/exchanges`
pub(super) async fn page(State(pages): State<Pages>, Query(pairs): Pairs) -> Response {
    let recorder = match recorder(&pages) {
        Ok(recorder) => recorder,
        Err(answer) => return *answer,
    };
    let filter = match Filter::parse(pairs) {
        Ok(filter) => filter,
        Err(why) => return problem(StatusCode::BAD_REQUEST, why),
    };
    heavy(move || {
        let found = recorder.find(filter.most, |record| filter.wants(record));
        let exchanges: Vec<_> = found.iter().map(record::json).collect();
        json_answer(&json!({ "exchanges": exchanges }))
    })
    .await
}

/// `/exchanges/ID/story`
pub(super) async fn story(State(pages): State<Pages>, Path(id): Path<String>, Query(pairs): Pairs) -> Response {
    let recorder = match recorder(&pages) {
        Ok(recorder) => recorder,
        Err(answer) => return *answer,
    };
    heavy(move || {
        let found = recorder.find(1, |record| record.is(&id));
        let Some(found) = found.first() else {
            let why = format!("no record has the name or x-request-id {id:?}: it is none, or too old");
            return problem(StatusCode::GONE, why);
        };
        match record::story(&recorder, found) {
            Ok(story) => tell(&story, is_text(&pairs)),
            Err(why) => problem(StatusCode::GONE, why),
        }
    })
    .await
}

/// `/explain?from=…&to=…&method=…&path=…&header=name:value&source_ip=…&jwt=…&tcp`
pub(super) async fn ask(State(pages): State<Pages>, Query(pairs): Pairs) -> Response {
    let text = is_text(&pairs);
    let question = match question(pairs) {
        Ok(question) => question,
        Err(why) => return problem(StatusCode::BAD_REQUEST, why),
    };
    heavy(move || {
        let snapshot = pages.proxy.snapshot.load_full();
        match question.ask(&snapshot) {
            Ok(asked) => tell(&explain(&snapshot, &asked), text),
            Err(error) => problem(StatusCode::BAD_REQUEST, error.to_string()),
        }
    })
    .await
}

fn is_text(pairs: &[(String, String)]) -> bool {
    pairs.iter().any(|(name, value)| name == "format" && value == "text")
}

fn tell(story: &Story, text: bool) -> Response {
    if text {
        return story.to_string().into_response();
    }
    match serde_json::to_value(story) {
        Ok(value) => json_answer(&value),
        Err(error) => problem(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

fn question(pairs: Vec<(String, String)>) -> Result<Question, String> {
    let mut question = Question::default();
    for (name, value) in pairs {
        match &*name {
            "from" => question.from = Some(value),
            "to" => question.to = value,
            "method" => question.method = Some(value),
            "path" => question.path = Some(value),
            "header" => question.headers.push(value),
            "source_ip" => {
                question.source_ip = Some(value.parse().map_err(|_| format!("source_ip={value:?} is no address"))?);
            }
            "jwt" => question.jwt = Some(value),
            "tcp" => question.tcp = value != "false",
            "format" => {}
            other => {
                return Err(format!(
                    "{other:?} is none of from, to, method, path, header, source_ip, jwt, tcp, format"
                ));
            }
        }
    }
    Ok(question)
}
