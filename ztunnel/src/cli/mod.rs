//! The commands of `cairn-ztunnel`.

pub mod policies;
pub mod proxy;
