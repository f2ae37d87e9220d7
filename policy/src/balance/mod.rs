//! Who gets the next request: the arithmetic of load balancing, without endpoints.
//!
//! Functions over weights, counts and random numbers. Whoever knows the live endpoints feeds them in: [`priority_shares`] says which
//! priority gets which share, [`locality_shares`] does so for the localities of one, [`Weights`], [`AliasTable`], [`smooth_sequence`]
//! and [`least_loaded`] choose inside.

mod least;
mod priority;
mod sequence;
mod weights;

pub use least::{least_loaded, two_of, weighted_load};
pub use priority::{
    DEFAULT_OVERPROVISIONING, DEFAULT_PANIC_THRESHOLD, PriorityHealth, PriorityShares, locality_shares, priority_shares,
    untried_priority_shares,
};
pub use sequence::{MOST_SEQUENCE, smooth_sequence};
pub use weights::{AliasTable, WeightSumError, Weights};
