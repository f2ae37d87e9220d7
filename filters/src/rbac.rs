//! Role-based access control of requests (contract xds §3.4): 403 for what the rules deny.
//!
//! The decision itself is [`cairn_policy::rbac`]'s; here its facts are read off the record, and a denial becomes an answer in Envoy's
//! words. It sees the request as it arrived, its path normalized, for it stands before the filters and routes that edit.

use cairn_exchange::{Exchange, ResponseFlags};
use cairn_policy::rbac::{Denied, Rbac};
use http::StatusCode;

use crate::{
    contract::{LocalReply, Verdict},
    on_route::{RouteConfig, Scope},
};

/// The request's head is there: decides, by the route's own rules where it has any.
pub fn decode_head(rbac: &Rbac, exchange: &mut Exchange, scope: &Scope<'_>) -> Verdict {
    let rbac = match scope.config() {
        Some(RouteConfig::Rbac(None)) => return Verdict::Continue,
        Some(RouteConfig::Rbac(Some(other))) => other,
        _ => rbac,
    };
    match rbac.check(exchange) {
        Ok(()) => Verdict::Continue,
        Err(denied) => Verdict::Reply(reply(&denied)),
    }
}

fn reply(denied: &Denied) -> LocalReply {
    LocalReply::new(StatusCode::FORBIDDEN, ResponseFlags::NONE, denied.details(), Denied::ANSWER)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, sync::Arc};

    use cairn_exchange::{Connection, Protocol, RequestHead, Scheme, ShadowDecision, clock};
    use cairn_policy::{
        matcher::StringMatcher,
        rbac::{Action, Condition, Policy, Rules, Shadow},
    };
    use http::{HeaderMap, HeaderValue, Method, uri::PathAndQuery};

    use super::*;
    use crate::{Filter, FilterChain, NoServices, OnRoute, Run};

    fn exchange(path: &'static str) -> Exchange {
        let connection = Connection {
            id: 1,
            authority: "10.96.1.10:80".into(),
            local_address: "10.96.1.10:80".parse().ok(),
            service_port: 80,
            remote_address: "10.244.0.9:41000".parse().unwrap(),
            peer: None,
            local: None,
            source: None,
            requested_server_name: None,
            opened: clock::now(),
        };
        let mut exchange = Exchange::begin(Protocol::Http11, Arc::new(connection), "chain".into(), 1);
        exchange.request = Some(RequestHead {
            method: Method::GET,
            path: PathAndQuery::from_static(path),
            authority: HeaderValue::from_static("web"),
            scheme: Scheme::Http,
            headers: HeaderMap::new(),
        });
        exchange
    }

    fn rules(action: Action, path: &str) -> Rules {
        let policy = Policy {
            permissions: vec![Condition::Path(StringMatcher::prefix(path))],
            principals: vec![Condition::Always],
            condition: None,
        };
        Rules::new(action, BTreeMap::from([("ns[app]-policy[a]-rule[0]".to_owned(), policy)]))
    }

    fn enforced(rules: Rules) -> Filter {
        let rbac = Rbac {
            rules: Some(rules),
            shadow: None,
        };
        Filter::Rbac(Arc::new(rbac))
    }

    #[test]
    fn what_is_denied_is_answered_in_envoys_words() {
        let by_name = "rbac_access_denied_matched_policy[ns[app]-policy[a]-rule[0]]";
        let by_none = "rbac_access_denied_matched_policy[none]";
        for (filters, path, details) in [
            (vec![enforced(rules(Action::Deny, "/admin"))], "/admin/x", Some(by_name)),
            (vec![enforced(rules(Action::Deny, "/admin"))], "/", None),
            (vec![enforced(rules(Action::Allow, "/api"))], "/api", None),
            (vec![enforced(rules(Action::Allow, "/api"))], "/", Some(by_none)),
            (vec![enforced(rules(Action::Log, "/"))], "/", None),
            (
                vec![
                    enforced(rules(Action::Deny, "/api/x")),
                    enforced(rules(Action::Allow, "/api")),
                ],
                "/api/x",
                Some(by_name),
            ),
            (vec![Filter::Rbac(Arc::default())], "/", None),
        ] {
            let chain = FilterChain::new(filters);
            let verdict = chain.decode_head(&mut Run::default(), &mut exchange(path), &OnRoute::NONE, &NoServices);
            match (verdict, details) {
                (Verdict::Continue, None) => {}
                (Verdict::Reply(reply), Some(details)) => {
                    assert_eq!(reply.details, details);
                    assert_eq!(
                        (reply.status, &reply.body[..]),
                        (StatusCode::FORBIDDEN, &b"RBAC: access denied"[..])
                    );
                    assert_eq!(reply.flags, ResponseFlags::NONE);
                }
                (verdict, details) => panic!("{path}: {verdict:?} where {details:?} belongs"),
            }
        }
    }

    #[test]
    fn a_dry_run_is_noted_and_stops_nothing() {
        let shadow = Shadow::new(rules(Action::Deny, "/"), "istio_dry_run_deny_");
        let chain = FilterChain::new(vec![
            Filter::Rbac(Arc::new(Rbac {
                rules: None,
                shadow: Some(shadow),
            })),
            enforced(rules(Action::Log, "/")),
        ]);
        let mut exchange = exchange("/");
        assert!(matches!(
            chain.decode_head(&mut Run::default(), &mut exchange, &OnRoute::NONE, &NoServices),
            Verdict::Continue
        ));
        assert_eq!(
            exchange.shadow,
            [ShadowDecision {
                prefix: "istio_dry_run_deny_".into(),
                allowed: false,
                policy: Some("ns[app]-policy[a]-rule[0]".into()),
            }]
        );
        assert!(exchange.audited);
        let hint = |exchange: &Exchange| exchange.metadata.entry("envoy.common", "access_log_hint").cloned();
        assert_eq!(hint(&exchange), Some(true.into()));
        let chain = FilterChain::new(vec![enforced(rules(Action::Log, "/other"))]);
        let _ = chain.decode_head(&mut Run::default(), &mut exchange, &OnRoute::NONE, &NoServices);
        assert_eq!(hint(&exchange), Some(false.into()));
    }

    #[test]
    fn what_tried_out_rules_decide_is_noted_and_forgotten_where_nothing_matches() {
        let shadow = |path, prefix: &str| {
            Filter::Rbac(Arc::new(Rbac {
                rules: None,
                shadow: Some(Shadow::new(rules(Action::Deny, path), prefix)),
            }))
        };
        let noted = |filters: Vec<Filter>| {
            let mut exchange = exchange("/a");
            let _ = FilterChain::new(filters).decode_head(&mut Run::default(), &mut exchange, &OnRoute::NONE, &NoServices);
            let noted = exchange.metadata.namespace("envoy.filters.http.rbac");
            let mut noted: Vec<_> = noted
                .map(|(key, value)| format!("{key}={}", value.as_str().unwrap()))
                .collect();
            noted.sort();
            noted
        };
        let id = "p_shadow_effective_policy_id=ns[app]-policy[a]-rule[0]";
        let matched = [id, "p_shadow_engine_result=denied"];
        assert_eq!(noted(vec![shadow("/a", "p_")]), matched);
        assert_eq!(noted(vec![shadow("/b", "p_")]), ["p_shadow_engine_result=allowed"]);
        assert_eq!(
            noted(vec![shadow("/a", "p_"), shadow("/b", "p_")]),
            ["p_shadow_engine_result=allowed"]
        );
        let other = noted(vec![shadow("/a", "p_"), shadow("/b", "q_")]);
        assert_eq!(other, [id, "p_shadow_engine_result=denied", "q_shadow_engine_result=allowed"]);
    }
}
