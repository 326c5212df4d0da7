//! Images: their folders on a tmpfs, and the way from the source's memory to the target's.

use std::convert::Infallible;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt};
use http::Method;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use tokio::sync::mpsc;

use crate::client::{AgentClient, chain};
use crate::criu::latch::received_as;
use crate::memory::ahead::{AHEAD_FOLDER, Extent, PARENT_LINK, pages_name};
use crate::memory::layout::{Change, Laid, number};
use crate::memory::read::{Reader, read_memory};
use crate::protocol::frames::{Decoder, Encoder, FrameError, Item, PIECE_BYTES};
use crate::system;

/// What is read from an image at a time, and the largest HTTP/2 frame.
const CHUNK_BYTES: usize = 1 << 20;
/// Chunks on the way between the reading thread and the connection.
const CHUNKS_UNDER_WAY: usize = 8;
/// Up to this much is read and sent without the way over another thread, which costs more than the reading.
const AT_ONCE_BYTES: u64 = 4 << 20;

/// How long a CRIU without an agent may go on writing.
const LEFT_LIMIT: Duration = Duration::from_secs(5);
/// Until it is looked again whether it has ended.
const LEFT_PAUSE: Duration = Duration::from_millis(5);

/// Why images could not be kept, sent or received.
#[derive(Debug, thiserror::Error)]
pub enum ImagesError {
    /// The folder.
    #[error("the images' folder {} cannot be used", .0.display())]
    Folder(PathBuf, #[source] io::Error),
    /// A file.
    #[error("image {0} cannot be read or written: is there memory left?")]
    File(String, #[source] io::Error),
    /// The stream.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The connection.
    #[error("the connection from the source broke: {0}")]
    Stream(String),
    /// The target does not take them.
    #[error("the target does not take the images: {0}")]
    Upload(String),
}

/// The folder of all images of an agent: on a tmpfs, for root only, empty at the start.
pub fn open_root(state_dir: &Path) -> Result<PathBuf, ImagesError> {
    let root = state_dir.join("images");
    let failed = |error| ImagesError::Folder(root.clone(), error);
    make_private(&root).map_err(failed)?;
    if statfs(&root).map_err(|errno| failed(errno.into()))?.filesystem_type() != TMPFS_MAGIC {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        // As much as there is memory: half of it, the default, could be too little for one large server.
        mount(Some("tmpfs"), &root, Some("tmpfs"), flags, Some("mode=0700,size=100%"))
            .map_err(|errno| failed(errno.into()))?;
    }
    for left in fs::read_dir(&root).map_err(failed)? {
        let left = left.map_err(failed)?;
        let is_folder = left.file_type().map_err(failed)?.is_dir();
        let path = left.path();
        if is_folder { wipe_left(&path) } else { fs::remove_file(path) }.map_err(failed)?;
    }
    Ok(root)
}

/// Where CRIU's cache of the kernel's features is: with the images, since it holds for one boot.
pub fn kernel_cache(root: &Path) -> PathBuf {
    root.join("criu.kdat")
}

/// Wipes a folder into which a killed agent's CRIU may still write: it notices soon, and undoes what it did.
fn wipe_left(path: &Path) -> io::Result<()> {
    let until = Instant::now() + LEFT_LIMIT;
    loop {
        match fs::remove_dir_all(path) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty && Instant::now() < until => {
                std::thread::sleep(LEFT_PAUSE);
            }
            done => return done,
        }
    }
}

fn make_private(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// The folder of one migration's images; wiped when dropped.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
}

impl Folder {
    /// Makes an empty one.
    pub fn create(root: &Path, id: &str) -> Result<Self, ImagesError> {
        let path = root.join(id);
        let failed = |error| ImagesError::Folder(path.clone(), error);
        if path.exists() {
            fs::remove_dir_all(&path).map_err(failed)?;
        }
        make_private(&path).map_err(failed)?;
        Ok(Self { path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Forgets what is in it.
    pub fn clear(&self) -> Result<(), ImagesError> {
        let failed = |error| ImagesError::Folder(self.path.clone(), error);
        fs::remove_dir_all(&self.path).and_then(|()| make_private(&self.path)).map_err(failed)
    }

    /// The images: name and size in bytes. CRIU's log and the like stay here.
    pub fn list(&self) -> Result<Vec<(String, u64)>, ImagesError> {
        let failed = |error| ImagesError::Folder(self.path.clone(), error);
        let mut images = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let metadata = entry.metadata().map_err(failed)?;
            if let Ok(name) = entry.file_name().into_string()
                && name.ends_with(".img")
                && metadata.is_file()
            {
                images.push((name, metadata.len()));
            }
        }
        Ok(images)
    }

    /// Writes what comes until the end mark; gives the bytes on the wire. `ahead` is called at whatever comes ahead of
    /// the images, `begun` at the first of these.
    pub async fn receive<E: std::fmt::Display>(
        path: &Path,
        mut stream: impl Stream<Item = Result<Bytes, E>> + Unpin,
        mut ahead: impl FnMut(),
        begun: impl FnOnce(),
    ) -> Result<u64, ImagesError> {
        let mut decoder = Decoder::default();
        let mut current: Option<(String, File)> = None;
        let mut pieces: Option<(String, File)> = None;
        let (mut sent_bytes, mut ended, mut begun) = (0, false, Some(begun));
        while let Some(chunk) = stream.next().await {
            let chunk = chunk.map_err(|error| ImagesError::Stream(error.to_string()))?;
            sent_bytes += chunk.len() as u64;
            decoder.push(chunk, |item| -> Result<(), ImagesError> {
                match item {
                    Item::Piece { name, extents, data } => {
                        ahead();
                        let failed = |error| ImagesError::File(name.clone(), error);
                        if pieces.as_ref().is_none_or(|(open, _)| *open != name) {
                            pieces = Some((name.clone(), open_ahead(path, &name).map_err(failed)?));
                        }
                        if let Some((_, file)) = &pieces {
                            write_parts(file, &extents, &data).map_err(failed)?;
                        }
                    }
                    Item::File { name, .. } => {
                        if let Some(begun) = begun.take() {
                            begun();
                        }
                        // For root alone even outside of its folder.
                        let mut options = OpenOptions::new();
                        let file = options
                            .write(true)
                            .create(true)
                            .truncate(true)
                            .mode(0o600)
                            .open(path.join(received_as(&name)));
                        let file = file.map_err(|error| ImagesError::File(name.clone(), error))?;
                        current = Some((name, file));
                    }
                    Item::Data(data) => {
                        if let Some((name, file)) = &mut current {
                            // A tmpfs: this is a copy in memory and waits for nothing.
                            file.write_all(&data).map_err(|error| ImagesError::File(name.clone(), error))?;
                        }
                    }
                    Item::End { .. } => ended = true,
                }
                Ok(())
            })?;
            if ended {
                return Ok(sent_bytes);
            }
        }
        decoder.finish()?;
        Ok(sent_bytes)
    }
}

/// Opens a file of what comes ahead, where CRIU takes it for that of an earlier dump.
fn open_ahead(path: &Path, name: &str) -> io::Result<File> {
    let folder = path.join(AHEAD_FOLDER);
    match DirBuilder::new().mode(0o700).create(&folder) {
        Ok(()) => symlink(AHEAD_FOLDER, path.join(PARENT_LINK))?,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error),
    }
    let open = |name: &str| {
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(folder.join(name))
    };
    // To CRIU a list of pages needs a file with them, even if there are none.
    if let Some(inner_pid) = number(name, "pagemap-") {
        open(&pages_name(inner_pid))?;
    }
    open(name)
}

fn write_parts(file: &File, extents: &[Extent], data: &[u8]) -> io::Result<()> {
    let mut rest = data;
    for (offset, len) in extents {
        let (part, behind) = rest.split_at_checked(*len as usize).ok_or(io::ErrorKind::UnexpectedEof)?;
        file.write_all_at(part, *offset)?;
        rest = behind;
    }
    Ok(())
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!(folder = %self.path.display(), %error, "images could not be wiped");
        }
    }
}

