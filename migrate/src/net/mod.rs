//! The site's network, as far as a migration touches it.
//!
//! * [`silence`]: rules that keep a backend's address from being heard and from hearing.
//! * [`netfilter`]: removing those rules without waiting.
//! * [`drain`]: watching the queues that a checkpoint does not hold.
//! * [`repair`]: taking connections off the wire without a word.
//!
//! What is not here: gates, holding and routing; that is the load balancer's.

pub mod drain;
pub mod netfilter;
pub mod repair;
pub mod silence;
