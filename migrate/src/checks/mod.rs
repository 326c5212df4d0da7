//! What is looked at in *prepare*, while clients notice nothing, so that a dump or a restore does not fail later.
//!
//! The source looks at the workload's tasks and refuses what CRIU would refuse in the freeze. What they need of a site
//! becomes a [`Manifest`](crate::protocol::manifest::Manifest), which the target compares with what it has.
//!
//! * [`problem`]: everything that can be found to be wrong, in plain words.
//! * [`tasks`]: goes over the workload's tasks: who traces them, their namespaces, their memory.
//! * [`descriptors`]: their open files; [`unix`]: whom their unix sockets are connected to.
//! * [`mappings`]: their mapped files.
//! * [`files`]: whether a site has the files of a manifest, by content; [`hashes`]: contents that were read before.
//! * [`container`]: which of its files are a container's own.
//! * [`sockets`]: whether addresses and ports of a manifest are free at a site.
//! * [`room`]: memory, and space for images.
//! * [`cpu`]: which instructions a processor has.
//! * [`clock`]: how far two sites' clocks are apart.
//!
//! What is not here: when it is looked at, and what comes of it (that is [`crate::agent`]).

pub mod clock;
pub mod container;
pub mod cpu;
pub mod descriptors;
pub mod files;
pub mod hashes;
pub mod mappings;
pub mod problem;
pub mod room;
pub mod sockets;
pub mod tasks;
pub mod unix;
