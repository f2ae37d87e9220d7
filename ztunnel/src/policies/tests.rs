//! Tables of policies, connections and what is decided; policies as istiod sends them.

use std::net::IpAddr;

use cairn_proto::istio::{
    security::{
        Address, Authorization, Group, Match, Rules as Clause, ServiceAccountMatch, StringMatch, string_match::MatchType,
    },
    workload::Extension,
};
use prost::Message as _;

use super::*;
use crate::{authorization, testing};

const ALLOW: i32 = 0;
const DENY: i32 = 1;

fn wire(action: i32, clauses: Vec<Vec<Match>>) -> Authorization {
    Authorization {
        name: "p".into(),
        namespace: "app".into(),
        scope: 1,
        action,
        groups: vec![Group {
            rules: clauses.into_iter().map(|matches| Clause { matches }).collect(),
        }],
        ..Authorization::default()
    }
}

fn read(wire: &Authorization) -> Result<Policy, String> {
    authorization::read(&format!("{}/{}", wire.namespace, wire.name), &wire.encode_to_vec()).map_err(|error| error.to_string())
}

/// What one policy decides of a connection from `peer` at `source` to 10.1.0.1:`port`.
fn decide(wires: &[Authorization], peer: &str, source: &str, port: u16) -> Result<(), Denied> {
    let policies = Policies::default();
    policies.change(wires.iter().map(|wire| read(wire).unwrap()).collect(), &[]);
    let peer: Option<SpiffeId> = (!peer.is_empty()).then(|| format!("spiffe://{peer}").parse().unwrap());
    policies.ruling(&testing::workload("web", &[])).decide(Asked {
        peer: peer.as_ref(),
        source: source.parse().unwrap(),
        destination: SocketAddr::new([10, 1, 0, 1].into(), port),
    })
}

fn shape(kind: &str, text: &str) -> StringMatch {
    let text = text.to_owned();
    StringMatch {
        match_type: Some(match kind {
            "exact" => MatchType::Exact(text),
            "prefix" => MatchType::Prefix(text),
            "suffix" => MatchType::Suffix(text),
            _ => MatchType::Presence(()),
        }),
    }
}

