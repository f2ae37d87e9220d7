//! Where istiod's answers meet the tables: workloads and services into the [`Mesh`], policies into [`Policies`].
//!
//! What is good applies, what is bad is refused by name in one NACK and what was there before stays. A policy that cannot be read and was not there before shuts the door for those that it is about.

use std::{collections::BTreeSet, sync::Arc};

use cairn_telemetry::{Registry, registry::Counter};
use cairn_xds::{Consumer, Subscription, Update, Verdict};

use crate::{
    authorization,
    certificates::Certificates,
    mesh::{Interner, Mesh, Tunnel},
    policies::Policies,
    wds,
};

/// Problems that a NACK names.
const MOST_NAMED: usize = 20;

/// Takes over what istiod sends.
pub struct Tables {
    mesh: Arc<Mesh>,
    policies: Arc<Policies>,
    /// Prepares certificates of workloads on this node.
    prepare: Option<(Arc<Certificates>, Arc<str>)>,
    texts: Interner,
    /// Uids whose certificates are prepared.
    prepared: BTreeSet<Arc<str>>,
    /// Policies that nobody could read, and for which the worst stands.
    unreadable: BTreeSet<String>,
    refused: Counter,
}

/// The types to subscribe to. Policies first, so that a workload never meets its policies late at start.
pub fn subscriptions() -> Vec<Subscription> {
    vec![Subscription::wildcard(authorization::TYPE), Subscription::wildcard(wds::TYPE)]
}

// === impl Tables ===

impl Tables {
    /// Fills these tables; with `prepare`, certificates of HBONE workloads of that node are prepared.
    pub fn new(
        mesh: Arc<Mesh>,
        policies: Arc<Policies>,
        prepare: Option<(Arc<Certificates>, Arc<str>)>,
        registry: &Registry,
    ) -> Self {
        Self {
            mesh,
            policies,
            prepare,
            texts: Interner::default(),
            prepared: BTreeSet::new(),
            unreadable: BTreeSet::new(),
            refused: registry.counter("cairn_refused_resources_total", "Resources of istiod that were refused.", &[]),
        }
    }

    fn addresses(&mut self, update: &Update) -> Vec<String> {
        let mut problems = Vec::new();
        for changed in &update.changed {
            match wds::apply(&changed.name, &changed.bytes, &self.mesh, &mut self.texts) {
                Ok(()) => self.prepare(&changed.name),
                Err(error) => problems.push(error.to_string()),
            }
        }
        for name in &update.removed {
            self.mesh.remove(name);
            self.unprepare(name);
        }
        self.mesh.pushed();
        problems
    }

    fn prepare(&mut self, uid: &str) {
        let Some((certificates, node)) = &self.prepare else { return };
        let workload = self.mesh.workload(uid);
        let ours = workload.filter(|workload| {
            workload.node == *node && workload.tunnel == Tunnel::Hbone && !workload.host_network && !workload.native_tunnel
        });
        match ours
            .as_ref()
            .and_then(|workload| Some((workload.uid(), workload.identity()?)))
        {
            Some((uid, identity)) => {
                certificates.prepare(uid, identity);
                self.prepared.insert(uid.clone());
            }
            None => self.unprepare(uid),
        }
    }

    fn unprepare(&mut self, uid: &str) {
        if let Some((certificates, _)) = &self.prepare
            && self.prepared.remove(uid)
        {
            certificates.forget(uid);
        }
    }

    fn authorizations(&mut self, update: &Update) -> Vec<String> {
        let (mut changed, mut problems) = (Vec::new(), Vec::new());
        for resource in &update.changed {
            match authorization::read(&resource.name, &resource.bytes) {
                Ok(policy) => {
                    self.unreadable.remove(&resource.name);
                    changed.push(policy);
                }
                Err(error) => {
                    problems.push(error.to_string());
                    if !self.policies.contains(&resource.name) || self.unreadable.contains(&resource.name) {
                        self.unreadable.insert(resource.name.clone());
                        changed.push(authorization::worst(&resource.name, &resource.bytes));
                    }
                }
            }
        }
        for name in &update.removed {
            self.unreadable.remove(name);
        }
        self.policies.change(changed, &update.removed);
        problems
    }
}

