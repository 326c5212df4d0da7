//! Our own processes in a lab: the daemon in `lb`, an agent at each site, and the workloads that the agents start.
//!
//! Each can be killed and started again by itself, as a test of failures wants. Logs and configuration files are in the
//! lab's scratch folder; when something does not become ready the error shows the end of its log, and when a test
//! panics the ends of all logs go to standard error.
//!
//! Nothing here says what the admin API means, except for the two calls that every user of a stack makes: start a
//! migration and wait for its end.

mod certificates;
mod config;
mod workload;

use std::ffi::OsString;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};

pub use certificates::Certificates;
pub use workload::{Memory, Mode, Protocol, Runner, Tunnels, Workload};

use crate::error::LabError;
use crate::http::{self, Response, Server};
use crate::link::Spec;
use crate::podman;
use crate::process::Process;
use crate::{Lab, Site, address, processors, program, wait_for};

/// How long our processes may take to be ready; most of a daemon's start is the verifier's.
const READY_LIMIT: Duration = Duration::from_secs(20);
/// How long a daemon may take to end when asked to.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// Mounts an empty file system over the folders that the first argument counts, then becomes the rest.
const HIDE: &str =
    r#"n=$1; shift; while [ "$n" -gt 0 ]; do mount -t tmpfs none "$1"; shift; n=$((n - 1)); done; exec "$@""#;
/// Mounts the second file over the first, then becomes the rest.
const REPLACE: &str = r#"mount --bind "$2" "$1"; shift 2; exec "$@""#;
/// Lines of each log that are shown when a test panics.
const SHOWN_LINES: usize = 60;

/// What a stack carries.
#[derive(Clone, Debug, Default)]
pub struct StackOptions {
    /// The servers behind the load balancer; each is one backend. Those with the same service address share a service.
    pub workloads: Vec<Workload>,
    /// Tunnels to the sites, with the agents' decapsulator at their ends; none unless a workload needs them.
    pub tunnels: Option<Tunnels>,
    /// The daemon's hold limits, where they differ from its defaults.
    pub hold: HoldOptions,
    /// Checks every service by connecting to it so often; `None`: none is checked.
    pub check_interval_ms: Option<u64>,
    /// Added to the environment of daemon and agents.
    pub environment: Vec<(String, String)>,
    /// Folders that a site's agent, and so the servers there, find empty.
    pub hidden: Vec<(Site, PathBuf)>,
    /// Files that a site's agent, and so the servers there, find in the place of others: the place, and what is there.
    pub replaced: Vec<(Site, PathBuf, PathBuf)>,
    /// Keeps the sites on these processors (see [`crate::processors`]); empty: on any.
    pub site_processors: Vec<usize>,
    /// An emulated link between the sites, for what agents send each other (see [`Lab::join_sites`]); `None`: whatever
    /// the lab has.
    pub link: Option<Spec>,
}

/// Section `[hold]` of the daemon's configuration; what is `None` is left out.
#[derive(Clone, Debug, Default, Serialize)]
pub struct HoldOptions {
    /// Bytes that a hold queue takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<u64>,
    /// Age at which a held packet is dropped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_age_ms: Option<u64>,
    /// How long a hold may last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// How long new connections alone are held first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub handshakes_ms: Option<u64>,
    /// `drop-newest` or `drop-oldest`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overflow: Option<String>,
}

/// A lab with our processes running in it. Dropping it kills them all and removes the lab.
#[derive(Debug)]
pub struct Stack {
    // Fields are dropped in this order: processes first, then the lab they live in.
    daemon: Option<Process>,
    agents: [Option<Process>; 2],
    environment: Vec<(String, String)>,
    workloads: Vec<Workload>,
    hidden: Vec<(Site, PathBuf)>,
    replaced: Vec<(Site, PathBuf, PathBuf)>,
    site_processors: Vec<usize>,
    certificates: Certificates,
    lab: Lab,
}

