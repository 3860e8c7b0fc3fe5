//! Random changes of a map beside the same changes of a plain vector of bytes.

use std::ops::Range;

use proptest::prelude::*;

use super::{GIB, LEAF_BYTES, Memory};
use crate::{
    ids::ChunkId,
    map::{Map, diff},
    testing::{Seeded, noise},
};

/// The space is too long for a vector, so the vector has these windows of it: the borders of leaves and of inner
/// nodes of each height, where a mistake would be.
const WINDOWS: [u64; 4] = [0, LEAF_BYTES - WINDOW / 2, GIB - WINDOW / 2, 256 * GIB - WINDOW / 2];
const WINDOW: u64 = 96 << 10;
const CHUNKS: usize = 6;
const CHUNK_BYTES: usize = 40 << 10;

#[derive(Clone, Debug)]
enum Op {
    Set { at: usize, length: usize, chunk: usize, offset: usize },
    Clear { from: usize, to: usize },
    Resize { sectors: usize },
    Finish,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let places = WINDOWS.len() * usize::try_from(WINDOW).unwrap();
    let at = 0..places;
    let op = prop_oneof![
        // Blocks as a disk writes them, and bytes as a cutter of contents leaves them.
        6 => (at.clone(), 1..5_usize, 0..CHUNKS, 0..5_usize).prop_map(|(at, length, chunk, offset)| Op::Set {
            at: at / 4096 * 4096,
            length: length * 4096,
            chunk,
            offset: offset * 4096,
        }),
        4 => (at.clone(), 1..20_000_usize, 0..CHUNKS, 0..20_000_usize)
            .prop_map(|(at, length, chunk, offset)| Op::Set { at, length, chunk, offset }),
        3 => (at.clone(), at).prop_map(|(from, to)| Op::Clear { from: from.min(to), to: from.max(to) }),
        1 => (0..places / 512).prop_map(|sectors| Op::Resize { sectors }),
        2 => Just(Op::Finish),
    ];
    proptest::collection::vec(op, 1..60)
}

/// The address of a place in the vector.
fn address(place: usize) -> u64 {
    let place = place as u64;
    WINDOWS[usize::try_from(place / WINDOW).unwrap().min(WINDOWS.len() - 1)] + place % WINDOW
}

fn windows() -> impl Iterator<Item = (Range<usize>, Range<u64>)> {
    WINDOWS.into_iter().enumerate().map(|(index, start)| {
        let width = usize::try_from(WINDOW).unwrap();
        (index * width..(index + 1) * width, start..start + WINDOW)
    })
}

/// What a map says of the windows: the chunk's number and the offset in it, plus one; 0 for zeros.
fn targets(memory: &Memory, map: &Map, chunks: &[(ChunkId, Vec<u8>)]) -> Vec<u64> {
    let mut targets = vec![0; WINDOWS.len() * usize::try_from(WINDOW).unwrap()];
    let mut mapped = 0;
    for (places, addresses) in windows() {
        let end = addresses.end.min(map.length()).max(addresses.start.min(map.length()));
        let start = addresses.start.min(end);
        let mut expected = start;
        for piece in map.lookup(memory, start..end).unwrap() {
            assert_eq!(piece.range.start, expected, "no gap, no overlap");
            expected = piece.range.end;
            let Some((id, offset)) = piece.source else { continue };
            let number = chunks.iter().position(|(known, _)| *known == id).unwrap() as u64;
            mapped += piece.range.end - piece.range.start;
            for address in piece.range.clone() {
                let place = places.start + usize::try_from(address - addresses.start).unwrap();
                targets[place] = 1 + (number << 32) + u64::from(offset) + address - piece.range.start;
            }
        }
        assert_eq!(expected, end);
    }
    let everywhere = map.lookup(memory, 0..map.length()).unwrap();
    let all: u64 =
        everywhere.iter().filter(|piece| piece.source.is_some()).map(|piece| piece.range.end - piece.range.start).sum();
    assert_eq!(all, mapped, "nothing stands outside the windows");
    targets
}

