//! Images: their folders on a tmpfs, and the way from the source's memory to the target's.

use std::convert::Infallible;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

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
use crate::memory::read::{Image, Reader};
use crate::protocol::frames::{Decoder, Encoder, FrameError, Item};
use crate::system;

/// What is read from an image at a time, and the largest HTTP/2 frame.
const CHUNK_BYTES: usize = 1 << 20;
/// Chunks on the way between the reading thread and the connection.
const CHUNKS_UNDER_WAY: usize = 8;
/// Up to this much is read and sent without the way over another thread, which costs more than the reading.
const AT_ONCE_BYTES: u64 = 4 << 20;

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
        if is_folder { fs::remove_dir_all(path) } else { fs::remove_file(path) }.map_err(failed)?;
    }
    Ok(root)
}

/// Where CRIU's cache of the kernel's features is: with the images, since it holds for one boot.
pub fn kernel_cache(root: &Path) -> PathBuf {
    root.join("criu.kdat")
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

    /// Writes what comes until the end mark; gives the bytes on the wire. `begun` is called at the first.
    pub async fn receive<E: std::fmt::Display>(
        path: &Path,
        mut stream: impl Stream<Item = Result<Bytes, E>> + Unpin,
        begun: impl FnOnce(),
    ) -> Result<u64, ImagesError> {
        let mut decoder = Decoder::default();
        let mut current: Option<(String, File)> = None;
        let (mut sent_bytes, mut ended, mut begun) = (0, false, Some(begun));
        while let Some(chunk) = stream.next().await {
            let chunk = chunk.map_err(|error| ImagesError::Stream(error.to_string()))?;
            sent_bytes += chunk.len() as u64;
            decoder.push(chunk, |item| -> Result<(), ImagesError> {
                match item {
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
        Ok(Self { chunks })
    }

    /// Sends the images and the end mark. Without the end mark the target takes nothing.
    pub async fn send(self, folder: PathBuf, images: Vec<Image>) -> Result<(), ImagesError> {
        if self.fits_at_once(&images) {
            return self.send_with(&folder, &images, |chunks, chunk| chunks.try_send(chunk).is_ok());
        }
        let sending = tokio::task::spawn_blocking(move || {
            self.send_with(&folder, &images, |chunks, chunk| chunks.blocking_send(chunk).is_ok())
        });
        sending.await.map_err(|error| ImagesError::Stream(error.to_string()))?
    }

    /// True if all of it is a few chunks, for which the queue has room.
    fn fits_at_once(&self, images: &[Image]) -> bool {
        let bytes: u64 = images.iter().map(|image| image.len + image.name.len() as u64 + 16).sum();
        bytes <= AT_ONCE_BYTES && self.chunks.capacity() > (AT_ONCE_BYTES as usize / CHUNK_BYTES) + 1
    }

    fn send_with(
        self,
        folder: &Path,
        images: &[Image],
        put: impl Fn(&mpsc::Sender<Bytes>, Bytes) -> bool,
    ) -> Result<(), ImagesError> {
        let gone = || ImagesError::Upload("it ended the request".to_owned());
        let send = |chunk| if put(&self.chunks, chunk) { Ok(()) } else { Err(gone()) };
        let mut encoder = Encoder::default();
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::memory::read::Content;

    fn stream(bytes: Vec<u8>) -> impl Stream<Item = Result<Bytes, Infallible>> + Unpin {
        let chunks: Vec<_> = bytes.chunks(7).map(|chunk| Ok(Bytes::copy_from_slice(chunk))).collect();
        futures_util::stream::iter(chunks)
    }

    async fn sent(folder: &Folder) -> Vec<u8> {
        let (chunks, mut queue) = mpsc::channel(CHUNKS_UNDER_WAY);
        let upload = Upload { chunks };
        let images = folder.list().unwrap().into_iter();
        let images =
            images.map(|(name, len)| Image { name, len, content: Content::File }).collect::<Vec<_>>();
        let sending = tokio::spawn(upload.send(folder.path().to_owned(), images));
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
        let sent_bytes = Folder::receive(to.path(), stream(bytes.clone()), || begun += 1).await.unwrap();
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
    async fn a_stream_that_breaks_off_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        let (from, to) =
            (Folder::create(root.path(), "a").unwrap(), Folder::create(root.path(), "b").unwrap());
        fs::write(from.path().join("core-1.img"), b"core").unwrap();
        let mut bytes = sent(&from).await;
        bytes.pop();
        let error = Folder::receive(to.path(), stream(bytes), || ()).await.unwrap_err();
        assert!(matches!(error, ImagesError::Frame(FrameError::Truncated { .. })), "{error}");
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