impl Stack {
    /// Writes the configurations, starts agents and daemon, and waits until all are ready and every workload runs.
    pub fn start(mut lab: Lab, options: StackOptions) -> Result<Stack, LabError> {
        let StackOptions {
            workloads,
            tunnels,
            hold,
            check_interval_ms,
            environment,
            hidden,
            replaced,
            site_processors,
            link,
        } = options;
        if let Some(spec) = &link {
            lab.join_sites(spec)?;
        }
        if tunnels.is_some() {
            lab.hold_virtual_addresses()?;
        }
        let (daemon, agents) = (None, [None, None]);
        workloads.iter().try_for_each(|workload| workload.make_containers(&lab))?;
        let certificates = Certificates::make(&lab.dir().join("pki"))?;
        let mut stack = Stack {
            daemon,
            agents,
            environment,
            workloads,
            hidden,
            replaced,
            site_processors,
            certificates,
            lab,
        };
        let files = stack.certificates.daemon();
        let services = config::services(&stack.workloads, check_interval_ms);
        let daemon = config::daemon(&stack.lab, &stack.workloads, services, tunnels, &hold, files);
        stack.write_config("lb", &daemon)?;
        for site in Site::ALL {
            let files = stack.certificates.agent(site);
            let text = config::agent(&stack.lab, site, &stack.workloads, tunnels, files);
            stack.write_config(&agent_name(site), &text)?;
            stack.spawn_agent(site)?;
        }
        stack.spawn_daemon()?;
        Site::ALL.into_iter().try_for_each(|site| stack.wait_agent(site))?;
        stack.wait_daemon()?;
        stack.wait_workloads()?;
        Ok(stack)
    }

    /// The lab that the stack runs in.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// What was started, as given.
    pub fn workloads(&self) -> &[Workload] {
        &self.workloads
    }

    /// The certificates that daemon and agents show each other.
    pub fn certificates(&self) -> &Certificates {
        &self.certificates
    }

    /// The admin API's URL; it answers inside the namespace `lb` only.
    pub fn admin_url(&self) -> String {
        format!("http://{}", address::ADMIN)
    }

    /// A configuration file: `lb` or `agent-ams`, `agent-fra`. May be rewritten before a restart.
    pub fn config_path(&self, name: &str) -> PathBuf {
        self.lab.dir().join(format!("{name}.toml"))
    }

    /// A process's log; same names as [`Stack::config_path`].
    pub fn log_path(&self, name: &str) -> PathBuf {
        self.lab.dir().join(format!("{name}.log"))
    }

    /// The daemon's process number, while it is supposed to run.
    pub fn daemon_pid(&self) -> Option<u32> {
        self.daemon.as_ref().map(Process::pid)
    }

    /// SIGKILL to the daemon; its tables stay pinned.
    pub fn kill_daemon(&mut self) {
        self.daemon = None;
    }

    /// SIGTERM to the daemon; says how it ended.
    pub fn stop_daemon(&mut self) -> Option<ExitStatus> {
        self.daemon.take().map(|mut daemon| daemon.stop(STOP_LIMIT))
    }

    /// Starts the daemon (after killing it, should it run) and waits until it is ready.
    pub fn restart_daemon(&mut self) -> Result<(), LabError> {
        self.kill_daemon();
        self.spawn_daemon()?;
        self.wait_daemon()
    }

    /// SIGKILL to a site's agent; workloads go on.
    pub fn kill_agent(&mut self, site: Site) {
        self.agents[site as usize] = None;
    }

    /// Starts a site's agent (after killing it, should it run) and waits until it is ready.
    pub fn restart_agent(&mut self, site: Site) -> Result<(), LabError> {
        self.kill_agent(site);
        self.spawn_agent(site)?;
        self.wait_agent(site)
    }

