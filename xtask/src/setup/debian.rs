//! Debian's packages: installing them without starting the services that some of them bring.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::shell;

/// Asked by package scripts before they start or stop a service (Debian Policy, invoke-rc.d).
const POLICY: &str = "/usr/sbin/policy-rc.d";

/// Whether packages are installed with apt here.
pub fn has_apt() -> bool {
    shell::which("apt-get").is_some() && shell::which("dpkg").is_some()
}

/// Whether a package is installed.
pub fn is_installed(package: &str) -> bool {
    shell::answer("dpkg-query", &["--show", "--showformat=${db:Status-Status}", package])
        .is_some_and(|status| status == "installed")
}

/// Installs packages and nothing that they only recommend. Services neither start nor stop, now or at the next boot.
pub fn install(packages: &[&str]) -> Result<()> {
    let wanted = packages.join(" ");
    if !has_apt() {
        bail!("install what Debian calls {wanted}");
    }
    if !shell::is_root() {
        bail!("run this as root, or `sudo apt-get install --no-install-recommends {wanted}`");
    }
    let _policy = Policy::forbid_services()?;
    let mut install = apt_get();
    install.args(["install", "--yes", "--no-install-recommends", "--no-upgrade"]).args(packages);
    // Lists may be absent (a fresh image) or so old that what they name is gone.
    if shell::run_quiet(&mut install).is_err() {
        shell::run_quiet(apt_get().arg("update"))?;
        shell::run_quiet(&mut install)?;
    }
    Ok(())
}

/// apt-get that asks nothing and waits for others that hold its lock.
pub fn apt_get() -> Command {
    let mut apt_get = Command::new("apt-get");
    apt_get.args(["-qq", "-o", "DPkg::Lock::Timeout=300", "-o", "Dpkg::Use-Pty=0"]);
    apt_get.env("DEBIAN_FRONTEND", "noninteractive");
    apt_get
}

/// Keeps a freshly installed service from starting with the machine. Where neither program is there, nothing starts it.
pub fn disable_service(service: &str) {
    if shell::which("systemctl").is_some() {
        let _ = shell::answer("systemctl", &["disable", service]);
    } else {
        let _ = shell::answer("update-rc.d", &[service, "disable"]);
    }
}

/// While it lives, package scripts may not start or stop services.
struct Policy {
    is_ours: bool,
}

impl Policy {
    fn forbid_services() -> Result<Policy> {
        let path = Path::new(POLICY);
        if path.exists() {
            // Somebody has decided already, as images for containers do.
            return Ok(Policy { is_ours: false });
        }
        fs::write(path, "#!/bin/sh\n# Written by `cargo xtask setup` while it installs packages: no service starts.\nexit 101\n")
            .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o755)))
            .with_context(|| format!("cannot write {POLICY}"))?;
        Ok(Policy { is_ours: true })
    }
}

impl Drop for Policy {
    fn drop(&mut self) {
        if self.is_ours {
            let _ = fs::remove_file(POLICY);
        }
    }
}
