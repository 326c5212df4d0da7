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
use super::rpc::{self, Inherited, Kind, Options, Request, Response, RuntimeRequest};
use super::swrk::{self, Swrk, SwrkError};
use crate::workload::container::Record;
use crate::workload::enter::{IMAGES_FD, SOCKET_FD};
use crate::workload::holder::HolderPid;
use crate::workload::{init, processes, sys};

/// As runc calls CRIU.
const NAME: &str = "criu";
/// Set for runc, and so for what it starts: the folder of images, where the agent listens.
const FOLDER: &str = "DROVER_RELAY_FOLDER";
/// Likewise: CRIU's program and leading arguments, one a line.
const PROGRAM: &str = "DROVER_RELAY_CRIU";
/// Likewise: another CRIU's cache of the kernel's features.
const CACHE: &str = "DROVER_RELAY_CACHE";
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
pub const DESCRIPTORS: &str = "descriptors.json";
/// Of a container without a monitor.
const NO_STREAMS: [&str; STREAMS] = ["/dev/null"; STREAMS];
/// stdin, stdout, stderr.
pub const STREAMS: usize = 3;
/// How a monitor's program is called.
const MONITOR: &str = "conmon";
/// The first letters of a pipe's name.
const PIPE: &str = "pipe:";

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
            init::private_run(std::env::var_os(CACHE).as_deref().map(Path::new))?;
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
    /// Its program and arguments, or those of who calls it.
    pub command: tokio::process::Command,
    /// What it finds around it.
    pub surroundings: &'a Surroundings<'a>,
    /// What it writes down of the container.
    pub record: Record,
}

/// What a runtime, and through it CRIU's place, finds around it.
#[derive(Clone, Copy, Debug)]
pub struct Surroundings<'a> {
    /// The folder with the `criu` that the runtime is to find first.
    pub programs: &'a Path,
    /// CRIU.
    pub criu: &'a Program,
    /// The images' folder.
    pub images: &'a Path,
    /// Where the kernel's features are kept.
    pub kernel_cache: &'a Path,
}

impl Surroundings<'_> {
    /// As environment variables, for a `PATH` that goes on with `rest`.
    pub fn variables(&self, rest: Option<OsString>) -> [(&'static str, OsString); 4] {
        let mut path = self.programs.as_os_str().to_owned();
        if let Some(rest) = rest {
            path.push(":");
            path.push(rest);
        }
        [
            ("PATH", path),
            (FOLDER, self.images.into()),
            (PROGRAM, self.criu.argv().join("\n").into()),
            (CACHE, self.kernel_cache.into()),
        ]
    }
}

/// Notes what a container's first three descriptors are called in its images.
pub fn note_streams(images: &Path, streams: &[impl AsRef<str>]) -> io::Result<()> {
    let names: Vec<&str> = streams.iter().map(AsRef::as_ref).collect();
    std::fs::write(images.join(DESCRIPTORS), serde_json::to_vec(&names)?)
}

/// What the runtime is told of them while nobody knows their names: that each is a pipe.
pub fn any_streams() -> [String; STREAMS] {
    std::array::from_fn(|number| format!("{PIPE}[{number}]"))
}

/// Puts the names in the images in the place of [`any_streams`]. What is no pipe there needs nothing from here.
fn renamed(inherited: Vec<Inherited>, streams: &[String]) -> Vec<Inherited> {
    let any = any_streams();
    let rename = |one: Inherited| match any.iter().position(|name| *name == one.key) {
        Some(number) => {
            let key = streams.get(number).filter(|key| key.starts_with(PIPE))?.clone();
            Some(Inherited { key, ..one })
        }
        None => Some(one),
    };
    inherited.into_iter().filter_map(rename).collect()
}

impl Call<'_> {
    /// Starts the runtime, and through it CRIU, which waits to be told to begin. `complaint` says why the runtime has
    /// failed, should it.
    pub async fn start(self, complaint: impl Fn() -> Option<String>) -> Result<Swrk, SwrkError> {
        let failed = |why: Option<String>| {
            SwrkError::Failed(why.unwrap_or_else(|| "runc: it ended without saying why".to_owned()))
        };
        let images = self.surroundings.images;
        let (ours, theirs) = swrk::socket_pair()?;
        let folder = File::open(images).map_err(SwrkError::Start)?;
        swrk::write_config(images).map_err(SwrkError::Start)?;
        if self.kind == Kind::Restore {
            note_streams(images, &NO_STREAMS).map_err(SwrkError::Start)?;
        }
        let path = path_of(&folder);
        // A dump that is begun again finds the former one's.
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).map_err(SwrkError::Start)?;
        let Self { kind, mut command, surroundings, record } = self;
        command.envs(surroundings.variables(std::env::var_os("PATH"))).stdin(Stdio::null());
        let mut runtime = command.spawn().map_err(SwrkError::Start)?;
        let handed = tokio::select! {
            handed = receive(&listener, &theirs, &folder) => handed.map_err(SwrkError::Start)?,
            _ = runtime.wait() => return Err(failed(complaint())),
            () = tokio::time::sleep(START_LIMIT) => {
                return Err(failed(Some(format!("runc: it does not start CRIU within {START_LIMIT:?}"))));
            }
        };
        drop(theirs);
        let (socket, criu) = handed;
        let relay = Relay::new(kind, record, socket, criu).await?;
        Swrk::behind(relay, ours, runtime, images)
    }
}

