//! Builds the eBPF program with the toolchain that `cargo xtask setup` found, and hands its object to `lb`.

use std::collections::HashMap;
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

const SETUP: &str =
    "the eBPF toolchain is not set up: run `cargo xtask setup` once (as root), then build again";

fn main() {
    if let Err(message) = build() {
        // One line that a user can act on; cargo shows it with the build script's failure.
        println!("cargo::error={message}");
        std::process::exit(1);
    }
}

fn build() -> Result<(), String> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("lb lies in the workspace");
    for watched in
        ["lb-ebpf/src", "lb-ebpf/Cargo.toml", "lb-ebpf/Cargo.lock", "lb-core/src", "lb-core/Cargo.toml"]
    {
        println!("cargo::rerun-if-changed={}", workspace.join(watched).display());
    }
    let description = cache_folder()?.join("ebpf-toolchain");
    println!("cargo::rerun-if-changed={}", description.display());
    let toolchain = Toolchain::read(&description)?;

    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let target = out.join("ebpf");
    let status = toolchain
        .cargo(&workspace.join("lb-ebpf"), &target)
        .status()
        .map_err(|error| format!("cannot start cargo for the eBPF program ({error})"))?;
    if !status.success() {
        return Err("the eBPF program did not build; its compiler's messages stand above".into());
    }
    println!(
        "cargo::rustc-env=DROVER_EBPF_OBJECT={}",
        target.join("bpfel-unknown-none/release/lb-ebpf").display()
    );
    Ok(())
}

fn cache_folder() -> Result<PathBuf, String> {
    println!("cargo::rerun-if-env-changed=XDG_CACHE_HOME");
    println!("cargo::rerun-if-env-changed=HOME");
    env::var_os("XDG_CACHE_HOME")
        .filter(|folder| !folder.is_empty())
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cache")))
        .map(|cache| cache.join("drover"))
        .ok_or_else(|| {
            "neither XDG_CACHE_HOME nor HOME is set, so there is no cache folder to look into".into()
        })
}

/// What `cargo xtask setup` wrote down.
struct Toolchain {
    keys: HashMap<String, String>,
    linker: String,
}

impl Toolchain {
    fn read(description: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(description).map_err(|_| SETUP.to_string())?;
        let keys: HashMap<_, _> = text
            .lines()
            .filter_map(|line| line.split_once('='))
            .map(|(key, value)| (key.trim().to_string(), value.trim().to_string()))
            .collect();
        let linker = keys.get("LINKER").filter(|linker| Path::new(linker).exists()).ok_or(SETUP)?.clone();
        Ok(Self { keys, linker })
    }

    fn get(&self, key: &str) -> &str {
        self.keys.get(key).map_or("", String::as_str)
    }

    fn cargo(&self, package: &Path, target: &Path) -> Command {
        // With a toolchain of its own (`+nightly`) it is rustup's cargo that has to be asked.
        let own = self.get("CARGO_ARGS");
        let program =
            if own.is_empty() { env::var("CARGO").unwrap_or("cargo".into()) } else { "cargo".into() };
        let mut cargo = Command::new(program);
        cargo.args(own.split_whitespace());
        cargo
            .args(["build", "--release", "--locked", "--target", "bpfel-unknown-none", "--target-dir"])
            .arg(target);
        if self.get("BUILD_STD") == "1" {
            cargo.args(["-Z", "build-std=core"]);
        }
        cargo.current_dir(package);
        // What cargo sets for this build script is meant for the host.
        for inherited in
            ["RUSTC", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "CARGO_ENCODED_RUSTFLAGS", "RUSTFLAGS"]
        {
            cargo.env_remove(inherited);
        }
        if own.starts_with('+') {
            cargo.env_remove("RUSTUP_TOOLCHAIN");
        }
        if !self.get("RUSTC").is_empty() {
            // A distribution's stable compiler; the target and one feature are not stable yet.
            cargo.env("RUSTC", self.get("RUSTC"));
        }
        cargo.env("RUSTC_BOOTSTRAP", "1");
        cargo.env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", &self.linker);
        cargo.env(
            "RUSTFLAGS",
            // v4: relaxed 64-bit atomics do not lower on v3. Misaligned access: a quarter fewer instructions.
            "-C debuginfo=2 -C link-arg=--btf -C target-cpu=v4 \
             -C link-arg=--cpu-features=+allows-misaligned-mem-access",
        );
        cargo
    }
}
