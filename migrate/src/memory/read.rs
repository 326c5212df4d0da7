//! Reading what images are made of: files, bytes, and the memory of stopped tasks.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSliceMut, Read};
use std::path::Path;

use bytes::Bytes;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

/// An image that is to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Its file's name.
    pub name: String,
    /// Bytes.
    pub len: u64,
    /// Where they come from.
    pub content: Content,
}

/// Where an image's bytes come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// The file of its name in the images folder.
    File,
    /// From here.
    Bytes(Bytes),
    /// From several places, one after the other.
    Parts(Vec<Part>),
}

/// A part of an image's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The next so many bytes of the file of its name.
    File {
        /// Bytes.
        len: u64,
    },
    /// Memory of a stopped task.
    Memory {
        /// As this host counts.
        pid: i32,
        /// Where.
        address: u64,
        /// Bytes.
        len: u64,
    },
}

impl Part {
    fn len(self) -> u64 {
        match self {
            Self::File { len } | Self::Memory { len, .. } => len,
        }
    }
}

/// An image's bytes, one after the other. The end comes after [`Image::len`] of them.
#[derive(Debug)]
pub struct Reader {
    file: Option<File>,
    bytes: Bytes,
    parts: VecDeque<Part>,
}

impl Reader {
    /// Opens an image of the folder.
    pub fn open(folder: &Path, image: &Image) -> io::Result<Self> {
        let mut reader = Self { file: None, bytes: Bytes::new(), parts: VecDeque::new() };
        match &image.content {
            Content::File => reader.parts.push_back(Part::File { len: image.len }),
            Content::Bytes(bytes) => reader.bytes = bytes.clone(),
            Content::Parts(parts) => reader.parts = parts.iter().copied().collect(),
        }
        if reader.parts.iter().any(|part| matches!(part, Part::File { .. })) {
            reader.file = Some(File::open(folder.join(&image.name))?);
        }
        Ok(reader)
    }
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if !self.bytes.is_empty() {
            let len = self.bytes.len().min(buffer.len());
            buffer[..len].copy_from_slice(&self.bytes.split_to(len));
            return Ok(len);
        }
        let Some(part) = self.parts.front_mut() else { return Ok(0) };
        let len = usize::try_from(part.len()).unwrap_or(usize::MAX).min(buffer.len());
        let read = match (&mut *part, &mut self.file) {
            (Part::Memory { pid, address, .. }, _) => read_memory(*pid, *address, &mut buffer[..len])?,
            (Part::File { .. }, Some(file)) => file.read(&mut buffer[..len])?,
            (Part::File { .. }, None) => 0,
        };
        match part {
            Part::Memory { address, len, .. } => {
                *address += read as u64;
                *len -= read as u64;
            }
            Part::File { len } => *len -= read as u64,
        }
        if part.len() == 0 {
            self.parts.pop_front();
        }
        Ok(read)
    }
}

/// Reads memory of a task; fewer bytes than asked for only where its memory ends.
pub fn read_memory(pid: i32, address: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let base = usize::try_from(address).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let remote = [RemoteIoVec { base, len: buffer.len() }];
    Ok(process_vm_readv(Pid::from_raw(pid), &mut [IoSliceMut::new(buffer)], &remote)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_follow_each_other() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("pages-1.img"), b"abcdefgh").unwrap();
        let memory: Vec<u8> = (0..200_u8).collect();
        let pid = i32::try_from(std::process::id()).unwrap();
        let address = memory.as_ptr() as u64;
        let parts = vec![
            Part::File { len: 3 },
            Part::Memory { pid, address, len: 150 },
            Part::File { len: 5 },
            Part::Memory { pid, address: address + 150, len: 50 },
        ];
        let image = Image { name: "pages-1.img".into(), len: 208, content: Content::Parts(parts) };
        let mut all = Vec::new();
        Reader::open(folder.path(), &image).unwrap().read_to_end(&mut all).unwrap();
        assert_eq!(all, [b"abc", &memory[..150], b"defgh", &memory[150..]].concat());
        let bytes = Image { content: Content::Bytes(Bytes::from_static(b"xyz")), ..image };
        let mut all = Vec::new();
        Reader::open(folder.path(), &bytes).unwrap().read_to_end(&mut all).unwrap();
        assert_eq!(all, b"xyz");
    }

    #[test]
    fn memory_that_is_not_there_is_an_error() {
        let pid = i32::try_from(std::process::id()).unwrap();
        assert!(read_memory(pid, 0, &mut [0; 8]).is_err());
    }
}
