//! CRIU's cache of what it has found out about the kernel (`kdat`): letting it dump without pages.
//!
//! The agent sends a workload's memory itself, so CRIU's dump has to leave it out. That is what CRIU does with pages
//! which have not changed since an earlier dump, and it asks the kernel for those: where the kernel does not track
//! changes (no `CONFIG_MEM_SOFT_DIRTY`) it calls every page unchanged, which is just what is wanted, but CRIU refuses to
//! ask. What it looks at is one byte of its cache. Whether a cache with that byte set is understood as meant is for the
//! caller to ask CRIU (`FEATURE_CHECK`).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::OnceLock;

/// `struct kerndat_s` begins with a magic number, a device, the last capability and the zero page's number, padded to 8
/// bytes each; then `has_dirty_track`.
const TRACKING_AT: u64 = 32;
const PAGE_BYTES: usize = 4096;
/// Of a page's entry in `pagemap`.
const SOFT_DIRTY: u64 = 1 << 55;

/// Keeps what a CRIU has found out about this kernel, for those that are started later.
pub fn keep(found: &Path, path: &Path) {
    if !path.exists()
        && let Err(error) = std::fs::copy(found, path)
    {
        // It only costs each of them the time to find out for itself.
        tracing::debug!(%error, "CRIU keeps no cache of the kernel's features");
    }
}

/// Sets in the cache that the kernel tracks changes of memory, or takes it back.
pub fn claim_tracking(cache: &Path, claim: bool) -> io::Result<()> {
    let file = File::options().read(true).write(true).open(cache)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, TRACKING_AT)?;
    if byte != [u8::from(!claim)] {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "CRIU's cache is not as expected"));
    }
    file.write_all_at(&[u8::from(claim)], TRACKING_AT)
}

/// Whether this kernel tracks changes of memory: it says so of a page that was just written (pagemap(5)).
pub fn tracks_changes() -> bool {
    static TRACKS: OnceLock<bool> = OnceLock::new();
    *TRACKS.get_or_init(|| {
        let written = std::hint::black_box(Box::new([1_u8; 2 * PAGE_BYTES]));
        let page = (written.as_ptr() as usize / PAGE_BYTES + 1) as u64;
        let mut entry = [0; size_of::<u64>()];
        let read =
            File::open("/proc/self/pagemap").and_then(|pages| pages.read_exact_at(&mut entry, page * 8));
        read.is_ok() && u64::from_ne_bytes(entry) & SOFT_DIRTY != 0
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_tracks_changes_if_it_was_built_to() {
        let Ok(config) = std::process::Command::new("zcat").arg("/proc/config.gz").output() else { return };
        if config.status.success() {
            let expected = String::from_utf8_lossy(&config.stdout).contains("CONFIG_MEM_SOFT_DIRTY=y");
            assert_eq!(tracks_changes(), expected);
        }
    }

    #[test]
    fn only_the_one_byte_is_touched_and_only_if_it_is_a_flag() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("criu.kdat");
        std::fs::write(&path, [0; 64]).unwrap();
        claim_tracking(&path, true).unwrap();
        let mut expected = [0; 64];
        expected[32] = 1;
        assert_eq!(std::fs::read(&path).unwrap(), expected);
        assert_eq!(claim_tracking(&path, true).unwrap_err().kind(), io::ErrorKind::InvalidData);
        claim_tracking(&path, false).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), [0; 64]);
        std::fs::write(&path, [0; 32]).unwrap();
        assert_eq!(claim_tracking(&path, true).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
