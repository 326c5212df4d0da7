//! Memory, and space for images. Images are on a tmpfs, so both are memory; a folder may be smaller still.

use std::io;
use std::path::Path;

use nix::sys::statfs::statfs;

use super::problem::Problem;

const MIB: u64 = 1 << 20;
/// What images hold besides memory: tasks, descriptors, sockets with their queues.
const BESIDES_BYTES: u64 = 4 * MIB;

/// What a site can give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Memory that is available, `MemAvailable` of `/proc/meminfo`.
    pub available_bytes: u64,
    /// Free space in the images' folder.
    pub images_bytes: u64,
    /// What is to be left over.
    pub spare_bytes: u64,
}

impl Room {
    /// Of this host, with its images in `images`.
    pub fn here(images: &Path, spare_bytes: u64) -> io::Result<Self> {
        let meminfo = std::fs::read_to_string("/proc/meminfo")?;
        let folder = statfs(images)?;
        let block_bytes = u64::try_from(folder.block_size()).unwrap_or(0);
        Ok(Self {
            available_bytes: available_bytes(&meminfo).ok_or(io::ErrorKind::InvalidData)?,
            images_bytes: folder.blocks_available().saturating_mul(block_bytes),
            spare_bytes,
        })
    }

    /// What is wrong with it for the images of so much memory (at the source).
    pub fn for_images(self, memory_bytes: u64, images: &Path) -> Vec<Problem> {
        let need = memory_bytes.saturating_add(BESIDES_BYTES);
        self.problems("a checkpoint", need, need, images)
    }

    /// What is wrong with it for the images and the restored tasks beside them (at the target).
    pub fn for_restore(self, memory_bytes: u64, images: &Path) -> Vec<Problem> {
        let need = memory_bytes.saturating_add(BESIDES_BYTES);
        self.problems(
            "a restore (the images, and the tasks' memory beside them)",
            need.saturating_mul(2),
            need,
            images,
        )
    }

    fn problems(self, what: &'static str, memory: u64, images: u64, folder: &Path) -> Vec<Problem> {
        let mib = |bytes: u64| bytes.div_ceil(MIB);
        let usable = self.available_bytes.saturating_sub(self.spare_bytes);
        let mut problems = Vec::new();
        if memory > usable {
            problems.push(Problem::Memory {
                what,
                need_mib: mib(memory),
                available_mib: usable / MIB,
                spare_mib: mib(self.spare_bytes),
            });
        }
        if images > self.images_bytes {
            problems.push(Problem::Space {
                need_mib: mib(images),
                free_mib: self.images_bytes / MIB,
                folder: folder.display().to_string(),
            });
        }
        problems
    }
}

/// Whether so much memory is more than a control group may have.
pub fn exceeds(memory_bytes: u64, bound_bytes: u64) -> Option<Problem> {
    let (need_mib, bound_mib) = (memory_bytes.div_ceil(MIB), bound_bytes / MIB);
    (memory_bytes > bound_bytes).then_some(Problem::Bound { need_mib, bound_mib })
}

fn available_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(problems: &[Problem]) -> String {
        problems.iter().map(|problem| format!("{problem}\n")).collect()
    }

    #[test]
    fn a_restore_takes_twice_what_a_checkpoint_takes() {
        let images = Path::new("/images");
        let room = Room { available_bytes: 100 * MIB, images_bytes: 1000 * MIB, spare_bytes: 10 * MIB };
        assert!(room.for_images(80 * MIB, images).is_empty());
        assert!(room.for_restore(40 * MIB, images).is_empty());
        let refused = said(&room.for_restore(80 * MIB, images));
        assert!(
            refused.contains("takes 168 MiB, and 90 MiB of memory are available (10 MiB are to be left"),
            "{refused}"
        );
    }

    #[test]
    fn a_small_folder_is_named() {
        let room = Room { available_bytes: 1000 * MIB, images_bytes: 50 * MIB, spare_bytes: 0 };
        let refused = said(&room.for_images(60 * MIB, Path::new("/run/images")));
        assert!(
            refused.contains("images take 64 MiB, and their folder \"/run/images\" has room for 50 MiB"),
            "{refused}"
        );
    }

    #[test]
    fn a_control_group_has_to_be_large_enough() {
        assert!(exceeds(5 * MIB, 5 * MIB).is_none());
        let refused = exceeds(5 * MIB + 1, 5 * MIB).unwrap().to_string();
        assert!(refused.contains("hold 6 MiB, and their control group there may have 5 MiB"), "{refused}");
    }

    #[test]
    fn this_host_has_some() {
        assert_eq!(available_bytes("MemFree: 1 kB\nMemAvailable:   2048 kB\n"), Some(2 * MIB));
        let here = Room::here(Path::new("/dev/shm"), 0).unwrap();
        assert!(here.available_bytes > MIB && here.images_bytes > MIB, "{here:?}");
    }
}
