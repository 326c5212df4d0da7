//! What can go wrong with a lab.

use std::path::PathBuf;

/// A lab could not be made, or something could not be started in it.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// Namespaces and XDP need root.
    #[error("the lab needs root: run this as root (or with sudo)")]
    NotRoot,
    /// A system call or a file operation failed.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// A program that sets up the lab failed.
    #[error("`{command}` failed: {output}")]
    Command {
        /// The command line.
        command: String,
        /// What it printed.
        output: String,
    },
    /// One of our own programs has not been built.
    #[error("{} is not there: build it with `cargo build -p {package}{flags}`", .path.display())]
    NotBuilt {
        /// Where it was looked for.
        path: PathBuf,
        /// The package that makes it.
        package: String,
        /// Further flags of the build.
        flags: &'static str,
    },
    /// Something that was started did not become ready.
    #[error("{name} {problem}; the end of its log {}:\n{tail}", .log.display())]
    NotReady {
        /// Which process.
        name: String,
        /// What was seen instead.
        problem: String,
        /// Its log.
        log: PathBuf,
        /// The last lines of the log.
        tail: String,
    },
    /// No certificates for daemon and agents.
    #[error("the lab's certificates cannot be made or read")]
    Certificates(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The admin API or an agent could not be talked to.
    #[error("HTTP request to {url} failed: {problem}")]
    Http {
        /// What was asked for.
        url: String,
        /// What went wrong.
        problem: String,
    },
}

impl LabError {
    /// For `map_err`: says what was tried beside the system's reason.
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> LabError {
        let what = what.into();
        move |source| LabError::Io { what, source }
    }
}
