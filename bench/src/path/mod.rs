//! The load of the path benchmark: clients and servers that measure what carries packets between them.
//!
//! ```text
//! requests      a request, its answer, the next request, on N connections: rate and latency
//! connections   connect, one request, close: new connections a second
//! datagrams     numbered UDP datagrams, as fast as they go, and who counts them
//! exchange      the request and how its answer is recognized (pure)
//! latencies     a histogram (pure)
//! processors    how busy the whole machine was
//! report, goals what was measured and what it is compared with (pure)
//! ```
//!
//! Each part measures on one thread and knows one target address. What is on the way is the business of the program
//! `bench-path`.

pub mod connections;
pub mod datagrams;
pub mod exchange;
pub mod goals;
pub mod latencies;
pub mod processors;
pub mod report;
pub mod requests;

use std::io;
use std::net::{IpAddr, SocketAddr};

/// Why a measurement came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A system call failed.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Nothing was answered.
    #[error(
        "{target} answered nothing within {ms} ms: does a server listen there, and is there a way to it?"
    )]
    Silence {
        /// What was asked.
        target: SocketAddr,
        /// How long it was waited for.
        ms: u128,
    },
    /// Answers were not those of our server.
    #[error(
        "{target} answered {wrong} requests with something else than `serve` does: another server has this port"
    )]
    Wrong {
        /// What was asked.
        target: SocketAddr,
        /// How many answers did not fit their requests.
        wrong: u64,
    },
}

impl LoadError {
    pub(crate) fn io<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> LoadError {
        let what = what.into();
        move |source| LoadError::Io { what, source: source.into() }
    }
}

/// The address that the `number`th socket of a client is bound to; none: the kernel chooses.
fn source(sources: &[IpAddr], number: usize) -> Option<SocketAddr> {
    sources.get(number % sources.len().max(1)).map(|ip| SocketAddr::new(*ip, 0))
}
