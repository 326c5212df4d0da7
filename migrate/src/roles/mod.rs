//! The agent's two roles as pure state machines: event in, commands out; no I/O, no clock.
//!
//! What performs the commands and feeds the events is in [`crate::agent`].

pub mod source;
pub mod target;
