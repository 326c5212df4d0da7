//! The load balancer's daemon and its command line.
pub mod config;
pub mod control;
pub mod datapath;
#[cfg(test)]
mod memory;
#[cfg(test)]
mod testing;