/// Takes runc's socket from the program that is about to be CRIU, and gives it what it needs; says which process it is.
async fn receive(listener: &UnixListener, criu_end: &OwnedFd, folder: &File) -> io::Result<(OwnedFd, Criu)> {
    let (stream, _) = listener.accept().await?;
    let pid = getsockopt(&stream, sockopt::PeerCredentials)?.pid();
    let criu = Criu { pid, end: sys::pidfd_open(pid)? };
    let fds = stream.async_io(Interest::READABLE, || sys::receive_fds(stream.as_raw_fd())).await?;
    let socket = fds.into_iter().next().ok_or(io::ErrorKind::UnexpectedEof)?;
    sys::send_with_fds(stream.as_raw_fd(), WORD, &[criu_end.as_raw_fd(), folder.as_raw_fd()])?;
    Ok((socket, criu))
}

/// CRIU as its runtime has started it.
#[derive(Debug)]
struct Criu {
    /// As this host counts.
    pid: i32,
    end: OwnedFd,
}

/// The connection to a runtime that believes that it speaks with CRIU.
#[derive(Debug)]
pub struct Relay {
    kind: Kind,
    record: Record,
    socket: AsyncFd<OwnedFd>,
    /// CRIU's process, as this host counts.
    criu_pid: i32,
    /// Readable when it is gone.
    criu: AsyncFd<OwnedFd>,
    /// The options of its request.
    options: Vec<u8>,
    /// CRIU's question, which the runtime has not heard yet.
    question: Option<Response>,
}

impl Relay {
    async fn new(kind: Kind, record: Record, socket: OwnedFd, criu: Criu) -> Result<Self, SwrkError> {
        let socket = swrk::register(socket)?;
        let criu_pid = criu.pid;
        let criu = sys::register(criu.end).map_err(SwrkError::Start)?;
        let request = swrk::receive(&socket).await?;
        let request = RuntimeRequest::decode(&request[..]).map_err(SwrkError::Message)?;
        if request.kind() != kind {
            return Err(SwrkError::Failed(format!("runc asks for {:?} instead of {kind:?}", request.kind())));
        }
        let options = rpc::without(&request.options.unwrap_or_default(), rpc::FREEZE_CGROUP);
        let options = options.ok_or_else(|| SwrkError::Failed("runc's request makes no sense".to_owned()))?;
        Ok(Self { kind, record, socket, criu_pid, criu, options, question: None })
    }

    /// The monitor that the runtime was started by, if it was one.
    pub fn monitor(&self) -> Option<HolderPid> {
        let mut above = processes::ancestors(self.criu_pid);
        HolderPid::of(above.find(|pid| processes::name(*pid).as_deref() == Some(MONITOR))?)
    }

    /// CRIU's cache of the kernel's features, as this host finds it.
    pub fn kernel_cache(&self) -> PathBuf {
        init::kernel_cache_of(self.criu_pid)
    }

    /// What the runtime has asked for, with options of ours: of two values of one option the last counts. `images` says
    /// what the container's first descriptors are called there.
    pub fn request(&self, ours: &Options, images: &Path) -> Vec<u8> {
        let (mut options, mut ours) = (self.options.clone(), ours.clone());
        let asked = Options::decode(&options[..]).unwrap_or_default().inherited;
        if !asked.is_empty()
            && let Some(rest) = rpc::without(&options, rpc::INHERITED)
        {
            let streams = std::fs::read(images.join(DESCRIPTORS)).unwrap_or_default();
            let streams: Vec<String> = serde_json::from_slice(&streams).unwrap_or_default();
            (options, ours.inherited) = (rest, renamed(asked, &streams));
        }
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
        let pid = std::process::id().cast_signed();
        let me = Criu { pid, end: sys::pidfd_open(pid).unwrap() };
        Relay::new(kind, record(), socket, me).await.unwrap()
    }

    #[tokio::test]
    async fn our_options_stand_behind_runcs() {
        let (runc, socket) = pair();
        let theirs = Options { pid: Some(7), log_level: 4, network_lock: Some(1), ..Options::default() };
        let relay = relay(Kind::Dump, &runc, socket, &theirs).await;
        let ours = Options { images_dir_fd: -1, log_level: 2, network_lock: Some(3), ..Options::default() };
        let request = Request::decode(&relay.request(&ours, Path::new("/nonexistent"))[..]).unwrap();
        assert_eq!(request.kind(), Kind::Dump);
        assert_eq!(request.options.unwrap(), Options { pid: Some(7), ..ours });
    }

    #[tokio::test]
    async fn a_monitors_pipes_get_the_names_that_they_have_in_the_images() {
        let (runc, socket) = pair();
        let images = tempfile::tempdir().unwrap();
        let inherited = |names: &[(&str, i32)]| -> Vec<_> {
            names.iter().map(|(key, fd)| Inherited { key: (*key).to_owned(), fd: *fd }).collect()
        };
        let any = any_streams();
        let asked = inherited(&[("net", 3), (&any[0], 4), (&any[1], 5), (&any[2], 6)]);
        let relay =
            relay(Kind::Restore, &runc, socket, &Options { inherited: asked, ..Options::default() }).await;
        let request = || Request::decode(&relay.request(&Options::default(), images.path())[..]).unwrap();
        note_streams(images.path(), &["/dev/null", "pipe:[77]", "pipe:[78]"]).unwrap();
        let expected = inherited(&[("net", 3), ("pipe:[77]", 5), ("pipe:[78]", 6)]);
        assert_eq!(request().options.unwrap().inherited, expected);
        note_streams(images.path(), &NO_STREAMS).unwrap();
        assert_eq!(request().options.unwrap().inherited, inherited(&[("net", 3)]));
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
