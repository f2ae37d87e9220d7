//! The subsets of a set of endpoints, each prepared for the choice among its members like the whole.
//!
//! They are made with the set, from the labels of its endpoints, and share those endpoints and their state; a request looks its subset up
//! by its criteria.

use std::{collections::HashMap, sync::Arc};

use cairn_policy::balance::{Chosen, Criteria, SubsetRules};

use super::{Arrangement, Endpoint, EndpointSet, LocalityGroup};

/// The most subsets of a cluster; endpoints of further ones are found by the fallback.
pub const MAX_SUBSETS: usize = 10_000;

/// The subsets of a set.
#[derive(Debug)]
pub struct Subsets {
    rules: Arc<SubsetRules>,
    by_labels: HashMap<Criteria, EndpointSet>,
    default: Option<EndpointSet>,
}

/// Where a request's endpoint is chosen.
pub enum Within<'s> {
    /// Among all.
    All,
    /// Among these.
    Subset(&'s EndpointSet),
    /// Nowhere.
    Nobody,
}

impl Subsets {
    /// Puts the endpoints of these localities together.
    pub fn new(localities: &[Vec<Arc<LocalityGroup>>], rules: &Arc<SubsetRules>, arrangement: &Arrangement) -> Self {
        let arrangement = Arrangement {
            subsets: None,
            locality_weighted: arrangement.locality_weighted && rules.by_locality,
            ..arrangement.clone()
        };
        // Endpoints by subset, level and locality.
        let mut members: HashMap<Criteria, Vec<(usize, usize, Arc<Endpoint>)>> = HashMap::new();
        for (level, groups) in localities.iter().enumerate() {
            for (index, group) in groups.iter().enumerate() {
                for endpoint in group.endpoints.iter() {
                    for subset in rules.memberships(&endpoint.labels) {
                        if members.len() < MAX_SUBSETS || members.contains_key(&subset) {
                            members.entry(subset).or_default().push((level, index, endpoint.clone()));
                        }
                    }
                }
            }
        }
        let set = |of: Vec<(usize, usize, Arc<Endpoint>)>| set(localities, of, rules, &arrangement);
        let by_labels = members.into_iter().map(|(subset, of)| (subset, set(of))).collect();
        let default = (!rules.default.is_empty()).then(|| {
            let all = localities.iter().enumerate().flat_map(|(level, groups)| {
                let groups = groups.iter().enumerate();
                groups.flat_map(move |(index, group)| group.endpoints.iter().map(move |endpoint| (level, index, endpoint)))
            });
            let meets = all.filter(|(.., endpoint)| endpoint.labels.meet(&rules.default, rules.list_as_any));
            set(meets
                .map(|(level, index, endpoint)| (level, index, endpoint.clone()))
                .collect())
        });
        Self {
            rules: rules.clone(),
            by_labels,
            default,
        }
    }

    /// Where the endpoint for a request is chosen.
    pub fn choose(&self, asked: &Criteria) -> Within<'_> {
        match self.rules.choose(asked, |subset| self.by_labels.contains_key(subset)) {
            Chosen::Nobody => Within::Nobody,
            Chosen::All => Within::All,
            Chosen::Subset(subset) => self.by_labels.get(&subset).map_or(Within::Nobody, Within::Subset),
            Chosen::Default => match &self.default {
                Some(default) if default.iter().next().is_some() => Within::Subset(default),
                _ if self.rules.panic_to_all => Within::All,
                _ => Within::Nobody,
            },
        }
    }
}

/// A set of some endpoints of these localities.
fn set(
    localities: &[Vec<Arc<LocalityGroup>>],
    of: Vec<(usize, usize, Arc<Endpoint>)>,
    rules: &SubsetRules,
    arrangement: &Arrangement,
) -> EndpointSet {
    let mut groups: Vec<Vec<Vec<Arc<Endpoint>>>> = localities.iter().map(|groups| vec![Vec::new(); groups.len()]).collect();
    for (level, index, endpoint) in of {
        if let Some(group) = groups.get_mut(level).and_then(|groups| groups.get_mut(index)) {
            group.push(endpoint);
        }
    }
    let mut list = Vec::new();
    for (level, (all, those)) in std::iter::zip(localities, groups).enumerate() {
        for (group, endpoints) in std::iter::zip(all, those) {
            let weight = if rules.scale_localities && !group.endpoints.is_empty() {
                let share = endpoints.len() as f64 / group.endpoints.len() as f64;
                (f64::from(group.weight) * share).round() as u32
            } else {
                group.weight
            };
            let of = LocalityGroup {
                locality: group.locality.clone(),
                weight,
                endpoints: endpoints.into(),
            };
            list.push((level, of));
        }
    }
    EndpointSet::new(list, arrangement.clone())
}

