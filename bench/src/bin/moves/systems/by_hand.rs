//! What people do today: a script around CRIU or runc, a copy over the sites' link, and a route.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bench::interrupt::Interrupt;
use bench::moves::case::Case;
use lab::bundle::{self, Bundle};
use lab::process::Process;
use lab::{Lab, Site, address, processors, wait_for};
use migrate::criu::program::Program;

use super::host::Host;
use super::{Moved, Place, link, own_program, server_address, server_arguments};

/// The script.
pub const SCRIPT: &str = include_str!("move.sh");

/// Where the images are received.
const COPY_PORT: u16 = 7500;
/// The server's first pid: at the other site it has to be free.
const FIRST_PID: u32 = 5000;
/// How long the server may take until it listens: it fills its memory first.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How long the script may take.
const MOVE_LIMIT: Duration = Duration::from_secs(400);
/// How soon its end is noticed.
const LOOK: Duration = Duration::from_millis(2);
/// Where there is no half of the processors for the sites.
const ALL_PROCESSORS: &str = "0-1023";

/// What checkpoints and restores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    /// CRIU's own command line.
    Criu,
    /// runc, which drives CRIU.
    Runc,
}

/// A lab with the server in it, and the script that moves it.
pub struct ByHand {
    tool: Tool,
    site: Site,
    /// The server's pid at its host, where it has one that stays.
    server_pid: String,
    /// Folders with programs: CRIU under its own name first.
    path: String,
    script: PathBuf,
    processors: String,
    moves: u32,
    hosts: [Host; 2],
    lab: Lab,
}

impl ByHand {
    /// Makes the hosts and starts the server at the first one.
    pub fn new(tool: Tool, case: &Case) -> anyhow::Result<ByHand> {
        let mut lab = Lab::new()?;
        if let Some(spec) = link(case) {
            lab.join_sites(&spec)?;
        }
        lab.route(server_address().ip(), Site::A)?;
        let processors =
            processors::halves().map_or(ALL_PROCESSORS.to_owned(), |(_, sites)| processors::list(&sites));
        let [a, b] = Site::ALL.map(|site| Host::new(&lab, site, &processors));
        let hosts = [a?, b?];
        let path = programs(&lab)?;
        let script = lab.dir().join("move.sh");
        write_program(&script, SCRIPT)?;
        let (site, server_pid, moves) = (Site::A, String::new(), 0);
        let mut place = ByHand { tool, site, server_pid, path, script, processors, moves, hosts, lab };
        for host in &place.hosts {
            // Leaves what it finds out about the kernel for later, as a first dump would.
            host.run(&place.path, "criu check >/dev/null")?;
        }
        match tool {
            Tool::Criu => place.start_process(case)?,
            Tool::Runc => place.start_container(case)?,
        }
        place.wait_until_it_listens()?;
        Ok(place)
    }

    fn start_process(&mut self, case: &Case) -> anyhow::Result<()> {
        let program = own_program()?;
        let words = server_arguments(case).join(" ");
        // Whatever was inherited is outside of what a checkpoint can hold.
        let line = format!(
            "for fd in $(ls /proc/self/fd); do [ $fd -le 2 ] || eval \"exec $fd>&-\"; done; cd /; \
             echo {FIRST_PID} > /proc/sys/kernel/ns_last_pid; \
             setsid {} {words} </dev/null >/dev/null 2>&1 & echo $!",
            program.display()
        );
        self.server_pid = self.hosts[0].run(&self.path, &line)?.trim().to_owned();
        Ok(())
    }

    fn start_container(&mut self, case: &Case) -> anyhow::Result<()> {
        let root = self.lab.dir().join("root");
        bundle::fill_root(&root, &own_program()?)?;
        let criu_config = self.lab.dir().join("criu.conf");
        std::fs::write(&criu_config, "network-lock nftables\n")
            .context("cannot write CRIU's configuration")?;
        let lab = self.lab.dir().file_name().and_then(|name| name.to_str()).context("the lab has no name")?;
        for (site, host) in Site::ALL.into_iter().zip(&self.hosts) {
            let bundle = Bundle {
                root: &root,
                cgroup: &format!("/{lab}-{}", site.name()),
                // The host's own network, as seen from its own first process.
                network: Some("/proc/1/ns/net"),
                criu_config: Some(&criu_config),
                arguments: &server_arguments(case),
            };
            bundle.write(&host.files().join("bundle"))?;
        }
        let files = self.hosts[0].files().display();
        let line = format!(
            "runc --root {files}/root --log {files}/run.log run --detach --no-pivot --bundle {files}/bundle server \
             </dev/null >/dev/null 2>/dev/null || {{ cat {files}/run.log >&2; exit 1; }}"
        );
        self.hosts[0].run(&self.path, &line).map(drop)
    }

