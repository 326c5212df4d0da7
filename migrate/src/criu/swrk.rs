//! One CRIU process (`criu swrk FD`) inside a workload's namespaces, and the connection to it.
//!
//! The process gets a socket and the images folder and nothing else. The folder is named to CRIU as
//! `/proc/self/fd/N` through a configuration file, since CRIU runs in another pid namespace (so a descriptor
//! of ours means nothing to it) and in a mount namespace whose `/run` may hide the folder's path.
//! If this process goes away while CRIU waits in its post-dump hook, CRIU lets the source run again.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::socket::{self, AddressFamily, MsgFlags, SockFlag, SockType, recv, socketpair};
use prost::Message;
use tokio::io::unix::AsyncFd;

use super::latch::Latch;
use super::log;
use super::program::Program;
use super::relay::Relay;
use super::rpc::{CGROUPS_IGNORE, Features, Kind, NETWORK_LOCK_SKIP, Options, Request, Response};
use crate::workload::enter;
use crate::workload::holder::HolderPid;
use crate::workload::sys;

/// Deleted files up to this size travel inside the images.
pub const GHOST_LIMIT_BYTES: u32 = 64 << 20;
/// A CRIU that has said its last word ends at once; one that does not is left to itself.
const END_LIMIT: Duration = Duration::from_secs(5);
/// CRIU's messages are small; the largest carries one line of error text.
pub const MAX_MESSAGE_BYTES: usize = 64 << 10;
/// Warnings and errors; more would cost time in the freeze window.
const LOG_LEVEL: i32 = 2;
/// CRIU's log in the images folder; not an image.
pub const LOG_FILE: &str = "criu.log";
/// What CRIU says before it has a log.
pub const STDERR_FILE: &str = "criu.stderr";
/// CRIU's configuration file in the images folder.
pub const CONFIG_FILE: &str = "criu.conf";

