//! The real servers that drills run against: how each is started, and how clients talk to it.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::protocol::quake3::{Quake3, Query};
use crate::protocol::redis::Redis;
use crate::protocol::{Protocol, Transport};

/// A kind of server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scenario {
    /// A redis server: TCP, one connection per client.
    Redis,
    /// An OpenArena game server: UDP.
    OpenArena,
}

/// A server is not installed here.
#[derive(Debug, thiserror::Error)]
#[error("{file} is not here: install the package {package}, or run `cargo xtask setup`")]
pub struct NotInstalled {
    /// What is missing.
    pub file: String,
    /// Debian's package with it.
    pub package: &'static str,
}

/// The dedicated server of Debian's ioquake3, and OpenArena's data for it.
const IOQ3DED: &str = "/usr/lib/ioquake3/ioq3ded";
const OPENARENA_DATA: &str = "/usr/lib/openarena-server";

/// An empty value: the engine joins its arguments into one line and takes it apart again.
const EMPTY: &str = "\"\"";

impl Scenario {
    /// Its name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::OpenArena => "openarena",
        }
    }

    /// The port that its server usually has.
    pub fn port(self) -> u16 {
        match self {
            Self::Redis => 6379,
            Self::OpenArena => 27960,
        }
    }

    /// What carries its protocol.
    pub fn transport(self) -> Transport {
        match self {
            Self::Redis => Transport::Tcp,
            Self::OpenArena => Transport::Udp,
        }
    }

    /// How many clients a drill has unless told otherwise.
    pub fn default_clients(self) -> u32 {
        match self {
            Self::Redis => 200,
            Self::OpenArena => 16,
        }
    }

    /// Messages a second, unless told otherwise. The game server's are few because it ignores more: see
    /// [`crate::protocol::quake3`].
    pub fn default_rate_per_s(self) -> f64 {
        match self {
            Self::Redis => 2000.0,
            Self::OpenArena => 8.0,
        }
    }

    /// How to talk to it.
    pub fn protocol(self) -> Arc<dyn Protocol> {
        match self {
            Self::Redis => Arc::new(redis()),
            Self::OpenArena => Arc::new(Quake3::new(Query::Info)),
        }
    }

    /// Program and arguments of a server on `address` that writes nothing outside `dir`, reads nothing from
    /// its standard input and talks to nobody but its clients.
    pub fn command(self, address: SocketAddr, dir: &Path) -> Result<Vec<String>, NotInstalled> {
        match self {
            Self::Redis => redis_command(address, dir),
            Self::OpenArena => openarena_command(address, dir),
        }
    }
}

/// The drills' messages to redis; the keys are `drill:<client>`, the server being a new one each time.
pub fn redis() -> Redis {
    Redis::new("drill")
}

fn redis_command(address: SocketAddr, dir: &Path) -> Result<Vec<String>, NotInstalled> {
    let program = on_path("redis-server")
        .ok_or_else(|| NotInstalled { file: "redis-server".to_owned(), package: "redis-server" })?;
    let (ip, port, dir) = (address.ip().to_string(), address.port().to_string(), dir.display().to_string());
    // In memory only: nothing is saved, so nothing but the migration keeps the counts.
    let arguments = [
        "--bind",
        &ip,
        "--port",
        &port,
        "--dir",
        &dir,
        "--save",
        "",
        "--appendonly",
        "no",
        "--protected-mode",
        "no",
        "--daemonize",
        "no",
        "--tcp-backlog",
        "511",
    ];
    Ok(std::iter::once(program.display().to_string()).chain(arguments.map(str::to_owned)).collect())
}

fn openarena_command(address: SocketAddr, dir: &Path) -> Result<Vec<String>, NotInstalled> {
    for (file, package) in [(IOQ3DED, "ioquake3-server"), (OPENARENA_DATA, "openarena-server")] {
        if !Path::new(file).exists() {
            return Err(NotInstalled { file: file.to_owned(), package });
        }
    }
    let (enabled, ip_variable, port_variable) = match address.ip() {
        IpAddr::V4(_) => ("1", "net_ip", "net_port"),
        IpAddr::V6(_) => ("2", "net_ip6", "net_port6"),
    };
    let (ip, port, dir) = (address.ip().to_string(), address.port().to_string(), dir.display().to_string());
    let variables = [
        ("com_basegame", "baseoa"),
        ("fs_basepath", OPENARENA_DATA),
        ("fs_homepath", &dir),
        // OpenArena's protocol number, as Debian's wrapper sets it.
        ("com_legacyprotocol", "71"),
        ("com_protocol", "71"),
        // 1 is a server for the local network: no heartbeats to a master server.
        ("dedicated", "1"),
        ("sv_master1", EMPTY),
        ("net_enabled", enabled),
        (ip_variable, &ip),
        (port_variable, &port),
        ("ttycon", "0"),
        // Without a game log no file is held open for writing.
        ("g_log", EMPTY),
        ("bot_enable", "0"),
        ("sv_hostname", "drover drill"),
    ];
    let set = variables.iter().flat_map(|(name, value)| ["+set", name, value]);
    let words = std::iter::once(IOQ3DED).chain(set).chain(["+map", "oa_dm1"]);
    Ok(words.map(str::to_owned).collect())
}

fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())
}
