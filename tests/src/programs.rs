//! Where programs are: our own beside the one that runs.

use std::path::PathBuf;

use crate::error::LabError;

/// Finds the program `name` that Cargo built beside the running one (a test, `drill`, ...).
pub fn program(name: &str) -> Result<PathBuf, LabError> {
    let running = std::env::current_exe().map_err(LabError::io("find the running program's path"))?;
    let mut folder = running.parent().expect("a program's file is in a folder");
    // Tests and examples are one folder below the programs.
    if folder.ends_with("deps") || folder.ends_with("examples") {
        folder = folder.parent().expect("deps is below the profile's folder");
    }
    let path = folder.join(name);
    if path.is_file() {
        return Ok(path);
    }
    let package = if name == "drill" { "bench" } else { name }.to_owned();
    let flags = if folder.ends_with("release") { " --release" } else { "" };
    Err(LabError::NotBuilt { path, package, flags })
}

/// Finds an installed program: by its path, or in the folders of `PATH`.
pub fn installed(name: &str) -> Result<PathBuf, LabError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places = std::env::split_paths(&path).map(|folder| folder.join(name));
    let absent = || LabError::io(format!("find {name} in PATH"))(std::io::ErrorKind::NotFound.into());
    places.find(|place| place.is_file()).ok_or_else(absent)
}
