//! The memory of a workload: it is taken and brought by the agents, not by CRIU, which writes every page to a file and
//! reads every page from one while the workload stands still.
//!
//! * [`layout`]: CRIU's dump without pages, and what takes their place in the images.
//! * [`read`]: reading the memory of stopped tasks.

pub mod layout;
pub mod read;
