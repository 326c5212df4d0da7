//! What lets a CRIU that restores start before there are images. It opens the inventory first of all, when it has looked
//! at its options and the processor; so the inventory is a pipe until the images are there.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

/// The image that CRIU reads first.
pub const INVENTORY: &str = "inventory.img";
/// Where it is kept until CRIU may read it.
const KEPT: &str = "inventory.kept";

/// The name under which an image is received.
pub fn received_as(name: &str) -> &str {
    if name == INVENTORY { KEPT } else { name }
}

/// Holds a CRIU that restores; one that is dropped without having been opened makes it fail.
#[derive(Debug)]
pub struct Latch {
    images: PathBuf,
    /// With both ends, so that neither waits to open it.
    pipe: File,
}

impl Latch {
    /// Makes the inventory of this folder a pipe.
    pub fn shut(images: &Path) -> io::Result<Self> {
        let path = images.join(INVENTORY);
        mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)?;
        let pipe = OpenOptions::new().read(true).write(true).open(path)?;
        Ok(Self { images: images.to_owned(), pipe })
    }

    /// Lets CRIU read the inventory that was received, wherever it is by now.
    pub fn open(mut self) -> io::Result<()> {
        let inventory = fs::read(self.images.join(KEPT))?;
        // For a CRIU that has not come to it yet.
        fs::rename(self.images.join(KEPT), self.images.join(INVENTORY))?;
        // For one that waits. It is small: a pipe takes it at once.
        self.pipe.write_all(&inventory)
    }
}

impl Drop for Latch {
    /// Who opens the pipe later would wait for ever; who reads it hears that it is over.
    fn drop(&mut self) {
        let path = self.images.join(INVENTORY);
        if fs::symlink_metadata(&path).is_ok_and(|metadata| !metadata.is_file()) {
            // The folder may have been wiped meanwhile.
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// What a CRIU reads that comes before, or after.
    fn read(images: &Path) -> std::thread::JoinHandle<io::Result<Vec<u8>>> {
        let path = images.join(INVENTORY);
        std::thread::spawn(move || fs::read(path))
    }

    #[test]
    fn who_waits_and_who_comes_later_read_what_was_received() {
        let images = tempfile::tempdir().unwrap();
        let latch = Latch::shut(images.path()).unwrap();
        let early = read(images.path());
        std::thread::sleep(Duration::from_millis(20));
        assert!(!early.is_finished());
        fs::write(images.path().join(received_as(INVENTORY)), b"all of it").unwrap();
        latch.open().unwrap();
        assert_eq!(early.join().unwrap().unwrap(), b"all of it");
        assert_eq!(read(images.path()).join().unwrap().unwrap(), b"all of it");
    }

    #[test]
    fn nobody_waits_at_one_that_is_given_up() {
        let images = tempfile::tempdir().unwrap();
        let latch = Latch::shut(images.path()).unwrap();
        let early = read(images.path());
        std::thread::sleep(Duration::from_millis(20));
        // Nothing was received.
        latch.open().unwrap_err();
        assert_eq!(early.join().unwrap().unwrap(), b"");
        assert_eq!(read(images.path()).join().unwrap().unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn the_other_images_are_received_as_what_they_are() {
        assert_eq!(received_as("core-1.img"), "core-1.img");
        assert!(!received_as(INVENTORY).ends_with(".img"));
    }
}
