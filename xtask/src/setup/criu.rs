//! CRIU: the system's where it is new enough and works on this kernel, else Debian's newest in a folder of its own.
//!
//! Older ones cannot read newer kernels' vdso or set their socket options. The newest is in Debian's suite `sid`, whose
//! packages do not belong on a stable system: they are unpacked beside each other in the cache folder with all their
//! libraries, and started through their own loader. Nothing of the system changes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{State, announce, debian, missing};
use crate::{cache, shell};

/// The oldest that is known to work with the kernels of today.
const OLDEST: (u32, u32) = (4, 2);

/// Finds a CRIU that works or unpacks Debian's, and writes down how it is started.
pub(super) fn provide() -> State {
    match find_or_unpack() {
        Ok(state) => state,
        Err(error) => {
            missing(&error.context("a CRIU of version 4.2 or newer that passes `criu check` is needed"))
        }
    }
}

fn find_or_unpack() -> Result<State> {
    if !shell::is_root() {
        bail!("only root can run and check it");
    }
    let file = cache::folder()?.join("criu.cmd");
    if let Some(system) = shell::which("criu") {
        let command = vec![system.display().to_string()];
        if let Ok(version) = check(&command) {
            cache::write(&file, &lines(&command))?;
            return Ok(State::Found(format!("{version} ({})", command[0])));
        }
    }
    if let Ok(text) = fs::read_to_string(&file) {
        let command: Vec<_> = text.lines().map(str::to_owned).collect();
        if let Ok(version) = check(&command) {
            return Ok(State::Found(format!("{version} ({})", command.last().map_or("", String::as_str))));
        }
    }
    announce("fetching a newer CRIU than the system's");
    let command = unpack()?;
    let version = check(&command)?;
    cache::write(&file, &lines(&command))?;
    Ok(State::Installed(format!("{version} ({})", command.last().map_or("", String::as_str))))
}

fn lines(command: &[String]) -> String {
    command.join("\n") + "\n"
}

/// The version of a CRIU that is new enough and passes its own check.
fn check(command: &[String]) -> Result<String> {
    let (program, arguments) = command.split_first().context("no command")?;
    let ask = |question: &str| shell::run_quiet(Command::new(program).args(arguments).arg(question));
    let printed = ask("--version")?;
    let version = printed.lines().find_map(|line| line.strip_prefix("Version: ")).unwrap_or("unknown").trim();
    let mut numbers = version.split('.').map_while(|part| part.parse::<u32>().ok());
    let found = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if found < OLDEST {
        bail!("version {version} is too old");
    }
    ask("check")?;
    Ok(version.to_owned())
}

/// Downloads CRIU and the libraries it needs into the cache, and returns the command that starts it.
fn unpack() -> Result<Vec<String>> {
    if !debian::has_apt() {
        bail!("install it");
    }
    let source = source_of_sid()
        .context("it is fetched from Debian's suite sid, and this is not a Debian: install it")?;
    let cache = cache::folder()?;
    let partial = cache.join("criu.partial");
    let _ = fs::remove_dir_all(&partial);
    let apt = partial.join("apt");
    for folder in ["lists/partial", "archives/partial"] {
        fs::create_dir_all(apt.join(folder)).with_context(|| format!("cannot create {}", apt.display()))?;
    }
    fs::write(apt.join("sources.list"), source + "\n")?;
    // Empty: as if nothing were installed, so that every library is fetched, the C library too.
    fs::write(apt.join("status"), "")?;
    let configuration = apt.join("apt.conf");
    fs::write(&configuration, apt_configuration(&apt))?;
    let apt_get = || {
        let mut apt_get = debian::apt_get();
        apt_get.arg("-c").arg(&configuration);
        apt_get
    };
    shell::run_quiet(apt_get().arg("update"))?;
    shell::run_quiet(apt_get().args([
        "install",
        "--yes",
        "--no-install-recommends",
        "--download-only",
        "criu",
    ]))?;

    let root = partial.join("root");
    let mut version = None;
    for entry in fs::read_dir(apt.join("archives"))? {
        let package = entry?.path();
        if package.extension().is_none_or(|extension| extension != "deb") {
            continue;
        }
        shell::run_quiet(Command::new("dpkg").arg("-x").args([&package, &root]))?;
        let name = package.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(rest) = name.strip_prefix("criu_") {
            version = rest.split(['-', '_']).next().map(str::to_owned);
        }
    }
    let version = version.context("apt-get fetched no package criu")?;
    let prefix = cache.join(format!("criu-{version}"));
    let _ = fs::remove_dir_all(&prefix);
    fs::rename(&root, &prefix).with_context(|| format!("cannot move CRIU to {}", prefix.display()))?;
    let _ = fs::remove_dir_all(&partial);
    command_in(&prefix)
}

