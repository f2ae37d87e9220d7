//! Subsets of a cluster's endpoints (`lb_subset_config`): which endpoints a request may go to, by what both say of themselves.
//!
//! Endpoints have labels, a request has criteria (of its route, its weighted cluster, and what filters noted). Selectors name the sets of
//! labels by which endpoints are put together; a request whose criteria name exactly those labels goes to the endpoints that have its
//! values. Where nobody has them, or no selector is about those labels, a fallback decides. This module says which subset that is;
//! what endpoints are in it, and which of them is chosen, is for its callers.

use std::{collections::BTreeMap, sync::Arc};

use serde_json::Value;

/// The most values of lists that one endpoint stands for, over all labels of a selector: more subsets than these are not made of it.
const MOST_COMBINATIONS: usize = 64;

/// What an endpoint says of itself: values in one form, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Labels(BTreeMap<Arc<str>, Label>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Label {
    whole: Arc<str>,
    /// The members, where the value is a list.
    members: Vec<Arc<str>>,
}

/// What a request asks of endpoints: labels and their values, in order of the labels' names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Criteria(Vec<(Arc<str>, Arc<str>)>);

/// How endpoints are put together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SubsetRules {
    /// Sets of labels.
    pub selectors: Vec<Selector>,
    /// For requests without a subset.
    pub fallback: Fallback,
    /// What [`Fallback::Default`] stands for.
    pub default: Criteria,
    /// An endpoint with a list of values is in the subset of each of them.
    pub list_as_any: bool,
    /// Where the fallback has nobody, everybody counts.
    pub panic_to_all: bool,
    /// Localities share within subsets by weight.
    pub by_locality: bool,
    /// Their weights count for as much as they have endpoints in the subset.
    pub scale_localities: bool,
}

/// Labels by which endpoints are put together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selector {
    /// Their names, in order and each once.
    keys: Vec<Arc<str>>,
    /// For requests that name them, with values that nobody has.
    fallback: SelectorFallback,
}

/// Who serves requests without a subset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fallback {
    /// Nobody.
    #[default]
    Nobody,
    /// Everybody.
    All,
    /// The endpoints of the default subset.
    Default,
}

/// The same for one selector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SelectorFallback {
    /// As for all.
    AsCluster,
    /// In its own way.
    Of(Fallback),
    /// The subset by fewer labels.
    Keys(Vec<Arc<str>>),
}

/// The endpoints that a request may go to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chosen {
    /// Nobody.
    Nobody,
    /// Everybody.
    All,
    /// The default subset.
    Default,
    /// Those of a selector that have these values.
    Subset(Criteria),
}

// === impl Labels ===

impl Labels {
    /// Labels with these values.
    pub fn new<'v>(of: impl IntoIterator<Item = (&'v str, &'v Value)>) -> Self {
        let label = |(name, value): (&str, &Value)| {
            let members = match value {
                Value::Array(members) => members.iter().map(text).collect(),
                _ => Vec::new(),
            };
            let whole = text(value);
            (Arc::from(name), Label { whole, members })
        };
        Self(of.into_iter().map(label).collect())
    }

    /// Whether an endpoint with these labels has all the values that are asked for.
    pub fn meet(&self, criteria: &Criteria, list_as_any: bool) -> bool {
        criteria.0.iter().all(|(name, value)| {
            let has = |label: &Label| label.whole == *value || list_as_any && label.members.contains(value);
            self.0.get(name).is_some_and(has)
        })
    }
}

/// One form for all values that are the same.
fn text(value: &Value) -> Arc<str> {
    match value.as_f64() {
        // Envoy's numbers are all of one kind.
        Some(number) => number.to_string().into(),
        None => value.to_string().into(),
    }
}

// === impl Criteria ===

