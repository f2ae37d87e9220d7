//! Who gets the next request: the arithmetic of load balancing, without endpoints.
//!
//! Functions over weights, counts and random numbers. Whoever knows the live endpoints feeds them in: [`priority_shares`] says which
//! priority gets which share, [`locality_shares`] does so for the localities of one, [`Weights`], [`AliasTable`], [`smooth_sequence`]
//! and [`least_loaded`] choose inside, [`choose_dynamic`] where weights change with each request, [`Ring`] and [`Maglev`] where a hash of the
//! request decides.

mod bounded;
mod dynamic;
mod least;
mod maglev;
mod murmur;
mod priority;
mod ring;
mod sequence;
mod slow_start;
mod subset;
mod weights;

pub use bounded::{Load, within_bounds};
pub use dynamic::choose_dynamic;
pub use least::{least_loaded, two_of, weighted_load};
pub use maglev::{DEFAULT_TABLE, MOST_ENTRIES, Maglev, is_prime};
pub use priority::{
    DEFAULT_OVERPROVISIONING, DEFAULT_PANIC_THRESHOLD, PriorityHealth, PriorityShares, locality_shares, priority_shares,
    untried_priority_shares,
};
pub use ring::{DEFAULT_MINIMUM, HashFunction, MOST_POINTS, Ring, RingSize};
pub use sequence::{MOST_SEQUENCE, smooth_sequence};
pub use slow_start::SlowStart;
pub use subset::{Chosen, Criteria, Fallback, Labels, Selector, SelectorFallback, SubsetRules};
pub use weights::{AliasTable, WeightSumError, Weights};
