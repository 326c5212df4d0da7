//! How images travel: a stream of named files with an end mark that makes a cut-off stream visible.
//!
//! ```text
//! stream = magic "DRV1"  file*  end
//! file   = name_len: u16 (1..=255)  name  data_len: u64  data
//! end    = 0: u16  files: u32  bytes: u64          (big endian; bytes counts the data only)
//! ```
//!
//! The decoder is incremental and holds at most one header: data is handed on as it comes.

use bytes::{Buf, Bytes, BytesMut};

/// First bytes of every stream.
const MAGIC: &[u8; 4] = b"DRV1";
/// Size of the end mark in bytes.
const END_LEN: usize = 2 + 4 + 8;

/// Why a stream cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not our stream.
    #[error("the image stream does not begin with DRV1: the sender is no Drover agent of this version")]
    Magic,
    /// A name that could leave the images' folder, or is no name.
    #[error("the image stream names a file {0:?}, which is not a plain file name")]
    Name(String),
    /// The end mark disagrees with what came.
    #[error(
        "the image stream announced {announced_files} files and {announced_bytes} bytes, but carried {files} and {bytes}"
    )]
    Count {
        /// Files by the end mark.
        announced_files: u32,
        /// Bytes by the end mark.
        announced_bytes: u64,
        /// Files that came.
        files: u32,
        /// Bytes that came.
        bytes: u64,
    },
    /// The stream ended before its end mark.
    #[error(
        "the image stream broke off after {files} files and {bytes} bytes: the source or the network went away"
    )]
    Truncated {
        /// Files that came whole.
        files: u32,
        /// Bytes of data that came.
        bytes: u64,
    },
    /// Bytes follow the end mark.
    #[error("the image stream goes on after its end mark")]
    Trailing,
}

/// What the decoder makes of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// A file begins; `Data` follows until `len` bytes have come.
    File {
        /// A plain file name.
        name: String,
        /// Bytes of its data.
        len: u64,
    },
    /// The next bytes of the current file; never empty.
    Data(Bytes),
    /// The end mark: everything that was sent has come.
    End {
        /// Files in the stream.
        files: u32,
        /// Bytes of data in the stream.
        bytes: u64,
    },
}

/// Counts what is sent, so that the end mark is right by construction.
#[derive(Debug, Default)]
pub struct Encoder {
    files: u32,
    bytes: u64,
}

impl Encoder {
    /// The stream's first bytes.
    pub fn start() -> Bytes {
        Bytes::from_static(MAGIC)
    }

    /// The header of a file of `len` bytes; the caller sends exactly that many bytes of data after it.
    pub fn file(&mut self, name: &str, len: u64) -> Result<Bytes, FrameError> {
        check_name(name)?;
        let name_len = u16::try_from(name.len()).map_err(|_| FrameError::Name(name.into()))?;
        let mut header = Vec::with_capacity(2 + name.len() + 8);
        header.extend_from_slice(&name_len.to_be_bytes());
        header.extend_from_slice(name.as_bytes());
        header.extend_from_slice(&len.to_be_bytes());
        self.files += 1;
        self.bytes += len;
        Ok(header.into())
    }

    /// The end mark.
    pub fn end(self) -> Bytes {
        let mut mark = Vec::with_capacity(END_LEN);
        mark.extend_from_slice(&0u16.to_be_bytes());
        mark.extend_from_slice(&self.files.to_be_bytes());
        mark.extend_from_slice(&self.bytes.to_be_bytes());
        mark.into()
    }
}

#[derive(Debug)]
enum Expect {
    Magic,
    Header,
    Data { left: u64 },
    Nothing,
}

/// Takes bytes as they come and gives [`Item`]s.
#[derive(Debug)]
pub struct Decoder {
    buffer: BytesMut,
    expect: Expect,
    files: u32,
    bytes: u64,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { buffer: BytesMut::new(), expect: Expect::Magic, files: 0, bytes: 0 }
    }
}

impl Decoder {
    /// Takes the next bytes and passes every item that they complete to `out`, in order.
    pub fn push<E: From<FrameError>>(
        &mut self,
        mut chunk: Bytes,
        mut out: impl FnMut(Item) -> Result<(), E>,
    ) -> Result<(), E> {
        loop {
            match &mut self.expect {
                Expect::Data { left: 0 } => {
                    self.files += 1;
                    self.expect = Expect::Header;
                }
                Expect::Data { left } => {
                    // Data goes through without a copy; only headers are gathered.
                    if chunk.is_empty() {
                        return Ok(());
                    }
                    let take = usize::try_from(*left).unwrap_or(usize::MAX).min(chunk.len());
                    let data = chunk.split_to(take);
                    *left -= take as u64;
                    self.bytes += take as u64;
                    out(Item::Data(data))?;
                }
                Expect::Nothing => {
                    return if chunk.is_empty() { Ok(()) } else { Err(FrameError::Trailing.into()) };
                }
                Expect::Magic | Expect::Header => {
                    let Some(need) = self.missing() else {
                        let item = self.header()?;
                        if let Some(item) = item {
                            out(item)?;
                        }
                        continue;
                    };
                    if chunk.is_empty() {
                        return Ok(());
                    }
                    let take = need.min(chunk.len());
                    self.buffer.extend_from_slice(&chunk.split_to(take));
                }
            }
        }
    }

