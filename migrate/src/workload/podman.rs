//! A workload that is a container of podman's, by its name.
//!
//! Everything podman does stays podman's: it starts the container, its monitor (conmon) keeps it and tells podman of its
//! end, and runc runs it. So podman's own commands go on working on a container that has moved.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::Deserialize;

use super::container::Container;
use super::holder::HolderPid;

/// What podman does without waiting for a migration takes less than a second.
const LIMIT: Duration = Duration::from_secs(30);
/// Where runc keeps its records unless it is told otherwise, and podman does not tell it.
pub const RUNC_RECORDS: &str = "/run/runc";
/// podman's only runtime whose checkpoints can be had; the other one's end with a `c` and no `r`.
const RUNTIME: &str = "runc";
/// Which of the host's files podman reads its configuration from, the later ones over the earlier.
const CONFIGS: [&str; 2] = ["/usr/share/containers/containers.conf", "/etc/containers/containers.conf"];
/// A folder with more of them.
const MORE_CONFIGS: &str = "/etc/containers/containers.conf.d";
/// Names another one instead of them.
const CONFIG: &str = "CONTAINERS_CONF";
/// In such a file: what monitors find as their environment.
const MONITORS_VARIABLES: &str = "conmon_env_vars";

/// Why a container of podman's cannot be a workload.
#[derive(Debug, thiserror::Error)]
pub enum PodmanError {
    /// No podman.
    #[error("{0:?} cannot be run: install podman, or name it in the agent's `podman`")]
    NoPodman(String, #[source] io::Error),
    /// It takes too long; somebody else may be at the container.
    #[error("podman does not answer within {LIMIT:?} about container {0:?}")]
    Silent(String),
    /// It says no.
    #[error("podman: {0}")]
    Said(String),
    /// Created nowhere, or by another user.
    #[error(
        "podman knows no container {0:?}: make it with `podman create` at every site, as root (containers of other users \
         are not seen)"
    )]
    Unknown(String),
    /// What it says is not understood.
    #[error("what podman says of container {0:?} is not understood")]
    Json(String, #[source] serde_json::Error),
    /// Something about the container.
    #[error("podman's container {container:?} {problem}")]
    Refused {
        /// Its name.
        container: String,
        /// What is wrong and what would be right.
        problem: &'static str,
    },
    /// A folder of the host's in it.
    #[error("podman's container {container:?} has {} mounted, which is not here", .path.display())]
    NoVolume {
        /// Its name.
        container: String,
        /// The folder.
        path: PathBuf,
    },
    /// podman's or our own folders.
    #[error("{} cannot be written", .0.display())]
    Write(PathBuf, #[source] io::Error),
    /// The host's own.
    #[error("{} is no configuration of podman's", .0.display())]
    Config(PathBuf, #[source] toml::de::Error),
}

/// What podman knows of a container.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Found {
    id: String,
    /// The image's hash; empty where there is none.
    pub image: String,
    #[serde(default)]
    pod: String,
    #[serde(rename = "OCIRuntime")]
    runtime: String,
    static_dir: PathBuf,
    state: State,
    host_config: HostConfig,
    #[serde(default)]
    mounts: Vec<Mount>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct State {
    running: bool,
    #[serde(default)]
    conmon_pid: i32,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HostConfig {
    restart_policy: RestartPolicy,
    #[serde(default)]
    auto_remove: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RestartPolicy {
    name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Mount {
    source: PathBuf,
}

impl Found {
    /// As runc knows it.
    pub fn container(&self) -> Container {
        Container { bundle: self.static_dir.clone(), name: self.id.clone() }
    }

    /// Where podman looks for images.
    pub fn images(&self) -> PathBuf {
        self.static_dir.join("checkpoint")
    }

    /// Its monitor, if it runs.
    pub fn monitor(&self) -> Option<HolderPid> {
        HolderPid::of(self.state.conmon_pid).filter(|monitor| self.state.running && monitor.is_alive())
    }

    /// Fails where it can be no workload.
    fn check(&self, name: &str) -> Result<(), PodmanError> {
        let runtime = Path::new(&self.runtime).file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let restarts = !["", "no"].contains(&self.host_config.restart_policy.name.as_str());
        for (is_so, problem) in [
            (runtime != RUNTIME, "is not run by runc: create it with `podman --runtime runc create`"),
            (
                restarts,
                "has a restart policy, and only the agent may start it: create it with `--restart no`",
            ),
            (
                self.host_config.auto_remove,
                "is removed when it ends, and so when it leaves: create it without `--rm`",
            ),
            (
                !self.pod.is_empty(),
                "is in a pod, whose other containers would stay behind: create it without `--pod`",
            ),
        ] {
            if is_so {
                return Err(PodmanError::Refused { container: name.to_owned(), problem });
            }
        }
        match self.mounts.iter().find(|mount| !mount.source.exists()) {
            Some(Mount { source }) => {
                Err(PodmanError::NoVolume { container: name.to_owned(), path: source.clone() })
            }
            None => Ok(()),
        }
    }
}

/// podman: how it is called, and what it has said.
#[derive(Debug)]
pub struct Podman {
    /// The program and what stands before each command.
    words: Vec<String>,
    /// For the monitors' configurations.
    folder: PathBuf,
    /// While podman restores a container it answers no question about it.
    known: Mutex<HashMap<String, Found>>,
}

impl Podman {
    /// With configurations of monitors in `folder`.
    pub fn new(words: Vec<String>, folder: PathBuf) -> Self {
        Self { words, folder, known: Mutex::default() }
    }

    /// Asks podman for a container that can be a workload.
    pub async fn find(&self, name: &str) -> Result<Found, PodmanError> {
        let said = self.run(name, &["container", "inspect"]).await?;
        let found = parse(&said).map_err(|error| PodmanError::Json(name.to_owned(), error))?;
        let found = found.ok_or_else(|| PodmanError::Unknown(name.to_owned()))?;
        found.check(name)?;
        self.lock().insert(name.to_owned(), found.clone());
        Ok(found)
    }

    /// What [`Podman::find`] has found last.
    pub fn known(&self, name: &str) -> Option<Found> {
        self.lock().get(name).cloned()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Found>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a container; gives what keeps it.
    pub async fn start(&self, name: &str) -> Result<Option<HolderPid>, PodmanError> {
        self.run(name, &["start"]).await?;
        Ok(self.find(name).await?.monitor())
    }

    /// Sees to it that a container which does not run can be restored: podman has written what runc needs.
    pub async fn make_ready(&self, name: &str) -> Result<Found, PodmanError> {
        let found = self.find(name).await?;
        if found.state.running {
            let problem = "runs at the target already, and there cannot be two: stop it";
            return Err(PodmanError::Refused { container: name.to_owned(), problem });
        }
        // What a podman that was killed has left.
        self.run(name, &["container", "cleanup"]).await?;
        if !found.container().bundle.join("config.json").exists() {
            self.run(name, &["init"]).await?;
            self.run(name, &["container", "cleanup"]).await?;
        }
        Ok(found)
    }

    /// A call that restores a container, with the monitor's surroundings as environment variables.
    pub fn restore(
        &self,
        name: &str,
        variables: &[(&str, OsString)],
    ) -> Result<tokio::process::Command, PodmanError> {
        let file = self.folder.join(format!("{name}.conf"));
        let write =
            |text: String| std::fs::create_dir_all(&self.folder).and_then(|()| std::fs::write(&file, text));
        write(monitors_config(&configs(), variables)?)
            .map_err(|error| PodmanError::Write(file.clone(), error))?;
        let mut command = self.command();
        command.args(["container", "restore", "--tcp-established", "--file-locks", name]).env(CONFIG, file);
        Ok(command)
    }

    fn command(&self) -> tokio::process::Command {
        let (program, args) = self.words.split_first().expect("the configuration has a program");
        let mut command = tokio::process::Command::new(program);
        command.args(args).stdin(Stdio::null());
        command
    }

    async fn run(&self, name: &str, words: &[&str]) -> Result<Vec<u8>, PodmanError> {
        let mut command = self.command();
        let done = command.args(words).arg(name).output();
        let output = match tokio::time::timeout(LIMIT, done).await {
            Err(_) => return Err(PodmanError::Silent(name.to_owned())),
            Ok(Err(error)) => return Err(PodmanError::NoPodman(self.words.join(" "), error)),
            Ok(Ok(output)) => output,
        };
        if output.status.success() {
            return Ok(output.stdout);
        }
        let said = String::from_utf8_lossy(&output.stderr);
        if said.contains("no such container") {
            return Err(PodmanError::Unknown(name.to_owned()));
        }
        Err(PodmanError::Said(
            complaint_in(&said).unwrap_or_else(|| format!("{words:?} failed without a word")),
        ))
    }
}

/// What is wrong, in podman's words.
pub fn complaint_in(said: &str) -> Option<String> {
    let last = said.lines().rev().find(|line| !line.trim().is_empty())?;
    Some(last.trim_start_matches("Error: ").trim().to_owned())
}

fn parse(said: &[u8]) -> Result<Option<Found>, serde_json::Error> {
    Ok(serde_json::from_slice::<Vec<Found>>(said)?.into_iter().next())
}

/// The files that podman reads here.
fn configs() -> Vec<PathBuf> {
    if let Some(only) = std::env::var_os(CONFIG) {
        return vec![only.into()];
    }
    let more = std::fs::read_dir(MORE_CONFIGS).into_iter().flatten();
    let mut more: Vec<PathBuf> = more.filter_map(|entry| Some(entry.ok()?.path())).collect();
    more.retain(|path| path.extension().is_some_and(|extension| extension == "conf"));
    more.sort();
    CONFIGS.iter().map(PathBuf::from).chain(more).collect()
}

/// podman's configuration as the files say, but for what a monitor finds as its environment.
fn monitors_config(files: &[PathBuf], variables: &[(&str, OsString)]) -> Result<String, PodmanError> {
    let mut all = toml::Table::new();
    for file in files {
        // One that is not there says nothing.
        let Ok(text) = std::fs::read_to_string(file) else { continue };
        merge(&mut all, toml::from_str(&text).map_err(|error| PodmanError::Config(file.clone(), error))?);
    }
    let entry = all.entry("engine").or_insert_with(|| toml::Table::new().into());
    if let Some(engine) = entry.as_table_mut() {
        let is_ours = |line: &toml::Value| {
            let name = line.as_str().and_then(|line| line.split('=').next());
            variables.iter().any(|(ours, _)| Some(*ours) == name)
        };
        let theirs = engine.remove(MONITORS_VARIABLES);
        let theirs = theirs.and_then(|value| value.as_array().cloned()).unwrap_or_default();
        let ours = variables.iter().map(|(name, value)| format!("{name}={}", value.to_string_lossy()).into());
        let lines = theirs.into_iter().filter(|line| !is_ours(line)).chain(ours);
        engine.insert(MONITORS_VARIABLES.to_owned(), toml::Value::Array(lines.collect()));
    }
    Ok(all.to_string())
}

/// Tables grow, all else is replaced.
fn merge(into: &mut toml::Table, from: toml::Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(toml::Value::Table(into)), toml::Value::Table(from)) => merge(into, from),
            (_, value) => drop(into.insert(key, value)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = r#"[{"Id": "af01", "Image": "9e", "Pod": "", "OCIRuntime": "/usr/sbin/runc",
        "StaticDir": "/var/lib/c/userdata", "State": {"Running": true, "ConmonPid": 1, "Other": 2},
        "HostConfig": {"RestartPolicy": {"Name": "", "MaximumRetryCount": 0}, "AutoRemove": false},
        "Mounts": [{"Type": "bind", "Source": "/", "Destination": "/host"}]}]"#;

    #[test]
    fn a_container_that_cannot_be_a_workload_is_refused_with_its_reason() {
        let found = |text: &str| parse(text.as_bytes()).unwrap().unwrap();
        found(SAID).check("chat").unwrap();
        assert_eq!(
            found(SAID).container(),
            Container { bundle: "/var/lib/c/userdata".into(), name: "af01".into() }
        );
        for (from, to, why) in [
            ("/usr/sbin/runc", "crun", "is not run by runc: create it with `podman --runtime runc"),
            ("{\"Name\": \"\"", "{\"Name\": \"always\"", "has a restart policy"),
            ("\"AutoRemove\": false", "\"AutoRemove\": true", "is removed when it ends"),
            ("\"Pod\": \"\"", "\"Pod\": \"p1\"", "is in a pod"),
            (
                "\"Source\": \"/\"",
                "\"Source\": \"/nonexistent/x\"",
                "has /nonexistent/x mounted, which is not here",
            ),
        ] {
            let text = found(&SAID.replace(from, to)).check("chat").unwrap_err().to_string();
            assert!(text.starts_with("podman's container \"chat\" ") && text.contains(why), "{text}");
        }
        assert_eq!(parse(b"[]").unwrap(), None);
    }

    #[test]
    fn the_hosts_configuration_stays_but_for_the_monitors_environment() {
        let folder = tempfile::tempdir().unwrap();
        let files = ["a", "b", "none"].map(|name| folder.path().join(name));
        let first =
            "[engine]\nruntime = \"crun\"\nconmon_env_vars = [\"PATH=/bin\", \"A=1\"]\n[network]\nx = 1\n";
        std::fs::write(&files[0], first).unwrap();
        std::fs::write(&files[1], "[engine]\nruntime = \"runc\"\n").unwrap();
        let text = monitors_config(&files, &[("PATH", "/ours:/bin".into()), ("B", "x\ny".into())]).unwrap();
        let expected = "[engine]\nruntime = \"runc\"\nconmon_env_vars = [\"A=1\", \"PATH=/ours:/bin\", \"B=x\\ny\"]\n\
                        [network]\nx = 1\n";
        let read = |text: &str| toml::from_str::<toml::Table>(text).unwrap();
        assert_eq!(read(&text), read(expected));
        std::fs::write(&files[2], "[").unwrap();
        assert!(
            monitors_config(&files, &[]).unwrap_err().to_string().contains("is no configuration of podman's")
        );
    }

    #[test]
    fn podmans_last_line_is_what_is_wrong() {
        let said = "time=\"x\" level=warning msg=\"y\"\nError: no such thing\n\n";
        assert_eq!(complaint_in(said).as_deref(), Some("no such thing"));
        assert_eq!(complaint_in(""), None);
    }
}
