//! The server as a container: a bundle with a root folder and a configuration for runc.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use serde_json::json;

/// The server's program inside of the container.
const PROGRAM: &str = "/server";

/// Writes a bundle: `folder/config.json`, with the root folder `root`. `cgroup` is the container's own.
pub fn write_bundle(
    folder: &Path,
    root: &Path,
    cgroup: &str,
    criu_config: &Path,
    arguments: &[String],
) -> anyhow::Result<()> {
    let arguments: Vec<&str> = std::iter::once(PROGRAM).chain(arguments.iter().map(String::as_str)).collect();
    let capabilities = ["CAP_NET_BIND_SERVICE", "CAP_KILL"];
    let config = json!({
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
        "root": {"path": root},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        ],
        "annotations": {"org.criu.config": criu_config},
        "linux": {
            "cgroupsPath": cgroup,
            // The host's own network, as seen from its own first process.
            "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "network", "path": "/proc/1/ns/net"}],
        },
    });
    std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::write(folder.join("config.json"), config.to_string()))
        .with_context(|| format!("cannot write the container's bundle {}", folder.display()))
}

/// Fills a root folder with a program and the libraries that it is linked with.
pub fn fill_root(root: &Path, program: &Path) -> anyhow::Result<()> {
    let output = Command::new("ldd").arg(program).output().context("cannot start ldd")?;
    ensure!(output.status.success(), "ldd does not know the libraries of {}", program.display());
    copy(program, &root.join(&PROGRAM[1..]))?;
    for library in libraries(&String::from_utf8_lossy(&output.stdout)) {
        let inside = library.strip_prefix("/").context("ldd names a library without its folder")?;
        copy(&library, &root.join(inside))?;
    }
    ["proc", "dev"].into_iter().try_for_each(|name| {
        std::fs::create_dir_all(root.join(name))
            .with_context(|| format!("cannot make {name} in {}", root.display()))
    })
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    let folder = to.parent().context("a file is in a folder")?;
    std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::copy(from, to))
        .map(drop)
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
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
