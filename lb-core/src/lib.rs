//! The domain core of Drover's data path.
//!
//! What lives here: the domain types, the map record layouts, header parsing, consistent hashing,
//! [`decide()`] and the header rewriting. The same code runs in the kernel (over BPF maps and checked
//! packet pointers), in user space and in the tests as the oracle.
//!
//! What does not: anything that can fail for an outside reason. No clock, no I/O, no allocation, no
//! `unsafe`: time is an argument and storage stands behind a trait.
//!
//! ```text
//! client -> parse -> flow, or service and Maglev pick -> backend record -> gate -> rewrite -> site
//! site   -> parse -> flow -> is this the backend's location? ----------------> rewrite -> client
//! ```
#![no_std]
#![forbid(unsafe_code)]

#[cfg(feature = "host")]
extern crate std;

pub mod checksum;
pub mod decapsulate;
pub mod decide;
pub mod family;
pub mod gate;
#[cfg(feature = "host")]
pub mod host;
pub mod maglev;
pub mod packet;
pub mod process;
pub mod reason;
pub mod record;

pub use decide::{Arrival, Tables, Verdict, decide};
pub use family::{Family, V4, V6};
pub use gate::{Gate, GateWord, Slot};
pub use packet::Packet;
pub use process::{Action, process};
pub use reason::{Class, Reason};
