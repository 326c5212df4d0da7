//! Captured packets as a pcap-ng stream, for Wireshark and its relatives.
//!
//! `format` writes blocks and knows nothing of load balancing; `stream` says what of a sampled packet goes into one:
//! the interface that it came in on, when, its first bytes, and as a comment why the data path did with it what it
//! did. What is not here: sampling itself (`datapath::xdp::samples`).

pub mod format;
pub mod stream;

pub use stream::{MEDIA_TYPE, Recorder};

#[cfg(test)]
mod tests;
