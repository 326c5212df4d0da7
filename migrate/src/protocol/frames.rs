//! How images travel: a stream of named files with an end mark that makes a cut-off stream visible.
//!
//! ```text
//! stream = magic "DRV2"  piece*  file*  end
//! piece  = 0xffff: u16  name_len: u16 (1..=255)  extents: u16 (1..)  data_len: u32 (..=1 MiB)  packed_len: u32
//!          name  (offset: u64  len: u32)*  packed data
//! file   = name_len: u16 (1..=255)  name  data_len: u64  data
//! end    = 0: u16  files: u32  bytes: u64      (big endian; pieces and files, and the bytes of their data only)
//! ```
//!
//! A piece is written over what is at its places in a file of what goes ahead of the images. Its data are packed (zstd)
//! if packed_len is less than data_len. The decoder is incremental and holds at most one header or piece: files' data
//! are handed on as they come.

use bytes::{Buf, Bytes, BytesMut};

/// First bytes of every stream.
const MAGIC: &[u8; 4] = b"DRV2";
/// Size of the end mark in bytes.
const END_LEN: usize = 2 + 4 + 8;
/// What a piece begins with, where a file has the length of its name.
const PIECE_MARK: [u8; 2] = [0xff; 2];
/// Size of the part of a piece that says how large it is.
const PIECE_HEAD_LEN: usize = 2 + 2 + 2 + 4 + 4;
const EXTENT_LEN: usize = 8 + 4;
/// The most that a piece holds.
pub const PIECE_BYTES: usize = 1 << 20;
/// No task has as much memory, so no file ends behind this.
const MOST_OFFSET: u64 = 1 << 47;
/// Fast enough to keep up with a link of some gigabits.
const PACKING_LEVEL: i32 = 1;

/// Why a stream cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not our stream.
    #[error("the image stream does not begin with DRV2: the sender is no Drover agent of this version")]
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
    /// A piece that makes no sense.
    #[error("the image stream has a piece of memory that makes no sense: {0}")]
    Piece(&'static str),
    /// Bytes follow the end mark.
    #[error("the image stream goes on after its end mark")]
    Trailing,
}

