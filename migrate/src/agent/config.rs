//! `agent.toml`: read, then validated into another type, with every error naming its place.

mod raw;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use self::raw::RawConfig;
use crate::decapsulator::config as decapsulator;
use crate::protocol::Protocol;
use crate::tls::Files;
use crate::workload::cgroup::{Cgroup, CgroupError};
use crate::workload::container::Container;
use crate::workload::user::UserName;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// No such file, or not readable.
    #[error("{} cannot be read", .0.display())]
    Read(PathBuf, #[source] std::io::Error),
    /// Not TOML, or an unknown or missing key; the message has the line.
    #[error("{}: {message}", .file.display())]
    Toml {
        /// The file.
        file: PathBuf,
        /// With line and column.
        message: String,
    },
    /// A value that makes no sense.
    #[error("{}: {place}: {problem}", .file.display())]
    Value {
        /// The file.
        file: PathBuf,
        /// Where in it.
        place: String,
        /// What is wrong and what would be right.
        problem: String,
    },
}

/// A site agent's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The site's name in the load balancer.
    pub site: String,
    /// Where the HTTP API listens.
    pub listen: SocketAddr,
    /// How it is spoken, here and with other agents.
    pub transport: Transport,
    /// Where records and (on a tmpfs) images are kept.
    pub state_dir: PathBuf,
    /// Program and leading arguments of CRIU, if not the default.
    pub criu: Option<Vec<String>>,
    /// The program that runs containers.
    pub runc: PathBuf,
    /// podman, and what stands before each of its commands.
    pub podman: Vec<String>,
    /// Available memory that a migration has to leave.
    pub spare_memory_bytes: u64,
    /// The site's end of the load balancer's tunnels, where it is ours.
    pub decapsulator: Option<decapsulator::Config>,
    /// What may run here.
    pub workloads: Vec<Workload>,
}

/// How the agent's API is spoken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transport {
    /// In cleartext, and nobody is asked who they are.
    Plain,
    /// With TLS and certificates at both ends.
    Tls(Files),
}

impl Transport {
    /// The files, where there are any.
    pub fn tls(&self) -> Option<&Files> {
        match self {
            Self::Plain => None,
            Self::Tls(files) => Some(files),
        }
    }
}

/// When a workload's memory goes over to the target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Memory {
    /// With the images if it is little, after the restore otherwise.
    #[default]
    Auto,
    /// With the images or ahead of them: the workload never depends on two sites.
    Pre,
    /// After the restore: the freeze does not grow with it, and until all of it is there the loss of either site is the
    /// loss of the workload.
    Post,
}

/// From here on memory is much.
const MUCH_BYTES: u64 = 4 << 20;

impl Memory {
    /// Whether so much of it goes over after the restore.
    pub fn is_later(self, bytes: u64) -> bool {
        match self {
            Self::Auto => bytes >= MUCH_BYTES,
            Self::Pre => false,
            Self::Post => true,
        }
    }
}

/// One server that may run at this site.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// The backend's name in the load balancer.
    pub name: String,
    /// The address that its sockets are bound to.
    pub address: SocketAddr,
    /// Its protocol.
    pub protocol: Protocol,
    /// What it is.
    pub kind: Kind,
    /// Whether this agent starts it.
    pub start: bool,
    /// When its memory goes over.
    pub memory: Memory,
    /// What bounds it at this site; a container has bounds of its own.
    pub cgroup: Option<Cgroup>,
}

/// What a workload is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A program that the agent starts.
    Process(Process),
    /// A container of runc's.
    Runc(Container),
    /// A container of podman's, by its name.
    Podman(String),
}

/// A program that the agent starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Program and arguments; never empty.
    pub command: Vec<String>,
    /// Its working directory.
    pub dir: PathBuf,
    /// Where its output goes; it has to be the same file at every site. Nowhere if `None`.
    pub log: Option<PathBuf>,
    /// As whom it runs; as the agent if `None`. What has moved stays who it was.
    pub user: Option<UserName>,
    /// Set besides the agent's own environment.
    pub env: BTreeMap<String, String>,
}

