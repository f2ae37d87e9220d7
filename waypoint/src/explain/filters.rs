//! What each HTTP filter says of a request.
//!
//! Filters without IO run themselves, alone; policies and tokens are told by their own interpreters. Nothing is taken from a limit and
//! nobody is asked: such filters are undecided.

use std::{any::Any, sync::Arc};

use cairn_exchange::{Exchange, clock};
use cairn_filters::{
    Filter, FilterChain, HttpFilter, NoServices, OnRoute, Placed, RouteConfig, Run, Verdict,
    grpc_web::GrpcWeb,
    jwt_authn::{JwtAuthn, RemoteKeys},
    set_filter_state::SetFilterState,
};
use cairn_policy::{
    fault::{Aborted, Faults},
    jwt::{Checked, FetchedKeys, JwtStory, Keys, Problem},
    rbac::{Action, Denied, Facts, PolicyName, PolicyStory, Rbac, RulesStory},
};
use http::StatusCode;

use super::{
    Asked, Story,
    story::StepOutcome::{self, Answers, Denies, Off, Passes, Undecided},
};

/// Near misses that are told.
const NEAREST: usize = 3;

/// A filter that ends the way.
pub(super) enum Stopped {
    /// By a policy.
    Denied(Denied),
    /// With an answer and its reason.
    Answered(StatusCode, String),
}

/// Tells of one filter; what it changes is changed.
pub(super) fn tell(
    placed: &Placed,
    exchange: &mut Exchange,
    route: &OnRoute<'_>,
    asked: &Asked,
    story: &mut Story,
) -> Option<Stopped> {
    let name = &*placed.name;
    if route.disabled(name).unwrap_or(placed.off) {
        story.step(name, Off, vec!["does not run on this route".to_owned()]);
        return None;
    }
    match &placed.filter {
        Filter::GrpcStats => None,
        Filter::Rbac(own) => match route.config(name) {
            Some(RouteConfig::Rbac(None)) => {
                story.step(name, Passes, vec!["the route lets everything pass".to_owned()]);
                None
            }
            Some(RouteConfig::Rbac(Some(other))) => rbac(other, name, &Facts::inside(exchange), story).map(Stopped::Denied),
            _ => rbac(own, name, &Facts::inside(exchange), story).map(Stopped::Denied),
        },
        Filter::Fault(fault) => {
            let faults = match route.config(name) {
                Some(RouteConfig::Fault(faults)) => faults,
                _ => &fault.faults,
            };
            faulty(faults, name, exchange, route, story)
        }
        Filter::HeaderMutation(_) | Filter::Cors => alone(placed, exchange, route, story),
        Filter::Other(other) => {
            let any: &dyn Any = &**other as &dyn HttpFilter as &dyn Any;
            if let Some(filter) = any.downcast_ref::<JwtAuthn>() {
                tokens(filter, name, exchange, route, asked, story)
            } else if any.is::<SetFilterState>() || any.is::<GrpcWeb>() {
                alone(placed, exchange, route, story)
            } else if other.name() == "envoy.filters.http.buffer" {
                story.step(
                    name,
                    Passes,
                    vec!["waits for the whole body; too large a one is answered 413".to_owned()],
                );
                None
            } else {
                story.step(
                    name,
                    Undecided,
                    vec!["asks or counts live: what it says is not known here".to_owned()],
                );
                None
            }
        }
    }
}

/// Runs a filter that does no IO.
fn alone(placed: &Placed, exchange: &mut Exchange, route: &OnRoute<'_>, story: &mut Story) -> Option<Stopped> {
    let chain = FilterChain::of(vec![Placed {
        off: false,
        ..placed.clone()
    }]);
    match chain.decode_head(&mut Run::default(), exchange, route, &NoServices) {
        Verdict::Continue => {
            story.step(&*placed.name, Passes, Vec::new());
            None
        }
        Verdict::Stop(_) => {
            story.step(&*placed.name, Undecided, vec!["asks live".to_owned()]);
            None
        }
        Verdict::Reply(reply) => {
            let says = format!("answers {} by itself", reply.status.as_u16());
            story.step(&*placed.name, Answers, vec![says]);
            Some(Stopped::Answered(reply.status, reply.details.into_owned()))
        }
    }
}

fn faulty(faults: &Faults, name: &str, exchange: &Exchange, route: &OnRoute<'_>, story: &mut Story) -> Option<Stopped> {
    let head = exchange.request.as_ref()?;
    if faults.is_inert() || !faults.applies(head, route.cluster().map(|name| &**name)) {
        story.step(name, Passes, Vec::new());
        return None;
    }
    let mut says = Vec::new();
    // 0 is in every share that is not empty, the largest remainder only in whole ones.
    if let Some(delay) = faults.delay(head, 0) {
        says.push(format!("may delay by {delay:?}"));
    }
    let Some(abort) = faults.abort(head, 0) else {
        story.step(name, Passes, says);
        return None;
    };
    let (status, with) = match abort {
        Aborted::Http(status) => (status, format!("answers {}", status.as_u16())),
        Aborted::Grpc(code) => (StatusCode::OK, format!("answers gRPC status {code}")),
    };
    let denominator = faults
        .abort
        .as_ref()
        .map_or(1, |abort| u64::from(abort.share.denominator.max(1)));
    if faults.abort(head, denominator - 1).is_some() {
        says.insert(0, format!("{with}: a fault that is put in on purpose"));
        story.step(name, Answers, says);
        return Some(Stopped::Answered(status, "fault_filter_abort".to_owned()));
    }
    says.push(format!("{with} to some requests, by chance"));
    story.step(name, Undecided, says);
    None
}

// === tokens ===

