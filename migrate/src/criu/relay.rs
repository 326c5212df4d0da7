//! Standing between a container runtime and CRIU.
//!
//! runc starts the first `criu` of its PATH and speaks CRIU's RPC with it over a socket that CRIU inherits. The agent
//! puts a link to its own program there. Called by that name, this program looks at runc's first message: unless it asks
//! for a dump or a restore, it simply becomes CRIU. Otherwise it hands runc's socket to the agent, gets CRIU's end of
//! another one and the images' folder, and then becomes CRIU too, with its pid, its descriptors and its place in runc's
//! family of processes:
//!
//! ```text
//! runc <--- RPC ---> agent <--- RPC ---> CRIU
//! ```
//!
//! So the agent says when the dump or restore begins, puts its own options behind runc's, and answers CRIU's hooks; a
//! yes is runc's to give, too. What the agent sees is the same [`Swrk`] as without a runtime.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::socket::{MsgFlags, getsockopt, recv, sockopt};
use prost::Message;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixListener;

use super::program::Program;
use super::rpc::{self, Kind, Options, Request, Response, RuntimeRequest};
use super::swrk::{self, Swrk, SwrkError};
use crate::workload::container::Record;
use crate::workload::enter::{self, IMAGES_FD, SOCKET_FD};
use crate::workload::holder::HolderPid;
use crate::workload::sys;

/// As runc calls CRIU.
const NAME: &str = "criu";
/// Set for runc, and so for what it starts: the folder of images, where the agent listens.
const FOLDER: &str = "DROVER_RELAY_FOLDER";
/// Likewise: CRIU's program and leading arguments, one a line.
const PROGRAM: &str = "DROVER_RELAY_CRIU";
/// The agent's socket in the images' folder.
const SOCKET: &str = "relay.sock";
/// What is sent with descriptors, which cannot go alone.
const WORD: &[u8] = b"x";
/// runc asks for CRIU's version, prepares mounts and then asks for what it was called for.
const START_LIMIT: Duration = Duration::from_secs(10);
/// runc writes a small file at most.
const ASK_LIMIT: Duration = Duration::from_secs(3);
/// Hooks that runc has no use for, and the load balancer has decided about when they are answered.
const NOT_RUNCS: [&str; 2] = ["pre-resume", "post-resume"];
/// The hook at which it writes down what was restored.
const RECORDED: &str = "post-restore";
/// runc looks at what is in here when it restores: what the container's first three descriptors are.
const DESCRIPTORS: (&str, &str) = ("descriptors.json", r#"["/dev/null","/dev/null","/dev/null"]"#);

/// Puts the link to this program into a folder for runc's PATH.
pub fn install(folder: &Path) -> io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let (link, new) = (folder.join(NAME), folder.join("criu.new"));
    // One that a killed agent left.
    let _ = std::fs::remove_file(&new);
    std::os::unix::fs::symlink(std::env::current_exe()?, &new)?;
    std::fs::rename(new, link)
}

/// True if this program was called by that link.
pub fn is_called() -> bool {
    let name = std::env::args_os().next();
    name.is_some_and(|name| Path::new(&name).file_name() == Some(OsStr::new(NAME)))
        && std::env::var_os(PROGRAM).is_some()
}

/// Becomes CRIU; returns only if that fails.
pub fn become_criu() -> Result<std::convert::Infallible> {
    let program = std::env::var(PROGRAM).context("CRIU's program")?;
    let mut words = program.lines();
    let mut command = std::process::Command::new(words.next().context("no program")?);
    command.args(words);
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    match runtimes_socket(&args) {
        Some(socket) if wants_the_agent(socket)? => {
            let (ours, images) = hand_over(socket).context("ask the agent")?;
            let duplicate = |fd: &OwnedFd, at: RawFd| -> Result<()> {
                let got = fcntl(fd, FcntlArg::F_DUPFD(at))?;
                ensure!(got == at, "descriptor {at} is taken");
                Ok(())
            };
            duplicate(&ours, SOCKET_FD).context("CRIU's socket")?;
            duplicate(&images, IMAGES_FD).context("the images' folder")?;
            // The agent has it now, and has to see when runc's end is closed.
            nix::unistd::close(socket).context("close runc's socket")?;
            command.args(["swrk", &SOCKET_FD.to_string()]);
        }
        _ => {
            command.args(args);
        }
    }
    Err(command.exec()).context("become CRIU")
}

