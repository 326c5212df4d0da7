//! The wire between the coordinator and the site agents: version 1 of the agent's HTTP API.
//!
//! | request | body | answer |
//! | --- | --- | --- |
//! | `GET /healthz` | | `ok` |
//! | `GET /v1/workloads` | | `[WorkloadStatus]` |
//! | `PUT /v1/migrations/{id}` | [`Prepare`] | [`Prepared`] when the role is ready |
//! | `GET /v1/migrations/{id}` | | [`MigrationStatus`] |
//! | `GET /v1/migrations/{id}/events` | | [`AgentEvent`]s from the first on, one JSON object per line |
//! | `POST /v1/migrations/{id}/freeze` | [`Freeze`] | 202; what comes of it is in the events |
//! | `POST /v1/migrations/{id}/manifest` | [`Manifest`](manifest::Manifest) | [`Welcome`](manifest::Welcome) if the workload may come |
//! | `POST /v1/migrations/{id}/memory` | stream of questions ([`crate::memory::wire`]) | stream of pages |
//! | `POST /v1/migrations/{id}/images` | image stream ([`frames`]) | 200 when complete |
//! | `POST /v1/migrations/{id}/offer` | [`Part`] | the number of the target's new offer; null where the workload runs |
//! | `POST /v1/migrations/{id}/go` | [`Go`] | [`Running`] when the tasks run |
//! | `POST /v1/migrations/{id}/confirm` | [`Part`] | 200 when the lease is off |
//! | `POST /v1/migrations/{id}/release` | [`Part`] | [`Served`] or null when the source is gone; 425 while the target fetches memory from it |
//! | `POST /v1/migrations/{id}/abort` | [`Part`] | 200 when the source runs again / the target is gone |
//! | `POST /v1/workloads/{name}/start`, `.../stop` | | 200 |
//!
//! `go`, `confirm`, `release` and `abort` may be repeated; the answer is the same. An agent that was restarted and does
//! not know the migration answers them from what it sees of the workload. Errors are
//! `application/problem+json` ([`Problem`]).
//!
//! With TLS ([`crate::tls`]) all of it is a coordinator's; the agent of a migration's source may do nothing but send its
//! manifest and its images, that of its target nothing but fetch memory. Without TLS nobody is asked who they are.

pub mod frames;
pub mod manifest;

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// The transport protocol of a backend's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// The name that nftables and operators know.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// Which side of a migration an agent is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The workload runs here and is to leave.
    Source,
    /// The workload is to run here.
    Target,
}

/// Asks an agent to get ready for its part. Nothing that a client could notice happens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prepare {
    /// The agent's side.
    pub role: Role,
    /// The workload's name, which is the backend's name in the load balancer.
    pub workload: String,
    /// The backend's address as the load balancer knows it; it must be the workload's.
    pub address: SocketAddr,
    /// The backend's protocol as the load balancer knows it.
    pub protocol: Protocol,
    /// The other agent's site: the source sends images to no other, the target takes them from no other.
    pub peer_site: String,
    /// Where the other agent is: the source sends images there, the target fetches pages from there.
    pub peer_url: String,
    /// How long the load balancer will hold, from its hold on. An agent that hears nothing for this long
    /// and a margin falls back to the safe side.
    pub hold_deadline_ms: u64,
    /// How long an offer of the target's stands. What was taken up and not confirmed by then is suspended.
    pub lease_ms: u64,
}

/// The answer to [`Prepare`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepared {
    /// The agent's site.
    pub site: String,
}

/// Asks the source to drain, freeze, dump and send.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Freeze {
    /// At least this long passes before the freeze, so that packets that are under way arrive.
    pub settle_us: u64,
}

/// Names an agent's part in a migration, so that an agent that was restarted can answer for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// The agent's side.
    pub role: Role,
    /// The workload's name.
    pub workload: String,
}

/// Lets the target run, on a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Go {
    /// The workload's name.
    pub workload: String,
    /// The target's offer that is taken up, from [`AgentEvent::Restored`].
    pub offer: u32,
}

/// The answer to `go`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Running {
    /// When the tasks began to run, by the agent's `CLOCK_REALTIME`.
    pub at_unix_us: i64,
}

/// Memory that has come after the restore; also the answer to `release`, where there was any.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Served {
    /// When the target had all of it, by the source agent's `CLOCK_REALTIME`.
    pub at_unix_us: i64,
    /// Bytes of it.
    pub bytes: u64,
}

/// What an agent tells of a migration as it happens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum AgentEvent {
    /// Source: memory goes over while the workload runs.
    Copying {
        /// Bytes of it so far.
        bytes: u64,
    },
    /// Source: what goes ahead of the freeze has gone, if anything; it may begin.
    CopiedAhead {
        /// Bytes of it.
        bytes: u64,
    },
    /// Source: nothing that was accepted from clients waits outside of what a checkpoint holds.
    Drained,
    /// Source: no task of the workload runs any more.
    Frozen {
        /// By the agent's `CLOCK_REALTIME`.
        at_unix_us: i64,
    },
    /// Source: the images are complete; the workload stays frozen.
    Dumped {
        /// Bytes of all images.
        image_bytes: u64,
    },
    /// Target: the images are here, the restore begins.
    Received {
        /// Bytes on the wire, framing included.
        sent_bytes: u64,
    },
    /// Target: there is a copy whose tasks do not run, and `go` may let them.
    Restored {
        /// Number of the offer.
        offer: u32,
    },
    /// Target: the tasks run.
    Running(Running),
    /// Target: the lease is off.
    Confirmed,
    /// Target: the lease ended unconfirmed; the tasks are stopped until it is confirmed.
    Suspended,
    /// Source: the target has all memory that did not come with the images.
    Served(Served),
    /// Source: the workload is gone from here.
    Released,
    /// Source: the workload runs here (again).
    Resumed(Running),
    /// Target: what was restored or received is gone.
    Dropped,
    /// Something went wrong; the agent goes (or stays) on the safe side by itself.
    Failed {
        /// For an operator.
        reason: String,
    },
}

