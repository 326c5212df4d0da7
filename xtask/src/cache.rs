//! The cache folder: what setup fetched or built, so that a fresh clone does not do it again.
//!
//! ```text
//! $XDG_CACHE_HOME/drover (else ~/.cache/drover)
//!   ebpf-toolchain     how to build for the kernel, KEY=VALUE; read by lb's build script
//!   criu.cmd           how to start CRIU, one argument a line; read by the site agent
//!   criu-VERSION/      an unpacked CRIU with its libraries
//!   tools/bin/         programs built from crates: bpf-linker, cargo-deny, cargo-fuzz, cargo-nextest
//! ```

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The cache folder, not necessarily there.
pub fn folder() -> Result<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_CACHE_HOME")
        .or_else(|| Some(absolute("HOME")?.join(".cache")))
        .map(|caches| caches.join("drover"))
        .context("neither XDG_CACHE_HOME nor HOME is set: there is no folder to keep things in")
}

/// Where `cargo install` puts the tools.
pub fn tools() -> Result<PathBuf> {
    Ok(folder()?.join("tools"))
}

/// Held while setup changes things, so that two of them do not; waits for the other.
pub fn lock() -> Result<File> {
    let folder = folder()?;
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let path = folder.join("lock");
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}

/// Writes a file of the cache; a reader sees the old text or the new one, never a part. An unchanged text leaves the file
/// alone, since build scripts look at its time.
pub fn write(path: &Path, text: &str) -> Result<()> {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    let partial = path.with_extension("partial");
    fs::write(&partial, text)
        .and_then(|()| fs::rename(&partial, path))
        .with_context(|| format!("cannot write {}", path.display()))
}
