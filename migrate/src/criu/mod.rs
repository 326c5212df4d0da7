//! CRIU, driven through its RPC: `criu swrk FD` is started before the freeze and asks back at its hooks.
//!
//! * [`rpc`]: the messages (CRIU's `rpc.proto`, the part that is used).
//! * [`swrk`]: one CRIU process and the connection to it.
//! * [`latch`]: what a restore waits at that was begun before there are images.
//! * [`relay`]: CRIU behind a container runtime that starts it.
//! * [`log`]: the lines of CRIU's log that say why something failed.
//! * [`program`]: which CRIU is run.
//! * [`check`]: whether it can work here.
//! * [`images`]: those of its images that are read and written here.
//! * [`kernel_cache`]: what it has found out about the kernel.

pub mod check;
pub mod images;
pub mod kernel_cache;
pub mod latch;
pub mod log;
pub mod program;
pub mod relay;
pub mod rpc;
pub mod swrk;
