//! The load balancer's daemon.
pub mod config;
pub mod datapath;
