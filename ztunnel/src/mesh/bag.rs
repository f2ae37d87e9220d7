//! Endpoints that may all be chosen, each by its share.
//!
//! A binary indexed tree over the shares: adding, removing and choosing take a number of steps that grows with the logarithm of their
//! number, so that 10,000 endpoints cost what 10 do.

use std::{collections::HashMap, sync::Arc};

use foldhash::fast::RandomState;

use super::workload::{Ports, Workload};

/// One endpoint of a service.
#[derive(Clone, Debug)]
pub(super) struct Member {
    pub(super) workload: Arc<Workload>,
    pub(super) ports: Ports,
}

/// Endpoints and their shares.
#[derive(Debug, Default)]
pub(super) struct Bag {
    members: Vec<Member>,
    /// Sums of shares: entry `i` (from 1) covers as many entries up to `i` as its lowest bit says.
    sums: Vec<u64>,
    places: HashMap<Arc<str>, usize, RandomState>,
}

// === impl Bag ===

impl Bag {
    pub(super) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Member> {
        self.members.iter()
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    fn total(&self) -> u64 {
        self.prefix(self.members.len())
    }

    /// The sum of the first `count` shares.
    fn prefix(&self, count: usize) -> u64 {
        let (mut at, mut sum) = (count, 0);
        while at > 0 {
            sum += self.sums.get(at - 1).copied().unwrap_or_default();
            at -= lowest_bit(at);
        }
        sum
    }

    fn change(&mut self, index: usize, by: i64) {
        let mut at = index + 1;
        while let Some(sum) = self.sums.get_mut(at - 1) {
            *sum = sum.saturating_add_signed(by);
            at += lowest_bit(at);
        }
    }

    /// Adds an endpoint, or puts it in the place of what it was.
    pub(super) fn insert(&mut self, member: Member) {
        let uid = member.workload.uid().clone();
        let share = u64::from(member.workload.capacity);
        if let Some(index) = self.places.get(&uid).copied()
            && let Some(place) = self.members.get_mut(index)
        {
            let before = i64::from(place.workload.capacity);
            let by = i64::from(member.workload.capacity) - before;
            *place = member;
            self.change(index, by);
            return;
        }
        let at = self.members.len() + 1;
        let covered = self.prefix(at - 1) - self.prefix(at - lowest_bit(at));
        self.sums.push(covered + share);
        self.places.insert(uid, self.members.len());
        self.members.push(member);
    }

    /// Takes an endpoint away; whether it was there.
    pub(super) fn remove(&mut self, uid: &str) -> bool {
        let Some(index) = self.places.remove(uid) else {
            return false;
        };
        let Some(last) = self.members.pop() else { return false };
        self.sums.pop();
        if let Some(place) = self.members.get_mut(index) {
            let by = i64::from(last.workload.capacity) - i64::from(place.workload.capacity);
            self.places.insert(last.workload.uid().clone(), index);
            *place = last;
            self.change(index, by);
        }
        true
    }

    /// One that is acceptable, by shares; those that are not are passed over. Only when luck has failed several times all are looked
    /// at.
    pub(super) fn choose(&self, acceptable: impl Fn(&Member) -> bool) -> Option<&Member> {
        const TRIES: usize = 8;
        let total = self.total();
        if total == 0 {
            return None;
        }
        for _ in 0..TRIES {
            let member = self.at(fastrand::u64(..total))?;
            if acceptable(member) {
                return Some(member);
            }
        }
        let (before, after) = self.members.split_at(fastrand::usize(..self.members.len()));
        after
            .iter()
            .chain(before)
            .find(|member| member.workload.capacity > 0 && acceptable(member))
    }

    /// The member whose share covers this point.
    fn at(&self, mut point: u64) -> Option<&Member> {
        let mut place = 0;
        let mut step = self.sums.len().next_power_of_two();
        while step > 0 {
            if let Some(sum) = self.sums.get(place + step - 1)
                && *sum <= point
            {
                point -= sum;
                place += step;
            }
            step /= 2;
        }
        self.members.get(place)
    }
}

fn lowest_bit(number: usize) -> usize {
    number & number.wrapping_neg()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing;

    fn member(name: usize, capacity: u32) -> Member {
        let mut workload = testing::workload(&format!("w{name}"), &[]);
        workload.capacity = capacity;
        Member {
            workload: Arc::new(workload),
            ports: Arc::from([]),
        }
    }

    proptest! {
        #[test]
        fn every_point_belongs_to_the_member_that_a_walk_finds(changes in prop::collection::vec((0..20usize, prop::option::of(0..5u32)), 1..80)) {
            let mut bag = Bag::default();
            let mut plain: HashMap<String, u32> = HashMap::new();
            for (name, change) in changes {
                match change {
                    Some(capacity) => {
                        bag.insert(member(name, capacity));
                        plain.insert(member(name, 0).workload.uid().to_string(), capacity);
                    }
                    None => {
                        let uid = member(name, 0).workload.uid().clone();
                        prop_assert_eq!(bag.remove(&uid), plain.remove(&*uid).is_some());
                    }
                }
                prop_assert_eq!(bag.len(), plain.len());
                prop_assert_eq!(bag.total(), plain.values().map(|share| u64::from(*share)).sum::<u64>());
                let mut found: HashMap<String, u32> = HashMap::new();
                for point in 0..bag.total() {
                    *found.entry(bag.at(point).unwrap().workload.uid().to_string()).or_default() += 1;
                }
                plain.iter().filter(|(_, share)| **share > 0).for_each(|(uid, share)| assert_eq!(found.get(uid), Some(share)));
            }
        }
    }

    #[test]
    fn who_has_no_share_is_never_chosen() {
        let mut bag = Bag::default();
        bag.insert(member(0, 0));
        assert!(bag.choose(|_| true).is_none());
        bag.insert(member(1, 2));
        bag.insert(member(2, 0));
        for _ in 0..50 {
            assert_eq!(bag.choose(|_| true).unwrap().workload.uid(), member(1, 0).workload.uid());
        }
        assert!(bag.choose(|member| member.workload.capacity == 0).is_none());
    }
}
