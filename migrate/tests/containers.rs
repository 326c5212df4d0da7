//! Workloads that are containers of runc's: they move like a process, and what is wrong with them is said.
#![expect(clippy::unwrap_used, reason = "a test states what it expects by unwrapping")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use common::outcome::{assert_moves, assert_refused, assert_rolled_back, scratch, show};
use common::{At, BACKEND, Client, DEADLINE, Lab, Options, possible};
use migrate::coordinator::Outcome;

/// A bundle of the counter; it goes with the test.
struct Bundle(tempfile::TempDir);

impl Bundle {
    fn new() -> Self {
        let bundle = Self(scratch());
        let root = bundle.root();
        for folder in ["proc", "dev", "bin"] {
            std::fs::create_dir_all(root.join(folder)).unwrap();
        }
        std::fs::copy(common::counter(), root.join("bin/counter")).unwrap();
        for library in libraries(&root.join("bin/counter")) {
            let place = root.join(library.strip_prefix("/").unwrap());
            std::fs::create_dir_all(place.parent().unwrap()).unwrap();
            std::fs::copy(&library, place).unwrap();
        }
        bundle.write_config(&[]);
        bundle
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn root(&self) -> PathBuf {
        self.path().join("rootfs")
    }

    fn write_config(&self, more: &[&str]) {
        let args: Vec<_> = ["/bin/counter", "10.1.0.1:7000"].iter().chain(more).collect();
        let namespaces = ["pid", "mount", "ipc", "uts"].map(|kind| serde_json::json!({"type": kind}));
        let config = serde_json::json!({
            "ociVersion": "1.0.2",
            "process": {"terminal": false, "user": {"uid": 0, "gid": 0}, "args": args, "cwd": "/",
                "env": ["PATH=/bin"], "rlimits": []},
            "root": {"path": "rootfs"},
            "hostname": "counter",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]}
            ],
            "linux": {"namespaces": namespaces}
        });
        std::fs::write(self.path().join("config.json"), config.to_string()).unwrap();
    }

    /// The workload's lines at each site. Both are on one host, so their containers have different names.
    fn runc(&self) -> Option<[String; 2]> {
        let name = |site: &str| format!("drover-test-{}-{site}", self.path().file_name().unwrap().display());
        let name = |site: &str| name(site).replace(".tmp", "");
        Some(["a", "b"].map(|site| format!("{{ bundle = {:?}, container = {:?} }}", self.path(), name(site))))
    }

    fn options(&self) -> Options {
        Options { runc: self.runc(), ..Options::default() }
    }

    fn lab(&self) -> Arc<Lab> {
        Arc::new(Lab::new(self.options()))
    }
}

/// The libraries of a program, and its loader.
fn libraries(program: &Path) -> Vec<PathBuf> {
    let output = Command::new("ldd").arg(program).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

fn workloads(lab: &Lab, at: At) -> String {
    lab.get(at, "/v1/workloads")
}

#[test]
fn a_container_moves_there_and_back() {
    if !possible() {
        return;
    }
    let bundle = Bundle::new();
    let lab = bundle.lab();
    let client = Client::start(&lab);
    for round in 0..10 {
        assert_moves(&lab, &client, &format!("there-{round}"), At::A);
        assert_moves(&lab, &client, &format!("back-{round}"), At::B);
    }
    client.finish().unwrap();
    let answer = lab.http(At::A, "POST", &format!("/v1/workloads/{BACKEND}/stop"), "");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}
