//! A server as a container: an OCI bundle with a root folder and a configuration for runc.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::error::LabError;

/// The server's program inside of the container.
pub const PROGRAM: &str = "/server";

/// A bundle's configuration.
#[derive(Clone, Copy, Debug)]
pub struct Bundle<'a> {
    /// Its root folder.
    pub root: &'a Path,
    /// The container's own control group.
    pub cgroup: &'a str,
    /// The path of the network namespace to join; `None`: the one that runc is in.
    pub network: Option<&'a str>,
    /// CRIU's configuration file; `None`: its default.
    pub criu_config: Option<&'a Path>,
    /// The server's arguments.
    pub arguments: &'a [String],
}

impl Bundle<'_> {
    /// Writes `folder/config.json`.
    pub fn write(&self, folder: &Path) -> Result<(), LabError> {
        let arguments: Vec<&str> =
            std::iter::once(PROGRAM).chain(self.arguments.iter().map(String::as_str)).collect();
        let capabilities = ["CAP_NET_BIND_SERVICE", "CAP_KILL"];
        let mut namespaces = vec![json!({"type": "pid"}), json!({"type": "mount"})];
        namespaces.extend(self.network.map(|path| json!({"type": "network", "path": path})));
        let mut config = json!({
            "ociVersion": "1.0.2",
            "process": {
                "terminal": false,
                "user": {"uid": 0, "gid": 0},
                "args": arguments,
                "env": ["PATH=/"],
                "cwd": "/",
                "capabilities": {
                    "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
                },
                // CRIU could not raise them again.
                "rlimits": [],
            },
            "root": {"path": self.root},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            ],
            "linux": {"cgroupsPath": self.cgroup, "namespaces": namespaces},
        });
        if let Some(criu_config) = self.criu_config {
            config["annotations"] = json!({"org.criu.config": criu_config});
        }
        std::fs::create_dir_all(folder)
            .and_then(|()| std::fs::write(folder.join("config.json"), config.to_string()))
            .map_err(LabError::io(format!("write the container's bundle {}", folder.display())))
    }
}

/// Fills a root folder with a program and the libraries that it is linked with.
pub fn fill_root(root: &Path, program: &Path) -> Result<(), LabError> {
    let output = Command::new("ldd").arg(program).output().map_err(LabError::io("start ldd"))?;
    if !output.status.success() {
        let (command, output) = (format!("ldd {}", program.display()), lossy(&output.stderr));
        return Err(LabError::Command { command, output });
    }
    copy(program, root, Path::new(PROGRAM))?;
    for library in libraries(&lossy(&output.stdout)) {
        copy(&library, root, &library)?;
    }
    ["proc", "dev"].into_iter().try_for_each(|name| {
        let folder = root.join(name);
        std::fs::create_dir_all(&folder).map_err(LabError::io(format!("make {}", folder.display())))
    })
}

fn lossy(text: &[u8]) -> String {
    String::from_utf8_lossy(text).into_owned()
}

/// Copies a file to the place below `root` that is `inside` in the container.
fn copy(from: &Path, root: &Path, inside: &Path) -> Result<(), LabError> {
    let to = root.join(inside.strip_prefix("/").unwrap_or(inside));
    let folder = to.parent().unwrap_or(root);
    std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::copy(from, &to))
        .map(drop)
        .map_err(LabError::io(format!("copy {} to {}", from.display(), to.display())))
}

/// The files in what ldd prints: `NAME => FILE (ADDRESS)`, or for the loader `FILE (ADDRESS)`.
fn libraries(printed: &str) -> Vec<PathBuf> {
    let file = |line: &str| {
        let line = line.trim();
        let named = line.split_once("=> ").map_or(line, |(_, rest)| rest);
        named.split_whitespace().next().filter(|word| word.starts_with('/')).map(PathBuf::from)
    };
    printed.lines().filter_map(file).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_the_loader_are_found_and_what_has_no_file_is_not() {
        let printed = "\tlinux-vdso.so.1 (0x00007ffc)\n\
                       \tlibgcc_s.so.1 => /lib/x86_64-linux-gnu/libgcc_s.so.1 (0x00007f01)\n\
                       \t/lib64/ld-linux-x86-64.so.2 (0x00007f02)\n";
        let expected = ["/lib/x86_64-linux-gnu/libgcc_s.so.1", "/lib64/ld-linux-x86-64.so.2"];
        assert_eq!(libraries(printed), expected.map(PathBuf::from));
    }
}
