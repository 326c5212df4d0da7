//! Programs built from crates: the test runner and the dependency checker.

use anyhow::Result;

use super::{State, announce, missing};
use crate::{cache, shell};

/// Reports each tool, built where it is missing.
pub(super) fn provide(report: &mut impl FnMut(&str, State)) {
    for (name, version, purpose) in [
        ("cargo-nextest", "0.9.143", "runs the tests"),
        ("cargo-deny", "0.20.2", "checks licences, sources and advisories of dependencies"),
    ] {
        let state = match shell::which(name) {
            Some(path) => State::Found(format!("{purpose} ({})", path.display())),
            None => match install(name, version, &[], &[]) {
                Ok(()) => State::Installed(purpose.to_owned()),
                Err(error) => missing(&error),
            },
        };
        report(name, state);
    }
}

/// Builds a crate's programs into the cache's tools.
pub(super) fn install(name: &str, version: &str, flags: &[&str], environment: &[(&str, &str)]) -> Result<()> {
    announce(&format!("building {name} {version} (some minutes)"));
    let mut cargo = shell::cargo();
    cargo
        .args(["install", name, "--version", version, "--locked", "--root"])
        .arg(cache::tools()?)
        .args(flags);
    cargo.envs(environment.iter().copied());
    shell::run_quiet(&mut cargo).map(drop)
}
