//! What `agent.toml` may say, and what is wrong with it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{Config, Kind, Memory, Process, Transport, Workload};
use crate::decapsulator::config::RawDecapsulator;
use crate::protocol::{Protocol, is_valid_id};
use crate::tls::Files;
use crate::workload::cgroup::Cgroup;
use crate::workload::container::Container;
use crate::workload::user::UserName;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawConfig {
    site: String,
    listen: String,
    tls: Option<Files>,
    #[serde(default)]
    insecure: bool,
    state_dir: Option<PathBuf>,
    criu: Option<Vec<String>>,
    runc: Option<PathBuf>,
    podman: Option<Vec<String>>,
    #[serde(default = "spare_memory_mib")]
    spare_memory_mib: u64,
    decapsulator: Option<RawDecapsulator>,
    #[serde(default)]
    workloads: Vec<RawWorkload>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawWorkload {
    name: String,
    address: String,
    protocol: Protocol,
    command: Option<Vec<String>>,
    dir: Option<PathBuf>,
    log: Option<PathBuf>,
    #[serde(default)]
    start: bool,
    #[serde(default)]
    memory: Memory,
    user: Option<String>,
    env: Option<BTreeMap<String, String>>,
    cgroup: Option<RawCgroup>,
    runc: Option<RawContainer>,
    podman: Option<RawPodman>,
    docker: Option<serde::de::IgnoredAny>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawContainer {
    bundle: PathBuf,
    container: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPodman {
    container: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCgroup {
    path: PathBuf,
    memory_max_mib: Option<u64>,
    pids_max: Option<u64>,
}

/// Why containers of daemons are not taken.
const NOT_HELD: &str = "its containers are not moved, since a daemon outside of the container keeps acting on it (see the \
                        README): make one of its image with podman, or export it as an OCI bundle, and write \
                        runc = { bundle = \"/PATH\" }";

/// What a host needs to stay usable.
fn spare_memory_mib() -> u64 {
    64
}

/// A place in the file and what is wrong there.
pub(super) type Problem = (String, String);

impl RawConfig {
    pub(super) fn validate(self) -> Result<Config, Problem> {
        let at = |place: &str, problem: &str| (place.to_owned(), problem.to_owned());
        if !is_valid_id(&self.site) {
            return Err(at("site", "a name of letters, digits, `-`, `_` and `.` is meant"));
        }
        let listen: SocketAddr =
            self.listen.parse().map_err(|_| at("listen", "IP:PORT is meant, such as 10.2.1.1:7401"))?;
        let transport = transport(self.tls, self.insecure, listen)?;
        let state_dir = self.state_dir.unwrap_or_else(|| Path::new("/run/drover").join(&self.site));
        if !state_dir.is_absolute() {
            return Err(at("state_dir", "an absolute path is meant"));
        }
        for (key, words) in [("criu", &self.criu), ("podman", &self.podman)] {
            if words.as_ref().is_some_and(Vec::is_empty) {
                return Err(at(key, "a program is meant; leave the key out for the default"));
            }
        }
        let mut workloads: Vec<Workload> = Vec::new();
        for (index, raw) in self.workloads.into_iter().enumerate() {
            let place = format!("workloads[{index}] {:?}", raw.name);
            let workload = raw.validate().map_err(|(key, problem)| (format!("{place}: {key}"), problem))?;
            for other in &workloads {
                if other.name == workload.name {
                    return Err((place, "the name is taken by a workload above".to_owned()));
                }
                if let (Some(cgroup), Some(others)) = (&workload.cgroup, &other.cgroup)
                    && cgroup.path() == others.path()
                {
                    let problem = format!("the path is taken by workload {:?}", other.name);
                    return Err((format!("{place}: cgroup: path"), problem));
                }
                if let Some(container) = workload.container()
                    && other.container() == Some(container)
                {
                    let problem = format!("the container is workload {:?}'s", other.name);
                    return Err((format!("{place}: {}: container", container.0), problem));
                }
                if (other.address, other.protocol) == (workload.address, workload.protocol) {
                    let problem = format!("the address is taken by workload {:?}", other.name);
                    return Err((format!("{place}: address"), problem));
                }
            }
            workloads.push(workload);
        }
        let decapsulator = self.decapsulator.map(|raw| {
            if workloads.is_empty() {
                let problem =
                    "it takes packets to the workloads out of tunnels, and there is no [[workloads]]";
                return Err(at("decapsulator", problem));
            }
            raw.validate(&self.site).map_err(|(key, problem)| (format!("decapsulator: {key}"), problem))
        });
        let decapsulator = decapsulator.transpose()?;
        let spare_memory_bytes = self
            .spare_memory_mib
            .checked_mul(1 << 20)
            .ok_or_else(|| at("spare_memory_mib", "mebibytes are meant, such as 64"))?;
        Ok(Config {
            site: self.site,
            listen,
            transport,
            state_dir,
            criu: self.criu,
            runc: self.runc.unwrap_or_else(|| "runc".into()),
            podman: self.podman.unwrap_or_else(|| vec!["podman".to_owned()]),
            spare_memory_bytes,
            decapsulator,
            workloads,
        })
    }
}

/// Without TLS whoever reaches the agent commands it, which an operator has to say they mean.
fn transport(tls: Option<Files>, insecure: bool, listen: SocketAddr) -> Result<Transport, Problem> {
    let Some(files) = tls else {
        if insecure || listen.ip().is_loopback() {
            return Ok(Transport::Plain);
        }
        let problem = format!(
            "whoever reaches {listen} commands this agent, for there is no section [tls]: set it, with a certificate of \
             `migrate pki issue --agent`; or set insecure = true where only load balancers and agents reach {listen}"
        );
        return Err(("tls".to_owned(), problem));
    };
    if insecure {
        let problem = "there is a section [tls], which means the contrary: take one of them away";
        return Err(("insecure".to_owned(), problem.to_owned()));
    }
    if let Some((key, _)) = files.each().iter().find(|(_, path)| !path.is_absolute()) {
        return Err((format!("tls: {key}"), "an absolute path is meant".to_owned()));
    }
    Ok(Transport::Tls(files))
}

impl RawWorkload {
    fn validate(self) -> Result<Workload, Problem> {
        let at = |place: &str, problem: &str| (place.to_owned(), problem.to_owned());
        if !is_valid_id(&self.name) {
            return Err(at("name", "letters, digits, `-`, `_` and `.` are meant, at most 64"));
        }
        let address: SocketAddr =
            self.address.parse().map_err(|_| at("address", "IP:PORT is meant, such as 10.1.0.1:6379"))?;
        if address.ip().is_unspecified() || address.port() == 0 {
            return Err(at("address", "the one address that clients are led to is meant, with its port"));
        }
        let kind = match (&self.runc, &self.podman, &self.docker) {
            (.., Some(_)) => return Err(at("docker", NOT_HELD)),
            (Some(_), Some(_), _) => return Err(at("podman", "there is `runc`, too: take one of them away")),
            (Some(container), ..) => Kind::Runc(self.as_runcs(container)?),
            (_, Some(container), _) => Kind::Podman(self.as_podmans(container)?),
            (None, None, None) => Kind::Process(self.as_process()?),
        };
        let cgroup = self.cgroup.map(RawCgroup::validate).transpose()?;
        let Self { name, protocol, start, memory, .. } = self;
        Ok(Workload { name, address, protocol, kind, start, memory, cgroup })
    }

    fn as_process(&self) -> Result<Process, Problem> {
        let at = |place: &str, problem: &str| (place.to_owned(), problem.to_owned());
        let Some(command) =
            self.command.clone().filter(|command| command.first().is_some_and(|it| !it.is_empty()))
        else {
            return Err(at(
                "command",
                "a program and its arguments are meant (or `runc` with a bundle, or `podman`)",
            ));
        };
        let dir = self.dir.clone().unwrap_or_else(|| "/".into());
        for (key, path) in [("dir", Some(&dir)), ("log", self.log.as_ref())] {
            if path.is_some_and(|path| !path.is_absolute()) {
                return Err(at(key, "an absolute path is meant"));
            }
        }
        let user = self.user.as_ref().map(|user| user.parse::<UserName>()).transpose();
        let user = user.map_err(|error| at("user", &error.to_string()))?;
        let env = self.env.clone().unwrap_or_default();
        for (name, value) in &env {
            // environ(7): a name ends at the first `=`, and both end at the first zero byte.
            if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
                return Err(at(
                    "env",
                    &format!("{name:?} cannot be a variable's name, or its value not one"),
                ));
            }
        }
        Ok(Process { command, dir, log: self.log.clone(), user, env })
    }

    fn as_runcs(&self, raw: &RawContainer) -> Result<Container, Problem> {
        self.has_nothing_of_a_process("is in its bundle's config.json")?;
        if !raw.bundle.is_absolute() {
            return Err(("runc: bundle".to_owned(), "an absolute path is meant".to_owned()));
        }
        Ok(Container {
            bundle: raw.bundle.clone(),
            name: self.container_name("runc", raw.container.as_ref())?,
        })
    }

    fn as_podmans(&self, raw: &RawPodman) -> Result<String, Problem> {
        self.has_nothing_of_a_process("was said to `podman create`")?;
        self.container_name("podman", raw.container.as_ref())
    }

    fn container_name(&self, key: &str, name: Option<&String>) -> Result<String, Problem> {
        let name = name.unwrap_or(&self.name);
        if is_valid_id(name) {
            return Ok(name.clone());
        }
        let problem = "letters, digits, `-`, `_` and `.` are meant, at most 64";
        Err((format!("{key}: container"), problem.to_owned()))
    }

    /// What a process is told here stands elsewhere for a container.
    fn has_nothing_of_a_process(&self, elsewhere: &str) -> Result<(), Problem> {
        for (key, is_there) in [
            ("command", self.command.is_some()),
            ("dir", self.dir.is_some()),
            ("log", self.log.is_some()),
            ("user", self.user.is_some()),
            ("env", self.env.is_some()),
            ("cgroup", self.cgroup.is_some()),
        ] {
            if is_there {
                return Err((key.to_owned(), format!("a container's {elsewhere}: take the key away")));
            }
        }
        Ok(())
    }
}

impl RawCgroup {
    fn validate(self) -> Result<Cgroup, Problem> {
        let at = |place: &str, problem: &str| (format!("cgroup: {place}"), problem.to_owned());
        let mut cgroup = Cgroup::at(&self.path).ok_or_else(|| {
            at("path", "a path below the hierarchies' roots is meant, such as drover/chat-1")
        })?;
        let bytes = |mib: u64| mib.checked_mul(1 << 20).filter(|bytes| *bytes > 0);
        if let Some(mib) = self.memory_max_mib {
            let bad = || at("memory_max_mib", "at least one mebibyte is meant, such as 512");
            cgroup.memory_max_bytes = Some(bytes(mib).ok_or_else(bad)?);
        }
        if self.pids_max == Some(0) {
            return Err(at("pids_max", "at least one task is meant, such as 100"));
        }
        cgroup.pids_max = self.pids_max;
        Ok(cgroup)
    }
}
