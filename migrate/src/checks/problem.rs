//! Everything that a check can find to be wrong, in plain words that name the thing.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};

/// As many problems as an operator reads in one message.
const SAID: usize = 8;

/// A task of a workload, as messages name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// As this host counts.
    pub pid: i32,
    /// The program's name as the kernel has it.
    pub name: String,
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} (pid {})", self.name, self.pid)
    }
}

fn kind_name(is_container: bool) -> &'static str {
    if is_container { "container" } else { "process" }
}

/// One thing that would make a dump or a restore fail.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// A container cannot go on as a process, nor the other way round.
    #[error(
        "it is a {} there and a {} at the source: let both agents' configurations say the same",
        kind_name(*is_container_here),
        kind_name(!*is_container_here)
    )]
    OtherKind {
        /// What the target's configuration says.
        is_container_here: bool,
    },
    /// It would run on with other files around it.
    #[error(
        "its container is made of {here} there and of {there} at the source: make both of the same image (`podman save` \
         and `podman load` keep its hash)"
    )]
    OtherImage {
        /// At the target.
        here: String,
        /// At the source.
        there: String,
    },
    /// It would stay behind.
    #[error(
        "{task} does not descend from the workload's first process, and would be left behind: let no process of the \
         server detach itself (daemonize)"
    )]
    Orphan {
        /// Who.
        task: Task,
    },
    /// A debugger or the like.
    #[error("{task} is traced by pid {tracer}: end that debugger or tracer first")]
    Traced {
        /// Who.
        task: Task,
        /// By whom.
        tracer: i32,
    },
    /// The kernel does not tell CRIU its limits.
    #[error(
        "{task} runs as UID {uid}, GID {gid}, and CRIU may dump another user's process only with the capability \
         CAP_SYS_RESOURCE: start the agent with it, or the server as the agent's own user"
    )]
    OtherUser {
        /// Who.
        task: Task,
        /// Its user.
        uid: String,
        /// Its group.
        gid: String,
    },
    /// CRIU does not dump namespaces below those of the root.
    #[error(
        "{task} is in another {kind} namespace than the workload's first process, which CRIU cannot dump"
    )]
    Namespace {
        /// Who.
        task: Task,
        /// As `/proc/PID/ns` names it.
        kind: &'static str,
    },
    /// A descriptor that CRIU knows no way to dump.
    #[error("{task} holds {what} (descriptor {fd}), which CRIU cannot dump")]
    Descriptor {
        /// Who.
        task: Task,
        /// Its number.
        fd: i32,
        /// What it is.
        what: String,
    },
    /// One end of a unix connection.
    #[error(
        "{task} holds a unix socket (descriptor {fd}) that is connected to {peer} outside of the workload: close that \
         connection, or move its other end along"
    )]
    UnixSocket {
        /// Who.
        task: Task,
        /// Its number.
        fd: i32,
        /// The other end.
        peer: String,
    },
    /// A file that cannot be opened by its path inside the workload's mounts.
    #[error(
        "{task} holds {path:?} (descriptor {fd}) from a mount that is not the workload's, so it could not be opened again"
    )]
    Mount {
        /// Who.
        task: Task,
        /// Its number.
        fd: i32,
        /// As it was called.
        path: String,
    },
    /// It would have to travel in the images.
    #[error(
        "{task} holds the deleted file {path:?} (descriptor {fd}), whose {mib} MiB would have to travel in the images: \
         at most {limit_mib} MiB do"
    )]
    Deleted {
        /// Who.
        task: Task,
        /// Its number.
        fd: i32,
        /// As it was called.
        path: String,
        /// Its size.
        mib: u64,
        /// The bound.
        limit_mib: u64,
    },
    /// Memory that CRIU knows no way to dump.
    #[error("{task} has {what} mapped, which CRIU cannot dump")]
    Mapping {
        /// Who.
        task: Task,
        /// What it is.
        what: String,
    },
    /// A restore opens it by its path.
    #[error("{path:?} cannot be had there: the workload has it open or mapped")]
    Missing {
        /// The path.
        path: String,
        /// In the system's words.
        #[source]
        source: io::Error,
    },
    /// A folder where a file is meant, or the other way round.
    #[error("{path:?} is {here} there and {wanted} at the source")]
    Kind {
        /// The path.
        path: String,
        /// At the target.
        here: &'static str,
        /// At the source.
        wanted: &'static str,
    },
    /// CRIU compares sizes.
    #[error(
        "{path:?} has {here} bytes there and {wanted} at the source: the same file has to be at both sites"
    )]
    Size {
        /// The path.
        path: String,
        /// At the target.
        here: u64,
        /// At the source.
        wanted: u64,
    },
    /// The process would go on in other code.
    #[error("{path:?} has other content there than at the source: the same program has to be at both sites")]
    Content {
        /// The path.
        path: String,
    },
    /// The site does not hold an address of a socket.
    #[error(
        "the workload has a socket bound to {address}, which is not an address of this site: add it there"
    )]
    Address {
        /// The address.
        address: IpAddr,
        /// In the system's words.
        #[source]
        source: io::Error,
    },
    /// Something else has the port.
    #[error("{address}/{protocol} is taken there by another process: stop that first")]
    Port {
        /// Address and port.
        address: SocketAddr,
        /// `tcp` or `udp`.
        protocol: &'static str,
        /// In the system's words.
        #[source]
        source: io::Error,
    },
    /// Too little memory.
    #[error(
        "{what} takes {need_mib} MiB, and {available_mib} MiB of memory are available ({spare_mib} MiB are to be left, see \
         `spare_memory_mib`): free some there"
    )]
    Memory {
        /// What it is for.
        what: &'static str,
        /// How much that is.
        need_mib: u64,
        /// How much there is, without what is to be left.
        available_mib: u64,
        /// What is to be left.
        spare_mib: u64,
    },
    /// The workload would not fit into its control group.
    #[error(
        "the tasks hold {need_mib} MiB, and their control group there may have {bound_mib} MiB (`memory_max_mib`)"
    )]
    Bound {
        /// How much they hold.
        need_mib: u64,
        /// How much they may hold.
        bound_mib: u64,
    },
    /// Too little space for images.
    #[error("the images take {need_mib} MiB, and their folder {folder:?} has room for {free_mib} MiB")]
    Space {
        /// How much they take.
        need_mib: u64,
        /// How much is free.
        free_mib: u64,
        /// The folder.
        folder: String,
    },
    /// Another processor.
    #[error("the processor there lacks what the workload may be using{}: {said}", said_instructions(.missing))]
    Processor {
        /// Names of instruction sets, as `/proc/cpuinfo` has them.
        missing: Vec<String>,
        /// In CRIU's words.
        said: String,
    },
}

