//! Moving a running server from one site to another: Drover's companion to the load balancer.
//!
//! ```text
//! coordinator (inside lb)        source agent                     target agent
//!   prepare  ------------------------------------------------->   holder, CRIU waiting
//!   prepare  ------------------>   CRIU waits in pre-dump
//!   hold     (the load balancer's gate)
//!   freeze   ------------------>   drain, dump; then frozen in
//!                                  CRIU's post-dump hook  ----->   images, restore; stopped in
//!   flip     <-------------------------------------------------   CRIU's pre-resume hook
//!   confirm  ------------------------------------------------->   tasks run
//!   release  ------------------>   killed, still silent
//! ```
//!
//! * [`protocol`]: what goes over the wire between coordinator and agents, and the framing of images.
//! * [`roles`]: the pure state machines of the source and the target (event -> commands).
//! * [`coordinator`]: the pure state machine of the whole migration, and what drives it from inside `lb`.
//! * [`client`]: one HTTP/2 connection to an agent, opened before it is needed.
//! * [`system`]: what a process asks of the system, so that a simulation can be many processes.
//! * [`tls`]: who is who between them: certificates, and the CA that makes them.
//! * [`criu`]: CRIU's RPC, its process, and reading its log.
//! * [`memory`]: the workload's memory: taking it, and bringing it with the images or after them.
//! * [`workload`]: running a server in namespaces of its own, and finding it again.
//! * [`checks`]: what is looked at in *prepare* so that nothing fails later.
//! * [`net`]: silencing an address, watching queues drain, taking connections off the wire.
//! * [`decapsulator`]: the site's end of the load balancer's tunnels, where there is no device for it.
//! * [`agent`]: the site agent: configuration, HTTP server, and the drivers of the roles.
//!
//! What is not here: packets, gates and hold queues (that is `lb`), and any decision in the agents about
//! whether a migration goes on: the coordinator alone decides, the agents only fall back to the safe side
//! when it is silent.

pub mod agent;
pub mod checks;
pub mod client;
pub mod coordinator;
pub mod criu;
pub mod decapsulator;
pub mod memory;
pub mod net;
pub mod protocol;
pub mod roles;
pub mod system;
pub mod tls;
pub mod workload;