/// The socket of `criu swrk FD`.
fn runtimes_socket(args: &[OsString]) -> Option<RawFd> {
    match args {
        [swrk, fd] if swrk == "swrk" => fd.to_str()?.parse().ok(),
        _ => None,
    }
}

fn wants_the_agent(socket: RawFd) -> Result<bool> {
    let mut buffer = vec![0; swrk::MAX_MESSAGE_BYTES];
    let len = recv(socket, &mut buffer, MsgFlags::MSG_PEEK).context("read runc's request")?;
    let kind = RuntimeRequest::decode(&buffer[..len]).context("understand runc's request")?.kind();
    Ok(matches!(kind, Kind::Dump | Kind::Restore))
}

/// Gives the agent runc's socket; gets CRIU's and the images' folder.
fn hand_over(socket: RawFd) -> Result<(OwnedFd, OwnedFd)> {
    let folder = std::env::var_os(FOLDER).map(PathBuf::from).context("the images' folder")?;
    let agent = UnixStream::connect(path_of(&File::open(folder)?)).context("reach the agent")?;
    sys::send_with_fds(agent.as_raw_fd(), WORD, &[socket])?;
    let mut fds = sys::receive_fds(agent.as_raw_fd())?.into_iter();
    match (fds.next(), fds.next()) {
        (Some(ours), Some(images)) => Ok((ours, images)),
        _ => bail!("the agent did not answer"),
    }
}

/// The socket's path, which has to be short.
fn path_of(folder: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", folder.as_raw_fd()))
}

/// What is asked of a runtime.
#[derive(Debug)]
pub struct Call<'a> {
    /// What it is asked for.
    pub kind: Kind,
    /// Its program and arguments.
    pub argv: Vec<OsString>,
    /// The folder with the `criu` that it is to find first.
    pub programs: PathBuf,
    /// What it writes down of the container.
    pub record: Record,
    /// Inside of which namespaces it runs.
    pub holder: HolderPid,
    /// CRIU.
    pub criu: &'a Program,
    /// The images' folder.
    pub images: &'a Path,
}