/// A request to the target that is open and waits for images.
#[derive(Debug)]
pub struct Upload {
    chunks: mpsc::Sender<Bytes>,
    encoder: Encoder,
}

impl Upload {
    /// Opens it; the first bytes are sent at once. What goes wrong until the end is told to `failed`.
    pub async fn open(
        client: Arc<AgentClient>,
        id: &str,
        failed: impl FnOnce(ImagesError) + Send + 'static,
    ) -> Result<Self, ImagesError> {
        client.connect().await.map_err(|error| ImagesError::Upload(chain(&error)))?;
        let (chunks, queue) = mpsc::channel::<Bytes>(CHUNKS_UNDER_WAY);
        let path = format!("/v1/migrations/{id}/images");
        let frames = futures_util::stream::unfold(queue, |mut queue| async {
            let chunk = queue.recv().await?;
            Some((Ok::<_, Infallible>(Frame::data(chunk)), queue))
        });
        let body = StreamBody::new(frames).boxed_unsync();
        system::spawn(async move {
            let answer = async {
                let response = client.send(Method::POST, &path, body).await?;
                client.accept(response).await
            };
            if let Err(error) = answer.await {
                failed(ImagesError::Upload(chain(&error)));
            }
        });
        // Cannot be full yet.
        let _ = chunks.send(Encoder::start()).await;
        Ok(Self { chunks, encoder: Encoder::default() })
    }

