//! Whether backends do their work: probes that take the way of clients' packets, and what their results mean.
//!
//! * [`machine`] turns results into up and down: pure.
//! * [`prober`] asks one backend once.
//! * [`namespace`] is where probes come from, so that they take the data path's way.

pub mod machine;
pub mod namespace;
mod offloads;
pub mod prober;
