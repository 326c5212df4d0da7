//! The domain core of Drover's data path.
//!
//! What lives here: the domain types, the map record layouts, header parsing, consistent hashing,
//! [`decide`] and the header rewriting. The same code runs in the kernel (over BPF maps and checked
//! packet pointers), in user space and in the tests as the oracle.
//!
//! What does not: anything that can fail for an outside reason. No clock, no I/O, no allocation, no
//! `unsafe`: time is an argument and storage stands behind a trait.
#![no_std]
#![forbid(unsafe_code)]

pub mod gate;

pub use gate::{Gate, GateWord, Slot};
