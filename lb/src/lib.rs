//! The load balancer's daemon and its command line.
//!
//! ```text
//! cli -> run -> admin -> migrations -> control -> datapath
//!   \-> client -- HTTP --^       \-> migrate (the companion's coordinator)
//! ```
//!
//! * [`config`] is the file, checked, all its mistakes at once.
//! * [`datapath`] carries packets: the trait, and XDP.
//! * [`capture`] writes sampled packets for Wireshark.
//! * [`control`] decides what happens to a backend's packets: a pure state machine and its driver.
//! * [`health`] finds out which backends do their work.
//! * [`migrations`] knows those under way and those that ended, and ends what a former daemon left behind.
//! * [`admin`] is the HTTP API.
//! * [`reload`] reads the configuration again while the daemon runs.
//! * [`run`] puts the daemon together and takes it apart.
//! * [`cli`] and [`client`] are the commands and their side of the API.
//!
//! What is not here: parsing and rewriting of packets (`lb-core`), and checkpoint and restore (`migrate`).

pub mod admin;
pub mod capture;
pub mod cli;
pub mod client;
pub mod config;
pub mod control;
pub mod datapath;
pub mod health;
#[cfg(test)]
mod memory;
pub mod migrations;
pub mod reload;
pub mod run;
#[cfg(test)]
mod testing;
