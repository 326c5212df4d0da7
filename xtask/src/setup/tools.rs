//! Programs built from crates: the dependency checker, and, where it is there, the test runner.

use anyhow::Result;

use super::{State, announce, missing};
use crate::{cache, shell};

/// Reports each tool. cargo-deny is built where it is missing, in about two minutes; cargo-nextest, which would take six,
/// is only used where it is there, since `cargo test` does the same more slowly.
pub(super) fn provide(report: &mut impl FnMut(&str, State)) {
    let path = |name| shell::which(name).map(|path| path.display().to_string());
    report(
        "cargo-nextest",
        match path("cargo-nextest") {
            Some(path) => State::Found(path),
            None => {
                State::Optional("`cargo test` runs the tests; with nextest they take less time".to_owned())
            }
        },
    );
    report(
        "cargo-deny",
        match path("cargo-deny") {
            Some(path) => State::Found(path),
            None => match install("cargo-deny", "0.20.2", &[], &[]) {
                Ok(()) => {
                    State::Installed("checks licences, sources and advisories of dependencies".to_owned())
                }
                Err(error) => missing(&error),
            },
        },
    );
}

/// Reports the fuzzer's driver, which is built where it is missing.
pub(super) fn provide_fuzzer(report: &mut impl FnMut(&str, State)) {
    let state = match shell::which("cargo-fuzz") {
        Some(path) => State::Found(path.display().to_string()),
        None => match install("cargo-fuzz", "0.13.2", &[], &[]) {
            Ok(()) => State::Installed("builds and runs fuzz targets".to_owned()),
            Err(error) => missing(&error),
        },
    };
    report("cargo-fuzz", state);
}

/// Builds a crate's programs into the cache's tools.
pub(super) fn install(name: &str, version: &str, flags: &[&str], environment: &[(&str, &str)]) -> Result<()> {
    announce(&format!("building {name} {version} (one to three minutes)"));
    let mut cargo = shell::cargo();
    cargo
        .args(["install", name, "--version", version, "--locked", "--root"])
        .arg(cache::tools()?)
        .args(flags);
    cargo.envs(environment.iter().copied());
    shell::run_quiet(&mut cargo).map(drop)
}