/// An apt that keeps its state in `folder` and knows one source.
fn apt_configuration(folder: &Path) -> String {
    let folder = folder.display();
    format!(
        "Dir::State \"{folder}\";\n\
         Dir::State::lists \"{folder}/lists\";\n\
         Dir::State::status \"{folder}/status\";\n\
         Dir::Etc::SourceList \"{folder}/sources.list\";\n\
         Dir::Etc::SourceParts \"-\";\n\
         Dir::Etc::Preferences \"-\";\n\
         Dir::Etc::PreferencesParts \"-\";\n\
         Dir::Cache \"{folder}\";\n\
         Dir::Cache::archives \"{folder}/archives\";\n\
         Acquire::Languages \"none\";\n\
         APT::Sandbox::User \"root\";\n\
         APT::Default-Release \"\";\n"
    )
}

/// How the unpacked program is started: through the loader that belongs to its libraries.
fn command_in(prefix: &Path) -> Result<Vec<String>> {
    let libraries = find(&prefix.join("usr/lib"), |name| name.contains("-linux-gnu"))
        .with_context(|| format!("no libraries in {}", prefix.display()))?;
    let loader = find(&libraries, |name| name.starts_with("ld-linux"))
        .with_context(|| format!("no loader in {}", libraries.display()))?;
    let program = prefix.join("usr/sbin/criu");
    let words = [loader, "--library-path".into(), libraries, program];
    Ok(words.iter().map(|word| word.display().to_string()).collect())
}

fn find(folder: &Path, matches: impl Fn(&str) -> bool) -> Option<PathBuf> {
    let mut entries = fs::read_dir(folder).ok()?.flatten();
    entries.find(|entry| matches(&entry.file_name().to_string_lossy())).map(|entry| entry.path())
}

/// A sources.list line for the suite sid at the mirror that this machine takes Debian from.
fn source_of_sid() -> Option<String> {
    let release = fs::read_to_string("/etc/os-release").ok()?;
    let value = |key: &str| {
        let line = release.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))?;
        Some(line.trim_matches('"').to_owned())
    };
    if value("ID")? != "debian" {
        return None;
    }
    let codename = value("VERSION_CODENAME")?;
    let targets = shell::answer(
        "apt-get",
        &["indextargets", "--format", "$(CREATED_BY) $(REPO_URI) $(RELEASE) $(COMPONENT)"],
    )?;
    let mirror = mirror_of(&targets, &codename)?;
    let keyring = "/usr/share/keyrings/debian-archive-keyring.gpg";
    let signed = if Path::new(keyring).exists() { format!("[signed-by={keyring}] ") } else { String::new() };
    Some(format!("deb {signed}{mirror} sid main"))
}

/// The mirror of the running release itself, not of its updates and not of somebody else's packages for it.
fn mirror_of<'a>(targets: &'a str, codename: &str) -> Option<&'a str> {
    let mirrors = targets.lines().filter_map(|line| {
        let [created_by, mirror, release, component] = line.split(' ').collect::<Vec<_>>().try_into().ok()?;
        let is_release = [codename, "stable", "oldstable", "testing", "sid", "unstable"].contains(&release);
        (created_by == "Packages" && component == "main" && is_release).then_some(mirror)
    });
    // Debian's mirrors end in /debian by convention; others may use its release names and components too.
    let all: Vec<_> = mirrors.collect();
    all.iter().find(|mirror| mirror.trim_end_matches('/').ends_with("/debian")).or(all.first()).copied()
}

#[cfg(test)]
mod tests {
    use super::mirror_of;

    #[test]
    fn the_mirror_is_the_release_s_own() {
        let targets = "Translations http://m/debian/ bookworm main\n\
                       Packages http://other/apt/ bookworm main\n\
                       Packages http://m/debian-security/ bookworm-security main\n\
                       Packages http://m/debian/ bookworm-updates main\n\
                       Packages http://m/debian/ bookworm contrib\n\
                       Packages http://m/debian/ bookworm main";
        assert_eq!(mirror_of(targets, "bookworm"), Some("http://m/debian/"));
    }

    #[test]
    fn a_mirror_list_is_a_mirror_too() {
        let targets = "Packages mirror+file:/etc/apt/mirrors/debian.list/ trixie main";
        assert_eq!(mirror_of(targets, "trixie"), Some("mirror+file:/etc/apt/mirrors/debian.list/"));
        assert_eq!(mirror_of(targets, "bookworm"), None);
    }
}