impl Criteria {
    /// Criteria of these values.
    pub fn new<'v>(of: impl IntoIterator<Item = (&'v str, &'v Value)>) -> Self {
        let all: BTreeMap<Arc<str>, Arc<str>> = of.into_iter().map(|(name, value)| (name.into(), text(value))).collect();
        Self(all.into_iter().collect())
    }

    /// These, and those of `nearer`, which win.
    #[must_use]
    pub fn merged(&self, nearer: &Self) -> Self {
        let all: BTreeMap<_, _> = self.0.iter().chain(&nearer.0).cloned().collect();
        Self(all.into_iter().collect())
    }

    /// Whether nothing is asked.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn names(&self, keys: &[Arc<str>]) -> bool {
        self.0.len() == keys.len() && self.0.iter().zip(keys).all(|((name, _), key)| name == key)
    }

    fn only(&self, keys: &[Arc<str>]) -> Self {
        Self(self.0.iter().filter(|(name, _)| keys.contains(name)).cloned().collect())
    }
}

impl std::fmt::Display for Criteria {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (number, (name, value)) in self.0.iter().enumerate() {
            let comma = if number == 0 { "" } else { ", " };
            write!(f, "{comma}{name}={value}")?;
        }
        Ok(())
    }
}

// === impl Selector ===

impl Selector {
    /// A selector by these labels.
    pub fn new(keys: impl IntoIterator<Item = String>, fallback: SelectorFallback) -> Self {
        let keys: std::collections::BTreeSet<Arc<str>> = keys.into_iter().map(Into::into).collect();
        Self {
            keys: keys.into_iter().collect(),
            fallback,
        }
    }

    /// The labels' names.
    pub fn keys(&self) -> &[Arc<str>] {
        &self.keys
    }
}

// === impl SubsetRules ===

impl SubsetRules {
    /// The subsets that an endpoint with these labels is in.
    pub fn memberships(&self, labels: &Labels) -> Vec<Criteria> {
        let of = |selector: &Selector| self.combinations(&selector.keys, labels);
        let mut all: Vec<Criteria> = self.selectors.iter().flat_map(of).collect();
        // Two selectors may name the same labels.
        let mut seen = std::collections::HashSet::new();
        all.retain(|criteria| seen.insert(criteria.clone()));
        all
    }

    fn combinations(&self, keys: &[Arc<str>], labels: &Labels) -> Vec<Criteria> {
        let mut all = vec![Vec::new()];
        for key in keys {
            let Some(label) = labels.0.get(key) else { return Vec::new() };
            let values = match label.members.as_slice() {
                members @ [_, ..] if self.list_as_any => members,
                _ => std::slice::from_ref(&label.whole),
            };
            all = all
                .iter()
                .flat_map(|so_far: &Vec<(Arc<str>, Arc<str>)>| {
                    let with = |value: &Arc<str>| so_far.iter().cloned().chain([(key.clone(), value.clone())]).collect();
                    values.iter().map(with)
                })
                .take(MOST_COMBINATIONS)
                .collect();
        }
        if keys.is_empty() {
            return Vec::new();
        }
        all.into_iter().map(Criteria).collect()
    }

    /// The endpoints for a request; `exists` tells whether anybody is in a subset.
    pub fn choose(&self, asked: &Criteria, exists: impl Fn(&Criteria) -> bool) -> Chosen {
        let Some(selector) = self.selector(asked) else {
            return self.fallback.chosen();
        };
        if exists(asked) {
            return Chosen::Subset(asked.clone());
        }
        match &selector.fallback {
            SelectorFallback::AsCluster => self.fallback.chosen(),
            SelectorFallback::Of(fallback) => fallback.chosen(),
            // Fewer labels each time, so that this ends.
            SelectorFallback::Keys(keys) if keys.len() < asked.0.len() => self.choose(&asked.only(keys), exists),
            SelectorFallback::Keys(_) => self.fallback.chosen(),
        }
    }

    fn selector(&self, asked: &Criteria) -> Option<&Selector> {
        if asked.is_empty() {
            return None;
        }
        self.selectors.iter().find(|selector| asked.names(&selector.keys))
    }
}