    /// Says whether the stream may end here.
    pub fn finish(&self) -> Result<(), FrameError> {
        match self.expect {
            Expect::Nothing => Ok(()),
            _ => Err(FrameError::Truncated { files: self.files, bytes: self.bytes }),
        }
    }

    /// How many bytes the header under way still lacks; `None` when it is complete.
    fn missing(&self) -> Option<usize> {
        let whole = match self.expect {
            Expect::Magic => MAGIC.len(),
            _ => match self.buffer.first_chunk::<2>() {
                None => 2,
                Some([0, 0]) => END_LEN,
                Some(len) => 2 + usize::from(u16::from_be_bytes(*len)) + 8,
            },
        };
        (self.buffer.len() < whole).then(|| whole - self.buffer.len())
    }

    /// Reads the complete header in the buffer.
    fn header(&mut self) -> Result<Option<Item>, FrameError> {
        if matches!(self.expect, Expect::Magic) {
            if self.buffer[..] != MAGIC[..] {
                return Err(FrameError::Magic);
            }
            self.buffer.clear();
            self.expect = Expect::Header;
            return Ok(None);
        }
        let name_len = usize::from(self.buffer.get_u16());
        if name_len == 0 {
            let announced_files = self.buffer.get_u32();
            let announced_bytes = self.buffer.get_u64();
            let (files, bytes) = (self.files, self.bytes);
            if (announced_files, announced_bytes) != (files, bytes) {
                return Err(FrameError::Count { announced_files, announced_bytes, files, bytes });
            }
            self.expect = Expect::Nothing;
            return Ok(Some(Item::End { files, bytes }));
        }
        let name = String::from_utf8_lossy(&self.buffer.split_to(name_len)).into_owned();
        check_name(&name)?;
        let len = self.buffer.get_u64();
        self.expect = Expect::Data { left: len };
        Ok(Some(Item::File { name, len }))
    }
}

fn check_name(name: &str) -> Result<(), FrameError> {
    let plain = (1..=255).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b'\\');
    if plain { Ok(()) } else { Err(FrameError::Name(name.into())) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encode(files: &[(String, Vec<u8>)]) -> Vec<u8> {
        let mut encoder = Encoder::default();
        let mut stream = Encoder::start().to_vec();
        for (name, data) in files {
            stream.extend_from_slice(&encoder.file(name, data.len() as u64).unwrap());
            stream.extend_from_slice(data);
        }
        stream.extend_from_slice(&encoder.end());
        stream
    }

    type Files = Vec<(String, Vec<u8>)>;

    fn decode(stream: &[u8], chunk: usize) -> Result<(Files, bool), FrameError> {
        let mut decoder = Decoder::default();
        let (mut files, mut ended) = (Files::new(), false);
        for part in stream.chunks(chunk.max(1)) {
            decoder.push(Bytes::copy_from_slice(part), |item| {
                match item {
                    Item::File { name, .. } => files.push((name, Vec::new())),
                    Item::Data(data) => files.last_mut().unwrap().1.extend_from_slice(&data),
                    Item::End { .. } => ended = true,
                }
                Ok::<(), FrameError>(())
            })?;
        }
        decoder.finish()?;
        Ok((files, ended))
    }

    fn some_files() -> impl Strategy<Value = Files> {
        prop::collection::vec(
            ("[a-z][a-z0-9-]{0,20}\\.img", prop::collection::vec(any::<u8>(), 0..300)),
            0..8,
        )
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out(files in some_files(), chunk in 1usize..400) {
            prop_assert_eq!(decode(&encode(&files), chunk), Ok((files, true)));
        }

        #[test]
        fn every_truncation_is_seen(files in some_files(), chunk in 1usize..400, cut in any::<prop::sample::Index>()) {
            let stream = encode(&files);
            let cut = cut.index(stream.len());
            let seen = decode(&stream[..cut], chunk);
            prop_assert!(matches!(seen, Err(FrameError::Truncated { .. })), "{:?}", seen);
        }

        #[test]
        fn noise_never_panics(noise in prop::collection::vec(any::<u8>(), 0..500), chunk in 1usize..64) {
            let mut stream = MAGIC.to_vec();
            stream.extend_from_slice(&noise);
            let _ = decode(&stream, chunk);
        }
    }

    #[test]
    fn bad_streams_have_their_own_errors() {
        assert_eq!(decode(b"HTTP", 9), Err(FrameError::Magic));
        let mut trailing = encode(&[("a".into(), vec![1])]);
        trailing.push(0);
        assert_eq!(decode(&trailing, 99), Err(FrameError::Trailing));
        let mut miscounted = encode(&[("a".into(), vec![1])]);
        *miscounted.last_mut().unwrap() = 2;
        assert!(matches!(decode(&miscounted, 99), Err(FrameError::Count { .. })));
        for name in ["../x", "a/b", ".", "", "a\nb"] {
            assert!(Encoder::default().file(name, 0).is_err(), "{name:?}");
        }
        let mut escape = MAGIC.to_vec();
        escape.extend_from_slice(&4u16.to_be_bytes());
        escape.extend_from_slice(b"../x");
        escape.extend_from_slice(&0u64.to_be_bytes());
        assert_eq!(decode(&escape, 99), Err(FrameError::Name("../x".into())));
    }
}
