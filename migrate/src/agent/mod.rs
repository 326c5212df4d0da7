//! The site agent: runs a site's workloads and performs its part of migrations.
//!
//! * [`config`] reads `agent.toml`.
//! * [`door`]: who calls; [`admission`]: what that one may ask for.
//! * [`server`]: the HTTP API, `refusal`: its errors.
//! * [`site`]: the workloads here: starting, stopping, adopting, who owns which.
//! * [`host`]: what is done to the host, [`linux`]: how.
//! * [`containers`]: what is done in another way with workloads that are containers; [`podman`]: with podman's.
//! * [`session`]: what both roles' drivers share: inbox, events, view.
//! * [`source`], [`target`]: the drivers of the two roles; [`crate::roles`] decides.
//! * [`readiness`]: whether a workload can leave or enter the site, asked in *prepare*.
//! * [`images`]: the images' folders, and sending and receiving them; [`ahead`]: memory that goes before them.
//!
//! What is not here: any decision about a migration as a whole.

pub(crate) mod admission;
pub mod ahead;
pub mod config;
pub mod containers;
pub mod door;
pub mod host;
pub mod images;
pub mod linux;
pub mod podman;
pub mod readiness;
pub(crate) mod refusal;
pub mod server;
pub mod session;
pub mod site;
pub mod source;
pub mod target;
