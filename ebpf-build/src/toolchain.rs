//! The toolchain for eBPF programs that `cargo xtask setup` wrote down.

use std::collections::HashMap;
use std::env;
use std::path::Path;
use std::process::Command;

const SETUP: &str =
    "the eBPF toolchain is not set up: run `cargo xtask setup` once (as root), then build again";

/// What `cargo xtask setup` wrote down.
pub struct Toolchain {
    keys: HashMap<String, String>,
    linker: String,
}

impl Toolchain {
    /// Reads the description; the linker that it names has to exist.
    pub fn read(description: &Path) -> Result<Self, String> {
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

    /// The cargo command that builds a program of the package.
    pub fn build(&self, package: &Path, target: &Path, program: &str) -> Command {
        // With a toolchain of its own (`+nightly`) it is rustup's cargo that has to be asked.
        let own = self.get("CARGO_ARGS");
        let cargo_program =
            if own.is_empty() { env::var("CARGO").unwrap_or("cargo".into()) } else { "cargo".into() };
        let mut cargo = Command::new(cargo_program);
        cargo.args(own.split_whitespace());
        cargo
            .args(["build", "--release", "--locked", "--bin", program])
            .args(["--target", "bpfel-unknown-none", "--target-dir"])
            .arg(target);
        if self.get("BUILD_STD") == "1" {
            cargo.args(["-Z", "build-std=core"]);
        }
        cargo.current_dir(package);
        self.set_environment(&mut cargo);
        cargo
    }

    fn set_environment(&self, cargo: &mut Command) {
        // What cargo sets for this build script is meant for the host.
        for inherited in
            ["RUSTC", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "CARGO_ENCODED_RUSTFLAGS", "RUSTFLAGS"]
        {
            cargo.env_remove(inherited);
        }
        if self.get("CARGO_ARGS").starts_with('+') {
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
    }
}