impl Consumer for Tables {
    fn apply(&mut self, update: Update) -> Verdict {
        let problems = match update.type_url.as_str() {
            wds::TYPE => self.addresses(&update),
            authorization::TYPE => self.authorizations(&update),
            other => vec![format!("{other} was not asked for")],
        };
        if problems.is_empty() {
            return Verdict::accepted();
        }
        self.refused.add(problems.len() as u64);
        let mut words = problems.iter().take(MOST_NAMED).cloned().collect::<Vec<_>>().join("; ");
        if problems.len() > MOST_NAMED {
            words.push_str(&format!("; and {} more", problems.len() - MOST_NAMED));
        }
        Verdict::refused(words)
    }
}

#[cfg(test)]
mod tests {
    use cairn_exchange::clock;
    use cairn_proto::istio::{
        security::{Address, Authorization, Group, Match, Rules},
        workload::{self as wire, address::Type},
    };
    use cairn_xds::Changed;
    use prost::Message as _;

    use super::*;
    use crate::policies::Asked;

    fn tables() -> (Tables, Arc<Mesh>, Arc<Policies>) {
        let (mesh, policies) = (Arc::new(Mesh::new("")), Arc::new(Policies::default()));
        (
            Tables::new(mesh.clone(), policies.clone(), None, &Registry::new()),
            mesh,
            policies,
        )
    }

    fn update(type_url: &str, changed: Vec<(&str, Vec<u8>)>) -> Update {
        let changed = changed.into_iter().map(|(name, bytes)| Changed {
            name: name.to_owned(),
            version: String::new(),
            aliases: Vec::new(),
            type_url: type_url.into(),
            bytes: bytes.into(),
        });
        Update {
            type_url: type_url.into(),
            system_version: String::new(),
            nonce: String::new(),
            changed: changed.collect(),
            removed: Vec::new(),
            received: clock::now(),
            bytes: 0,
        }
    }

    #[test]
    fn the_good_apply_beside_the_bad_which_are_named() {
        let (mut tables, mesh, _) = tables();
        let pod = |name: &str, tunnel| {
            let workload = wire::Workload {
                uid: name.into(),
                addresses: vec![vec![10, 1, 0, 1]],
                tunnel_protocol: tunnel,
                ..wire::Workload::default()
            };
            wire::Address {
                r#type: Some(Type::Workload(workload)),
            }
            .encode_to_vec()
        };
        let verdict = tables.apply(update(
            wds::TYPE,
            vec![
                ("good", pod("good", 1)),
                ("legacy", pod("legacy", 2)),
                ("junk", b"\xff\xff".to_vec()),
            ],
        ));
        let words = verdict.error.unwrap();
        assert!(
            words.contains("legacy: tunnel_protocol") && words.contains("junk: "),
            "{words}"
        );
        assert!(mesh.workload("good").is_some() && mesh.workload("legacy").is_none());
    }

    #[test]
    fn a_policy_that_became_unreadable_stays_as_it_was_and_a_new_one_shuts_the_door() {
        let (mut tables, _, policies) = tables();
        let allow = |length| {
            let source = Address {
                address: vec![10, 2, 0, 0],
                length,
            };
            let one = Match {
                source_ips: vec![source],
                ..Match::default()
            };
            Authorization {
                name: "p".into(),
                namespace: "app".into(),
                scope: 1,
                groups: vec![Group {
                    rules: vec![Rules { matches: vec![one] }],
                }],
                ..Authorization::default()
            }
            .encode_to_vec()
        };
        let web = crate::testing::workload("web", &[]);
        let passes = |source: [u8; 4]| {
            let asked = Asked {
                peer: None,
                source: source.into(),
                destination: "10.1.0.1:80".parse().unwrap(),
            };
            policies.ruling(&web).decide(asked).is_ok()
        };
        assert!(
            tables
                .apply(update(authorization::TYPE, vec![("app/p", allow(16))]))
                .error
                .is_none()
        );
        let refused = tables.apply(update(authorization::TYPE, vec![("app/p", allow(77))]));
        assert!(refused.error.unwrap().contains("/77"));
        assert!(passes([10, 2, 0, 1]) && !passes([10, 3, 0, 1]));
        let (mut tables, _, policies) = self::tables();
        let passes = |policies: &Policies| {
            let asked = Asked {
                peer: None,
                source: [10, 2, 0, 1].into(),
                destination: "10.1.0.1:80".parse().unwrap(),
            };
            policies.ruling(&web).decide(asked).is_ok()
        };
        assert!(
            tables
                .apply(update(authorization::TYPE, vec![("app/p", allow(77))]))
                .error
                .is_some()
        );
        assert!(!passes(&policies));
        assert!(
            tables
                .apply(update(authorization::TYPE, vec![("app/p", allow(16))]))
                .error
                .is_none()
        );
        assert!(passes(&policies));
    }
}