impl Workload {
    /// Makes its control group; gives the folders by which it is joined, none if there is none.
    pub fn make_cgroup(&self) -> Result<Vec<PathBuf>, CgroupError> {
        self.cgroup.as_ref().map_or_else(|| Ok(Vec::new()), Cgroup::make)
    }

    /// Whether it is one.
    pub fn is_container(&self) -> bool {
        !matches!(self.kind, Kind::Process(_))
    }

    /// Who runs its container, and what it is called there.
    fn container(&self) -> Option<(&'static str, &str)> {
        match &self.kind {
            Kind::Process(_) => None,
            Kind::Runc(container) => Some(("runc", &container.name)),
            Kind::Podman(name) => Some(("podman", name)),
        }
    }
}

impl Config {
    /// Reads and validates a file.
    pub fn read(file: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(file).map_err(|error| ConfigError::Read(file.into(), error))?;
        Self::parse(&text, file)
    }

    fn parse(text: &str, file: &Path) -> Result<Self, ConfigError> {
        let raw: RawConfig = toml::from_str(text)
            .map_err(|error| ConfigError::Toml { file: file.into(), message: error.to_string() })?;
        raw.validate().map_err(|(place, problem)| ConfigError::Value { file: file.into(), place, problem })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
site = "ams"
listen = "10.2.1.1:7401"
[tls]
ca = "/etc/drover/ca.pem"
certificate = "/etc/drover/agent-ams.pem"
key = "/etc/drover/agent-ams.key"
[[workloads]]
name = "chat-1"
address = "10.1.0.1:6379"
protocol = "tcp"
command = ["redis-server"]
start = true
"#;

    const DECAPSULATOR: &str = r#"
[decapsulator]
interfaces = ["eth0"]
endpoints = ["10.2.1.2", "fd00:2:1::2"]
"#;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("agent.toml"))
    }

    #[test]
    fn defaults_are_filled_in() {
        let config = parse(GOOD).unwrap();
        assert_eq!(config.state_dir, Path::new("/run/drover/ams"));
        assert_eq!(process(&config.workloads[0]).dir, Path::new("/"));
        assert_eq!(config.runc, Path::new("runc"));
        assert_eq!(config.podman, ["podman"]);
        assert_eq!(config.spare_memory_bytes, 64 << 20);
        assert!(config.workloads[0].start);
        assert_eq!(config.decapsulator, None);
        let config = parse(&format!("{GOOD}{DECAPSULATOR}")).unwrap().decapsulator.unwrap();
        assert_eq!(config.hook, decapsulator::HookChoice::Auto);
        assert_eq!(config.pin_path, Path::new("/sys/fs/bpf/drover-agent/ams"));
        assert!(config.from.is_empty() && config.endpoints.len() == 2);
    }

    #[test]
    fn a_process_has_its_options() {
        let options = "user = \"33:7\"\nenv = { LANG = \"C\", EMPTY = \"\" }\n\
                       memory = \"post\"\n[workloads.cgroup]\npath = \"drover/chat-1\"\nmemory_max_mib = 512\npids_max = 9\n";
        let workload = parse(&format!("{GOOD}{options}")).unwrap().workloads.remove(0);
        assert_eq!(process(&workload).user, Some(UserName::Numbers { uid: 33, gid: Some(7) }));
        assert_eq!(process(&workload).env.len(), 2);
        let cgroup = workload.cgroup.unwrap();
        assert_eq!((cgroup.memory_max_bytes, cgroup.pids_max), (Some(512 << 20), Some(9)));
        let plain = parse(GOOD).unwrap().workloads.remove(0);
        assert_eq!((&process(&plain).user, process(&plain).env.len(), &plain.cgroup), (&None, 0, &None));
        assert_eq!((workload.memory, plain.memory), (Memory::Post, Memory::Auto));
    }