/// What the decoder makes of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// Something of what goes ahead of the images.
    Piece {
        /// A plain file name.
        name: String,
        /// Where each part of the data belongs in the file, and how long it is; together they are as long as the data.
        extents: Vec<(u64, u32)>,
        /// Unpacked.
        data: Vec<u8>,
    },
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
        /// Files and pieces in the stream.
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

    /// A piece: parts of a file's data, with the places where they belong. `pack`: the link is slower than packing.
    pub fn piece(
        &mut self,
        name: &str,
        extents: &[(u64, u32)],
        data: &[u8],
        pack: bool,
    ) -> Result<Bytes, FrameError> {
        check_name(name)?;
        check_extents(extents, data.len())?;
        let small = |len: usize| u16::try_from(len).map_err(|_| FrameError::Piece("it has too many parts"));
        let packed = pack.then(|| zstd::bulk::compress(data, PACKING_LEVEL).ok()).flatten();
        // One of the same length would be taken for one that is not packed.
        let packed = packed.as_deref().filter(|packed| packed.len() < data.len()).unwrap_or(data);
        let lengths = [data.len(), packed.len()].map(|len| u32::try_from(len).expect("it was checked"));
        let whole = PIECE_HEAD_LEN + name.len() + extents.len() * EXTENT_LEN + packed.len();
        let mut piece = Vec::with_capacity(whole);
        piece.extend_from_slice(&PIECE_MARK);
        piece.extend_from_slice(&small(name.len())?.to_be_bytes());
        piece.extend_from_slice(&small(extents.len())?.to_be_bytes());
        lengths.iter().for_each(|len| piece.extend_from_slice(&len.to_be_bytes()));
        piece.extend_from_slice(name.as_bytes());
        for (offset, len) in extents {
            piece.extend_from_slice(&offset.to_be_bytes());
            piece.extend_from_slice(&len.to_be_bytes());
        }
        piece.extend_from_slice(packed);
        self.files += 1;
        self.bytes += data.len() as u64;
        Ok(piece.into())
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
                    let Some(need) = self.missing()? else {
                        let is_piece =
                            matches!(self.expect, Expect::Header) && self.buffer.starts_with(&PIECE_MARK);
                        let item = if is_piece { Some(self.piece()?) } else { self.header()? };
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

    /// How many bytes the header or piece under way still lacks; `None` when it is complete.
    fn missing(&self) -> Result<Option<usize>, FrameError> {
        let whole = match self.expect {
            Expect::Magic => MAGIC.len(),
            _ => match self.buffer.first_chunk::<2>() {
                None => 2,
                Some([0, 0]) => END_LEN,
                Some(&PIECE_MARK) => match self.buffer.first_chunk() {
                    None => PIECE_HEAD_LEN,
                    Some(head) => PIECE_HEAD_LEN + PieceHead::read(head)?.rest(),
                },
                Some(len) => 2 + usize::from(u16::from_be_bytes(*len)) + 8,
            },
        };
        Ok((self.buffer.len() < whole).then(|| whole - self.buffer.len()))
    }

    /// Reads the complete piece in the buffer.
    fn piece(&mut self) -> Result<Item, FrameError> {
        let cut = FrameError::Piece("it is cut off");
        let head = PieceHead::read(self.buffer.first_chunk().ok_or(cut)?)?;
        self.buffer.advance(PIECE_HEAD_LEN);
        let name = String::from_utf8_lossy(&self.buffer.split_to(head.name_len)).into_owned();
        check_name(&name)?;
        let extents =
            (0..head.extents).map(|_| (self.buffer.get_u64(), self.buffer.get_u32())).collect::<Vec<_>>();
        check_extents(&extents, head.data_len)?;
        let packed = self.buffer.split();
        let data = if packed.len() == head.data_len {
            packed.to_vec()
        } else {
            // Never more than was announced.
            zstd::bulk::decompress(&packed, head.data_len)
                .map_err(|_| FrameError::Piece("it cannot be unpacked"))?
        };
        if data.len() != head.data_len {
            return Err(FrameError::Piece("it has another length than it says"));
        }
        self.files += 1;
        self.bytes += data.len() as u64;
        Ok(Item::Piece { name, extents, data })
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

/// How large the parts of a piece are.
struct PieceHead {
    name_len: usize,
    extents: usize,
    data_len: usize,
    packed_len: usize,
}

impl PieceHead {
    fn read(head: &[u8; PIECE_HEAD_LEN]) -> Result<Self, FrameError> {
        let mut head = &head[PIECE_MARK.len()..];
        let (name_len, extents) = (head.get_u16(), head.get_u16());
        let (data_len, packed_len) = (head.get_u32() as usize, head.get_u32() as usize);
        if name_len > 255 || data_len > PIECE_BYTES || packed_len > data_len {
            return Err(FrameError::Piece("it is too large"));
        }
        Ok(Self { name_len: name_len.into(), extents: extents.into(), data_len, packed_len })
    }

    /// How much follows.
    fn rest(&self) -> usize {
        self.name_len + self.extents * EXTENT_LEN + self.packed_len
    }
}

fn check_extents(extents: &[(u64, u32)], len: usize) -> Result<(), FrameError> {
    let all: u64 = extents.iter().map(|(_, len)| u64::from(*len)).sum();
    let fits =
        |(offset, len): &(u64, u32)| offset.checked_add((*len).into()).is_some_and(|end| end <= MOST_OFFSET);
    if all != len as u64 || len > PIECE_BYTES || extents.is_empty() || !extents.iter().all(fits) {
        return Err(FrameError::Piece("its parts do not fit it"));
    }
    Ok(())
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
    /// Name, places, data.
    type Piece = (String, Vec<(u64, u32)>, Vec<u8>);

    fn decode_pieces(stream: &[u8], chunk: usize) -> Result<Vec<Piece>, FrameError> {
        let (mut decoder, mut pieces) = (Decoder::default(), Vec::new());
        for part in stream.chunks(chunk.max(1)) {
            decoder.push(Bytes::copy_from_slice(part), |item| {
                if let Item::Piece { name, extents, data } = item {
                    pieces.push((name, extents, data));
                }
                Ok::<(), FrameError>(())
            })?;
        }
        decoder.finish()?;
        Ok(pieces)
    }

    fn encode_pieces(pieces: &[Piece], pack: bool) -> Vec<u8> {
        let mut encoder = Encoder::default();
        let mut stream = Encoder::start().to_vec();
        for (name, extents, data) in pieces {
            stream.extend_from_slice(&encoder.piece(name, extents, data, pack).unwrap());
        }
        stream.extend_from_slice(&encoder.file("core-1.img", 3).unwrap());
        stream.extend_from_slice(b"abc");
        stream.extend_from_slice(&encoder.end());
        stream
    }

    fn some_pieces() -> impl Strategy<Value = Vec<Piece>> {
        let part = (0..MOST_OFFSET - 300, prop::collection::vec(0_u8..3, 0..300));
        let piece = ("[a-z]{1,20}\\.img", prop::collection::vec(part, 1..5)).prop_map(|(name, parts)| {
            let extents = parts.iter().map(|(offset, data)| (*offset, data.len() as u32)).collect();
            (name, extents, parts.into_iter().flat_map(|(_, data)| data).collect())
        });
        prop::collection::vec(piece, 0..6)
    }

    fn decode(stream: &[u8], chunk: usize) -> Result<(Files, bool), FrameError> {
        let mut decoder = Decoder::default();
        let (mut files, mut ended) = (Files::new(), false);
        for part in stream.chunks(chunk.max(1)) {
            decoder.push(Bytes::copy_from_slice(part), |item| {
                match item {
                    Item::File { name, .. } => files.push((name, Vec::new())),
                    Item::Data(data) => files.last_mut().unwrap().1.extend_from_slice(&data),
                    Item::End { .. } => ended = true,
                    Item::Piece { .. } => {}
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
        fn pieces_come_out_as_they_went_in(pieces in some_pieces(), pack: bool, chunk in 1usize..400) {
            prop_assert_eq!(decode_pieces(&encode_pieces(&pieces, pack), chunk), Ok(pieces));
        }

        #[test]
        fn every_truncation_of_pieces_is_seen(
            pieces in some_pieces(), pack: bool, chunk in 1usize..400, cut in any::<prop::sample::Index>()
        ) {
            let stream = encode_pieces(&pieces, pack);
            let seen = decode_pieces(&stream[..cut.index(stream.len())], chunk);
            prop_assert!(matches!(seen, Err(FrameError::Truncated { .. })), "{:?}", seen);
        }

        #[test]
        fn altered_pieces_never_panic(
            pieces in some_pieces(), pack: bool, at in any::<prop::sample::Index>(), to: u8
        ) {
            let mut stream = encode_pieces(&pieces, pack);
            let at = at.index(stream.len());
            stream[at] = to;
            if let Ok(pieces) = decode_pieces(&stream, 99) {
                prop_assert!(pieces.iter().all(|(_, _, data)| data.len() <= PIECE_BYTES));
            }
        }

        #[test]
        fn noise_never_panics(noise in prop::collection::vec(any::<u8>(), 0..500), chunk in 1usize..64) {
            let mut stream = MAGIC.to_vec();
            stream.extend_from_slice(&noise);
            let _ = decode(&stream, chunk);
        }
    }

    #[test]
    fn pieces_that_make_no_sense_are_refused() {
        let whole = Encoder::default().piece("a", &[(0, 4000)], &[1; 4000], true).unwrap().to_vec();
        assert!(whole.len() < 100, "it is packed");
        let refused = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut piece = [&MAGIC[..], &whole[..]].concat();
            change(&mut piece);
            matches!(decode_pieces(&piece, 9), Err(FrameError::Piece(_) | FrameError::Name(_)))
        };
        let head = MAGIC.len() + 2;
        assert!(!refused(&|_| ()), "it is only cut off");
        assert!(refused(&|piece| piece[head] = 1), "a long name");
        assert!(
            refused(&|piece| piece[head + 4..][..4].copy_from_slice(&u32::MAX.to_be_bytes())),
            "much data"
        );
        assert!(
            refused(&|piece| piece[head + 4..][..4].copy_from_slice(&3999_u32.to_be_bytes())),
            "less data"
        );
        assert!(
            refused(&|piece| piece[head + 8..][..4].copy_from_slice(&4001_u32.to_be_bytes())),
            "grown by packing"
        );
        assert!(refused(&|piece| piece[head + 12] = b'/'), "another folder");
        assert!(refused(&|piece| piece[head + 13] = 0xff), "far behind");
        assert!(refused(&|piece| piece[head + 13 + 12] ^= 0xff), "not packed like this");
        // It unpacks to more, and to less, than it says.
        for len in [3000_u32, 5000] {
            let change = |piece: &mut Vec<u8>| {
                piece[head + 4..][..4].copy_from_slice(&len.to_be_bytes());
                piece[head + 13 + 8..][..4].copy_from_slice(&len.to_be_bytes());
            };
            assert!(refused(&change), "{len}");
        }
        let mut encoder = Encoder::default();
        assert!(encoder.piece("a", &[], &[], false).is_err());
        assert!(encoder.piece("a", &[(0, 1)], &[1, 2], false).is_err());
        assert!(
            encoder.piece("a", &[(0, PIECE_BYTES as u32 + 1)], &vec![0; PIECE_BYTES + 1], false).is_err()
        );
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
