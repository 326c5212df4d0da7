//! The benchmark of migrations: a server with memory and connections, clients that notice everything, and what is made
//! of it. How the server is moved is the business of the program `moves`.
//!
//! ```text
//! case      what is measured: memory, connections, rewritten pages, the sites' link (pure)
//! exchange  a request and its answer (pure)
//! memory    pages that are full, rewritten and checked (pure)
//! server    counts each connection's requests, in memory that moves with it
//! clients   closed loops on every connection, and the longest gap between answers
//! report    what was measured, as JSON, table and charts (pure)
//! goals     Drover beside the others, and what it is meant to reach (pure)
//! ```

pub mod case;
pub mod clients;
pub mod exchange;
pub mod goals;
pub mod memory;
pub mod report;
pub mod server;
