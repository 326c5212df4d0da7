//! Which of a container's files are in its root file system: what is on another of its mounts is its runtime's business.

use std::path::{Path, PathBuf};

use crate::protocol::manifest::NeededFile;

/// Keeps those on the root mount of the mount namespace of `pid`.
pub fn on_root(files: Vec<NeededFile>, pid: i32) -> Vec<NeededFile> {
    let mounts = std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
    let points: Vec<PathBuf> = mount_points(&mounts);
    files.into_iter().filter(|file| is_on_root(Path::new(&file.path), &points)).collect()
}

/// As a site finds them, whose bundle has its root file system in `root`.
pub fn below(files: Vec<NeededFile>, root: &Path) -> Vec<NeededFile> {
    let place = |path: &str| root.join(path.trim_start_matches('/')).to_string_lossy().into_owned();
    files.into_iter().map(|file| NeededFile { path: place(&file.path), ..file }).collect()
}

/// proc_pid_mountinfo(5): the fifth field, with blanks and the like as octal numbers.
fn mount_points(mounts: &str) -> Vec<PathBuf> {
    let point = |line: &str| Some(PathBuf::from(line.split(' ').nth(4)?.replace("\\040", " ")));
    mounts.lines().filter_map(point).collect()
}

fn is_on_root(path: &Path, points: &[PathBuf]) -> bool {
    let of = points.iter().filter(|point| path.starts_with(point));
    of.max_by_key(|point| point.components().count()).is_none_or(|point| point == Path::new("/"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::manifest::FileKind;

    #[test]
    fn files_of_the_root_are_told_from_those_of_other_mounts() {
        let points = mount_points(
            "36 35 98:0 /srv/rootfs / rw - ext4 /dev/vda rw\n37 36 0:5 / /dev rw - tmpfs tmpfs rw\n\
             38 36 98:0 /x /srv/a\\040b rw - ext4 /dev/vda rw\n",
        );
        for (path, wanted) in [
            ("/", true),
            ("/bin/server", true),
            ("/devices", true),
            ("/dev/null", false),
            ("/srv/a b/c", false),
            ("/srv/a", true),
        ] {
            assert_eq!(is_on_root(Path::new(path), &points), wanted, "{path}");
        }
    }

    #[test]
    fn paths_become_a_sites() {
        let file = |path: &str| NeededFile { path: path.into(), kind: FileKind::Folder };
        let found = below(vec![file("/"), file("/bin/x")], Path::new("/srv/rootfs"));
        assert_eq!(found, [file("/srv/rootfs/"), file("/srv/rootfs/bin/x")]);
    }
}
