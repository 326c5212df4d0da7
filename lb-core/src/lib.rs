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

mod admit;
pub mod checksum;
pub mod decapsulate;
pub mod decide;
pub mod encapsulate;
pub mod family;
pub mod flow;
pub mod gate;
#[cfg(feature = "host")]
pub mod host;
mod icmp;
pub mod maglev;
pub mod name;
pub mod packet;
pub mod process;
pub mod reason;
pub mod record;
pub mod tables;

pub use admit::LOWEST_NAT_PORT;
pub use decide::{Arrival, Verdict, decide};
pub use encapsulate::encapsulate;
pub use family::{Family, V4, V6};
pub use flow::{Direction, Flow, FlowKey, Mode};
pub use gate::{Gate, GateWord, Slot};
pub use name::FragmentKey;
pub use packet::Packet;
pub use process::{Action, Step, process, take, walk};
pub use reason::{Class, Reason};
pub use tables::Tables;
