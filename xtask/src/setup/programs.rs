//! Programs that labs, tests and demo start.

use std::path::Path;

use super::{State, announce, debian, missing};
use crate::shell;

struct Program {
    name: &'static str,
    package: &'static str,
    purpose: &'static str,
    /// The services that the package brings.
    services: &'static [&'static str],
}

impl Program {
    /// A name with slashes is a file that is not a program.
    fn is_there(&self) -> bool {
        if self.name.contains('/') {
            Path::new(self.name).is_file()
        } else {
            shell::which(self.name).is_some()
        }
    }
}

const fn tool(name: &'static str, package: &'static str, purpose: &'static str) -> Program {
    Program { name, package, purpose, services: &[] }
}

/// A program whose package and service are called as it is.
macro_rules! server {
    ($name:literal, $purpose:literal) => {
        Program { name: $name, package: $name, purpose: $purpose, services: &[$name] }
    };
}

const PROGRAMS: &[Program] = &[
    tool("ip", "iproute2", "makes the lab's namespaces"),
    tool("ethtool", "ethtool", "sets the lab's offloads"),
    tool("nft", "nftables", "silences a frozen server's address"),
    tool("unshare", "util-linux", "gives a workload its own process numbers"),
    tool("mount", "mount", "used by tests of the lab"),
    tool("kill", "procps", "ends what a lab test started"),
    tool("runc", "runc", "runs workloads of tests as containers, measured beside Drover"),
    Program {
        name: "podman",
        package: "podman",
        purpose: "runs workloads of tests as containers",
        services: &["podman.socket", "podman.service", "podman-restart.service", "podman-auto-update.timer"],
    },
    tool("redis-cli", "redis-tools", "fills a workload of tests"),
    server!("redis-server", "a workload of tests and demo"),
    server!("openarena-server", "a workload of tests and demo"),
    tool("/usr/lib/ioquake3/ioquake3", "ioquake3", "a client of a workload of tests"),
    tool("/usr/games/openarena", "openarena", "what that client plays"),
    tool("Xvfb", "xvfb", "a screen for that client"),
    server!("mosquitto", "a workload of tests"),
    tool("mosquitto_pub", "mosquitto-clients", "clients of a workload of tests"),
    Program {
        name: "nginx",
        package: "nginx-light",
        purpose: "a workload of tests, measured beside Drover",
        services: &["nginx"],
    },
];

/// What Drover is measured beside. A benchmark leaves out what is not there.
const PEERS: &[Program] = &[
    tool("iperf3", "iperf3", "measures throughput in benchmarks"),
    server!("haproxy", "measured beside Drover"),
    tool("/usr/lib/nginx/modules/ngx_stream_module.so", "libnginx-mod-stream", "nginx's TCP and UDP proxy"),
];

/// What migrations are measured beside. A benchmark leaves out what is not there.
const MOVERS: &[Program] = &[tool("nc", "netcat-openbsd", "copies images where a server is moved by hand")];

/// Reports each program; installs the missing ones with one call.
pub(super) fn provide(report: &mut impl FnMut(&str, State)) {
    provide_all(PROGRAMS, report);
}

/// The same with what benchmarks compare Drover's data path with; nothing of it has to be there.
pub(super) fn provide_peers(report: &mut impl FnMut(&str, State)) {
    provide_optional(PEERS, report);
}

/// The same with what they compare its migrations with.
pub(super) fn provide_movers(report: &mut impl FnMut(&str, State)) {
    provide_optional(MOVERS, report);
}

fn provide_optional(programs: &[Program], report: &mut impl FnMut(&str, State)) {
    provide_all(programs, &mut |name: &str, state: State| {
        report(name, if let State::Missing(text) = state { State::Optional(text) } else { state });
    });
}

fn provide_all(programs: &[Program], report: &mut impl FnMut(&str, State)) {
    let (found, absent): (Vec<_>, Vec<_>) = programs.iter().partition(|program| program.is_there());
    for program in found {
        report(program.name, State::Found(program.purpose.to_owned()));
    }
    if absent.is_empty() {
        return;
    }
    let mut packages: Vec<_> = absent.iter().map(|program| program.package).collect();
    packages.dedup();
    announce(&format!("installing {}", packages.join(", ")));
    let installed = debian::install(&packages);
    for program in absent {
        let state = match &installed {
            Ok(()) if program.is_there() => {
                program.services.iter().for_each(|service| debian::disable_service(service));
                State::Installed(format!("{} (package {})", program.purpose, program.package))
            }
            Ok(()) => State::Missing(format!("package {} has no program {}", program.package, program.name)),
            Err(error) => missing(error),
        };
        report(program.name, state);
    }
}
