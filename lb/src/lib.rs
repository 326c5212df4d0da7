//! The load balancer's daemon and its command line.
pub mod admin;
pub mod client;
pub mod config;
pub mod control;
pub mod datapath;
#[cfg(test)]
mod memory;
pub mod migrations;
#[cfg(test)]
mod testing;
