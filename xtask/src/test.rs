//! `cargo xtask test`: everything that must hold, in the order in which it is cheap to find out.

use anyhow::{Result, bail};

use crate::{setup, shell};

/// Labs and the kernel's verifier need root; these are the tests that do without.
const WITHOUT_LABS: &str = "not test(lab_) and not (kind(test) and (package(tests) or package(migrate) or package(lb) or package(bench)))";

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
    step("format of the eBPF crate", &["fmt", "--manifest-path", "lb-ebpf/Cargo.toml", "--check"])?;
    deny()?;
    step("lints", &["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"])?;
    documentation()?;
    step("build", &["build", "--quiet", "--workspace", "--bins"])?;
    step("documentation's examples", &["test", "--quiet", "--workspace", "--doc"])?;
    tests(quick)
}

/// Licences, sources and bans from the lock file alone; advisories where their database can be had.
fn deny() -> Result<()> {
    step(
        "licences, bans, sources",
        &["deny", "--log-level", "error", "check", "bans", "licenses", "sources"],
    )?;
    say("advisories");
    let fetched = shell::run_quiet(shell::cargo().args(["deny", "--log-level", "error", "fetch", "db"]));
    if fetched.is_err() {
        println!("skipped: the advisory database cannot be fetched from here");
        return Ok(());
    }
    shell::run(shell::cargo().args([
        "deny",
        "--log-level",
        "error",
        "check",
        "--disable-fetch",
        "advisories",
    ]))
}

fn documentation() -> Result<()> {
    say("documentation");
    let mut cargo = shell::cargo();
    cargo.args(["doc", "--quiet", "--workspace", "--no-deps", "--document-private-items"]);
    shell::run(cargo.env("RUSTDOCFLAGS", "-D warnings"))
}

fn tests(quick: bool) -> Result<()> {
    say(if quick { "tests without labs" } else { "tests" });
    let mut cargo = shell::cargo();
    if shell::which("cargo-nextest").is_some() {
        cargo.args(["nextest", "run", "--workspace"]);
        if quick {
            cargo.args(["-E", WITHOUT_LABS]);
        }
    } else {
        // Without nextest's groups: few threads, since a lab runs a whole system and measures times.
        cargo.args(["test", "--quiet", "--no-fail-fast", "--workspace"]);
        cargo.args(if quick { ["--lib", "--bins"] } else { ["--lib", "--tests"] });
        cargo.args(["--", "--test-threads", "2"]);
    }
    shell::run(&mut cargo)
}

fn step(name: &str, arguments: &[&str]) -> Result<()> {
    say(name);
    shell::run(shell::cargo().args(arguments))
}

fn say(name: &str) {
    println!("==> {name}");
}
