//! A workload's control group, in whichever hierarchies this host has: version 1 with one of each controller, version 2
//! with one for all, or both.
//!
//! Its bounds are set when the workload runs: CRIU and its helpers are in the group while they restore, and must not
//! fail for it.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

/// Where tasks are added, and listed.
const TASKS: &str = "cgroup.procs";
/// What a group of version 2 has, and what those below it have.
const CONTROLLERS: &str = "cgroup.controllers";
/// See [`CONTROLLERS`].
const CONTROLLERS_BELOW: &str = "cgroup.subtree_control";
/// Tasks that were killed leave their group a moment later.
const REMOVE_TRIES: u32 = 20;
/// Between two tries.
const REMOVE_PAUSE: Duration = Duration::from_millis(10);

/// A group as it is configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    /// Below the root of each hierarchy; relative, without `..`.
    path: PathBuf,
    /// Most memory that it may have.
    pub memory_max_bytes: Option<u64>,
    /// Most tasks, threads included, that it may have.
    pub pids_max: Option<u64>,
}

/// Why a group could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// This host has no such controller.
    #[error("this host has no control groups with the controller {0:?}: mount them, or take the bound away")]
    NoController(&'static str),
    /// This host has none at all.
    #[error("this host has no control groups with the controllers \"memory\" or \"pids\": mount them")]
    None,
    /// The system refused.
    #[error("the control group's {} cannot be written", .0.display())]
    Write(PathBuf, #[source] io::Error),
    /// The hosts's mounts.
    #[error("this host's mounts cannot be read")]
    Mounts(#[from] io::Error),
}

/// What bounds something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Controller {
    Memory,
    Pids,
}

impl Controller {
    const ALL: [Self; 2] = [Self::Memory, Self::Pids];

    fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Pids => "pids",
        }
    }

    fn bound_file(self, version: Version) -> &'static str {
        match (self, version) {
            (Self::Memory, Version::One) => "memory.limit_in_bytes",
            (Self::Memory, Version::Two) => "memory.max",
            (Self::Pids, _) => "pids.max",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// A controller's hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Hierarchy {
    controller: Controller,
    version: Version,
    root: PathBuf,
}

impl Cgroup {
    /// A group of that path; `None` if it is absolute, empty or leaves its hierarchy.
    pub fn at(path: &Path) -> Option<Self> {
        let is_plain = path.components().all(|component| matches!(component, Component::Normal(_)));
        let cgroup = Self { path: path.to_owned(), memory_max_bytes: None, pids_max: None };
        (is_plain && !path.as_os_str().is_empty()).then_some(cgroup)
    }

    /// Where it is below the root of each hierarchy.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes it, without its bounds; gives its folders, which [`join`] takes.
    pub fn make(&self) -> Result<Vec<PathBuf>, CgroupError> {
        let hierarchies = here()?;
        if hierarchies.is_empty() {
            return Err(CgroupError::None);
        }
        let mut folders = Vec::new();
        for hierarchy in &hierarchies {
            let folder = self.make_in(hierarchy)?;
            self.write_bound(hierarchy, None)?;
            if !folders.contains(&folder) {
                folders.push(folder);
            }
        }
        for controller in Controller::ALL {
            if self.bound(controller).is_some()
                && !hierarchies.iter().any(|known| known.controller == controller)
            {
                return Err(CgroupError::NoController(controller.name()));
            }
        }
        Ok(folders)
    }

