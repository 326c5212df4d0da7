//! Tables of names: which number is whose.

use std::io;

use aya::maps::{Array, MapData};

use crate::datapath::DatapathError;
use crate::datapath::xdp::batch::BatchMap;
use crate::datapath::xdp::program::kernel;

const NAME: usize = 64;
/// Names read with one system call.
const CHUNK: usize = 4096;

/// A table of names; a number whose name is all zeroes is free.
pub struct Names {
    array: Array<MapData, [u8; NAME]>,
    all: BatchMap<u32, [u8; NAME]>,
}

impl Names {
    /// Takes two handles on the same map.
    pub fn new(array: Array<MapData, [u8; NAME]>, same: MapData) -> io::Result<Self> {
        Ok(Self { array, all: BatchMap::new(same)? })
    }

    /// How many names it takes.
    pub fn most(&self) -> u32 {
        self.all.most()
    }

    /// Every name with its number.
    pub fn read(&self) -> Result<Vec<(String, u32)>, DatapathError> {
        let mut found = Vec::new();
        let mut chunks = self.all.chunks(CHUNK);
        while let Some(chunk) = chunks.next_chunk().map_err(kernel("reading the names"))? {
            for (number, bytes) in chunk {
                let length = bytes.iter().position(|byte| *byte == 0).unwrap_or(NAME);
                if length > 0 {
                    found.push((String::from_utf8_lossy(&bytes[..length]).into_owned(), *number));
                }
            }
        }
        Ok(found)
    }

    /// Writes a number's name.
    pub fn set(&mut self, number: u32, name: [u8; NAME]) -> Result<(), DatapathError> {
        self.array.set(number, name, 0).map_err(kernel("writing a name"))
    }

    /// Frees a number.
    pub fn clear(&mut self, number: u32) -> Result<(), DatapathError> {
        self.set(number, [0; NAME])
    }
}

/// A name as its table has it; configurations have none that is longer.
pub fn name_bytes(name: &str) -> [u8; NAME] {
    let mut bytes = [0; NAME];
    let length = name.len().min(NAME);
    bytes[..length].copy_from_slice(&name.as_bytes()[..length]);
    bytes
}