    fn process(workload: &Workload) -> &Process {
        match &workload.kind {
            Kind::Process(process) => process,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_container_is_a_bundle_and_a_name() {
        let runc = |line: &str| parse(&GOOD.replace("command = [\"redis-server\"]", line));
        let kind = |line: &str| runc(line).unwrap().workloads.remove(0).kind;
        let of = |name: &str| Kind::Runc(Container { bundle: "/srv/chat".into(), name: name.to_owned() });
        assert_eq!(kind("runc = { bundle = \"/srv/chat\" }"), of("chat-1"));
        assert_eq!(kind("runc = { bundle = \"/srv/chat\", container = \"x\" }"), of("x"));
        assert_eq!(kind("podman = {}"), Kind::Podman("chat-1".to_owned()));
        assert_eq!(kind("podman = { container = \"x\" }"), Kind::Podman("x".to_owned()));
        for (line, place) in [
            ("runc = { bundle = \"srv\" }", "runc: bundle: an absolute path"),
            ("runc = { bundle = \"/srv\", container = \"a/b\" }", "runc: container: letters"),
            ("runc = { }", "missing field `bundle`"),
            ("runc = { bundle = \"/srv\", image = \"x\" }", "unknown field `image`"),
            ("command = [\"x\"]\nrunc = { bundle = \"/srv\" }", "command: a container's is in its bundle's"),
            ("env = { A = \"b\" }\nrunc = { bundle = \"/srv\" }", "env: a container's is in its bundle's"),
            ("start = true", "duplicate key"),
            ("", "command: a program and its arguments are meant (or `runc`"),
            ("podman = { container = \"a/b\" }", "podman: container: letters"),
            ("podman = { pod = \"x\" }", "unknown field `pod`"),
            ("user = \"x\"\npodman = {}", "user: a container's was said to `podman create`"),
            ("podman = {}\nrunc = { bundle = \"/srv\" }", "podman: there is `runc`, too"),
            ("docker = \"chat\"", "docker: "),
        ] {
            let text = runc(line).unwrap_err().to_string();
            assert!(text.contains(place), "{line}: {text}");
        }
        let one = &GOOD[GOOD.find("[[").unwrap()..];
        let other = one.replace("chat-1", "chat-2").replace("6379", "6380");
        let command = "command = [\"redis-server\"]";
        let runcs = "runc = { bundle = \"/x\", container = \"c\" }";
        let podmans = "podman = { container = \"c\" }";
        for (line, key) in [(runcs, "runc"), (podmans, "podman")] {
            let text = parse(&format!("{GOOD}{other}").replace(command, line)).unwrap_err().to_string();
            assert!(
                text.contains(&format!("{key}: container: the container is workload \"chat-1\"'s")),
                "{text}"
            );
        }
        // Each has names of its own.
        parse(&format!("{GOOD}{other}").replacen(command, runcs, 1).replacen(command, podmans, 1)).unwrap();
    }

    #[test]
    fn there_is_no_tls_only_where_an_operator_says_so() {
        let (head, rest) = GOOD.split_once("[tls]").unwrap();
        let workloads = &rest[rest.find("[[").unwrap()..];
        let plain = |head: &str| parse(&format!("{head}{workloads}"));
        let refused = plain(head).unwrap_err().to_string();
        assert!(refused.contains("whoever reaches 10.2.1.1:7401 commands"), "{refused}");
        assert!(
            refused.contains("migrate pki issue --agent") && refused.contains("insecure = true"),
            "{refused}"
        );
        for fine in [
            format!("{head}insecure = true\n"),
            head.replace("10.2.1.1", "127.0.0.1"),
            head.replace("10.2.1.1", "[::1]"),
        ] {
            assert_eq!(plain(&fine).unwrap().transport, Transport::Plain, "{fine}");
        }
        let files = parse(GOOD).unwrap().transport;
        assert_eq!(files.tls().unwrap().certificate, Path::new("/etc/drover/agent-ams.pem"));
    }

    #[test]
    fn every_error_names_its_place() {
        for (from, to, place) in [
            ("\"ams\"", "\"../x\"", "agent.toml: site: "),
            ("10.2.1.1:7401", "10.2.1.1", "agent.toml: listen: "),
            ("\"/etc/drover/ca.pem\"", "\"ca.pem\"", "agent.toml: tls: ca: an absolute path"),
            ("ca =", "cas =", "unknown field `cas`"),
            ("[tls]", "insecure = true\n[tls]", "agent.toml: insecure: there is a section [tls]"),
            ("site =", "sites =", "unknown field `sites`"),
            (
                "site =",
                "spare_memory_mib = 99999999999999\nsite =",
                "agent.toml: spare_memory_mib: mebibytes",
            ),
            ("start = true", "start = 1", "line 13"),
            ("protocol = \"tcp\"", "protocol = \"sctp\"", "sctp"),
            ("10.1.0.1:6379", "10.1.0.1/32", "workloads[0] \"chat-1\": address: "),
            ("10.1.0.1:6379", "0.0.0.0:6379", "workloads[0] \"chat-1\": address: "),
            ("[\"redis-server\"]", "[]", "workloads[0] \"chat-1\": command: "),
            ("start = true", "dir = \"x\"", "workloads[0] \"chat-1\": dir: "),
            (
                "start = true",
                "user = \"a b\"",
                "workloads[0] \"chat-1\": user: \"a b\" is no user: a name, UID or",
            ),
            ("start = true", "env = { \"A=B\" = \"x\" }", "workloads[0] \"chat-1\": env: \"A=B\" cannot be"),
            ("start = true", "env = { A = 1 }", "expected a string"),
            ("start = true", "cgroup = { path = \"/x\" }", "workloads[0] \"chat-1\": cgroup: path: "),
            ("start = true", "cgroup = { path = \"x\", pids_max = 0 }", "cgroup: pids_max: at least one"),
            (
                "start = true",
                "cgroup = { path = \"x\", memory_max_mib = 0 }",
                "cgroup: memory_max_mib: at least",
            ),
            ("start = true", "cgroup = { path = \"x\", cpu = 1 }", "unknown field `cpu`"),
        ] {
            let error = parse(&GOOD.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains(place), "{to}: {error}");
        }
        for (line, place) in [
            ("interfaces = []", "decapsulator: interfaces: "),
            ("interfaces = [\"et/h0\"]", "decapsulator: interfaces: "),
            ("interfaces = [\"eth0\", \"eth0\"]", "decapsulator: interfaces: \"eth0\" is there twice"),
            ("endpoints = []", "decapsulator: endpoints: "),
            ("endpoints = [\"10.2.1.2/32\"]", "decapsulator: endpoints: "),
            ("endpoints = [\"::\"]", "decapsulator: endpoints: "),
            ("from = []", "decapsulator: from: "),
            ("from = [\"10.2.1.0/16\"]", "decapsulator: from: \"10.2.1.0/16\" has bits"),
            ("hook = \"tcx\"", "unknown variant `tcx`"),
            ("pin_path = \"/sys/fs/bpf/a.b\"", "decapsulator: pin_path: "),
            ("interface = \"eth0\"", "unknown field `interface`"),
        ] {
            let key = line.split(' ').next().unwrap();
            let others = DECAPSULATOR.lines().filter(|other| !other.starts_with(key));
            let text = format!("{GOOD}{}\n{line}\n", others.collect::<Vec<_>>().join("\n"));
            let error = parse(&text).unwrap_err().to_string();
            assert!(error.contains(place), "{line}: {error}");
        }
        let no_workload = format!("{}{DECAPSULATOR}", &GOOD[..GOOD.find("[[").unwrap()]);
        assert!(parse(&no_workload).unwrap_err().to_string().contains("decapsulator: it takes packets"));
        let twice = format!("{GOOD}{}", &GOOD[GOOD.find("[[").unwrap()..]);
        assert!(parse(&twice).unwrap_err().to_string().contains("workloads[1]"));
        let same_address = twice.replacen("chat-1", "chat-0", 1);
        let error = parse(&same_address).unwrap_err().to_string();
        assert!(error.contains("taken by workload \"chat-0\""), "{error}");
        let same_group =
            same_address.replacen("6379", "6380", 1).replace("start = true", "cgroup = { path = \"x\" }");
        let error = parse(&same_group).unwrap_err().to_string();
        assert!(error.contains("cgroup: path: the path is taken by workload \"chat-0\""), "{error}");
    }
}
