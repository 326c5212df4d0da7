//! For build scripts: builds one of `lb-ebpf`'s programs with the toolchain that `cargo xtask setup` found.
//!
//! A consumer names the program that it loads and builds no other. What it gets is the object's path in
//! `DROVER_EBPF_OBJECT`, to be used with `env!` in the crate itself.

mod toolchain;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use toolchain::Toolchain;

/// Where the package of the programs lies in the workspace, and what they are made of.
const PACKAGE: &str = "lb-ebpf";
const SOURCES: [&str; 5] =
    ["lb-ebpf/src", "lb-ebpf/Cargo.toml", "lb-ebpf/Cargo.lock", "lb-core/src", "lb-core/Cargo.toml"];

/// Builds the program (a `[[bin]]` of `lb-ebpf`) and tells cargo to set `DROVER_EBPF_OBJECT` to its object's path
/// while it compiles the crate whose build script this is. Ends the build script with a message if it cannot.
pub fn build(program: &str) {
    match object(program) {
        Ok(object) => println!("cargo::rustc-env=DROVER_EBPF_OBJECT={}", object.display()),
        Err(message) => {
            // One line that a user can act on; cargo shows it with the build script's failure.
            println!("cargo::error={message}");
            std::process::exit(1);
        }
    }
}

fn object(program: &str) -> Result<PathBuf, String> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace");
    for watched in SOURCES {
        println!("cargo::rerun-if-changed={}", workspace.join(watched).display());
    }
    let description = cache_folder()?.join("ebpf-toolchain");
    println!("cargo::rerun-if-changed={}", description.display());
    let toolchain = Toolchain::read(&description)?;

    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR for build scripts"));
    // TARGET/PROFILE/build/PACKAGE/out: next to the profiles, so that every consumer's programs share what they are
    // built from.
    let target = out.ancestors().nth(4).ok_or("OUT_DIR is not where cargo puts it")?.join("ebpf");
    let status = toolchain
        .build(&workspace.join(PACKAGE), &target, program)
        .status()
        .map_err(|error| format!("cannot start cargo for the eBPF program {program} ({error})"))?;
    if !status.success() {
        return Err(format!("the eBPF program {program} did not build; its compiler's messages stand above"));
    }
    // A copy: another consumer may be building the next one.
    let object = out.join(program);
    fs::copy(target.join("bpfel-unknown-none/release").join(program), &object)
        .map_err(|error| format!("cannot copy the eBPF program {program} ({error})"))?;
    Ok(object)
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