fn contents(targets: &[u64], chunks: &[(ChunkId, Vec<u8>)]) -> Vec<u8> {
    let byte = |target: u64| {
        let (number, offset) = ((target - 1) >> 32, (target - 1) & 0xffff_ffff);
        chunks[usize::try_from(number).unwrap()].1[usize::try_from(offset).unwrap()]
    };
    targets.iter().map(|target| if *target == 0 { 0 } else { byte(*target) }).collect()
}

/// The same map made anew: its pieces, cut and shuffled, set in one edit or in several.
fn rebuilt(memory: &mut Memory, map: &Map, seeded: &mut Seeded) -> Map {
    let mut parts = Vec::new();
    for piece in map.lookup(memory, 0..map.length()).unwrap() {
        let Some((chunk, offset)) = piece.source else { continue };
        let mut at = piece.range.start;
        while at < piece.range.end {
            let end = (at + 512 + seeded.below(9000) as u64).min(piece.range.end);
            parts.push((at..end, chunk, offset + u32::try_from(at - piece.range.start).unwrap()));
            at = end;
        }
    }
    for index in (1..parts.len()).rev() {
        parts.swap(index, seeded.below(index + 1));
    }
    let mut edit = Map::empty(map.length()).unwrap().edit();
    for (range, chunk, offset) in parts {
        edit.set(range, chunk, offset).unwrap();
        if seeded.below(20) == 0 {
            edit = memory.finish(edit).0.edit();
        }
    }
    memory.finish(edit).0
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_map_is_a_vector_of_bytes(ops in ops(), seed in any::<u64>()) {
        let chunks: Vec<(ChunkId, Vec<u8>)> = (0..CHUNKS as u64)
            .map(|number| noise(number + 1, CHUNK_BYTES))
            .map(|bytes| (ChunkId::of(&bytes), bytes))
            .collect();
        let mut memory = Memory::default();
        let mut seeded = Seeded::new(seed);
        let mut plain = vec![0; WINDOWS.len() * usize::try_from(WINDOW).unwrap()];
        let (mut stored, _) = memory.finish(Map::empty(address(plain.len())).unwrap().edit());
        let mut stored_targets = targets(&memory, &stored, &chunks);
        let mut edit = stored.edit();
        for op in ops.into_iter().chain([Op::Finish]) {
            match op {
                Op::Set { at, length, chunk, offset } => {
                    // Not over the end of a window, of the chunk or of the space.
                    let window = usize::try_from(WINDOW).unwrap();
                    let end = (at + length).min((at / window + 1) * window).min(at + CHUNK_BYTES - offset);
                    let range = address(at)..address(at) + (end - at) as u64;
                    if range.end > edit.length() {
                        prop_assert!(edit.set(range, chunks[chunk].0, u32::try_from(offset).unwrap()).is_err());
                    } else {
                        edit.set(range, chunks[chunk].0, u32::try_from(offset).unwrap()).unwrap();
                        plain[at..end].copy_from_slice(&chunks[chunk].1[offset..offset + end - at]);
                    }
                }
                Op::Clear { from, to } => {
                    let range = address(from).min(edit.length())..address(to).min(edit.length());
                    edit.clear(range).unwrap();
                    plain[from..to].fill(0);
                }
                Op::Resize { sectors } => {
                    let length = address(sectors * 512);
                    edit.resize(length).unwrap();
                    plain[sectors * 512..].fill(0);
                }
                Op::Finish => {
                    let (map, _) = memory.finish(edit);
                    let now = targets(&memory, &map, &chunks);
                    prop_assert!(contents(&now, &chunks) == plain, "other bytes");

                    let ranges = diff(&memory, &stored, &map).unwrap();
                    prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
                    prop_assert_eq!(&ranges, &diff(&memory, &map, &stored).unwrap());
                    let shorter = map.length().min(stored.length());
                    let longer = map.length().max(stored.length());
                    for place in 0..plain.len() {
                        let at = address(place);
                        let differs = stored_targets[place] != now[place] || (shorter..longer).contains(&at);
                        let first = ranges.partition_point(|range| range.end <= at);
                        let told = ranges.get(first).is_some_and(|range| range.contains(&at));
                        prop_assert_eq!(differs, told, "address {}", at);
                    }
                    prop_assert_eq!(rebuilt(&mut memory, &map, &mut seeded), map);
                    (stored, stored_targets) = (map, now);
                    edit = map.edit();
                }
            }
        }
    }
}