    /// Asks the admin API; returns the status code and the body (null where there is none).
    pub fn admin(&self, method: &str, path: &str, body: Option<&Value>) -> Result<(u16, Value), LabError> {
        let body = body.map(Value::to_string).unwrap_or_default();
        let response = self.admin_raw(method, path, "application/json", body.as_bytes())?;
        Ok((response.status, response.json()))
    }

    /// Asks the admin API with any body at all.
    pub fn admin_raw(
        &self,
        method: &str,
        path: &str,
        content_type: &str,
        body: &[u8],
    ) -> Result<Response, LabError> {
        let server: SocketAddr = address::ADMIN.parse().expect("the admin API's address is one");
        http::request(self.lab.lb(), server, method, path, content_type, body)
    }

    /// Asks a site's agent, as the daemon would.
    pub fn agent(
        &self,
        site: Site,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> Result<(u16, Value), LabError> {
        let address = SocketAddr::from((address::site4(site), address::AGENT_PORT));
        let server = Server { address, tls: Some(self.certificates.client(site)) };
        let body = body.map(Value::to_string).unwrap_or_default();
        let namespace = self.lab.site(site);
        let response =
            http::request_to(namespace, &server, method, path, "application/json", body.as_bytes())?;
        Ok((response.status, response.json()))
    }

    /// Starts a migration and returns its id. `more` (an object, or null) is added to the request's body, such as
    /// `{"policy": "drop"}`.
    pub fn start_migration(&self, backend: &str, to: Site, more: &Value) -> Result<String, LabError> {
        let mut body = json!({"backend": backend, "to": to.name()});
        for (name, value) in more.as_object().into_iter().flatten() {
            body[name] = value.clone();
        }
        let (status, answer) = self.admin("POST", "/v1/migrations", Some(&body))?;
        match (status, answer["id"].as_str()) {
            (202, Some(id)) => Ok(id.to_owned()),
            _ => Err(self.unexpected("/v1/migrations", format!("status {status}: {answer}"))),
        }
    }

    /// Waits until a migration has ended and its report is there; returns `GET /v1/migrations/{id}`.
    pub fn finished_migration(&self, id: &str, limit: Duration) -> Result<Value, LabError> {
        let path = format!("/v1/migrations/{id}");
        let mut last = Value::Null;
        let found = wait_for(limit, || {
            let answer = self.admin("GET", &path, None);
            match &answer {
                Ok((200, migration)) if !migration["report"].is_object() => {
                    last = migration.clone();
                    None
                }
                _ => Some(answer),
            }
        });
        match found {
            Some(Ok((200, migration))) => Ok(migration),
            Some(Ok((status, answer))) => Err(self.unexpected(&path, format!("status {status}: {answer}"))),
            Some(Err(error)) => Err(error),
            None => Err(self.unexpected(&path, format!("not finished within {limit:?}: {last}"))),
        }
    }

    fn unexpected(&self, path: &str, problem: String) -> LabError {
        LabError::Http { url: format!("{}{path}", self.admin_url()), problem }
    }

    fn write_config(&self, name: &str, text: &str) -> Result<(), LabError> {
        let path = self.config_path(name);
        std::fs::write(&path, text).map_err(LabError::io(format!("write {}", path.display())))
    }

    fn spawn_daemon(&mut self) -> Result<(), LabError> {
        let mut command = self.lab.lb().command(program("lb")?);
        command.args([Path::new("run"), Path::new("--config"), &self.config_path("lb")]);
        self.daemon = Some(self.spawn("lb", command)?);
        Ok(())
    }

    fn spawn_agent(&mut self, site: Site) -> Result<(), LabError> {
        let name = agent_name(site);
        // Each program becomes the next one, so that all of it stays one process.
        let mut words: Vec<OsString> = Vec::new();
        if !self.site_processors.is_empty() {
            words.extend(["taskset", "--cpu-list"].map(OsString::from));
            words.push(processors::list(&self.site_processors).into());
        }
        for (_, place, other) in self.replaced.iter().filter(|(at, ..)| *at == site) {
            words.extend(["unshare", "--mount", "sh", "-ec", REPLACE, "sh"].map(OsString::from));
            words.extend([place, other].map(OsString::from));
        }
        let hidden: Vec<_> =
            self.hidden.iter().filter(|(at, _)| *at == site).map(|(_, folder)| folder).collect();
        if !hidden.is_empty() {
            words.extend(["unshare", "--mount", "sh", "-ec", HIDE, "sh"].map(OsString::from));
            words.push(hidden.len().to_string().into());
            words.extend(hidden.into_iter().map(OsString::from));
        }
        words.push(program("migrate")?.into());
        words.extend(["agent", "--config"].map(OsString::from));
        words.push(self.config_path(&name).into());
        let mut command = self.lab.site(site).command(&words[0]);
        command.args(&words[1..]).env(podman::CONFIG_VARIABLE, podman::config_path(&self.lab));
        self.agents[site as usize] = Some(self.spawn(&name, command)?);
        Ok(())
    }

    fn spawn(&self, name: &str, mut command: std::process::Command) -> Result<Process, LabError> {
        if std::env::var_os("RUST_LOG").is_none() {
            command.env("RUST_LOG", "info");
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        Process::spawn(name, self.lab.dir(), command)
    }

    fn wait_daemon(&mut self) -> Result<(), LabError> {
        let mut daemon = self.daemon.take().expect("the daemon was just started");
        let answered = || matches!(self.admin("GET", "/healthz", None), Ok((200, _)));
        let ready = wait_ready(&mut daemon, answered);
        self.daemon = Some(daemon);
        ready
    }

    fn wait_agent(&mut self, site: Site) -> Result<(), LabError> {
        let mut agent = self.agents[site as usize].take().expect("the agent was just started");
        let answered = || matches!(self.agent(site, "GET", "/healthz", None), Ok((200, _)));
        let ready = wait_ready(&mut agent, answered);
        self.agents[site as usize] = Some(agent);
        ready
    }

    /// A workload is there when its agent says so and, for TCP, when its address takes connections.
    fn wait_workloads(&mut self) -> Result<(), LabError> {
        for workload in self.workloads.clone() {
            let namespace = self.lab.site(workload.site);
            let listed = || {
                let Ok((200, answer)) = self.agent(workload.site, "GET", "/v1/workloads", None) else {
                    return false;
                };
                let mut entries = answer.as_array().into_iter().flatten();
                entries.any(|entry| entry["name"] == *workload.name && entry["state"] == "running")
            };
            let connects =
                || namespace.run(|| TcpStream::connect_timeout(&workload.address, STOP_LIMIT)).is_ok();
            let is_there = || listed() && (workload.protocol == Protocol::Udp || connects());
            if wait_for(READY_LIMIT, || is_there().then_some(())).is_none() {
                let problem = format!("does not run workload {} at {}", workload.name, workload.address);
                let agent = self.agents[workload.site as usize].as_mut().expect("agents were started");
                return Err(agent.not_ready(&problem));
            }
        }
        Ok(())
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for name in ["lb".to_owned(), agent_name(Site::A), agent_name(Site::B)] {
            let text = std::fs::read(self.log_path(&name)).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<_> = text.lines().collect();
            eprintln!("---- the end of {name}.log");
            lines[lines.len().saturating_sub(SHOWN_LINES)..].iter().for_each(|line| eprintln!("{line}"));
        }
    }
}

/// Waits until `answered`, or until the process has ended.
fn wait_ready(process: &mut Process, answered: impl Fn() -> bool) -> Result<(), LabError> {
    let outcome = wait_for(READY_LIMIT, || match process.ended() {
        Some(_) => Some(false),
        None => answered().then_some(true),
    });
    match outcome {
        Some(true) => Ok(()),
        _ => Err(process.not_ready(&format!("does not answer GET /healthz within {READY_LIMIT:?}"))),
    }
}

fn agent_name(site: Site) -> String {
    format!("agent-{}", site.name())
}