/// One workload of an agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadStatus {
    /// Its name.
    pub name: String,
    /// What is known of it.
    pub state: WorkloadState,
    /// The process, as the agent's host counts, when there is one.
    pub pid: Option<i32>,
    /// The migration that it is part of, while there is one.
    pub migration: Option<String>,
}

/// Where a workload is in its life at one site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkloadState {
    /// Not at this site.
    Absent,
    /// It runs.
    Running,
    /// It is frozen: its images are being written or its fate is open.
    Frozen,
    /// This site waits for its images, or restores it.
    Restoring,
    /// It is restored and waits for `go`.
    Restored,
}

/// What an agent knows of one migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationStatus {
    /// Its id.
    pub id: String,
    /// The agent's side.
    pub role: Role,
    /// The workload.
    pub workload: String,
    /// The role's state, in words.
    pub state: String,
    /// True when nothing more happens here.
    pub ended: bool,
}

/// An error's body (RFC 9457).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// A URI that names the kind of problem; `about:blank` where the status says it all.
    #[serde(rename = "type")]
    pub kind: String,
    /// The status in words.
    pub title: String,
    /// The HTTP status code.
    pub status: u16,
    /// What happened and what to do about it.
    pub detail: String,
}

/// True for an id that can be part of a path: short, letters, digits, `-`, `_` and `.`, no leading dot.
pub fn is_valid_id(id: &str) -> bool {
    (1..=64).contains(&id.len())
        && !id.starts_with('.')
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The wire's shape is a promise to agents of other versions: a change here is a new version.
    #[test]
    fn golden_json() {
        let prepare = Prepare {
            role: Role::Source,
            workload: "chat-1".into(),
            address: "10.1.0.1:6379".parse().unwrap(),
            protocol: Protocol::Tcp,
            peer_site: "fra".into(),
            peer_url: "https://10.2.2.1:7401".into(),
            hold_deadline_ms: 5000,
            lease_ms: 10_000,
        };
        let json = r#"{"role":"source","workload":"chat-1","address":"10.1.0.1:6379","protocol":"tcp","peer_site":"fra","peer_url":"https://10.2.2.1:7401","hold_deadline_ms":5000,"lease_ms":10000}"#;
        assert_eq!(serde_json::to_string(&prepare).unwrap(), json);
        assert_eq!(serde_json::from_str::<Prepare>(json).unwrap(), prepare);

        for (event, json) in [
            (AgentEvent::Copying { bytes: 9 }, r#"{"event":"copying","bytes":9}"#),
            (AgentEvent::CopiedAhead { bytes: 9 }, r#"{"event":"copied_ahead","bytes":9}"#),
            (AgentEvent::Drained, r#"{"event":"drained"}"#),
            (AgentEvent::Frozen { at_unix_us: 7 }, r#"{"event":"frozen","at_unix_us":7}"#),
            (AgentEvent::Dumped { image_bytes: 9 }, r#"{"event":"dumped","image_bytes":9}"#),
            (AgentEvent::Received { sent_bytes: 9 }, r#"{"event":"received","sent_bytes":9}"#),
            (AgentEvent::Restored { offer: 0 }, r#"{"event":"restored","offer":0}"#),
            (AgentEvent::Running(Running { at_unix_us: 8 }), r#"{"event":"running","at_unix_us":8}"#),
            (AgentEvent::Confirmed, r#"{"event":"confirmed"}"#),
            (AgentEvent::Suspended, r#"{"event":"suspended"}"#),
            (
                AgentEvent::Served(Served { at_unix_us: 7, bytes: 9 }),
                r#"{"event":"served","at_unix_us":7,"bytes":9}"#,
            ),
            (AgentEvent::Released, r#"{"event":"released"}"#),
            (AgentEvent::Resumed(Running { at_unix_us: 8 }), r#"{"event":"resumed","at_unix_us":8}"#),
            (AgentEvent::Dropped, r#"{"event":"dropped"}"#),
            (AgentEvent::Failed { reason: "x".into() }, r#"{"event":"failed","reason":"x"}"#),
        ] {
            assert_eq!(serde_json::to_string(&event).unwrap(), json);
            assert_eq!(serde_json::from_str::<AgentEvent>(json).unwrap(), event);
        }
    }

    #[test]
    fn unknown_fields_are_refused() {
        assert!(serde_json::from_str::<Freeze>(r#"{"settle_us":1,"x":2}"#).is_err());
    }

    #[test]
    fn ids_that_could_leave_their_folder_are_refused() {
        for bad in ["", ".", "..", "a/b", "a b", ".hidden", &"x".repeat(65)] {
            assert!(!is_valid_id(bad), "{bad:?}");
        }
        for good in ["m-1", "a.b", "A_9"] {
            assert!(is_valid_id(good), "{good:?}");
        }
    }
}