impl Call<'_> {
    /// Starts the runtime, and through it CRIU, which waits to be told to begin. `complaint` says why the runtime has
    /// failed, should it.
    pub async fn start(self, complaint: impl Fn() -> Option<String>) -> Result<Swrk, SwrkError> {
        let failed = |why: Option<String>| {
            SwrkError::Failed(format!("runc: {}", why.as_deref().unwrap_or("it ended without saying why")))
        };
        let images = self.images;
        let (ours, theirs) = swrk::socket_pair()?;
        let folder = File::open(self.images).map_err(SwrkError::Start)?;
        swrk::write_config(self.images).map_err(SwrkError::Start)?;
        if self.kind == Kind::Restore {
            let (name, content) = DESCRIPTORS;
            std::fs::write(self.images.join(name), content).map_err(SwrkError::Start)?;
        }
        let path = path_of(&folder);
        // A dump that is begun again finds the former one's.
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).map_err(SwrkError::Start)?;
        let mut runtime = self.spawn().map_err(SwrkError::Start)?;
        let handed = tokio::select! {
            handed = receive(&listener, &theirs, &folder) => handed.map_err(SwrkError::Start)?,
            _ = runtime.wait() => return Err(failed(complaint())),
            () = tokio::time::sleep(START_LIMIT) => {
                return Err(failed(Some(format!("it does not start CRIU within {START_LIMIT:?}"))));
            }
        };
        drop(theirs);
        let (socket, criu) = handed;
        let relay = Relay::new(self.kind, self.record, socket, criu).await?;
        Swrk::behind(relay, ours, runtime, images)
    }

    fn spawn(&self) -> io::Result<tokio::process::Child> {
        let mut path = self.programs.clone().into_os_string();
        if let Some(rest) = std::env::var_os("PATH") {
            path.push(":");
            path.push(rest);
        }
        let mut command = enter::runtime(self.holder);
        command.args(&self.argv).env("PATH", path).env(FOLDER, self.images);
        command.env(PROGRAM, self.criu.argv().join("\n"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()
    }
}

/// Takes runc's socket from the program that is about to be CRIU, and gives it what it needs; says which process it is.
async fn receive(
    listener: &UnixListener,
    criu_end: &OwnedFd,
    folder: &File,
) -> io::Result<(OwnedFd, OwnedFd)> {
    let (stream, _) = listener.accept().await?;
    let criu = getsockopt(&stream, sockopt::PeerCredentials)?.pid();
    let criu = sys::pidfd_open(criu)?;
    let fds = stream.async_io(Interest::READABLE, || sys::receive_fds(stream.as_raw_fd())).await?;
    let socket = fds.into_iter().next().ok_or(io::ErrorKind::UnexpectedEof)?;
    sys::send_with_fds(stream.as_raw_fd(), WORD, &[criu_end.as_raw_fd(), folder.as_raw_fd()])?;
    Ok((socket, criu))
}

/// The connection to a runtime that believes that it speaks with CRIU.
#[derive(Debug)]
pub struct Relay {
    kind: Kind,
    record: Record,
    socket: AsyncFd<OwnedFd>,
    /// Readable when CRIU is gone.
    criu: AsyncFd<OwnedFd>,
    /// The options of its request.
    options: Vec<u8>,
    /// CRIU's question, which the runtime has not heard yet.
    question: Option<Response>,
}

impl Relay {
    async fn new(kind: Kind, record: Record, socket: OwnedFd, criu: OwnedFd) -> Result<Self, SwrkError> {
        let socket = swrk::register(socket)?;
        let criu = sys::register(criu).map_err(SwrkError::Start)?;
        let request = swrk::receive(&socket).await?;
        let request = RuntimeRequest::decode(&request[..]).map_err(SwrkError::Message)?;
        if request.kind() != kind {
            return Err(SwrkError::Failed(format!("runc asks for {:?} instead of {kind:?}", request.kind())));
        }
        let options = rpc::without(&request.options.unwrap_or_default(), rpc::FREEZE_CGROUP);
        let options = options.ok_or_else(|| SwrkError::Failed("runc's request makes no sense".to_owned()))?;
        Ok(Self { kind, record, socket, criu, options, question: None })
    }

    /// What the runtime has asked for, with options of ours: of two values of one option the last counts.
    pub fn request(&self, ours: &Options) -> Vec<u8> {
        let mut options = self.options.clone();
        ours.encode(&mut options).expect("a vector grows");
        RuntimeRequest { kind: self.kind.into(), options: Some(options), notify_success: None }
            .encode_to_vec()
    }

    /// Waits until CRIU is gone.
    pub async fn gone(&self) {
        // An error here would mean that the runtime of our tasks is going down.
        let _ = self.criu.readable().await;
    }

    /// Remembers a question of CRIU's, or tells the runtime its last word.
    pub async fn heard(&mut self, answer: &Response) {
        if answer.notify.is_some() {
            self.question = Some(answer.clone());
        } else if let Err(error) = swrk::send(&self.socket, &answer.encode_to_vec()).await {
            tracing::debug!(%error, "runc does not hear CRIU's last word");
        }
    }

    /// Asks the runtime CRIU's last question and gives its answer.
    pub async fn ask(&mut self) -> bool {
        let Some(question) = self.question.take() else { return true };
        let script = question.notify.as_ref().and_then(|notify| notify.script.as_deref());
        if script.is_some_and(|script| NOT_RUNCS.contains(&script)) {
            return true;
        }
        let ask = async {
            swrk::send(&self.socket, &question.encode_to_vec()).await?;
            let answer = swrk::receive(&self.socket).await?;
            Request::decode(&answer[..]).map_err(SwrkError::Message)
        };
        match tokio::time::timeout(ASK_LIMIT, ask).await {
            Ok(Ok(answer)) => {
                if script == Some(RECORDED)
                    && let Err(error) = self.record.save()
                {
                    tracing::warn!(%error, "there is no copy of runc's record of the container");
                }
                return answer.notify_success == Some(true);
            }
            Ok(Err(error)) => {
                tracing::warn!(script, error = crate::client::chain(&error), "runc does not answer CRIU");
            }
            Err(_) => tracing::warn!(script, "runc does not answer CRIU within {ASK_LIMIT:?}"),
        }
        // What is dumped is known to the agent; what is restored has to be known to runc, too.
        self.kind == Kind::Dump
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::container::{Container, Runtime};

    fn pair() -> (OwnedFd, OwnedFd) {
        swrk::socket_pair().unwrap()
    }

    fn record() -> Record {
        let container = Container { bundle: "/nonexistent".into(), name: "chat".into() };
        Runtime::new(Path::new("runc"), "/nonexistent".into()).record(&container)
    }

    fn question(script: &str) -> Response {
        let notify = Some(super::super::rpc::Notify { script: Some(script.to_owned()), pid: Some(3) });
        Response { kind: Kind::Notify.into(), success: true, notify, ..Response::default() }
    }

    async fn relay(kind: Kind, runc: &OwnedFd, socket: OwnedFd, options: &Options) -> Relay {
        let request = RuntimeRequest {
            kind: kind.into(),
            options: Some(options.encode_to_vec()),
            notify_success: None,
        };
        nix::sys::socket::send(runc.as_raw_fd(), &request.encode_to_vec(), MsgFlags::empty()).unwrap();
        let me = sys::pidfd_open(std::process::id().cast_signed()).unwrap();
        Relay::new(kind, record(), socket, me).await.unwrap()
    }

    #[tokio::test]
    async fn our_options_stand_behind_runcs() {
        let (runc, socket) = pair();
        let theirs = Options { pid: Some(7), log_level: 4, network_lock: Some(1), ..Options::default() };
        let relay = relay(Kind::Dump, &runc, socket, &theirs).await;
        let ours = Options { images_dir_fd: -1, log_level: 2, network_lock: Some(3), ..Options::default() };
        let request = Request::decode(&relay.request(&ours)[..]).unwrap();
        assert_eq!(request.kind(), Kind::Dump);
        assert_eq!(request.options.unwrap(), Options { pid: Some(7), ..ours });
    }

    #[tokio::test]
    async fn a_yes_is_runcs_to_give_and_a_dump_goes_on_without_it() {
        let (runc, socket) = pair();
        let mut relay = relay(Kind::Dump, &runc, socket, &Options::default()).await;
        let question = question("post-dump");
        for said in [true, false] {
            relay.heard(&question).await;
            let answer =
                Request { kind: Kind::Notify.into(), notify_success: Some(said), ..Request::default() };
            nix::sys::socket::send(runc.as_raw_fd(), &answer.encode_to_vec(), MsgFlags::empty()).unwrap();
            assert_eq!(relay.ask().await, said);
            let mut heard = vec![0; 1024];
            let len = recv(runc.as_raw_fd(), &mut heard, MsgFlags::MSG_DONTWAIT).unwrap();
            assert_eq!(Response::decode(&heard[..len]).unwrap(), question);
        }
        relay.heard(&question).await;
        drop(runc);
        assert!(relay.ask().await);
    }

    #[tokio::test]
    async fn a_restore_needs_runc_until_it_has_written_down_what_was_restored() {
        let (runc, socket) = pair();
        let mut relay = relay(Kind::Restore, &runc, socket, &Options::default()).await;
        drop(runc);
        relay.heard(&question("post-restore")).await;
        assert!(!relay.ask().await);
        relay.heard(&question("pre-resume")).await;
        assert!(relay.ask().await);
    }

    #[test]
    fn only_dumps_and_restores_are_the_agents() {
        assert_eq!(runtimes_socket(&["swrk".into(), "3".into()]), Some(3));
        assert_eq!(runtimes_socket(&["--version".into()]), None);
        let (runc, socket) = pair();
        for (kind, wanted) in [(Kind::Version, false), (Kind::Dump, true), (Kind::Restore, true)] {
            let request = RuntimeRequest { kind: kind.into(), options: None, notify_success: None };
            nix::sys::socket::send(runc.as_raw_fd(), &request.encode_to_vec(), MsgFlags::empty()).unwrap();
            assert_eq!(wants_the_agent(socket.as_raw_fd()).unwrap(), wanted, "{kind:?}");
            // It was only looked at.
            recv(socket.as_raw_fd(), &mut [0; 64], MsgFlags::MSG_DONTWAIT).unwrap();
        }
    }
}
