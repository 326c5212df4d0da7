//! Whether a site has the files of a manifest.

use std::fs::Metadata;
use std::path::Path;

use super::hashes::Hashes;
use super::problem::Problem;
use crate::protocol::manifest::{FileKind, NeededFile};

/// What is missing or different here.
pub fn compare(files: &[NeededFile], hashes: &Hashes) -> Vec<Problem> {
    files.iter().filter_map(|file| compare_one(file, hashes).err()).collect()
}

fn compare_one(file: &NeededFile, hashes: &Hashes) -> Result<(), Problem> {
    let path = file.path.clone();
    let missing = |source| Problem::Missing { path: file.path.clone(), source };
    let metadata = std::fs::metadata(&path).map_err(missing)?;
    let (here, wanted) = (kind_of(&metadata), name_of(&file.kind));
    if here != wanted {
        return Err(Problem::Kind { path, here, wanted });
    }
    let FileKind::Regular { bytes, blake3 } = &file.kind else { return Ok(()) };
    if let Some(wanted) = bytes.filter(|bytes| *bytes != metadata.len()) {
        return Err(Problem::Size { path, here: metadata.len(), wanted });
    }
    match blake3 {
        Some(wanted) if hashes.of(Path::new(&path)).map_err(missing)? != *wanted => {
            Err(Problem::Content { path })
        }
        _ => Ok(()),
    }
}

/// What a file is, in the words of messages.
fn kind_of(metadata: &Metadata) -> &'static str {
    if metadata.is_dir() {
        "a folder"
    } else if metadata.is_file() {
        "a file"
    } else {
        "a special file"
    }
}

fn name_of(kind: &FileKind) -> &'static str {
    match kind {
        FileKind::Folder => "a folder",
        FileKind::Regular { .. } => "a file",
        FileKind::Special => "a special file",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_difference_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(path("program"), b"code").unwrap();
        let hashes = Hashes::default();
        let right = hashes.of(Path::new(&path("program"))).unwrap();
        let regular =
            |bytes, blake3: Option<&str>| FileKind::Regular { bytes, blake3: blake3.map(str::to_owned) };
        let said = |path: String, kind| {
            let found = compare(&[NeededFile { path, kind }], &hashes);
            found.iter().map(ToString::to_string).collect::<String>()
        };
        for (path, kind) in [
            (path("program"), regular(Some(4), Some(&right))),
            (path("program"), regular(None, None)),
            (path(""), FileKind::Folder),
            ("/dev/null".to_owned(), FileKind::Special),
        ] {
            assert_eq!(said(path, kind), "");
        }
        for (name, kind, words) in [
            ("none", regular(None, None), "none\" cannot be had there"),
            ("program", FileKind::Folder, "program\" is a file there and a folder at the source"),
            ("program", regular(Some(5), Some(&right)), "program\" has 4 bytes there and 5 at the source"),
            ("program", regular(Some(4), Some("00")), "program\" has other content there"),
        ] {
            let text = said(path(name), kind);
            assert!(text.contains(words), "{text}");
        }
    }
}