#[cfg(test)]
mod tests {
    use cairn_policy::balance::{Fallback, Labels, Selector, SelectorFallback};
    use serde_json::{Value, json};

    use super::*;
    use crate::upstream::{
        Avoid, ClusterSettings, Picking,
        fixtures::{cluster, endpoint, locality},
    };

    fn labelled(number: usize, labels: &Value) -> Endpoint {
        let labels = labels.as_object().into_iter().flatten();
        Endpoint {
            labels: Arc::new(Labels::new(labels.map(|(name, value)| (name.as_str(), value)))),
            ..endpoint(number)
        }
    }

    fn asks(value: &Value) -> Option<Arc<Criteria>> {
        let fields = value.as_object()?.iter();
        Some(Arc::new(Criteria::new(fields.map(|(name, value)| (name.as_str(), value)))))
    }

    fn picked(cluster: &crate::upstream::Cluster, asked: &Value) -> Vec<String> {
        let mut all: Vec<_> = (0..200)
            .filter_map(|_| {
                Picking::new(cluster)
                    .asking(asks(asked))
                    .next(fastrand::u64(..), Avoid::default())
            })
            .map(|endpoint| endpoint.display.to_string())
            .collect();
        all.sort();
        all.dedup();
        all
    }

    fn rules(fallback: Fallback) -> SubsetRules {
        SubsetRules {
            selectors: vec![Selector::new(["version".to_owned()], SelectorFallback::AsCluster)],
            fallback,
            default: (*asks(&json!({"stage": "prod"})).unwrap()).clone(),
            ..SubsetRules::default()
        }
    }

    #[test]
    fn a_request_stays_in_its_subset_and_others_go_where_the_fallback_says() {
        let (a, b, c) = ("10.0.0.1:8080", "10.0.0.2:8080", "10.0.0.3:8080");
        for (fallback, panic_to_all, without) in [
            (Fallback::Nobody, false, vec![]),
            (Fallback::Nobody, true, vec![]),
            (Fallback::All, false, vec![a, b, c]),
            (Fallback::Default, false, vec![c]),
        ] {
            let subsets = SubsetRules {
                panic_to_all,
                ..rules(fallback)
            };
            let settings = ClusterSettings {
                subsets: Some(Arc::new(subsets)),
                ..ClusterSettings::default()
            };
            let groups = vec![
                locality(
                    0,
                    "x",
                    1,
                    vec![labelled(1, &json!({"version": "1"})), labelled(2, &json!({"version": "2"}))],
                ),
                locality(0, "y", 1, vec![labelled(3, &json!({"version": "1", "stage": "prod"}))]),
            ];
            let cluster = cluster(groups, settings);
            assert_eq!(picked(&cluster, &json!({"version": "1"})), [a, c]);
            assert_eq!(picked(&cluster, &json!({"version": "2"})), [b]);
            assert_eq!(picked(&cluster, &json!({"version": "3"})), without, "{fallback:?}");
            assert_eq!(picked(&cluster, &json!({})), without, "{fallback:?}");
            cluster.state.reassess();
            assert_eq!(
                picked(&cluster, &json!({"version": "2"})),
                [b],
                "subsets are made anew with the set"
            );
        }
    }

    #[test]
    fn an_empty_default_subset_is_nobody_unless_panic_counts_everybody() {
        for (panic_to_all, number) in [(false, 0), (true, 1)] {
            let subsets = SubsetRules {
                panic_to_all,
                ..rules(Fallback::Default)
            };
            let settings = ClusterSettings {
                subsets: Some(Arc::new(subsets)),
                ..ClusterSettings::default()
            };
            let cluster = cluster(
                vec![locality(0, "x", 1, vec![labelled(1, &json!({"version": "1"}))])],
                settings,
            );
            assert_eq!(picked(&cluster, &json!({"version": "9"})).len(), number);
        }
    }

    #[test]
    fn a_retry_stays_in_the_subset() {
        let settings = ClusterSettings {
            subsets: Some(Arc::new(rules(Fallback::All))),
            ..ClusterSettings::default()
        };
        let endpoints = (1..=4).map(|number| labelled(number, &json!({"version": (number % 2).to_string()})));
        let cluster = cluster(vec![locality(0, "x", 1, endpoints.collect())], settings);
        let mut picking = Picking::new(&cluster).asking(asks(&json!({"version": "1"})));
        let avoid = Avoid {
            endpoints: true,
            ..Avoid::default()
        };
        let mut those: Vec<_> = (0..2)
            .map(|_| picking.next(fastrand::u64(..), avoid).unwrap().display.to_string())
            .collect();
        those.sort();
        assert_eq!(those, ["10.0.0.1:8080", "10.0.0.3:8080"]);
        assert!(!picking.has_others());
    }
}