    fn wait_until_it_listens(&self) -> anyhow::Result<()> {
        let target = server_address();
        let connects = || {
            let connect = || std::net::TcpStream::connect_timeout(&target, START_LIMIT);
            self.lab.client().run(connect).ok()
        };
        wait_for(START_LIMIT, connects)
            .map(drop)
            .with_context(|| format!("the server does not listen at {target} within {START_LIMIT:?}"))
    }

    fn command(&self) -> std::process::Command {
        let (from, to) = (self.site, self.site.other());
        let (source, target) = (&self.hosts[from as usize], &self.hosts[to as usize]);
        let mut command = std::process::Command::new(&self.script);
        command
            .env("PATH", &self.path)
            .env("SYSTEM", if self.tool == Tool::Criu { "script" } else { "runc" })
            .env("SITE_PROCESSORS", &self.processors)
            .env("FROM", source.pid().to_string())
            .env("TO", target.pid().to_string())
            .env("FROM_FILES", source.files())
            .env("TO_FILES", target.files())
            .env("TO_ADDRESS", address::site4(to).to_string())
            .env("COPY_PORT", COPY_PORT.to_string())
            .env("ROUTER", self.lab.lb().name())
            .env("SERVER_PID", &self.server_pid)
            .env("SERVER_ADDRESS", server_address().ip().to_string());
        command
    }
}

impl Place for ByHand {
    fn lab(&self) -> &Lab {
        &self.lab
    }

    fn target(&self) -> SocketAddr {
        server_address()
    }

    fn site(&self) -> Site {
        self.site
    }

    fn move_over(&mut self, interrupt: &Interrupt) -> anyhow::Result<Moved> {
        self.moves += 1;
        let start = Instant::now();
        let mut script = Process::spawn(&format!("move-{}", self.moves), self.lab.dir(), self.command())?;
        let status = loop {
            if let Some(status) = script.ended() {
                break status;
            }
            if start.elapsed() > MOVE_LIMIT {
                bail!("the script has not ended within {MOVE_LIMIT:?}: {}", script.log_tail(5));
            }
            interrupt.sleep(LOOK)?;
        };
        if !status.success() {
            bail!("the script failed ({status}): {}", script.log_tail(5));
        }
        self.site = self.site.other();
        let total = start.elapsed();
        let said = std::fs::read_to_string(script.log()).context("cannot read what the script said")?;
        Ok(Moved { total, phases_ms: steps(&said), exposed_ms: 0.0 })
    }
}

/// The script's steps: it says when each begins, in seconds, and when it is over.
fn steps(said: &str) -> Vec<(String, f64)> {
    let step = |line: &str| {
        let (name, at) = line.strip_prefix("step ")?.split_once(' ')?;
        Some((name.to_owned(), at.parse::<f64>().ok()?))
    };
    let begun: Vec<_> = said.lines().filter_map(step).collect();
    begun.windows(2).map(|pair| (pair[0].0.clone(), (pair[1].1 - pair[0].1) * 1e3)).collect()
}

impl Drop for ByHand {
    fn drop(&mut self) {
        if self.tool == Tool::Runc {
            for host in &self.hosts {
                // Takes the container's control groups away. At the site where it is not there is nothing to do.
                let line = format!("runc --root {}/root delete --force server", host.files().display());
                let _ = host.run(&self.path, &line);
            }
        }
    }
}

/// Finds an installed program.
pub fn find(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&folders()).map(|folder| folder.join(program)).find(|path| path.is_file())
}

/// Where programs are; administrators' folders are not on everybody's path.
fn folders() -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    format!("{path}:/usr/sbin:/sbin")
}

/// Folders with programs, first of all one with CRIU, which runc looks for under this name.
fn programs(lab: &Lab) -> anyhow::Result<String> {
    let folder = lab.dir().join("bin");
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let criu = Program::find(None).argv().join(" ");
    write_program(&folder.join("criu"), &format!("#!/bin/sh\nexec {criu} \"$@\"\n"))?;
    Ok(format!("{}:{}", folder.display(), folders()))
}

fn write_program(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text)
        .and_then(|()| std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)))
        .with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_last_until_the_next_one() {
        let said = "step checkpoint 100.250000\nWarn: rlimit\nstep copy 100.500000\nstep end 101.750000\n";
        assert_eq!(steps(said), [("checkpoint".to_owned(), 250.0), ("copy".to_owned(), 1250.0)]);
    }
}