impl Fallback {
    fn chosen(self) -> Chosen {
        match self {
            Self::Nobody => Chosen::Nobody,
            Self::All => Chosen::All,
            Self::Default => Chosen::Default,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn criteria(value: &Value) -> Criteria {
        let fields = value.as_object().into_iter().flatten();
        Criteria::new(fields.map(|(name, value)| (name.as_str(), value)))
    }

    fn labels(value: &Value) -> Labels {
        let fields = value.as_object().into_iter().flatten();
        Labels::new(fields.map(|(name, value)| (name.as_str(), value)))
    }

    fn selector(keys: &[&str], fallback: SelectorFallback) -> Selector {
        Selector::new(keys.iter().map(|key| (*key).to_owned()), fallback)
    }

    #[test]
    fn a_request_goes_where_exactly_its_labels_are_selected() {
        let rules = SubsetRules {
            selectors: vec![
                selector(&["stage", "version"], SelectorFallback::AsCluster),
                selector(&["version"], SelectorFallback::Of(Fallback::All)),
                selector(&["zone", "version"], SelectorFallback::Keys(vec!["version".into()])),
            ],
            fallback: Fallback::Default,
            ..SubsetRules::default()
        };
        let there = rules.memberships(&labels(&json!({"version": "1", "stage": "prod", "zone": "a", "other": true})));
        assert_eq!(there.len(), 3);
        let subset = |value| Chosen::Subset(criteria(&value));
        for (asked, chosen) in [
            (json!({"version": "1"}), subset(json!({"version": "1"}))),
            (
                json!({"version": "1", "stage": "prod"}),
                subset(json!({"version": "1", "stage": "prod"})),
            ),
            // Nobody has these.
            (json!({"version": 1}), Chosen::All),
            (json!({"version": "1", "stage": "dev"}), Chosen::Default),
            (json!({"version": "1", "zone": "b"}), subset(json!({"version": "1"}))),
            (json!({"version": "2", "zone": "b"}), Chosen::All),
            // No selector is about these.
            (json!({"stage": "prod"}), Chosen::Default),
            (json!({"version": "1", "stage": "prod", "zone": "a"}), Chosen::Default),
            (json!({}), Chosen::Default),
        ] {
            assert_eq!(rules.choose(&criteria(&asked), |of| there.contains(of)), chosen, "{asked}");
        }
    }

    #[test]
    fn lists_are_one_value_or_each_of_theirs() {
        let endpoint = labels(&json!({"version": ["1", "2"], "stage": "prod"}));
        for (list_as_any, expected) in [
            (false, vec![json!({"version": ["1", "2"]})]),
            (true, vec![json!({"version": "1"}), json!({"version": "2"})]),
        ] {
            let rules = SubsetRules {
                selectors: vec![selector(&["version"], SelectorFallback::AsCluster)],
                list_as_any,
                ..SubsetRules::default()
            };
            assert_eq!(
                rules.memberships(&endpoint),
                expected.iter().map(criteria).collect::<Vec<_>>()
            );
            assert_eq!(
                endpoint.meet(&criteria(&json!({"version": "2", "stage": "prod"})), list_as_any),
                list_as_any
            );
        }
        let many = Value::from((0..100).collect::<Vec<_>>());
        let rules = SubsetRules {
            selectors: vec![selector(&["a", "b"], SelectorFallback::AsCluster)],
            list_as_any: true,
            ..SubsetRules::default()
        };
        assert_eq!(
            rules.memberships(&labels(&json!({"a": many, "b": many}))).len(),
            MOST_COMBINATIONS
        );
    }

    #[test]
    fn what_is_nearer_to_the_request_wins() {
        let route = criteria(&json!({"version": "1", "stage": "prod"}));
        let weighted = criteria(&json!({"version": "2"}));
        assert_eq!(route.merged(&weighted), criteria(&json!({"stage": "prod", "version": "2"})));
        assert_eq!(criteria(&json!({"n": 1})), criteria(&json!({"n": 1.0})));
        assert_ne!(criteria(&json!({"n": 1})), criteria(&json!({"n": "1"})));
    }
}
