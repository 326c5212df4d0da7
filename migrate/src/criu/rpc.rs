//! The messages of CRIU's RPC that are used here, with the field numbers of its `images/rpc.proto` (4.2).
//! One message is one packet on a `SOCK_SEQPACKET` socket.

use prost::Message;

/// `criu_req_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Kind {
    /// An answer to something that could not be understood.
    Empty = 0,
    /// Dump a process tree.
    Dump = 1,
    /// Restore one.
    Restore = 2,
    /// A question at a hook, and its answer.
    Notify = 6,
    /// Which kernel features are there; fills CRIU's cache of them as a side effect.
    FeatureCheck = 9,
    /// Which CRIU this is.
    Version = 10,
}

/// `criu_network_lock_method`: CRIU's own ways cost more than the dump of the sockets, so it does none.
pub const NETWORK_LOCK_SKIP: i32 = 3;
/// `criu_cg_mode` IGNORE: control groups are the site's business.
pub const CGROUPS_IGNORE: i32 = 0;

/// `criu_opts`.
#[derive(Clone, PartialEq, Message)]
pub struct Options {
    /// Required by the protocol; -1 where the folder is given by path.
    #[prost(int32, required, tag = "1")]
    pub images_dir_fd: i32,
    /// The root of the tree to dump, as CRIU's pid namespace counts.
    #[prost(int32, optional, tag = "2")]
    pub pid: Option<i32>,
    /// Established TCP connections come along.
    #[prost(bool, optional, tag = "5")]
    pub tcp_established: Option<bool>,
    /// File locks come along.
    #[prost(bool, optional, tag = "8")]
    pub file_locks: Option<bool>,
    /// 1 errors, 2 warnings, 3 info, 4 debug.
    #[prost(int32, required, tag = "9")]
    pub log_level: i32,
    /// A plain name in the images folder.
    #[prost(string, optional, tag = "10")]
    pub log_file: Option<String>,
    /// Ask back at the hooks.
    #[prost(bool, optional, tag = "12")]
    pub notify_scripts: Option<bool>,
    /// The folder of an earlier dump, seen from the images folder: pages that have not changed since stay there.
    #[prost(string, optional, tag = "14")]
    pub parent_img: Option<String>,
    /// Know which pages have changed; needed for an earlier dump.
    #[prost(bool, optional, tag = "15")]
    pub track_mem: Option<bool>,
    /// Files that were deleted but are linked elsewhere come along.
    #[prost(bool, optional, tag = "18")]
    pub link_remap: Option<bool>,
    /// `criu_cg_mode`.
    #[prost(int32, optional, tag = "34")]
    pub manage_cgroups_mode: Option<i32>,
    /// Deleted files up to this many bytes come along.
    #[prost(uint32, optional, tag = "35")]
    pub ghost_limit: Option<u32>,
    /// Descriptors of CRIU's that take the place of something in the images.
    #[prost(message, repeated, tag = "27")]
    pub inherited: Vec<Inherited>,
    /// Restore without the pages that are marked as lazy; who brings them listens in the images folder.
    #[prost(bool, optional, tag = "48")]
    pub lazy_pages: Option<bool>,
    /// A file with more options; its images folder wins over the one in the request.
    #[prost(string, optional, tag = "51")]
    pub config_file: Option<String>,
    /// `criu_network_lock_method`.
    #[prost(int32, optional, tag = "64")]
    pub network_lock: Option<i32>,
}

/// `inherit_fd`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Inherited {
    /// What the images call it, such as `pipe:[7]`.
    #[prost(string, required, tag = "1")]
    pub key: String,
    /// CRIU's descriptor.
    #[prost(int32, required, tag = "2")]
    pub fd: i32,
}

/// `criu_features`: asked for with true, answered likewise.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Features {
    /// Soft-dirty tracking of memory.
    #[prost(bool, optional, tag = "1")]
    pub mem_track: Option<bool>,
    /// userfaultfd, with all that a restore without pages needs.
    #[prost(bool, optional, tag = "2")]
    pub lazy_pages: Option<bool>,
}

/// `criu_req`.
#[derive(Clone, PartialEq, Message)]
pub struct Request {
    /// What is wanted.
    #[prost(enumeration = "Kind", required, tag = "1")]
    pub kind: i32,
    /// How.
    #[prost(message, optional, tag = "2")]
    pub options: Option<Options>,
    /// The answer to a hook: go on, or not.
    #[prost(bool, optional, tag = "3")]
    pub notify_success: Option<bool>,
    /// More requests follow on this connection.
    #[prost(bool, optional, tag = "4")]
    pub keep_open: Option<bool>,
    /// For a feature check.
    #[prost(message, optional, tag = "5")]
    pub features: Option<Features>,
}

