//! A task's mapped files: code has to be the same at the target, byte by byte, and everything else has to be there.

use std::fs;
use std::path::{Path, PathBuf};

use super::descriptors::{DELETED, kind_of};
use super::hashes::Hashes;
use super::problem::{Problem, Task};
use super::tasks::Found;
use crate::protocol::manifest::FileKind;

/// One line of `/proc/PID/maps`, of a mapping with a name.
#[derive(Debug, PartialEq, Eq)]
struct Mapping<'a> {
    /// `START-END`, as in `/proc/PID/map_files`.
    range: &'a str,
    is_executable: bool,
    /// It is written through to the file.
    is_shared_and_written: bool,
    name: &'a str,
}

impl<'a> Mapping<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (range, rest) = line.split_once(' ')?;
        let (permissions, rest) = rest.split_once(' ')?;
        // Offset, device, inode; then blanks and the name, which may have blanks of its own.
        let name = rest.splitn(4, ' ').nth(3)?.trim_start();
        let has = |flag| permissions.contains(flag);
        (!name.is_empty()).then_some(Self {
            range,
            is_executable: has('x'),
            is_shared_and_written: has('s') && has('w'),
            name,
        })
    }

    /// Memory that CRIU cannot dump, in words.
    fn undumped(&self) -> Option<String> {
        if self.name.starts_with("/SYSV") {
            return Some("shared memory of System V".to_owned());
        }
        let kind = self.name.strip_prefix("anon_inode:")?;
        Some(format!("memory of kind {kind:?}"))
    }

    /// A file with a path, not a part of the task's own memory.
    fn is_file(&self) -> bool {
        self.name.starts_with('/') && !self.name.ends_with(DELETED)
    }
}

/// Looks at all mappings of a task.
pub fn look(task: &Task, hashes: &Hashes, found: &mut Found) {
    let Ok(maps) = fs::read_to_string(format!("/proc/{}/maps", task.pid)) else { return };
    for mapping in maps.lines().filter_map(Mapping::parse) {
        if let Some(what) = mapping.undumped() {
            found.problems.push(Problem::Mapping { task: task.clone(), what });
        } else if mapping.is_file() {
            look_at_file(task, &mapping, hashes, found);
        }
    }
}

fn look_at_file(task: &Task, mapping: &Mapping<'_>, hashes: &Hashes, found: &mut Found) {
    // The very file that is mapped, whatever has its path by now.
    let at = PathBuf::from(format!("/proc/{}/map_files/{}", task.pid, mapping.range));
    // A mapping that is gone is none.
    let Ok(metadata) = fs::metadata(&at) else { return };
    if !metadata.is_file() {
        if !Path::new(mapping.name).starts_with("/dev/zero") {
            let what = format!("the device {:?}", mapping.name);
            found.problems.push(Problem::Mapping { task: task.clone(), what });
        }
        return;
    }
    let bytes = (!mapping.is_shared_and_written).then_some(metadata.len());
    let kind = match kind_of(&metadata, bytes) {
        FileKind::Regular { bytes, .. } if mapping.is_executable && !found.has_content(mapping.name) => {
            FileKind::Regular { bytes, blake3: hashes.of(&at).ok() }
        }
        kind => kind,
    };
    found.needs_file(mapping.name, kind);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read() {
        let line = "7f1c0000-7f1c1000 r-xp 00026000 fe:01 3155    /usr/lib/a library.so";
        let mapping = Mapping::parse(line).unwrap();
        assert_eq!((mapping.range, mapping.name), ("7f1c0000-7f1c1000", "/usr/lib/a library.so"));
        assert!(mapping.is_executable && !mapping.is_shared_and_written && mapping.is_file());
        assert_eq!(Mapping::parse("7ffc0000-7ffc1000 rw-p 00000000 00:00 0 "), None);
        let written = Mapping::parse("1000-2000 rw-s 00000000 fe:01 9 /srv/db").unwrap();
        assert!(written.is_shared_and_written && !written.is_executable);
        let name = |name| Mapping { range: "", is_executable: false, is_shared_and_written: false, name };
        assert!(!name("[stack]").is_file() && !name("/tmp/x (deleted)").is_file());
        assert_eq!(name("/SYSV00000000 (deleted)").undumped().unwrap(), "shared memory of System V");
        assert_eq!(name("anon_inode:[io_uring]").undumped().unwrap(), "memory of kind \"[io_uring]\"");
        assert_eq!(name("[heap]").undumped(), None);
    }

    #[test]
    fn code_of_a_process_is_found_with_its_content() {
        let me = Task { pid: std::process::id().cast_signed(), name: "me".into() };
        let (hashes, mut found) = (Hashes::default(), Found::default());
        look(&me, &hashes, &mut found);
        let program = std::env::current_exe().unwrap();
        let hash = hashes.of(&program).unwrap();
        let file = &found.files[program.to_str().unwrap()];
        let bytes = fs::metadata(&program).unwrap().len();
        assert_eq!(file.kind, FileKind::Regular { bytes: Some(bytes), blake3: Some(hash) });
        assert!(found.files.keys().any(|path| path.contains("libc")), "{:?}", found.files.keys());
    }
}
