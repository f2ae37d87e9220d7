//! The endpoints of an assignment with the live state of those that were there before.
//!
//! An endpoint about which nothing has changed goes on as it is, with its connections, counts and ejection; of one that has changed
//! the state goes on. Mostly one or a few change. So those at the beginning and the end of each locality are compared one by one,
//! and only what is left between is looked up by its target; where that is much, or an assignment has what is not to be seen from
//! these alone (two endpoints with one address, names, transports that are refused), all are looked up.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use foldhash::fast::RandomState;

use super::{
    assignment::{Assignment, Group},
    endpoint::{Reach, Reached},
    report::{Notes, Unsupported},
    transport::MatchedTransports,
};
use crate::upstream::{ClusterSettings, Endpoint, EndpointSet, LocalityGroup, Target, TransportTerms};

/// How many endpoints that may have changed are looked for one by one among all.
const FEW: usize = 16;

type Index<'a> = HashMap<&'a Target, &'a Arc<Endpoint>, RandomState>;

/// A group beside the one before it.
struct Beside<'a> {
    /// Those at the beginning that go on, those between, those at the end that go on.
    before: [&'a [Arc<Endpoint>]; 3],
    changed: Vec<&'a Reached>,
}

impl Assignment {
    /// The endpoints with their live state: that of `previous`, where an endpoint was in it. `addresses` knows those of a name.
    /// Endpoints that ask for a transport that we cannot do are left out and listed; of two with the same address the first counts,
    /// as in Envoy.
    pub(crate) fn endpoints<'a>(
        &self,
        cluster: &str,
        settings: &ClusterSettings,
        matched: &MatchedTransports,
        previous: &EndpointSet,
        addresses: impl Fn(&str) -> &'a [IpAddr],
        unsupported: &mut Vec<Unsupported>,
    ) -> EndpointSet {
        let lists = match self.few_changed(matched, previous) {
            Some(lists) => lists,
            None => self.any_changed(cluster, matched, previous, addresses, unsupported),
        };
        let groups = std::iter::zip(&self.groups, lists)
            .map(|(group, endpoints)| {
                let of = LocalityGroup {
                    locality: group.locality.clone(),
                    weight: group.weight,
                    endpoints,
                };
                (group.priority, of)
            })
            .collect();
        EndpointSet::new(groups, settings.arrangement(self.overprovisioning)).dropping(self.dropped)
    }

    /// The endpoints of each group, where nearly all go on as they are.
    fn few_changed(&self, matched: &MatchedTransports, previous: &EndpointSet) -> Option<Vec<Arc<[Arc<Endpoint>]>>> {
        let mut places: Vec<(usize, &LocalityGroup)> = Vec::new();
        let mut beside = Vec::with_capacity(self.groups.len());
        for group in &self.groups {
            let localities = &previous.priorities.get(group.priority)?.localities;
            let (index, before) = localities.iter().enumerate().find(|(_, before)| {
                let taken = places.iter().any(|(_, other)| std::ptr::eq(*other, &raw const ***before));
                before.locality == group.locality && !taken
            })?;
            places.push((index, before));
            beside.push(Beside::new(group, matched, &before.endpoints)?);
        }
        // Of those that nobody has any more, some may be in another group now.
        let known = places.len()
            == previous
                .priorities
                .iter()
                .map(|priority| priority.localities.len())
                .sum::<usize>();
        let left: Vec<&Arc<Endpoint>> = beside.iter().flat_map(|beside| beside.before[1]).collect();
        let changed: Vec<&Reached> = beside.iter().flat_map(|beside| beside.changed.iter().copied()).collect();
        if !known || left.len() > FEW || changed.len() > FEW {
            return None;
        }
        let mut seen: Vec<&Target> = Vec::with_capacity(changed.len());
        for reached in &changed {
            let Reach::At(target) = &reached.target else { return None };
            let goes_on = || {
                let mut all = beside
                    .iter()
                    .flat_map(|beside| beside.before[0].iter().chain(beside.before[2]));
                all.any(|endpoint| endpoint.target == *target)
            };
            let refused = matches!(
                matched.of(&reached.asks).map(Arc::as_ref),
                Some(TransportTerms::Unsupported(_))
            );
            if refused || seen.contains(&target) || goes_on() {
                return None;
            }
            seen.push(target);
        }
        let lists = std::iter::zip(&self.groups, &beside).map(|(group, beside)| {
            let [first, _, last] = beside.before;
            let changed = beside.changed.iter().filter_map(|reached| {
                let Reach::At(target) = &reached.target else { return None };
                let before = left.iter().find(|endpoint| endpoint.target == *target).copied();
                Some(reached.alive(target, &reached.display, matched.of(&reached.asks), before, &group.locality))
            });
            let mut list = Vec::with_capacity(first.len() + beside.changed.len() + last.len());
            list.extend_from_slice(first);
            list.extend(changed);
            list.extend_from_slice(last);
            list.into()
        });
        Some(lists.collect())
    }

    /// The endpoints of each group, whatever has changed.
    fn any_changed<'a, 'b>(
        &'b self,
        cluster: &str,
        matched: &MatchedTransports,
        previous: &EndpointSet,
        addresses: impl Fn(&str) -> &'a [IpAddr],
        unsupported: &mut Vec<Unsupported>,
    ) -> Vec<Arc<[Arc<Endpoint>]>> {
        let count = self.groups.iter().map(|group| group.endpoints.len()).sum();
        let mut before: Index<'_> = HashMap::with_capacity_and_hasher(count, RandomState::default());
        before.extend(previous.iter().map(|endpoint| (&endpoint.target, endpoint)));
        let mut seen: HashSet<Cow<'b, Target>, RandomState> = HashSet::with_capacity_and_hasher(count, RandomState::default());
        let mut notes = Notes::of(cluster);
        let mut lists = Vec::with_capacity(self.groups.len());
        for group in &self.groups {
            let mut endpoints = Vec::with_capacity(group.endpoints.len());
            for reached in group.endpoints.iter().flatten() {
                let transport = matched.of(&reached.asks);
                if let Some(TransportTerms::Unsupported(reason)) = transport.map(Arc::as_ref) {
                    notes.refuse("", format!("endpoint {} is left out: {reason}", reached.display));
                    continue;
                }
                let mut add = |target: Cow<'b, Target>, display: &Arc<str>| {
                    if !seen.contains(&*target) {
                        let before = before.get(&*target).copied();
                        endpoints.push(reached.alive(&target, display, transport, before, &group.locality));
                        seen.insert(target);
                    }
                };
                match &reached.target {
                    Reach::At(target) => add(Cow::Borrowed(target), &reached.display),
                    Reach::Named(host, port) => {
                        for ip in addresses(host) {
                            let at = SocketAddr::new(*ip, *port);
                            add(Cow::Owned(Target::Plain(at)), &at.to_string().into());
                        }
                    }
                }
            }
            lists.push(endpoints.into());
        }
        unsupported.extend(notes.into_list());
        lists
    }
}