fn range(text: &str) -> Address {
    let net: ipnet::IpNet = text.parse().unwrap();
    let address = match net.addr() {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    Address {
        address,
        length: u32::from(net.prefix_len()),
    }
}

#[test]
fn every_field_matches_what_it_says_and_its_negation_the_rest() {
    let m = Match::default;
    let account = |namespace: &str, service_account: &str| ServiceAccountMatch {
        namespace: namespace.into(),
        service_account: service_account.into(),
    };
    const A: &str = "cluster.local/ns/app/sa/a";
    const B: &str = "other.td/ns/apply/sa/b.c";
    // A match, its negation, and of the connections below those that the match holds for.
    let cases: Vec<(&str, Match, Match, [bool; 3])> = vec![
        (
            "namespace",
            Match {
                namespaces: vec![shape("exact", "app")],
                ..m()
            },
            Match {
                not_namespaces: vec![shape("exact", "app")],
                ..m()
            },
            [true, false, false],
        ),
        (
            "namespace prefix",
            Match {
                namespaces: vec![shape("prefix", "app")],
                ..m()
            },
            Match {
                not_namespaces: vec![shape("prefix", "app")],
                ..m()
            },
            [true, true, false],
        ),
        (
            "namespace suffix",
            Match {
                namespaces: vec![shape("suffix", "ly")],
                ..m()
            },
            Match {
                not_namespaces: vec![shape("suffix", "ly")],
                ..m()
            },
            [false, true, false],
        ),
        (
            "principal",
            Match {
                principals: vec![shape("exact", A)],
                ..m()
            },
            Match {
                not_principals: vec![shape("exact", A)],
                ..m()
            },
            [true, false, false],
        ),
        (
            "principal with its scheme",
            Match {
                principals: vec![shape("prefix", "spiffe://other.td/")],
                ..m()
            },
            Match {
                not_principals: vec![shape("prefix", "spiffe://other.td/")],
                ..m()
            },
            [false, true, false],
        ),
        (
            "principal suffix",
            Match {
                principals: vec![shape("suffix", "/sa/a")],
                ..m()
            },
            Match {
                not_principals: vec![shape("suffix", "/sa/a")],
                ..m()
            },
            [true, false, false],
        ),
        (
            "any principal",
            Match {
                principals: vec![shape("presence", "")],
                ..m()
            },
            Match {
                not_principals: vec![shape("presence", "")],
                ..m()
            },
            [true, true, false],
        ),
        (
            "service account, in any trust domain, letter by letter",
            Match {
                service_accounts: vec![account("apply", "b.c"), account("app", ".")],
                ..m()
            },
            Match {
                not_service_accounts: vec![account("apply", "b.c"), account("app", ".")],
                ..m()
            },
            [false, true, false],
        ),
        (
            "source",
            Match {
                source_ips: vec![range("10.2.0.0/24"), range("fd00::/16")],
                ..m()
            },
            Match {
                not_source_ips: vec![range("10.2.0.0/24"), range("fd00::/16")],
                ..m()
            },
            [true, false, true],
        ),
        (
            "destination",
            Match {
                destination_ips: vec![range("10.1.0.1/32")],
                ..m()
            },
            Match {
                not_destination_ips: vec![range("10.1.0.1/32")],
                ..m()
            },
            [true, true, true],
        ),
        (
            "port",
            Match {
                destination_ports: vec![80, 81],
                ..m()
            },
            Match {
                not_destination_ports: vec![80, 81],
                ..m()
            },
            [true, false, true],
        ),
    ];
    for (name, positive, negative, holds) in cases {
        for ((peer, source, port), holds) in [(A, "10.2.0.9", 80), (B, "10.3.0.9", 82), ("", "fd00::9", 81)]
            .into_iter()
            .zip(holds)
        {
            let case = format!("{name}, {peer} {source} {port}");
            let passes = |action, one: &Match| decide(&[wire(action, vec![vec![one.clone()]])], peer, source, port).is_ok();
            assert_eq!(passes(ALLOW, &positive), holds, "allow {case}");
            assert_eq!(passes(ALLOW, &negative), !holds, "allow not {case}");
            assert_eq!(passes(DENY, &positive), !holds, "deny {case}");
            assert_eq!(passes(DENY, &negative), holds, "deny not {case}");
        }
    }
}

#[test]
fn rules_are_alternatives_clauses_are_conditions_and_matches_are_alternatives() {
    let port = |port| Match {
        destination_ports: vec![port],
        ..Match::default()
    };
    let source = |text| Match {
        source_ips: vec![range(text)],
        ..Match::default()
    };
    let passes = |wire: &Authorization, port| decide(std::slice::from_ref(wire), "", "10.2.0.9", port).is_ok();
    let both = wire(ALLOW, vec![vec![port(80), port(81)], vec![source("10.2.0.0/16")]]);
    assert!(passes(&both, 80) && passes(&both, 81) && !passes(&both, 82));
    assert!(!passes(&wire(ALLOW, vec![vec![port(80)], vec![source("10.3.0.0/16")]]), 80));
    let mut either = wire(ALLOW, vec![vec![port(80)]]);
    either.groups.push(wire(ALLOW, vec![vec![port(82)]]).groups.remove(0));
    assert!(passes(&either, 80) && passes(&either, 82) && !passes(&either, 81));
    // A match without fields says nothing.
    assert!(!passes(&wire(ALLOW, vec![vec![Match::default()]]), 80));
    assert!(passes(&wire(ALLOW, vec![vec![Match::default(), port(80)]]), 80));
    // A clause without matches holds, and asks nothing of the others.
    assert!(passes(&wire(ALLOW, vec![vec![]]), 80) && !passes(&wire(DENY, vec![vec![]]), 80));
    assert!(passes(&wire(ALLOW, vec![vec![], vec![port(80)]]), 80) && !passes(&wire(ALLOW, vec![vec![], vec![port(80)]]), 81));
    // A rule without clauses says everything, a policy without rules nothing.
    assert!(passes(&wire(ALLOW, vec![]), 80) && !passes(&wire(DENY, vec![]), 80));
    let mut without = wire(ALLOW, vec![]);
    without.groups.clear();
    assert!(!passes(&without, 80));
    without.action = DENY;
    assert!(passes(&without, 80));
}

#[test]
fn deny_goes_before_allow_and_who_is_tried_out_decides_nothing() {
    let port = |port| Match {
        destination_ports: vec![port],
        ..Match::default()
    };
    let allow = wire(ALLOW, vec![]);
    let mut deny = wire(DENY, vec![vec![port(80)]]);
    deny.name = "d".into();
    let decided = |wires: &[Authorization], port| decide(wires, "", "10.2.0.9", port);
    assert_eq!(decided(&[allow.clone(), deny.clone()], 80), Err(Denied::By("app/d".into())));
    assert_eq!(decided(&[allow.clone(), deny.clone()], 81), Ok(()));
    assert_eq!(decided(&[wire(ALLOW, vec![vec![port(80)]])], 81), Err(Denied::NoneAllows));
    deny.dry_run = true;
    assert_eq!(decided(&[allow, deny.clone()], 80), Ok(()));
    let policies = Policies::default();
    policies.change(vec![read(&deny).unwrap()], &[]);
    let ruling = policies.ruling(&testing::workload("web", &[]));
    let asked = |port| Asked {
        peer: None,
        source: [10, 2, 0, 9].into(),
        destination: SocketAddr::new([10, 1, 0, 1].into(), port),
    };
    let would = DryRun {
        allowed: false,
        policy: Some("app/d".into()),
    };
    assert_eq!((ruling.try_out(asked(80)), ruling.try_out(asked(81))), (Some(would), None));
}

#[test]
fn a_policy_is_about_everybody_its_namespace_or_who_names_it() {
    let mut global = wire(DENY, vec![vec![]]);
    global.groups = vec![Group::default()];
    let decided = |scope: i32, namespace: &str, named: bool| {
        let policies = Policies::default();
        let wire = Authorization {
            scope,
            namespace: namespace.into(),
            ..global.clone()
        };
        policies.change(vec![read(&wire).unwrap()], &[]);
        let mut web = testing::workload("web", &[]);
        if named {
            web.policies = Box::new([format!("{namespace}/p").into()]);
        }
        let asked = Asked {
            peer: None,
            source: [10, 2, 0, 9].into(),
            destination: SocketAddr::new([10, 1, 0, 1].into(), 80),
        };
        policies.ruling(&web).decide(asked).is_err()
    };
    assert!(decided(0, "istio-system", false));
    assert!(decided(1, "app", false) && !decided(1, "other", false));
    assert!(decided(2, "app", true) && !decided(2, "app", false));
}

#[test]
fn a_policy_that_has_not_arrived_denies_and_one_that_is_gone_does_not() {
    let policies = Policies::default();
    let mut web = testing::workload("web", &[]);
    web.policies = Box::new(["app/p".into()]);
    let asked = Asked {
        peer: None,
        source: [10, 2, 0, 9].into(),
        destination: SocketAddr::new([10, 1, 0, 1].into(), 80),
    };
    let ruling = policies.ruling(&web);
    assert_eq!(ruling.decide(asked), Err(Denied::Unknown("app/p".into())));
    assert_eq!(ruling.decide_known(asked), Ok(()));
    let allow = Authorization {
        scope: 2,
        ..wire(ALLOW, vec![])
    };
    policies.change(vec![read(&allow).unwrap()], &[]);
    assert_eq!(policies.ruling(&web).decide(asked), Ok(()));
    policies.change(Vec::new(), &["app/p".into()]);
    assert_eq!(policies.ruling(&web).decide(asked), Ok(()));
}

#[test]
fn what_cannot_be_read_refuses_the_policy_and_at_worst_shuts_the_door() {
    let one = |one: Match| wire(ALLOW, vec![vec![one]]);
    let bad_range = |address: Vec<u8>, length| {
        one(Match {
            source_ips: vec![Address { address, length }],
            destination_ports: vec![80],
            ..Match::default()
        })
    };
    let cases = [
        (bad_range(vec![10, 0, 0], 8), "3 bytes"),
        (bad_range(vec![10, 0, 0, 0], 33), "/33"),
        (
            one(Match {
                destination_ports: vec![65_536],
                ..Match::default()
            }),
            "65536",
        ),
        (
            one(Match {
                principals: vec![StringMatch::default()],
                ..Match::default()
            }),
            "not known",
        ),
        (wire(7, vec![]), "action"),
        (
            Authorization {
                scope: 9,
                ..wire(ALLOW, vec![])
            },
            "scope",
        ),
        (
            Authorization {
                extensions: vec![Extension {
                    name: "new".into(),
                    config: None,
                }],
                ..wire(ALLOW, vec![])
            },
            "`new`",
        ),
    ];
    for (wire, words) in cases {
        let error = read(&wire).unwrap_err();
        assert!(error.contains(words), "{error}");
        let policies = Policies::default();
        policies.change(vec![authorization::worst("app/p", &wire.encode_to_vec())], &[]);
        let asked = Asked {
            peer: None,
            source: [10, 2, 0, 9].into(),
            destination: SocketAddr::new([10, 1, 0, 1].into(), 80),
        };
        assert!(
            policies.ruling(&testing::workload("web", &[])).decide(asked).is_err(),
            "{error}"
        );
    }
    // A field that nobody knows.
    let mut bytes = wire(ALLOW, vec![]).encode_to_vec();
    bytes.extend([0xf8, 0x7f, 1]);
    let error = authorization::read("app/p", &bytes).unwrap_err().to_string();
    assert!(error.contains("newer than this proxy"), "{error}");
}