/// `criu_req` of a runtime, with options that we do not all know, as they came.
#[derive(Clone, PartialEq, Message)]
pub struct RuntimeRequest {
    /// What is wanted.
    #[prost(enumeration = "Kind", required, tag = "1")]
    pub kind: i32,
    /// How; a message is encoded as its bytes are.
    #[prost(bytes = "vec", optional, tag = "2")]
    pub options: Option<Vec<u8>>,
    /// The answer to a hook.
    #[prost(bool, optional, tag = "3")]
    pub notify_success: Option<bool>,
}

/// A field of `criu_opts`: a control group to freeze. CRIU takes a tenth of a second for it, and a CRIU that is killed
/// meanwhile leaves everything in it frozen; without it CRIU stops each task.
pub const FREEZE_CGROUP: u64 = 44;
/// See [`Options::inherited`].
pub const INHERITED: u64 = 27;

/// A message without one of its fields; `None` if it makes no sense.
pub fn without(message: &[u8], field: u64) -> Option<Vec<u8>> {
    let (mut rest, mut kept) = (message, Vec::with_capacity(message.len()));
    while !rest.is_empty() {
        let start = rest;
        let key = varint(&mut rest)?;
        // protobuf's encoding: the kind of a field is in the lowest three bits of its key.
        let skip = match key & 7 {
            0 => varint(&mut rest).map(|_| 0)?,
            1 => 8,
            2 => varint(&mut rest)?,
            5 => 4,
            _ => return None,
        };
        rest = rest.get(usize::try_from(skip).ok()?..)?;
        if key >> 3 != field {
            kept.extend_from_slice(&start[..start.len() - rest.len()]);
        }
    }
    Some(kept)
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// `criu_restore_resp`.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Restored {
    /// The root of the tree, as CRIU's pid namespace counts.
    #[prost(int32, required, tag = "1")]
    pub pid: i32,
}

/// `criu_notify`.
#[derive(Clone, PartialEq, Message)]
pub struct Notify {
    /// The hook's name.
    #[prost(string, optional, tag = "1")]
    pub script: Option<String>,
    /// At some hooks: the root of the tree.
    #[prost(int32, optional, tag = "2")]
    pub pid: Option<i32>,
}

/// `criu_version`.
#[derive(Clone, PartialEq, Message)]
pub struct Version {
    /// 4 of 4.2.1.
    #[prost(int32, required, tag = "1")]
    pub major: i32,
    /// 2 of 4.2.1.
    #[prost(int32, required, tag = "2")]
    pub minor: i32,
    /// 1 of 4.2.1.
    #[prost(int32, optional, tag = "4")]
    pub sublevel: Option<i32>,
}

/// `criu_resp`.
#[derive(Clone, PartialEq, Message)]
pub struct Response {
    /// What was asked for, or a question.
    #[prost(enumeration = "Kind", required, tag = "1")]
    pub kind: i32,
    /// Whether it went well.
    #[prost(bool, required, tag = "2")]
    pub success: bool,
    /// After a restore.
    #[prost(message, optional, tag = "4")]
    pub restore: Option<Restored>,
    /// A question at a hook.
    #[prost(message, optional, tag = "5")]
    pub notify: Option<Notify>,
    /// An errno.
    #[prost(int32, optional, tag = "7")]
    pub errno: Option<i32>,
    /// After a feature check: what is there.
    #[prost(message, optional, tag = "8")]
    pub features: Option<Features>,
    /// The first error of the log.
    #[prost(string, optional, tag = "9")]
    pub error: Option<String>,
    /// After a question for the version.
    #[prost(message, optional, tag = "10")]
    pub version: Option<Version>,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes as protobuf's encoding defines them, so that a wrong tag or type cannot hide.
    #[test]
    fn the_encoding_is_crius() {
        let request = Request {
            kind: Kind::Dump.into(),
            options: Some(Options {
                pid: Some(5),
                log_level: 2,
                network_lock: Some(3),
                ..Options::default()
            }),
            notify_success: None,
            keep_open: None,
            features: None,
        };
        let bytes = request.encode_to_vec();
        assert_eq!(bytes, [8, 1, 18, 9, 8, 0, 16, 5, 72, 2, 128, 4, 3]);

        assert_eq!(without(&bytes, 2).unwrap(), [8, 1]);
        assert_eq!(without(&bytes[4..], 9).unwrap(), [8, 0, 16, 5, 128, 4, 3]);
        assert_eq!(without(&bytes[4..], 64).unwrap(), [8, 0, 16, 5, 72, 2]);
        assert_eq!(without(&bytes, 7).unwrap(), bytes);
        for bad in [&bytes[..5], &[0x80], &[0x0b, 0]] {
            assert_eq!(without(bad, 7), None, "{bad:?}");
        }

        let hook = [8, 6, 16, 1, 42, 11, 10, 9, b'p', b'o', b's', b't', b'-', b'd', b'u', b'm', b'p'];
        let response = Response::decode(&hook[..]).unwrap();
        assert_eq!(response.kind(), Kind::Notify);
        assert_eq!(response.notify.unwrap().script.as_deref(), Some("post-dump"));
    }
}
