//! Hash maps of up to millions of elements, read in chunks: a system call for thousands of elements instead of two
//! for each.

use std::io::{self, ErrorKind};
use std::marker::PhantomData;
use std::os::fd::{AsFd as _, BorrowedFd};

use aya::maps::MapData;

use super::bpf::{self, Batch};
use super::records::Record;

/// A hash (or array) map with keys and values of known types.
pub struct BatchMap<K, V> {
    data: MapData,
    most: u32,
    elements: PhantomData<fn(K) -> V>,
}

impl<K: Record, V: Record> BatchMap<K, V> {
    /// Takes a map whose keys and values are as large as `K` and `V`.
    pub fn new(data: MapData) -> io::Result<Self> {
        let info = data.info().map_err(io::Error::other)?;
        let sizes = (info.key_size() as usize, info.value_size() as usize);
        if sizes != (size_of::<K>(), size_of::<V>()) {
            let expected = (size_of::<K>(), size_of::<V>());
            let text = format!("keys and values have {sizes:?} bytes instead of {expected:?}");
            return Err(io::Error::new(ErrorKind::InvalidData, text));
        }
        Ok(Self { most: info.max_entries(), data, elements: PhantomData })
    }

    /// Elements that it has room for.
    pub fn most(&self) -> u32 {
        self.most
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.data.fd().as_fd()
    }

    /// Reads all elements, about `chunk` at a time. What comes and goes meanwhile is seen or not.
    pub fn chunks(&self, chunk: usize) -> Chunks<'_, K, V> {
        Chunks {
            map: self.fd(),
            position: Position::Start,
            keys: Vec::with_capacity(chunk),
            values: Vec::with_capacity(chunk),
        }
    }

    /// The value of a key.
    pub fn get(&self, key: &K) -> io::Result<Option<V>> {
        bpf::lookup(self.fd(), key)
    }

    /// Writes an element.
    pub fn put(&self, key: &K, value: &V) -> io::Result<()> {
        bpf::update(self.fd(), key, value)
    }

    /// Deletes the elements of these keys; how many of them there were.
    pub fn delete(&self, keys: &[K]) -> io::Result<usize> {
        bpf::delete_batch(self.fd(), keys)
    }
}

/// Tests make their own maps.
#[cfg(test)]
impl<K: Record, V: Record> BatchMap<K, V> {
    /// Makes a map.
    pub fn create(kind: u32, most: u32) -> io::Result<Self> {
        Self::new(MapData::from_fd(bpf::create_map::<K, V>(kind, most)?).map_err(io::Error::other)?)
    }
}

enum Position {
    Start,
    At(u32),
    End,
}

/// Reads a map chunk by chunk.
pub struct Chunks<'m, K, V> {
    map: BorrowedFd<'m>,
    position: Position,
    keys: Vec<K>,
    values: Vec<V>,
}

impl<K: Record, V: Record> Chunks<'_, K, V> {
    /// The next elements, in the map's own order; `None` after the last ones. A chunk may be empty.
    pub fn next_chunk(&mut self) -> io::Result<Option<impl ExactSizeIterator<Item = (&K, &V)>>> {
        let from = match self.position {
            Position::Start => None,
            Position::At(position) => Some(position),
            Position::End => return Ok(None),
        };
        loop {
            match bpf::lookup_batch(self.map, from, &mut self.keys, &mut self.values)? {
                Batch::More(position) => self.position = Position::At(position),
                Batch::End => self.position = Position::End,
                Batch::TooSmall => {
                    let larger = 2 * self.keys.capacity().max(8);
                    self.keys.reserve(larger);
                    self.values.reserve(larger);
                    continue;
                }
            }
            return Ok(Some(self.keys.iter().zip(&self.values)));
        }
    }
}

#[cfg(test)]
#[path = "batch_tests.rs"]
mod with_root;