// === impl Beside ===

impl<'a> Beside<'a> {
    /// `None` when it is not to be told from the two alone.
    fn new(group: &'a Group, matched: &MatchedTransports, before: &'a [Arc<Endpoint>]) -> Option<Self> {
        let goes_on = |(now, before): &(&Reached, &Arc<Endpoint>)| {
            matches!(&now.target, Reach::At(target) if *target == before.target)
                && now.is(before, &now.display, matched.of(&now.asks), &group.locality)
        };
        let now = || group.endpoints.iter().flatten();
        let first = now().zip(before).take_while(goes_on).count();
        let left = before.get(first..)?;
        // Both from behind, and none of the first again.
        let last = now().rev().zip(left.iter().rev()).take_while(goes_on).count();
        let count = now().count();
        let last = last.min(count - first);
        let changed = count - first - last;
        if changed > FEW {
            return None;
        }
        let (between, last) = left.split_at_checked(left.len() - last)?;
        Some(Self {
            before: [before.get(..first)?, between, last],
            changed: now().skip(first).take(changed).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, sync::atomic::Ordering};

    use proptest::prelude::*;

    use super::*;
    use crate::upstream::{Health, Locality};

    /// Priority, zone, and endpoints by number and weight.
    type Told = (usize, u8, Vec<(u8, u32)>);

    fn assignment(groups: &[Told]) -> Assignment {
        let group = |(priority, zone, endpoints): &Told| Group {
            priority: *priority,
            locality: Arc::new(Locality {
                zone: zone.to_string().into(),
                ..Locality::default()
            }),
            weight: 1,
            endpoints: endpoints
                .iter()
                .map(|(number, weight)| {
                    let address = SocketAddr::from((Ipv4Addr::new(10, 0, 0, *number), 80));
                    (*number != 0).then(|| Reached {
                        target: Reach::At(Target::Plain(address)),
                        display: address.to_string().into(),
                        health: Health::Healthy,
                        weight: *weight,
                        hostname: None,
                        hash_key: None,
                        labels: Default::default(),
                        asks: Default::default(),
                    })
                })
                .collect(),
        };
        Assignment {
            groups: groups.iter().map(group).collect(),
            ..Assignment::default()
        }
    }

    fn set(assignment: &Assignment, previous: &EndpointSet) -> EndpointSet {
        let (settings, matched) = (ClusterSettings::default(), MatchedTransports::default());
        assignment.endpoints("web", &settings, &matched, previous, |_| &[], &mut Vec::new())
    }

    /// What each endpoint is, and how many requests its state has counted.
    fn told(lists: &[Arc<[Arc<Endpoint>]>]) -> Vec<Vec<(String, u32, u64)>> {
        let tell = |endpoint: &Arc<Endpoint>| {
            let total = endpoint.state.total.load(Ordering::Relaxed);
            (endpoint.display.to_string(), endpoint.weight, total)
        };
        lists.iter().map(|list| list.iter().map(tell).collect()).collect()
    }

    fn groups() -> impl Strategy<Value = Vec<Told>> {
        let endpoints = prop::collection::vec((0..12_u8, 1..3_u32), 0..10);
        prop::collection::vec((0..2_usize, 0..2_u8, endpoints), 0..4)
    }

    proptest! {
        #[test]
        fn few_changes_come_out_as_any_changes_do(before in groups(), now in groups(), edit in 0..3_u8, at in 0..40_usize) {
            // Mostly one that is like the one before but for a change.
            let mut now = if edit == 0 { now } else { before.clone() };
            if let Some((_, _, endpoints)) = now.first_mut() && edit > 0 {
                let at = at.min(endpoints.len());
                match edit {
                    1 => endpoints.insert(at, (13, 1)),
                    _ => { endpoints.truncate(at); }
                }
            }
            let before = set(&assignment(&before), &EndpointSet::default());
            for (number, endpoint) in before.iter().enumerate() {
                endpoint.state.total.store(number as u64 + 1, Ordering::Relaxed);
            }
            let (now, matched) = (assignment(&now), MatchedTransports::default());
            let any = now.any_changed("web", &matched, &before, |_| &[], &mut Vec::new());
            if let Some(few) = now.few_changed(&matched, &before) {
                prop_assert_eq!(told(&few), told(&any));
            }
        }
    }

    #[test]
    fn those_that_go_on_are_not_looked_up() {
        let of = |numbers: &[u8]| assignment(&[(0, 0, numbers.iter().map(|number| (*number, 1)).collect())]);
        let before = set(&of(&[1, 2, 3, 4, 5]), &EndpointSet::default());
        let matched = MatchedTransports::default();
        for (now, few) in [
            (&[1, 2, 9, 4, 5][..], true),
            (&[1, 2, 4, 5], true),
            (&[9, 1, 2, 3, 4, 5], true),
            (&[5, 4, 3, 2, 1], true),
            // Whether an address comes twice is looked up.
            (&[1, 2, 2, 3, 4, 5], false),
            (&[1, 2, 9, 9, 3, 4, 5], false),
        ] {
            assert_eq!(of(now).few_changed(&matched, &before).is_some(), few, "{now:?}");
        }
    }
}