    fn make_in(&self, hierarchy: &Hierarchy) -> Result<PathBuf, CgroupError> {
        let mut folder = hierarchy.root.clone();
        for part in self.path.components() {
            if hierarchy.version == Version::Two {
                hand_down(&folder, hierarchy.controller)?;
            }
            folder.push(part);
            match fs::create_dir(&folder) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(CgroupError::Write(folder, error));
                }
                Ok(()) | Err(_) => {}
            }
        }
        Ok(folder)
    }

    /// Sets its bounds.
    pub fn set_bounds(&self) -> Result<(), CgroupError> {
        here()?.iter().try_for_each(|hierarchy| self.write_bound(hierarchy, self.bound(hierarchy.controller)))
    }

    fn bound(&self, controller: Controller) -> Option<u64> {
        match controller {
            Controller::Memory => self.memory_max_bytes,
            Controller::Pids => self.pids_max,
        }
    }

    fn write_bound(&self, hierarchy: &Hierarchy, bound: Option<u64>) -> Result<(), CgroupError> {
        let (controller, version) = (hierarchy.controller, hierarchy.version);
        let file = hierarchy.root.join(&self.path).join(controller.bound_file(version));
        let words = match (bound, controller, version) {
            (Some(bound), ..) => bound.to_string(),
            (None, Controller::Memory, Version::One) => "-1".to_owned(),
            (None, ..) => "max".to_owned(),
        };
        fs::write(&file, words).map_err(|error| CgroupError::Write(file, error))
    }

    /// Removes it where it is empty; the folders above it stay.
    pub async fn remove(&self) {
        let Ok(hierarchies) = here() else { return };
        for hierarchy in hierarchies {
            let folder = hierarchy.root.join(&self.path);
            for left in (0..REMOVE_TRIES).rev() {
                match fs::remove_dir(&folder) {
                    Err(error) if error.kind() == io::ErrorKind::ResourceBusy && left > 0 => {
                        tokio::time::sleep(REMOVE_PAUSE).await;
                        continue;
                    }
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        tracing::warn!(folder = %folder.display(), %error, "a control group stays");
                    }
                    Ok(()) | Err(_) => {}
                }
                break;
            }
        }
    }
}

/// Puts this process into a group, by one of its folders.
pub fn join(folder: &Path) -> Result<(), CgroupError> {
    let file = folder.join(TASKS);
    // 0 is whoever writes it.
    fs::write(&file, "0").map_err(|error| CgroupError::Write(file, error))
}

/// Lets the groups below have a controller. There may be tasks in it, for which the kernel refuses (EBUSY).
fn hand_down(folder: &Path, controller: Controller) -> Result<(), CgroupError> {
    let file = folder.join(CONTROLLERS_BELOW);
    let has = fs::read_to_string(&file).unwrap_or_default();
    if has.split_whitespace().any(|name| name == controller.name()) {
        return Ok(());
    }
    fs::write(&file, format!("+{}", controller.name())).map_err(|error| CgroupError::Write(file, error))
}

/// The hierarchies of this host.
fn here() -> Result<Vec<Hierarchy>, CgroupError> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(hierarchies(&mounts, |root| fs::read_to_string(root.join(CONTROLLERS)).unwrap_or_default()))
}

/// proc_pid_mountinfo(5): the mount point is the fifth field; behind a dash stand type, source and options.
fn hierarchies(mounts: &str, controllers_of: impl Fn(&Path) -> String) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in mounts.lines() {
        let Some((before, after)) = line.split_once(" - ") else { continue };
        let (Some(root), mut after) = (before.split(' ').nth(4), after.split(' ')) else { continue };
        let root = PathBuf::from(root);
        let (version, names) = match after.next() {
            Some("cgroup") => (Version::One, after.nth(1).unwrap_or_default().replace(',', " ")),
            Some("cgroup2") => (Version::Two, controllers_of(&root)),
            _ => continue,
        };
        for controller in Controller::ALL {
            let is_new = found.iter().all(|known| known.controller != controller);
            if is_new && names.split_whitespace().any(|name| name == controller.name()) {
                found.push(Hierarchy { controller, version, root: root.clone() });
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_are_found() {
        let one = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                   39 31 0:36 / /sys/fs/cgroup/pids rw,relatime shared:7 - cgroup cgroup rw,pids\n\
                   41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let found = hierarchies(one, |_| "hugetlb\n".to_owned());
        let roots: Vec<_> =
            found.iter().map(|known| (known.controller.name(), known.root.to_str().unwrap())).collect();
        assert_eq!(roots, [("memory", "/sys/fs/cgroup/memory"), ("pids", "/sys/fs/cgroup/pids")]);
        assert!(found.iter().all(|known| known.version == Version::One));

        let two = "30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        let found = hierarchies(two, |_| "cpuset cpu io memory pids\n".to_owned());
        assert_eq!(found.len(), 2);
        assert!(
            found
                .iter()
                .all(|known| known.version == Version::Two && known.root == Path::new("/sys/fs/cgroup"))
        );
        assert!(hierarchies("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n", |_| String::new()).is_empty());
    }

    #[test]
    fn a_path_stays_in_its_hierarchy() {
        for good in ["drover", "drover/chat-1"] {
            assert_eq!(Cgroup::at(Path::new(good)).unwrap().path(), Path::new(good));
        }
        for bad in ["", "/drover", "..", "drover/../x", "./x"] {
            assert_eq!(Cgroup::at(Path::new(bad)), None, "{bad:?}");
        }
    }
}