/// Why CRIU could not be talked to.
#[derive(Debug, thiserror::Error)]
pub enum SwrkError {
    /// It did not start.
    #[error("CRIU could not be started: run `cargo xtask setup`, or name it in the agent's `criu`")]
    Start(#[source] io::Error),
    /// The connection broke.
    #[error("the connection to CRIU broke")]
    Connection(#[source] io::Error),
    /// They cannot be given to it.
    #[error("CRIU cannot be given the images: do they have an inventory?")]
    Images(#[source] io::Error),
    /// It sent something unknown.
    #[error("CRIU sent a message that makes no sense: is it 4.2 or newer?")]
    Message(#[source] prost::DecodeError),
    /// It ended or failed; the text has the lines of its log that matter.
    #[error("{0}")]
    Failed(String),
}

/// The hooks at which CRIU asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Before anything is frozen.
    PreDump,
    /// Every task is frozen.
    QueryExtFiles,
    /// The images are complete.
    PostDump,
    /// Restored, out of repair mode, not running.
    PreResume,
    /// The tasks run.
    PostResume,
    /// One that means nothing to us; it is to be answered with yes.
    Other,
}

impl Hook {
    fn parse(name: &str) -> Self {
        match name {
            "pre-dump" => Self::PreDump,
            "query-ext-files" => Self::QueryExtFiles,
            "post-dump" => Self::PostDump,
            "pre-resume" => Self::PreResume,
            "post-resume" => Self::PostResume,
            _ => Self::Other,
        }
    }
}

/// What CRIU says.
#[derive(Debug)]
pub enum Said {
    /// A question: answer with [`Swrk::answer`].
    Hook(Hook),
    /// It is over.
    Ended(Ended),
}

/// How a dump or restore ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// As asked.
    Well,
    /// It failed, or a hook said no.
    Failed {
        /// The lines of its log that matter.
        reason: String,
        /// A connection in the accept queue was the reason.
        in_flight: bool,
        /// It went away without a last word, so it has not tidied up.
        was_killed: bool,
    },
}

/// One CRIU process.
#[derive(Debug)]
pub struct Swrk {
    socket: AsyncFd<OwnedFd>,
    /// What was started to become CRIU, or to start it.
    process: tokio::process::Child,
    images: PathBuf,
    /// The container runtime that CRIU was started by.
    relay: Option<Relay>,
    /// Until the images are there.
    latch: Option<Latch>,
}

impl Swrk {
    /// Starts CRIU inside the holder's namespaces and a control group, by its folders; its log, configuration and
    /// images are in `images`.
    pub fn start(
        program: &Program,
        holder: HolderPid,
        cgroups: &[PathBuf],
        images: &Path,
    ) -> Result<Self, SwrkError> {
        let (ours, theirs) = socket_pair()?;
        let folder = File::open(images).map_err(SwrkError::Start)?;
        write_config(images).map_err(SwrkError::Start)?;
        let stderr = File::create(images.join(STDERR_FILE)).map_err(SwrkError::Start)?;
        let mut command = tokio::process::Command::new("/proc/self/exe");
        command
            .args(["enter", "--holder", &holder.to_string()])
            .args(cgroups.iter().flat_map(|folder| [OsStr::new("--cgroup"), folder.as_os_str()]))
            .args(["criu", "--"])
            .args(program.argv())
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::from(OwnedFd::from(folder)))
            .stderr(Stdio::from(stderr));
        let process = command.spawn().map_err(SwrkError::Start)?;
        let socket = register(ours)?;
        Ok(Self { socket, process, images: images.to_owned(), relay: None, latch: None })
    }

    /// One that a container runtime has started; `process` is the runtime.
    pub fn behind(
        relay: Relay,
        ours: OwnedFd,
        process: tokio::process::Child,
        images: &Path,
    ) -> Result<Self, SwrkError> {
        let socket = register(ours)?;
        Ok(Self { socket, process, images: images.to_owned(), relay: Some(relay), latch: None })
    }

    /// The container's monitor, if it is one that has started CRIU.
    pub fn monitor(&self) -> Option<HolderPid> {
        self.relay.as_ref()?.monitor()
    }

    /// Its cache of the kernel's features, as this host finds it.
    pub fn kernel_cache(&self, holder: HolderPid) -> PathBuf {
        self.relay.as_ref().map_or_else(|| holder.kernel_cache(), Relay::kernel_cache)
    }

    /// Makes CRIU look at the kernel's features now rather than in the freeze window; gives those that matter here.
    pub async fn warm(&mut self) -> Result<Features, SwrkError> {
        match self.check_features().await {
            // A program that is not there, or does not run, says so on stderr and closes the connection.
            Err(error @ SwrkError::Connection(_)) => Err(SwrkError::Failed(format!(
                "{}; is CRIU 4.2 or newer installed (`cargo xtask setup`), or named in the agent's `criu`?",
                self.explain_error(&error)
            ))),
            other => other,
        }
    }

    async fn check_features(&self) -> Result<Features, SwrkError> {
        let features = Some(Features { mem_track: Some(true), lazy_pages: Some(true) });
        self.send(&Request {
            kind: Kind::FeatureCheck.into(),
            features,
            keep_open: Some(true),
            ..Request::default()
        })
        .await?;
        let answer = decode(&receive(&self.socket).await?)?;
        if answer.kind() != Kind::FeatureCheck || !answer.success {
            return Err(SwrkError::Failed(self.explain(&answer)));
        }
        Ok(answer.features.unwrap_or_default())
    }

    /// Begins to dump the tree of `pid` (as the holder's pid namespace counts). Pages that have not changed since the
    /// dump in the folder `parent` of the images folder are left out.
    pub async fn dump(&mut self, pid: i32, parent: Option<&str>) -> Result<(), SwrkError> {
        let track_mem = parent.map(|_| true);
        let options = Options { parent_img: parent.map(str::to_owned), track_mem, ..options() };
        self.begin(Kind::Dump, Options { pid: Some(pid), ..options.clone() }, &options).await
    }

    /// Begins to restore, as far as that goes without images; if `is_lazy`, without the pages that are marked so.
    pub async fn restore(&mut self, is_lazy: bool) -> Result<(), SwrkError> {
        self.latch = Some(Latch::shut(&self.images).map_err(SwrkError::Images)?);
        let options = Options { lazy_pages: Some(is_lazy), ..options() };
        self.begin(Kind::Restore, options.clone(), &options).await
    }

    /// Goes on with a restore: the images are in their folder.
    pub fn take_images(&mut self) -> Result<(), SwrkError> {
        self.latch.take().map_or(Ok(()), Latch::open).map_err(SwrkError::Images)
    }

    /// Sends our own request, or a container's with our options.
    async fn begin(&self, kind: Kind, own: Options, ours: &Options) -> Result<(), SwrkError> {
        if let Some(relay) = &self.relay {
            return send(&self.socket, &relay.request(ours, &self.images)).await;
        }
        let request = Request { kind: kind.into(), options: Some(own), ..Request::default() };
        self.send(&request).await
    }

    /// Waits for what CRIU says next. May be dropped and called again.
    pub async fn next(&mut self) -> Said {
        let heard = tokio::select! {
            biased;
            message = receive(&self.socket) => message.and_then(|message| decode(&message)),
            // What it was restoring when it was killed keeps its end of the connection open.
            () = gone(&mut self.process, self.relay.as_ref()) => take(self.socket.get_ref()),
        };
        if let (Ok(answer), Some(relay)) = (&heard, &mut self.relay) {
            relay.heard(answer).await;
        }
        let answer = match heard {
            Ok(answer) => answer,
            Err(error) => {
                return Said::Ended(Ended::Failed {
                    reason: self.explain_error(&error),
                    in_flight: self.is_in_flight(),
                    was_killed: true,
                });
            }
        };
        match answer {
            Response { notify: Some(notify), .. } => {
                Said::Hook(Hook::parse(notify.script.as_deref().unwrap_or_default()))
            }
            Response { success: true, .. } => Said::Ended(Ended::Well),
            failed => {
                let (reason, in_flight) = (self.explain(&failed), self.is_in_flight());
                Said::Ended(Ended::Failed { reason, in_flight, was_killed: false })
            }
        }
    }

    /// Answers CRIU's question.
    pub async fn answer(&mut self, yes: bool) -> Result<(), SwrkError> {
        let yes = match &mut self.relay {
            Some(relay) if yes => relay.ask().await,
            _ => yes,
        };
        let kind = Kind::Notify.into();
        self.send(&Request { kind, notify_success: Some(yes), ..Request::default() }).await
    }

    /// Waits until the process is gone.
    pub async fn end(mut self) {
        // A runtime that has not heard CRIU's last word finds that there is nobody any more.
        drop((self.socket, self.relay, self.latch));
        if tokio::time::timeout(END_LIMIT, self.process.wait()).await.is_err() {
            tracing::warn!(pid = self.process.id(), "CRIU has answered but does not end; it is left alone");
        }
    }

    async fn send(&self, request: &Request) -> Result<(), SwrkError> {
        send(&self.socket, &request.encode_to_vec()).await
    }

    fn explain(&self, answer: &Response) -> String {
        log::explain(&self.images.join(LOG_FILE), &self.images.join(STDERR_FILE), answer.error.as_deref())
    }

    fn explain_error(&self, error: &SwrkError) -> String {
        let known = log::explain(&self.images.join(LOG_FILE), &self.images.join(STDERR_FILE), None);
        format!("{known} ({})", crate::client::chain(error))
    }

    fn is_in_flight(&self) -> bool {
        std::fs::read(self.images.join(LOG_FILE))
            .is_ok_and(|text| log::is_in_flight(&String::from_utf8_lossy(&text)))
    }
}

/// Waits until CRIU is gone.
async fn gone(process: &mut tokio::process::Child, relay: Option<&Relay>) {
    match relay {
        Some(relay) => relay.gone().await,
        // It is gone, or was.
        None => drop(process.wait().await),
    }
}

/// Two ends of a connection as CRIU speaks it.
pub fn socket_pair() -> Result<(OwnedFd, OwnedFd), SwrkError> {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(|errno| SwrkError::Start(errno.into()))
}

/// Lets the runtime wait for one end of it.
pub fn register(socket: OwnedFd) -> Result<AsyncFd<OwnedFd>, SwrkError> {
    nix::fcntl::fcntl(&socket, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))
        .map_err(|errno| SwrkError::Start(errno.into()))?;
    sys::register(socket).map_err(SwrkError::Start)
}

