//! Against the kernel's maps. Needs root.

use std::collections::BTreeSet;

use super::*;

fn map(most: u32) -> BatchMap<u32, u64> {
    BatchMap::create(bpf::HASH, most).unwrap()
}

fn read(map: &BatchMap<u32, u64>, chunk: usize) -> (Vec<(u32, u64)>, usize) {
    let mut chunks = map.chunks(chunk);
    let (mut found, mut calls) = (Vec::new(), 0);
    while let Some(chunk) = chunks.next_chunk().unwrap() {
        found.extend(chunk.map(|(key, value)| (*key, *value)));
        calls += 1;
    }
    found.sort_unstable();
    (found, calls)
}

#[test]
fn every_element_is_read_once_in_any_chunks() {
    let map = map(20_000);
    assert_eq!(map.most(), 20_000);
    assert_eq!(read(&map, 100).0, []);
    let all: Vec<(u32, u64)> = (0..10_000).map(|i| (i, u64::from(i) << 33)).collect();
    for (key, value) in &all {
        map.put(key, value).unwrap();
    }
    let (found, calls) = read(&map, 512);
    assert_eq!(found, all);
    assert!((20..=40).contains(&calls), "{calls} calls for 10,000 elements in chunks of 512");
    // Smaller than a bucket: the buffers grow.
    assert_eq!(read(&map, 1).0, all);
    assert_eq!(read(&map, 100_000), (all, 1));
}

#[test]
fn missing_keys_do_not_keep_others_from_being_deleted() {
    let map = map(1000);
    for key in 0..600_u32 {
        map.put(&key, &7).unwrap();
    }
    // There and not there in turn, ending and beginning with missing ones.
    let keys: Vec<u32> = (0..300).flat_map(|key| [key + 5000, key, key + 9000]).collect();
    assert_eq!(map.delete(&keys).unwrap(), 300);
    let left: BTreeSet<u32> = read(&map, 64).0.into_iter().map(|(key, _)| key).collect();
    assert_eq!(left, (300..600).collect());
    assert_eq!(map.delete(&[]).unwrap(), 0);
    assert_eq!(map.get(&299).unwrap(), None);
    assert_eq!(map.get(&300).unwrap(), Some(7));
}

#[test]
fn elements_that_stay_are_read_while_others_come_and_go() {
    let map = map(8192);
    for key in 0..2000_u32 {
        map.put(&key, &1).unwrap();
    }
    let mut chunks = map.chunks(100);
    let mut stayed = BTreeSet::new();
    let mut round = 0;
    while let Some(chunk) = chunks.next_chunk().unwrap() {
        stayed.extend(chunk.map(|(key, _)| *key).filter(|key| *key < 2000));
        for key in 0..50 {
            map.put(&(10_000 + round * 50 + key), &2).unwrap();
        }
        map.delete(&[10_000 + round * 25]).unwrap();
        round += 1;
    }
    assert_eq!(stayed, (0..2000).collect());
}

#[test]
fn a_map_of_other_records_is_refused() {
    let map = bpf::create_map::<u32, u32>(bpf::HASH, 10).unwrap();
    let data = MapData::from_fd(map).unwrap();
    let error = BatchMap::<u32, u64>::new(data).err().unwrap().to_string();
    assert_eq!(error, "keys and values have (4, 4) bytes instead of (4, 8)");
}

#[test]
fn arrays_are_read_in_chunks_too() {
    let map = BatchMap::<u32, u64>::create(bpf::ARRAY, 1000).unwrap();
    for key in 0..1000_u32 {
        map.put(&key, &u64::from(key)).unwrap();
    }
    assert_eq!(read(&map, 64).0, (0..1000).map(|key| (key, u64::from(key))).collect::<Vec<_>>());
}