    /// Sends something of what goes ahead of the images. Waits while the link is busy, so not for the runtime's threads.
    pub fn send_piece(&mut self, name: &str, extents: &[Extent], data: &[u8]) -> Result<(), ImagesError> {
        let piece = self.encoder.piece(name, extents, data, self.is_behind())?;
        self.chunks.blocking_send(piece).map_err(|_| ended())
    }

    /// Chunks that the connection has not taken yet.
    pub fn waiting(&self) -> usize {
        if self.chunks.is_closed() { 0 } else { self.chunks.max_capacity() - self.chunks.capacity() }
    }

    /// The link is slower than we are.
    fn is_behind(&self) -> bool {
        self.chunks.capacity() == 0
    }

    /// Sends the images and the end mark. Without the end mark the target takes nothing.
    pub async fn send(self, folder: PathBuf, laid: Laid) -> Result<(), ImagesError> {
        if self.fits_at_once(&laid) {
            return self.send_with(&folder, &laid, |chunks, chunk| chunks.try_send(chunk).is_ok());
        }
        let sending = tokio::task::spawn_blocking(move || {
            self.send_with(&folder, &laid, |chunks, chunk| chunks.blocking_send(chunk).is_ok())
        });
        sending.await.map_err(|error| ImagesError::Stream(error.to_string()))?
    }

    /// True if all of it is a few chunks, for which the queue has room.
    fn fits_at_once(&self, laid: &Laid) -> bool {
        let names: u64 = laid.images.iter().map(|image| image.name.len() as u64 + 16).sum();
        let pieces = gather(&laid.changes).count();
        laid.bytes() + names <= AT_ONCE_BYTES
            && self.chunks.capacity() > (AT_ONCE_BYTES as usize / CHUNK_BYTES) + 1 + pieces
    }

    fn send_with(
        mut self,
        folder: &Path,
        Laid { changes, images, .. }: &Laid,
        put: impl Fn(&mpsc::Sender<Bytes>, Bytes) -> bool,
    ) -> Result<(), ImagesError> {
        let mut data = Vec::with_capacity(PIECE_BYTES);
        for (name, parts) in gather(changes) {
            let failed = |error| ImagesError::File(name.to_owned(), error);
            data.clear();
            for (change, (_, len)) in &parts {
                let start = data.len();
                data.resize(start + *len as usize, 0);
                read_all(change.0, change.1, &mut data[start..]).map_err(failed)?;
            }
            let extents: Vec<Extent> = parts.iter().map(|(_, extent)| *extent).collect();
            let piece = self.encoder.piece(name, &extents, &data, self.is_behind())?;
            if !put(&self.chunks, piece) {
                return Err(ended());
            }
        }
        let Self { chunks, mut encoder } = self;
        let send = |chunk| if put(&chunks, chunk) { Ok(()) } else { Err(ended()) };
        // Small images are gathered: fewer frames, fewer wake-ups.
        let mut buffer = BytesMut::with_capacity(CHUNK_BYTES);
        for image in images {
            let failed = |error| ImagesError::File(image.name.clone(), error);
            buffer.extend_from_slice(&encoder.file(&image.name, image.len)?);
            let mut reader = Reader::open(folder, image).map_err(failed)?;
            let mut left = image.len;
            while left > 0 {
                let room = CHUNK_BYTES.saturating_sub(buffer.len());
                if room == 0 {
                    send(buffer.split().freeze())?;
                    buffer.reserve(CHUNK_BYTES);
                    continue;
                }
                let take = usize::try_from(left).unwrap_or(usize::MAX).min(room);
                let start = buffer.len();
                buffer.resize(start + take, 0);
                reader.read_exact(&mut buffer[start..]).map_err(failed)?;
                left -= take as u64;
            }
        }
        buffer.extend_from_slice(&encoder.end());
        send(buffer.freeze())
    }
}