/// Tells CRIU, which finds it by its options, where the images are.
pub fn write_config(images: &Path) -> io::Result<()> {
    let here = enter::IMAGES_FOLDER;
    std::fs::write(images.join(CONFIG_FILE), format!("images-dir {here}\nwork-dir {here}\n"))
}

/// Sends one message.
pub async fn send(socket: &AsyncFd<OwnedFd>, message: &[u8]) -> Result<(), SwrkError> {
    socket
        .async_io(tokio::io::Interest::WRITABLE, |fd| {
            // A CRIU that is gone is an error of this connection, not a signal for the agent.
            socket::send(fd.as_raw_fd(), message, MsgFlags::MSG_NOSIGNAL).map_err(io::Error::from)
        })
        .await
        .map(drop)
        .map_err(SwrkError::Connection)
}

/// Receives one message.
pub async fn receive(socket: &AsyncFd<OwnedFd>) -> Result<Vec<u8>, SwrkError> {
    let mut buffer = vec![0; MAX_MESSAGE_BYTES];
    let len = socket
        .async_io(tokio::io::Interest::READABLE, |fd| {
            recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty()).map_err(io::Error::from)
        })
        .await
        .map_err(SwrkError::Connection)?;
    buffer.truncate(len);
    if buffer.is_empty() {
        return Err(SwrkError::Connection(io::ErrorKind::UnexpectedEof.into()));
    }
    Ok(buffer)
}

/// A message that is there already.
fn take(socket: &OwnedFd) -> Result<Response, SwrkError> {
    let mut buffer = vec![0; MAX_MESSAGE_BYTES];
    match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
        Ok(len) => decode(&buffer[..len]),
        Err(_) => decode(&[]),
    }
}

fn decode(message: &[u8]) -> Result<Response, SwrkError> {
    if message.is_empty() {
        return Err(SwrkError::Connection(io::ErrorKind::UnexpectedEof.into()));
    }
    Response::decode(message).map_err(SwrkError::Message)
}

fn options() -> Options {
    Options {
        images_dir_fd: -1,
        tcp_established: Some(true),
        file_locks: Some(true),
        log_level: LOG_LEVEL,
        log_file: Some(LOG_FILE.to_owned()),
        notify_scripts: Some(true),
        link_remap: Some(true),
        manage_cgroups_mode: Some(CGROUPS_IGNORE),
        ghost_limit: Some(GHOST_LIMIT_BYTES),
        config_file: Some(format!("{}/{CONFIG_FILE}", enter::IMAGES_FOLDER)),
        network_lock: Some(NETWORK_LOCK_SKIP),
        ..Options::default()
    }
}
