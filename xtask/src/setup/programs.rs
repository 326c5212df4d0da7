//! Programs that labs, tests and demo start.

use super::{State, announce, debian, missing};
use crate::shell;

struct Program {
    name: &'static str,
    package: &'static str,
    purpose: &'static str,
    /// The service that the package brings, if any.
    service: Option<&'static str>,
}

const fn tool(name: &'static str, package: &'static str, purpose: &'static str) -> Program {
    Program { name, package, purpose, service: None }
}

const fn server(name: &'static str, purpose: &'static str) -> Program {
    Program { name, package: name, purpose, service: Some(name) }
}

const PROGRAMS: &[Program] = &[
    tool("ip", "iproute2", "makes the lab's namespaces"),
    tool("ethtool", "ethtool", "sets the lab's offloads"),
    tool("nft", "nftables", "silences a frozen server's address"),
    tool("unshare", "util-linux", "gives a workload its own process numbers"),
    tool("mount", "mount", "used by tests of the lab"),
    tool("kill", "procps", "ends what a lab test started"),
    tool("redis-cli", "redis-tools", "fills a workload of tests"),
    server("redis-server", "a workload of tests and demo"),
    server("openarena-server", "a workload of tests and demo"),
];

/// Reports each program; installs the missing ones with one call.
pub(super) fn provide(report: &mut impl FnMut(&str, State)) {
    let (found, absent): (Vec<_>, Vec<_>) =
        PROGRAMS.iter().partition(|program| shell::which(program.name).is_some());
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
            Ok(()) if shell::which(program.name).is_some() => {
                program.service.into_iter().for_each(debian::disable_service);
                State::Installed(format!("{} (package {})", program.purpose, program.package))
            }
            Ok(()) => State::Missing(format!("package {} has no program {}", program.package, program.name)),
            Err(error) => missing(error),
        };
        report(program.name, state);
    }
}
