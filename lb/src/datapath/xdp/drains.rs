//! Which backends are drained by hand: a folder each, beside the pinned tables, so that it lives as long as they do.

use std::collections::HashSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::program::kernel;
use crate::datapath::DatapathError;

/// The marks below the pin path.
pub struct Drains {
    folder: PathBuf,
}

impl Drains {
    /// The marks that a former daemon left there, and those to come.
    pub fn new(pins: &Path) -> Self {
        Self { folder: pins.join("drained") }
    }

    /// Names of the marked backends.
    pub fn all(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        entries.filter_map(|entry| Some(entry.file_name().to_str()?.replace('~', "."))).collect()
    }

    /// Makes or removes a mark.
    pub fn set(&self, backend: &str, drained: bool) -> Result<(), DatapathError> {
        // bpffs takes no dots in names, and names of backends have no tildes.
        let mark = self.folder.join(backend.replace('.', "~"));
        let result = if drained { fs::create_dir_all(&mark) } else { fs::remove_dir(&mark) };
        match result {
            Err(error) if !drained && error.kind() == ErrorKind::NotFound => Ok(()),
            result => result.map_err(kernel(format!("marking a drained backend at {}", mark.display()))),
        }
    }

    /// Removes the marks of backends that there are no more: one of the same name may be another one.
    pub fn keep<'n>(&self, names: impl Iterator<Item = &'n str>) -> Result<(), DatapathError> {
        let marked = self.all();
        if marked.is_empty() {
            return Ok(());
        }
        let names: HashSet<&str> = names.collect();
        marked.iter().filter(|name| !names.contains(&***name)).try_for_each(|name| self.set(name, false))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_stay_until_they_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let drains = Drains::new(dir.path());
        assert!(drains.all().is_empty());
        drains.set("chat-1", false).unwrap();
        for _ in 0..2 {
            drains.set("chat.1", true).unwrap();
            drains.set("chat-1", true).unwrap();
        }
        let mut all = Drains::new(dir.path()).all();
        all.sort();
        assert_eq!(all, ["chat-1", "chat.1"]);
        drains.keep(["chat.1", "other"].into_iter()).unwrap();
        assert_eq!(drains.all(), ["chat.1"]);
        drains.set("chat.1", false).unwrap();
        assert!(drains.all().is_empty());
    }
}
