//! What a workload needs of the site that it is to run at: the source's agent makes the list in its *prepare* and asks
//! the target's with it, before anything is held.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::Protocol;

/// What a workload needs of a site.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Memory that the images hold and the restored tasks take again.
    pub memory_bytes: u64,
    /// Most of it is to come after the restore, if the target can fetch it.
    pub later: bool,
    /// Files that a restore opens.
    pub files: Vec<NeededFile>,
    /// Addresses and ports that a restore binds.
    pub sockets: Vec<NeededSocket>,
    /// The processor that the tasks have run on.
    pub processor: Processor,
    /// It is a container: its files' paths are those of its root file system.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_container: bool,
    /// It is made of an image that both sites have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<Image>,
}

/// What a container is made of, where its runtime knows it by that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// The image's hash.
    pub id: String,
    /// What the container's first three descriptors are called in the images: a monitor is at the other ends of them.
    pub streams: Vec<String>,
}

/// A file that a restore opens by its path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NeededFile {
    /// As the workload's mount namespace names it.
    pub path: String,
    /// What it has to be.
    pub kind: FileKind,
}

/// What a file is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum FileKind {
    /// A folder.
    Folder,
    /// A device or the like.
    Special,
    /// A regular file.
    Regular {
        /// Its size, unless it is written to.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        bytes: Option<u64>,
        /// BLAKE3 of its content, in hexadecimal digits, where code is run from it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        blake3: Option<String>,
    },
}

/// An address of the workload's sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NeededSocket {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// What it is bound to; port 0 where only the address counts.
    pub address: SocketAddr,
    /// The port is the workload's alone: it listens, or takes datagrams.
    pub is_open: bool,
}

/// A processor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Processor {
    /// Instruction sets by the names of `/proc/cpuinfo`.
    pub instructions: Vec<String>,
    /// What `criu cpuinfo dump` wrote, in hexadecimal digits: then `criu cpuinfo check` decides. CRIU knows x86, POWER
    /// and s390 so, and not Arm.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub criu_image: Option<String>,
}

/// The target's answer: the workload may come. Whether memory is fetched after the restore. When the question came and when this was said, by the target's
/// `CLOCK_REALTIME`, so that the source sees how far the clocks are apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// What a restore can do without is fetched later.
    pub later: bool,
    /// When the manifest had come.
    pub received_unix_us: i64,
    /// When the answer was sent.
    pub answered_unix_us: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The wire's shape is a promise to agents of other versions: a change here is a new version.
    #[test]
    fn golden_json() {
        let manifest = Manifest {
            is_container: false,
            image: None,
            memory_bytes: 4096,
            later: true,
            files: vec![
                NeededFile { path: "/srv".into(), kind: FileKind::Folder },
                NeededFile { path: "/dev/null".into(), kind: FileKind::Special },
                NeededFile {
                    path: "/bin/x".into(),
                    kind: FileKind::Regular { bytes: Some(7), blake3: Some("af".into()) },
                },
                NeededFile { path: "/log".into(), kind: FileKind::Regular { bytes: None, blake3: None } },
            ],
            sockets: vec![NeededSocket {
                protocol: Protocol::Tcp,
                address: "10.1.0.1:6379".parse().unwrap(),
                is_open: true,
            }],
            processor: Processor { instructions: vec!["avx2".into()], criu_image: Some("00ff".into()) },
        };
        let json = r#"{"memory_bytes":4096,"later":true,"files":[{"path":"/srv","kind":"folder"},{"path":"/dev/null","kind":"special"},{"path":"/bin/x","kind":{"regular":{"bytes":7,"blake3":"af"}}},{"path":"/log","kind":{"regular":{}}}],"sockets":[{"protocol":"tcp","address":"10.1.0.1:6379","is_open":true}],"processor":{"instructions":["avx2"],"criu_image":"00ff"}}"#;
        assert_eq!(serde_json::to_string(&manifest).unwrap(), json);
        assert_eq!(serde_json::from_str::<Manifest>(json).unwrap(), manifest);
        let welcome = Welcome { later: false, received_unix_us: 1, answered_unix_us: 2 };
        let json = r#"{"later":false,"received_unix_us":1,"answered_unix_us":2}"#;
        assert_eq!(serde_json::to_string(&welcome).unwrap(), json);
    }
}