/// Keys that the running proxy has fetched.
struct Fetched<'a>(&'a [Option<RemoteKeys>]);

impl FetchedKeys for Fetched<'_> {
    fn keys(&self, provider: usize) -> Option<Result<Arc<Keys>, Problem>> {
        self.0.get(provider)?.as_ref()?.known().map(Ok)
    }
}

fn tokens(
    filter: &JwtAuthn,
    name: &str,
    exchange: &mut Exchange,
    route: &OnRoute<'_>,
    asked: &Asked,
    story: &mut Story,
) -> Option<Stopped> {
    let settings = &filter.shared;
    if let Some(noted) = &asked.noted {
        exchange.metadata = noted.clone();
        let says = "the record keeps no tokens: what this filter noted of them then is taken".to_owned();
        story.step(name, Passes, vec![says]);
        return None;
    }
    let per_route = match route.config(name) {
        Some(RouteConfig::Jwt(per_route)) => Some(per_route),
        _ => None,
    };
    let now = clock::unix_seconds();
    let request = exchange.request.as_mut()?;
    let JwtStory {
        requires,
        providers,
        checked,
    } = settings
        .authentication
        .explain(per_route, request, &mut exchange.metadata, 0, now, &Fetched(&settings.remote));
    let mut says = Vec::new();
    match requires {
        None => says.push("asks this request for no token".to_owned()),
        Some(requires) => says.push(format!("requires {requires}")),
    }
    for provider in providers {
        if provider.tokens.is_empty() {
            says.push(format!("{}: no token in {}", provider.name, provider.places.join(", ")));
        }
        for token in provider.tokens {
            says.push(match token.problem {
                None => format!("{}: accepts {}", provider.name, token.about),
                Some(problem) => format!("{}: does not accept {}: {problem}", provider.name, token.about),
            });
        }
    }
    match checked {
        Checked::Passed => {
            exchange.reroute = settings.clear_route_cache && !exchange.metadata.is_empty();
            story.step(name, Passes, says);
            None
        }
        Checked::NeedsKeys(_) => {
            says.push("the keys of the issuer are fetched live; what the token says is not known further on".to_owned());
            story.step(name, Undecided, says);
            None
        }
        Checked::Refused(problem) => {
            says.insert(0, problem.to_string());
            story.step(name, Denies, says);
            let status = match problem {
                Problem::Audience => StatusCode::FORBIDDEN,
                _ => StatusCode::UNAUTHORIZED,
            };
            Some(Stopped::Answered(status, problem.details()))
        }
    }
}

// === policies ===

/// Tells of policies; what denies, if one does.
pub(super) fn rbac(filter: &Rbac, name: &str, facts: &Facts<'_>, story: &mut Story) -> Option<Denied> {
    let Rbac { rules, shadow } = filter;
    let mut says = Vec::new();
    let mut denied = None;
    let mut outcome = Passes;
    if let Some(rules) = rules {
        let told = rules.explain(facts);
        let matched = told.matched.as_ref().map(|policy| policy.name.clone());
        if told.action != Action::Log && (matched.is_some() || !told.allowed) {
            story.verdict.policy = matched.as_deref().map(short);
        }
        enforced(&told, &mut says);
        if !told.allowed {
            outcome = Denies;
            denied = Some(Denied {
                policy: matched.map(Into::into),
            });
        }
    }
    if let Some(shadow) = shadow {
        let told = shadow.rules.explain(facts);
        if &*shadow.prefix == crate::config::rbac::EXTERNAL {
            outcome = undecided(outcome, told.matched.is_some());
            let about = told.matched.as_ref().map(PolicyStory::sentence);
            says.push(about.map_or("no authorizer is asked".to_owned(), |about| {
                format!("an authorizer is asked: {about}")
            }));
        } else {
            let would = if told.allowed { "let it pass" } else { "deny it" };
            let by = told.matched.as_ref().map(|policy| format!(": {}", policy.sentence()));
            says.push(format!("a dry run would {would}{}", by.unwrap_or_default()));
        }
    }
    story.step(name, outcome, says);
    denied
}

fn undecided(outcome: StepOutcome, is: bool) -> StepOutcome {
    if is && outcome == Passes { Undecided } else { outcome }
}

/// `NAMESPACE/NAME`, or the name as it is.
fn short(name: &str) -> String {
    PolicyName::parse(name).map_or_else(|| name.to_owned(), |known| format!("{}/{}", known.namespace, known.name))
}

fn enforced(told: &RulesStory, says: &mut Vec<String>) {
    let RulesStory {
        action,
        allowed: _,
        policies,
        matched,
        nearest,
    } = told;
    let rules = |count: usize| {
        if count == 1 {
            "1 rule".to_owned()
        } else {
            format!("{count} rules")
        }
    };
    match (action, matched) {
        (Action::Allow, None) if *policies == 0 => says.push("ALLOW without rules denies everything".to_owned()),
        (Action::Allow, None) => says.push(format!(
            "none of {} of ALLOW policies matches, so it is denied",
            rules(*policies)
        )),
        (Action::Allow, Some(policy)) => says.push(format!("allowed: {}", policy.sentence())),
        (Action::Deny, None) => says.push(format!("none of {} of DENY policies matches", rules(*policies))),
        (Action::Deny, Some(policy)) => says.push(format!("denied: {}", policy.sentence())),
        (Action::Log, None) => says.push(format!("none of {} of AUDIT policies matches", rules(*policies))),
        (Action::Log, Some(policy)) => says.push(format!("marked for audit: {}", policy.sentence())),
    }
    if matched.is_none() {
        let near = nearest.iter().take(NEAREST).map(PolicyStory::sentence);
        says.extend(near.map(|sentence| format!("nearest: {sentence}")));
    }
}