fn said_instructions(missing: &[String]) -> String {
    if missing.is_empty() { String::new() } else { format!(" ({})", missing.join(", ")) }
}

/// Why a workload cannot leave or enter a site: all that was found, so that it is put right in one go.
#[derive(Debug)]
pub struct Refused {
    head: String,
    problems: Vec<Problem>,
}

impl Refused {
    /// `Ok` if nothing was found; `head` says what cannot be done.
    pub fn unless_none(head: impl FnOnce() -> String, problems: Vec<Problem>) -> Result<(), Self> {
        if problems.is_empty() { Ok(()) } else { Err(Self { head: head(), problems }) }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.head)?;
        for (place, problem) in self.problems.iter().take(SAID).enumerate() {
            // They are beside each other: none is the cause of the next.
            write!(f, "{} {}", if place == 0 { ":" } else { ";" }, crate::client::chain(problem))?;
        }
        match self.problems.len().saturating_sub(SAID) {
            0 => Ok(()),
            more => write!(f, "; and {more} more"),
        }
    }
}

impl std::error::Error for Refused {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_was_found_is_said_up_to_a_bound() {
        let head = || "workload \"chat-1\" cannot enter site \"fra\"".to_owned();
        assert!(Refused::unless_none(head, Vec::new()).is_ok());
        let missing = |n| Problem::Missing { path: format!("/f{n}"), source: io::ErrorKind::NotFound.into() };
        let refused = Refused::unless_none(head, (0..SAID + 3).map(missing).collect()).unwrap_err();
        let text = refused.to_string();
        assert!(
            text.starts_with("workload \"chat-1\" cannot enter site \"fra\": \"/f0\" cannot be had"),
            "{text}"
        );
        assert!(text.contains("entity not found; \"/f1\"") && text.ends_with("; and 3 more"), "{text}");
    }

    #[test]
    fn instructions_are_named_where_they_are_known() {
        let said = "CRIU: no".to_owned();
        let of = |missing: &[&str]| {
            let missing = missing.iter().map(ToString::to_string).collect();
            Problem::Processor { missing, said: said.clone() }.to_string()
        };
        assert!(of(&[]).ends_with("may be using: CRIU: no"));
        assert!(of(&["avx2", "fma"]).contains("using (avx2, fma): CRIU: no"));
    }
}
