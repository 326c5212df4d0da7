//! `cargo xtask test`: everything that must hold, in the order in which it is cheap to find out.

use std::process::Command;

use anyhow::{Result, bail};

use crate::{setup, shell};

/// What needs no lab: unit tests, and integration tests elsewhere than where labs are used. Tests that load the eBPF
/// program need root as labs do, and so do unit tests in modules of that name.
const WITHOUT_LABS: &str = "not (kind(test) & (package(tests) | package(migrate) | binary(/^lab/)))";
const WITHOUT_ROOT: &str = "not (kind(test) & (package(tests) | package(migrate) | binary(/^lab/) | package(lb)) | test(/with_root::/))";

const WORKSPACE: &str = "Cargo.toml";
/// Not a member of the workspace, since it is built for another target.
const EBPF: &str = "lb-ebpf/Cargo.toml";

/// Runs all checks and tests, or those that need no root.
pub fn run(quick: bool) -> Result<()> {
    if !quick && !shell::is_root() {
        bail!(
            "the lab tests make network namespaces and load XDP programs, which needs root: \
             run this as root, or `cargo xtask test --quick` for everything but them"
        );
    }
    let scope = if quick { setup::Scope::Checks } else { setup::Scope::Everything };
    setup::run(scope, setup::Show::Changes)?;

    step("format", &["fmt", "--all", "--check"])?;
    step("format of the eBPF crate", &["fmt", "--manifest-path", EBPF, "--check"])?;
    deny()?;
    step("lints", &["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"])?;
    documentation()?;
    step("build", &["build", "--quiet", "--workspace", "--bins"])?;
    say("documentation's examples");
    shell::run_quiet(shell::cargo().args(["test", "--quiet", "--workspace", "--doc"]))?;
    tests(quick)
}

/// Licences, sources and bans from the lock files alone; advisories where their database can be had.
fn deny() -> Result<()> {
    say("licences, bans, sources");
    shell::run(deny_command(WORKSPACE).args(["check", "bans", "licenses", "sources"]))?;
    shell::run(deny_command(EBPF).args(["check", "bans", "licenses", "sources"]))?;
    say("advisories");
    if shell::run_quiet(deny_command(WORKSPACE).args(["fetch", "db"])).is_err() {
        shell::say("skipped: the advisory database cannot be fetched from here");
        return Ok(());
    }
    [WORKSPACE, EBPF].into_iter().try_for_each(|manifest| {
        shell::run(deny_command(manifest).args(["check", "--disable-fetch", "advisories"]))
    })
}

fn deny_command(manifest: &str) -> Command {
    let mut cargo = shell::cargo();
    cargo.args([
        "deny",
        "--locked",
        "--log-level",
        "error",
        "--config",
        "deny.toml",
        "--manifest-path",
        manifest,
    ]);
    cargo
}

fn documentation() -> Result<()> {
    say("documentation");
    let mut cargo = shell::cargo();
    cargo.args(["doc", "--quiet", "--workspace", "--no-deps", "--document-private-items"]);
    // Private items are documented too, so links to them hold.
    shell::run(cargo.env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private-intra-doc-links"))
}

fn tests(quick: bool) -> Result<()> {
    say(if quick { "tests without labs" } else { "tests" });
    let mut cargo = shell::cargo();
    if shell::which("cargo-nextest").is_some() {
        cargo.args(["nextest", "run", "--workspace"]);
        if quick {
            cargo.args(["-E", if shell::is_root() { WITHOUT_LABS } else { WITHOUT_ROOT }]);
        }
    } else {
        // Without nextest's groups: few threads, since a lab runs a whole system and measures times.
        cargo.args(["test", "--no-fail-fast", "--workspace"]);
        cargo.args(if quick { ["--lib", "--bins"].as_slice() } else { &["--tests"] });
        cargo.args(["--", "--test-threads", "2"]);
        if quick && !shell::is_root() {
            cargo.args(["--skip", "::with_root::"]);
        }
    }
    shell::run(&mut cargo)
}

fn step(name: &str, arguments: &[&str]) -> Result<()> {
    say(name);
    shell::run(shell::cargo().args(arguments))
}

fn say(name: &str) {
    shell::say(&format!("==> {name}"));
}
