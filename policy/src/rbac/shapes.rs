//! Many shapes of one text, looked up together.
//!
//! Whole texts lie in a hash set. Beginnings and ends lie sorted, each with the longest other one that it extends: all that fit a text
//! are on the way up from where the text would stand. Parts are searched for by one automaton, expressions by one set of them. Each
//! shape has a slot, a number that whoever asks knows it by.

use std::{cmp::Ordering, collections::HashMap, sync::Arc};

use aho_corasick::AhoCorasick;
use cairn_exchange::regex::{Regex, RegexSet};
use foldhash::fast::RandomState;

/// A shape of a text; case counts.
#[derive(Clone, Debug)]
pub(super) enum Shape {
    Exact(Arc<str>),
    Prefix(Arc<str>),
    Suffix(Arc<str>),
    Contains(Arc<str>),
    Regex(Regex),
}

/// Shapes, each with its slot.
#[derive(Clone, Debug, Default)]
pub(super) struct Shapes {
    exact: HashMap<Arc<[u8]>, u32, RandomState>,
    prefixes: Affixes,
    suffixes: Affixes,
    parts: Option<Box<(AhoCorasick, Box<[u32]>)>>,
    expressions: Option<Box<(RegexSet, Box<[u32]>)>>,
}

/// Beginnings or ends.
#[derive(Clone, Debug, Default)]
struct Affixes {
    ends: bool,
    sorted: Box<[Affix]>,
}

#[derive(Clone, Debug)]
struct Affix {
    text: Arc<[u8]>,
    slot: u32,
    /// The longest of the others that this one extends.
    within: Option<u32>,
}

/// Shapes that could not be put together: they would take too much memory.
#[derive(Debug)]
pub(super) struct TooLarge;

// === impl Shapes ===

impl Shapes {
    pub(super) fn new(shapes: impl IntoIterator<Item = (Shape, u32)>) -> Result<Self, TooLarge> {
        let mut exact = HashMap::default();
        let (mut prefixes, mut suffixes, mut parts, mut expressions) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (shape, slot) in shapes {
            match shape {
                Shape::Exact(text) => drop(exact.insert(Arc::<[u8]>::from(text), slot)),
                Shape::Prefix(text) => prefixes.push((text, slot)),
                Shape::Suffix(text) => suffixes.push((text, slot)),
                Shape::Contains(text) => parts.push((text, slot)),
                Shape::Regex(regex) => expressions.push((regex, slot)),
            }
        }
        exact.shrink_to_fit();
        let parts = if parts.is_empty() {
            None
        } else {
            let automaton = AhoCorasick::new(parts.iter().map(|(text, _)| text.as_bytes())).map_err(|_| TooLarge)?;
            Some(Box::new((automaton, parts.into_iter().map(|(_, slot)| slot).collect())))
        };
        let expressions = if expressions.is_empty() {
            None
        } else {
            let set = RegexSet::new(expressions.iter().map(|(regex, _)| regex)).map_err(|_| TooLarge)?;
            Some(Box::new((set, expressions.into_iter().map(|(_, slot)| slot).collect())))
        };
        Ok(Self {
            exact,
            prefixes: Affixes::new(prefixes, false),
            suffixes: Affixes::new(suffixes, true),
            parts,
            expressions,
        })
    }

    /// Whether the text has one of the shapes.
    pub(super) fn any(&self, text: &[u8]) -> bool {
        self.exact.contains_key(text)
            || self.prefixes.longest(text).is_some()
            || self.suffixes.longest(text).is_some()
            || self.parts.as_deref().is_some_and(|(automaton, _)| automaton.is_match(text))
            || self.expressions.as_deref().is_some_and(|(set, _)| set.any(text))
    }

    /// Calls `f` with the slots of the shapes that the text has; a slot may come more than once.
    pub(super) fn each(&self, text: &[u8], f: &mut impl FnMut(u32)) {
        if let Some(slot) = self.exact.get(text) {
            f(*slot);
        }
        self.prefixes.each(text, f);
        self.suffixes.each(text, f);
        if let Some((automaton, slots)) = self.parts.as_deref() {
            for found in automaton.find_overlapping_iter(text) {
                slots.get(found.pattern().as_usize()).into_iter().for_each(|slot| f(*slot));
            }
        }
        if let Some((set, slots)) = self.expressions.as_deref() {
            set.each(text, |index| slots.get(index).into_iter().for_each(|slot| f(*slot)));
        }
    }
}

