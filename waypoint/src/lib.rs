//! The waypoint proxy
