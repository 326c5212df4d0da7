//! `cargo xtask bench cutover`: what a flip and a replay take while the tables hold many flows.
//!
//! ```text
//!   client                     lb                          sites
//!   inject (live frames) ----> eth0 -- c0 [Drover] a0, b0 -- eth0 [site: answers, or counts and checks the order]
//! ```
//!
//! The real datapath carries real frames between the namespaces of a lab; both ends are XDP programs
//! (`lb-ebpf/src/bench_cutover.rs`), since no socket keeps up with a replay. Datagrams without a number are answered,
//! which is what establishes flows; numbered ones are counted where they arrive, and have to arrive in order.
//!
//! * [`ends`] loads the two programs.
//! * [`subject`] is the datapath in its lab.
//! * [`run`] holds, flips and replays.
//! * [`report`] is what comes out.

mod ends;
pub mod report;
pub mod run;
mod subject;
