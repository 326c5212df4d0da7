//! Running a server so that it can be moved: each workload has a pid and a mount namespace of its own.
//!
//! Dumped pids have to be free at the target, and nothing outside may be held by the process; so a workload
//! lives below a *holder*, a tiny pid 1 ([`init`]) that reaps and does nothing else. A holder outlives the
//! agent that made it once it was told to; one that was never told dies with its agent.
//!
//! * [`holder`]: making a holder, and killing it.
//! * [`init`]: pid 1 itself (the hidden subcommand `init`).
//! * [`enter`]: starting something inside a holder (the hidden subcommand `enter`).
//! * [`container`]: a workload that is a container of runc's, inside its holder.
//! * [`podman`]: podman's containers, which are kept by their own monitors; [`watcher`]: what pid 1 does for the others
//!   (the hidden subcommand `watcher`).
//! * [`user`]: as whom it runs; [`cgroup`]: what bounds it.
//! * [`processes`]: what `/proc` says.
//! * [`record`]: how a restarted agent finds its workloads again.
//! * [`sys`]: the system calls that have no safe wrapper.
//!
//! What is not here: CRIU, and when a workload is started or moved.

pub mod cgroup;
pub mod container;
pub mod enter;
pub mod holder;
pub mod init;
mod keeper;
pub mod podman;
pub mod processes;
pub mod record;
pub mod sys;
pub mod user;
pub mod watcher;