fn ended() -> ImagesError {
    ImagesError::Upload("it ended the request".to_owned())
}

/// A part of a piece: the task and the address where it is, and its place in the file.
type Place = ((i32, u64), Extent);

/// Changes as pieces: the file's name, and as much as one piece holds.
fn gather(changes: &[Change]) -> impl Iterator<Item = (&str, Vec<Place>)> {
    let mut rest = changes.iter().flat_map(|change| {
        let starts = (0..change.len).step_by(PIECE_BYTES);
        starts.map(move |start| {
            let len = (change.len - start).min(PIECE_BYTES as u64) as u32;
            (change.name.as_str(), ((change.pid, change.address + start), (change.offset + start, len)))
        })
    });
    let mut next = rest.next();
    std::iter::from_fn(move || {
        let (name, first) = next.take()?;
        let (mut parts, mut bytes) = (vec![first], first.1.1 as usize);
        next = rest.next();
        while let Some((_, part)) =
            next.filter(|(other, part)| *other == name && bytes + part.1.1 as usize <= PIECE_BYTES)
        {
            bytes += part.1.1 as usize;
            parts.push(part);
            next = rest.next();
        }
        Some((name, parts))
    })
}

/// Reads memory of a stopped task.
fn read_all(pid: i32, address: u64, buffer: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        match read_memory(pid, address + done as u64, &mut buffer[done..])? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => done += read,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::memory::read::{Content, Image};

    fn stream(bytes: Vec<u8>) -> impl Stream<Item = Result<Bytes, Infallible>> + Unpin {
        let chunks: Vec<_> = bytes.chunks(7).map(|chunk| Ok(Bytes::copy_from_slice(chunk))).collect();
        futures_util::stream::iter(chunks)
    }

    async fn sent(folder: &Folder) -> Vec<u8> {
        let (chunks, mut queue) = mpsc::channel(CHUNKS_UNDER_WAY);
        let upload = Upload { chunks, encoder: Encoder::default() };
        let images = folder.list().unwrap().into_iter();
        let images =
            images.map(|(name, len)| Image { name, len, content: Content::File }).collect::<Vec<_>>();
        let sending = tokio::spawn(upload.send(folder.path().to_owned(), Laid { images, ..Laid::default() }));
        let mut bytes = Encoder::start().to_vec();
        while let Some(chunk) = queue.recv().await {
            bytes.extend_from_slice(&chunk);
        }
        sending.await.unwrap().unwrap();
        bytes
    }

    #[tokio::test]
    async fn images_arrive_as_they_were_and_logs_stay() {
        let root = tempfile::tempdir().unwrap();
        let (from, to) =
            (Folder::create(root.path(), "a").unwrap(), Folder::create(root.path(), "b").unwrap());
        let large: Vec<u8> = (0..3 * CHUNK_BYTES + 17).map(|n| (n % 251) as u8).collect();
        fs::write(from.path().join("pages-1.img"), &large).unwrap();
        fs::write(from.path().join("core-1.img"), b"core").unwrap();
        fs::write(from.path().join("empty.img"), b"").unwrap();
        fs::write(from.path().join("criu.log"), b"log").unwrap();
        let bytes = sent(&from).await;
        let mut begun = 0;
        let sent_bytes =
            Folder::receive(to.path(), stream(bytes.clone()), || (), || begun += 1).await.unwrap();
        assert_eq!((sent_bytes, begun), (bytes.len() as u64, 1));
        assert_eq!(fs::read(to.path().join("pages-1.img")).unwrap(), large);
        for entry in fs::read_dir(to.path()).unwrap() {
            assert_eq!(entry.unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o600);
        }
        let names = |folder: &Folder| {
            let mut names: Vec<_> = folder.list().unwrap().into_iter().map(|(name, _)| name).collect();
            names.sort();
            names
        };
        assert_eq!(names(&to), ["core-1.img", "empty.img", "pages-1.img"]);
        assert_eq!(names(&from), names(&to));
    }

    #[tokio::test]
    async fn memory_comes_ahead_and_changes_are_written_over_it() {
        let root = tempfile::tempdir().unwrap();
        let (from, to) =
            (Folder::create(root.path(), "a").unwrap(), Folder::create(root.path(), "b").unwrap());
        let (chunks, mut queue) = mpsc::channel(100);
        let mut upload = Upload { chunks, encoder: Encoder::default() };
        let content: Vec<u8> = (0..3 * PIECE_BYTES / 2).map(|n| (n % 251) as u8).collect();
        let laid = Laid {
            changes: [(4, 100), (200, 100), (400, PIECE_BYTES as u64 + 5)]
                .map(|(offset, len)| Change {
                    name: "pages-7.img".into(),
                    offset,
                    pid: std::process::id().cast_signed(),
                    address: content.as_ptr() as u64 + offset,
                    len,
                })
                .into(),
            ..Laid::default()
        };
        let folder = from.path().to_owned();
        let sending = tokio::task::spawn_blocking(move || {
            upload.send_piece("pagemap-7.img", &[(0, 4)], b"list").unwrap();
            upload.send_piece("pages-7.img", &[(0, 8), (300, 4)], b"aaaabbbbcccc").unwrap();
            upload
        });
        sending.await.unwrap().send(folder, laid).await.unwrap();
        let mut bytes = Encoder::start().to_vec();
        while let Some(chunk) = queue.recv().await {
            bytes.extend_from_slice(&chunk);
        }
        let mut pieces = 0;
        Folder::receive(to.path(), stream(bytes), || pieces += 1, || ()).await.unwrap();
        assert_eq!(pieces, 5, "three of them hold what has changed");
        let parent = to.path().join(PARENT_LINK);
        assert_eq!(fs::read(parent.join("pagemap-7.img")).unwrap(), b"list");
        let pages = fs::read(parent.join("pages-7.img")).unwrap();
        assert_eq!(&pages[..4], b"aaaa");
        assert_eq!(pages[4..104], content[4..104]);
        assert_eq!(pages[200..300], content[200..300]);
        assert_eq!(&pages[300..304], b"cccc");
        assert_eq!(pages[400..], content[400..400 + PIECE_BYTES + 5]);
        assert!(to.list().unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_stream_that_breaks_off_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        let (from, to) =
            (Folder::create(root.path(), "a").unwrap(), Folder::create(root.path(), "b").unwrap());
        fs::write(from.path().join("core-1.img"), b"core").unwrap();
        let mut bytes = sent(&from).await;
        bytes.pop();
        let error = Folder::receive(to.path(), stream(bytes), || (), || ()).await.unwrap_err();
        assert!(matches!(error, ImagesError::Frame(FrameError::Truncated { .. })), "{error}");
    }

    #[test]
    fn a_folder_that_is_still_written_to_is_wiped_when_that_is_over() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("m-1");
        make_private(&path).unwrap();
        let writes_to = path.clone();
        let writer = std::thread::spawn(move || {
            for number in 0..20_000 {
                // The folder itself goes away at some time.
                let _ = fs::write(writes_to.join(number.to_string()), b"");
            }
        });
        wipe_left(&path).unwrap();
        writer.join().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_folder_is_private_and_wiped() {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::create(root.path(), "m-1").unwrap();
        let path = folder.path().to_owned();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        fs::write(path.join("x.img"), b"secret").unwrap();
        folder.clear().unwrap();
        assert!(folder.list().unwrap().is_empty());
        drop(folder);
        assert!(!path.exists());
    }
}