// === impl Affixes ===

impl Affixes {
    fn new(list: Vec<(Arc<str>, u32)>, ends: bool) -> Self {
        let affix = |(text, slot): (Arc<str>, u32)| Affix {
            text: text.into(),
            slot,
            within: None,
        };
        let mut affixes = Self {
            ends,
            sorted: list.into_iter().map(affix).collect(),
        };
        affixes.sorted.sort_by(|a, b| order(&a.text, &b.text, ends));
        let mut open: Vec<u32> = Vec::new();
        for at in 0..affixes.sorted.len() {
            let Some(text) = affixes.sorted.get(at).map(|affix| affix.text.clone()) else {
                break;
            };
            while let Some(last) = open.last() {
                if affixes.at(*last).is_some_and(|outer| outer.fits(&text, ends)) {
                    break;
                }
                open.pop();
            }
            if let Some(affix) = affixes.sorted.get_mut(at) {
                affix.within = open.last().copied();
            }
            open.extend(u32::try_from(at));
        }
        affixes
    }

    fn at(&self, at: u32) -> Option<&Affix> {
        self.sorted.get(usize::try_from(at).ok()?)
    }

    /// The longest that fits: whatever fits comes before the text in order, and what lies between extends it.
    fn longest(&self, text: &[u8]) -> Option<&Affix> {
        let after = self
            .sorted
            .partition_point(|affix| order(&affix.text, text, self.ends).is_le());
        let mut at = self.sorted.get(after.checked_sub(1)?)?;
        while !at.fits(text, self.ends) {
            at = self.at(at.within?)?;
        }
        Some(at)
    }

    fn each(&self, text: &[u8], f: &mut impl FnMut(u32)) {
        let mut next = self.longest(text);
        while let Some(affix) = next {
            f(affix.slot);
            next = affix.within.and_then(|within| self.at(within));
        }
    }
}

impl Affix {
    fn fits(&self, text: &[u8], ends: bool) -> bool {
        if ends {
            text.ends_with(&self.text)
        } else {
            text.starts_with(&self.text)
        }
    }
}

/// From the beginning, or from the end backwards.
fn order(a: &[u8], b: &[u8], ends: bool) -> Ordering {
    if ends { a.iter().rev().cmp(b.iter().rev()) } else { a.cmp(b) }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn shape() -> impl Strategy<Value = Shape> {
        ("[ab]{0,4}", 0..5u8).prop_map(|(text, kind)| {
            let shared = Arc::from(&*text);
            match kind {
                0 => Shape::Exact(shared),
                1 => Shape::Prefix(shared),
                2 => Shape::Suffix(shared),
                3 => Shape::Contains(shared),
                _ => Shape::Regex(Regex::new(&format!("{text}.*b?")).unwrap()),
            }
        })
    }

    fn has(shape: &Shape, text: &str) -> bool {
        match shape {
            Shape::Exact(whole) => **whole == *text,
            Shape::Prefix(start) => text.starts_with(&**start),
            Shape::Suffix(end) => text.ends_with(&**end),
            Shape::Contains(part) => text.contains(&**part),
            Shape::Regex(regex) => regex.matches(text.as_bytes()),
        }
    }

    proptest! {
        #[test]
        fn shapes_are_found_as_each_alone(shapes in vec(shape(), 0..20), texts in vec("[abc]{0,6}", 1..8)) {
            // Of equal whole texts the last one is kept: slots stand for shapes, not for those who ask.
            let numbered: Vec<_> = shapes.iter().cloned().zip(0u32..).collect();
            let together = Shapes::new(numbered.clone()).unwrap();
            for text in texts {
                let mut found = Vec::new();
                together.each(text.as_bytes(), &mut |slot| found.push(slot));
                let expected: Vec<u32> = numbered.iter().filter(|(shape, _)| has(shape, &text)).map(|(_, slot)| *slot).collect();
                prop_assert_eq!(together.any(text.as_bytes()), !expected.is_empty());
                for slot in &expected {
                    let same = |other: &u32| {
                        let (a, b) = (&shapes[*slot as usize], &shapes[*other as usize]);
                        other == slot || matches!((a, b), (Shape::Exact(a), Shape::Exact(b)) if a == b)
                    };
                    prop_assert!(found.iter().any(same), "{:?} {:?}", text, shapes);
                }
                prop_assert!(found.iter().all(|slot| expected.contains(slot)));
            }
        }
    }
}
