//! Who is who between load balancer and agents: TLS 1.3 with certificates at both ends.
//!
//! * [`identity`]: what a certificate says of its owner: a coordinator, or the agent of one site.
//! * [`pki`]: makes a CA and issues certificates, for `migrate pki` and for labs.
//! * [`files`]: where an own certificate, its key and the CA are, and reading them.
//! * [`mod@dial`]: a client's handshake.
//! * [`verify`]: whom an agent lets in, and whom a client takes for a site's agent.
//! * [`words`]: what went wrong in a handshake, for an operator.
//!
//! What is not here: which identity may ask for what ([`crate::agent::admission`]), and revocation: a certificate that
//! must not be taken any more ends with its CA or its last day.

mod dial;
pub mod files;
pub mod identity;
pub mod pki;
mod verify;
mod words;

pub(crate) use dial::dial;
pub use files::{Credentials, Files, TlsError};
pub use identity::Identity;
pub(crate) use words::plain_io;

#[cfg(test)]
mod handshake_tests;
pub use words::plain_words;
