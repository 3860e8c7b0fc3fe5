//! The bytes of map nodes, what readers refuse, and maps beside a plain vector of bytes.

mod property;

use std::{
    collections::{HashMap, HashSet},
    sync::atomic::{AtomicUsize, Ordering},
};

use burgeon_api::ErrorKind;

use super::*;
use crate::{
    chunk::{Kind, MOST_CHUNK},
    testing::{Seeded, damage},
};

const GIB: u64 = 1 << 30;

/// Nodes in memory; counts what is read.
#[derive(Default)]
pub(super) struct Memory {
    nodes: HashMap<ChunkId, Bytes>,
    reads: AtomicUsize,
}

impl Nodes for Memory {
    fn get(&self, id: ChunkId) -> Result<Bytes> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.nodes.get(&id).cloned().ok_or_else(|| Error::not_found(format!("there is no {id:?}")))
    }
}

impl Memory {
    pub(super) fn put(&mut self, bytes: Vec<u8>) -> ChunkId {
        let id = ChunkId::of(&bytes);
        self.nodes.insert(id, bytes.into());
        id
    }

    /// Finishes an edit and says how many nodes it made.
    pub(super) fn finish(&mut self, edit: Edit) -> (Map, usize) {
        let mut made = Vec::new();
        let map = edit.finish(self, &mut made).unwrap();
        let count = made.len();
        for (id, bytes) in made {
            assert_eq!(self.put(bytes), id);
        }
        assert_eq!(Map::open(self, map.root()).unwrap(), map);
        (map, count)
    }

    fn reads(&self) -> usize {
        self.reads.load(Ordering::Relaxed)
    }
}

fn chunk(number: u8) -> ChunkId {
    ChunkId::of(&[number])
}

/// A map of `length` bytes with these extents.
fn map_of(memory: &mut Memory, length: u64, sets: &[(Range<u64>, u8, u32)]) -> Map {
    let mut edit = Map::empty(length).unwrap().edit();
    for (range, number, offset) in sets {
        edit.set(range.clone(), chunk(*number), *offset).unwrap();
    }
    memory.finish(edit).0
}

#[test]
fn bytes_of_version_1() {
    let hexadecimal = |node: &Node| node.encode().iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let chunk = ChunkId([0xab; 32]);
    let id = "ab".repeat(32);
    let extent = |offset, length, chunk_offset| Extent { offset, length, chunk, chunk_offset };
    let leaf = Node::Leaf(vec![extent(0x200, 0x1_0000, 0), extent(0x2_0000, 0x400, 0x123)]);
    let expected = ["42676e4c01000000", "02000000"].concat()
        + &["00020000", "00000100", "00000000", &id, "00000200", "00040000", "23010000", &id].concat();
    assert_eq!(hexadecimal(&leaf), expected);
    let inner = Node::Inner { height: 2, children: vec![(0, chunk), (255, chunk)] };
    assert_eq!(hexadecimal(&inner), ["42676e4e01020000", "02000000", "00", &id, "ff", &id].concat());
    let root = Root { length: GIB + 512, child: Some(chunk) };
    assert_eq!(hexadecimal(&Node::Root(root)), ["42676e5401020100", "0002004000000000", &id].concat());
    let zeros = Node::Root(Root { length: 0, child: None });
    assert_eq!(hexadecimal(&zeros), ["42676e5401000000", &"00".repeat(40)].concat());
    for node in [leaf, inner, Node::Root(root), zeros] {
        let bytes = node.encode();
        assert_eq!(Node::decode(ChunkId::of(&bytes), &bytes).unwrap(), node);
    }
}

#[test]
fn the_last_change_wins_and_neighbours_become_one() {
    let mut memory = Memory::default();
    let map = map_of(&mut memory, 16 << 20, &[(0..4096, 1, 0), (4096..8192, 1, 4096), (2048..3072, 2, 100)]);
    let pieces = map.lookup(&memory, 1024..10_000).unwrap();
    let piece = |range, source: Option<(u8, u32)>| Piece { range, source: source.map(|(n, at)| (chunk(n), at)) };
    assert_eq!(
        pieces,
        [
            piece(1024..2048, Some((1, 1024))),
            piece(2048..3072, Some((2, 100))),
            piece(3072..8192, Some((1, 3072))),
            piece(8192..10_000, None),
        ]
    );
    let mut edit = map.edit();
    edit.set(2048..3072, chunk(1), 2048).unwrap();
    let (mended, _) = memory.finish(edit);
    assert_eq!(mended, map_of(&mut memory, 16 << 20, &[(0..8192, 1, 0)]), "one extent, however it was written");
    assert_eq!(map.lookup(&memory, 5..5).unwrap(), []);

    // An extent over a leaf's border is two in the tree and one piece.
    let border = map_of(&mut memory, 16 << 20, &[(LEAF_BYTES - 512..LEAF_BYTES + 512, 3, 7)]);
    let pieces = border.lookup(&memory, LEAF_BYTES - 1024..LEAF_BYTES + 512).unwrap();
    assert_eq!(pieces[1], piece(LEAF_BYTES - 512..LEAF_BYTES + 512, Some((3, 7))));
}

#[test]
fn a_change_touches_one_path_only() {
    let mut memory = Memory::default();
    let sets: Vec<_> = (0..600).map(|leaf: u64| (leaf * LEAF_BYTES..leaf * LEAF_BYTES + 512, 1, 0)).collect();
    let map = map_of(&mut memory, 1 << 40, &sets);
    let at = 300 * LEAF_BYTES..300 * LEAF_BYTES + 512;

    let mut edit = map.edit();
    edit.set(at.clone(), chunk(2), 0).unwrap();
    let before = memory.reads();
    let (changed, made) = memory.finish(edit);
    // `finish` of this test opens the new root once more.
    assert_eq!((memory.reads() - before, made), (4 + 1, 5), "three inner nodes and a leaf; the root is new too");

    let before = memory.reads();
    assert_eq!(diff(&memory, &map, &changed).unwrap(), std::slice::from_ref(&at));
    assert_eq!(memory.reads() - before, 8, "of 600 leaves, the two that differ");

    let mut edit = changed.edit();
    edit.set(at, chunk(1), 0).unwrap();
    assert_eq!(memory.finish(edit), (map, 5), "the first map again");
    let mut edit = map.edit();
    edit.clear(GIB..1 << 40).unwrap();
    edit.clear(512..1024).unwrap();
    assert_eq!(memory.finish(edit.clone()).0, memory.finish(edit).0);
    assert_eq!(memory.finish(map.edit()), (map, 1), "no change, no node but the root");
}

#[test]
fn shared_subtrees_are_visited_once() {
    let mut memory = Memory::default();
    let leaf = |at: u64| at * LEAF_BYTES..at * LEAF_BYTES + 512;
    let map = map_of(&mut memory, 1 << 40, &[(leaf(0), 1, 0), (leaf(1), 1, 0), (leaf(300), 2, 0)]);
    let mut edit = map.edit();
    edit.set(leaf(300), chunk(3), 0).unwrap();
    let (clone, _) = memory.finish(edit);
    let mut seen = HashSet::new();
    let mut visited = Vec::new();
    for root in [map.root(), clone.root()] {
        let mut nodes = 0;
        chunks(&memory, root, &mut |kind, id| {
            nodes += usize::from(kind == Kind::MapNode);
            Ok(seen.insert((kind, id)))
        })
        .unwrap();
        visited.push(nodes);
    }
    // Root, one node of height 3, one of height 2, two of height 1, three leaves of which two are the same.
    assert_eq!(visited, [8, 6], "of the clone's nodes of height 1, the shared one is not entered");
    let data: HashSet<_> = seen.iter().filter(|(kind, _)| *kind == Kind::Data).map(|(_, id)| *id).collect();
    assert_eq!(data, HashSet::from([chunk(1), chunk(2), chunk(3)]));
    let error = chunks(&memory, map.root(), &mut |_, _| Err(Error::internal("enough"))).unwrap_err();
    assert_eq!(error.message, "enough");
}

#[test]
fn lengths_from_nothing_to_the_most() {
    let mut memory = Memory::default();
    for (length, height) in [
        (0, 0),
        (512, 0),
        (LEAF_BYTES, 0),
        (LEAF_BYTES + 512, 1),
        (GIB, 1),
        (GIB + 512, 2),
        (1 << 38, 2),
        (1 << 46, 3),
        (1 << 54, 4),
        (MOST_LENGTH, 5),
    ] {
        let (empty, _) = memory.finish(Map::empty(length).unwrap().edit());
        assert_eq!((empty.length(), height_of(length)), (length, height));
        let zeros = empty.lookup(&memory, 0..length).unwrap();
        assert_eq!(zeros.len(), usize::from(length > 0));
        if length == 0 {
            continue;
        }
        let last = length - 512..length;
        let map = map_of(&mut memory, length, &[(last.clone(), 1, 0)]);
        assert_eq!(
            map.lookup(&memory, last.clone()).unwrap(),
            [Piece { range: last.clone(), source: Some((chunk(1), 0)) }]
        );
        let mut edit = map.edit();
        edit.resize(length - 512).unwrap();
        edit.resize(MOST_LENGTH).unwrap();
        edit.resize(length).unwrap();
        assert_eq!(memory.finish(edit).0, empty, "what was cut off is gone");
        let mut edit = map.edit();
        edit.resize(MOST_LENGTH).unwrap();
        let (grown, _) = memory.finish(edit);
        assert_eq!(
            diff(&memory, &map, &grown).unwrap().first().map(|range| range.start),
            Some(length).filter(|at| *at < MOST_LENGTH)
        );
        let mut edit = grown.edit();
        edit.resize(length).unwrap();
        assert_eq!(memory.finish(edit).0, map, "and back");
    }
    for wrong in [1, 511, MOST_LENGTH + 512, u64::MAX] {
        assert_eq!(Map::empty(wrong).unwrap_err().kind, ErrorKind::Invalid);
    }
}

#[test]
fn what_no_map_can_hold_is_refused() {
    let memory = Memory::default();
    let map = Map::empty(GIB).unwrap();
    let mut edit = map.edit();
    let most = u32::try_from(MOST_CHUNK).unwrap();
    #[expect(clippy::reversed_empty_ranges, reason = "that is what is refused")]
    for (range, offset) in
        [(5..5, 0), (6..5, 0), (GIB..GIB + 1, 0), (0..513, most - 512), (0..u64::from(most) + 1, 0), (0..1, u32::MAX)]
    {
        assert_eq!(edit.set(range, chunk(1), offset).unwrap_err().kind, ErrorKind::Invalid);
    }
    assert_eq!(edit.clear(0..GIB + 1).unwrap_err().kind, ErrorKind::Invalid);
    assert_eq!(edit.resize(1).unwrap_err().kind, ErrorKind::Invalid);
    assert_eq!(map.lookup(&memory, 0..GIB + 1).unwrap_err().kind, ErrorKind::Invalid);
    for at in 0..=MOST_EXTENTS as u64 {
        edit.set(at * 2..at * 2 + 1, chunk(1), 0).unwrap();
    }
    assert_eq!(edit.finish(&memory, &mut Vec::new()).unwrap_err().kind, ErrorKind::Refused);
}

#[test]
fn nodes_that_break_a_rule_are_damaged() {
    let extent = |offset, length, chunk_offset| Extent { offset, length, chunk: chunk(1), chunk_offset };
    let leaf_bytes = u32::try_from(LEAF_BYTES).unwrap();
    let most = u32::try_from(MOST_CHUNK).unwrap();
    let inner = |height, children: &[u8]| Node::Inner {
        height,
        children: children.iter().map(|index| (*index, chunk(1))).collect(),
    };
    for (node, why) in [
        (Node::Leaf(vec![]), "0 entries"),
        (Node::Leaf(vec![extent(0, 0, 0)]), "is empty"),
        (Node::Leaf(vec![extent(512, 512, 0), extent(0, 512, 0)]), "not in order"),
        (Node::Leaf(vec![extent(0, 513, 0), extent(512, 512, 0)]), "over the one before"),
        (Node::Leaf(vec![extent(0, 512, 0), extent(512, 512, 512)]), "should be one"),
        (Node::Leaf(vec![extent(leaf_bytes - 1, 2, 0)]), "beyond the leaf"),
        (Node::Leaf(vec![extent(u32::MAX, u32::MAX, 0)]), "beyond the leaf"),
        (Node::Leaf(vec![extent(0, 2, most - 1)]), "beyond its chunk"),
        (Node::Leaf(vec![extent(0, 2, u32::MAX)]), "beyond its chunk"),
        (inner(1, &[]), "0 entries"),
        (inner(1, &[3, 3]), "follows"),
        (inner(1, &[4, 3]), "follows"),
        (inner(0, &[1]), "height 0"),
        (inner(6, &[1]), "height 6"),
        (Node::Root(Root { length: 1, child: None }), "no length"),
        (Node::Root(Root { length: 0, child: Some(chunk(1)) }), "a child"),
    ] {
        let bytes = node.encode();
        let id = ChunkId::of(&bytes);
        let error = Node::decode(id, &bytes).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Damaged);
        assert!(error.message.contains(why) && error.message.contains(&id.to_string()), "{error}");
    }
    let mut newer = Node::Leaf(vec![extent(0, 1, 0)]).encode();
    newer[4] = 2;
    let error = Node::decode(chunk(1), &newer).unwrap_err();
    assert!(error.kind == ErrorKind::Refused && error.message.contains("version 2"), "{error}");
}

#[test]
fn nodes_in_a_wrong_place_are_damaged() {
    let mut memory = Memory::default();
    let leaf = memory.put(Node::Leaf(vec![Extent { offset: 0, length: 1, chunk: chunk(1), chunk_offset: 0 }]).encode());
    let inner = memory.put(Node::Inner { height: 1, children: vec![(0, leaf)] }.encode());
    for (length, child) in [(GIB, leaf), (LEAF_BYTES, inner), (1 << 38, inner), (GIB, chunk(9))] {
        let root = memory.put(Root { length, child: Some(child) }.encode());
        let map = Map::open(&memory, root).unwrap();
        let wanted = if child == chunk(9) { ErrorKind::NotFound } else { ErrorKind::Damaged };
        let mut edit = map.edit();
        edit.set(0..1, chunk(2), 0).unwrap();
        assert_eq!(edit.finish(&memory, &mut Vec::new()).unwrap_err().kind, wanted);
        assert_eq!(map.lookup(&memory, 0..1).unwrap_err().kind, wanted);
        assert_eq!(diff(&memory, &map, &Map::empty(length).unwrap()).unwrap_err().kind, wanted);
        assert_eq!(chunks(&memory, root, &mut |_, _| Ok(true)).unwrap_err().kind, wanted);
    }
    assert_eq!(Map::open(&memory, leaf).unwrap_err().kind, ErrorKind::Damaged);

    // Bytes beyond the end stay there when the space grows over them.
    let beyond = memory.put(Node::Inner { height: 1, children: vec![(0, leaf), (200, leaf)] }.encode());
    let root = memory.put(Root { length: 100 * LEAF_BYTES, child: Some(beyond) }.encode());
    let mut edit = Map::open(&memory, root).unwrap().edit();
    edit.resize(GIB).unwrap();
    let (grown, _) = memory.finish(edit);
    assert_eq!(grown.lookup(&memory, 0..GIB).unwrap().len(), 2);
}

#[test]
fn damage_gives_errors_and_nodes_that_keep_the_rules() {
    let extents =
        (0..20).map(|n| Extent { offset: n * 9000, length: 4096, chunk: chunk(3), chunk_offset: n }).collect();
    let nodes = [
        Node::Leaf(extents),
        Node::Inner { height: 2, children: (0..20).map(|index| (index * 3, chunk(index))).collect() },
        Node::Root(Root { length: GIB, child: Some(chunk(1)) }),
    ]
    .map(|node| node.encode());
    let mut seeded = Seeded::new(2);
    for round in 0..20_000 {
        let mut bytes = nodes[round % 3].clone();
        damage(&mut seeded, &mut bytes);
        match Node::decode(chunk(0), &bytes) {
            Ok(node) => assert_eq!(node.encode(), bytes, "there is one way to write a node"),
            Err(error) => assert!(matches!(error.kind, ErrorKind::Damaged | ErrorKind::Refused), "{error}"),
        }
    }
}

#[test]
fn a_reader_remembers_nodes_up_to_its_bound() {
    let mut memory = Memory::default();
    let leaf = |at: u64| at * LEAF_BYTES..at * LEAF_BYTES + 512;
    // Every leaf is another: it holds its number.
    let sets: Vec<_> = (0..200).map(|at: u64| (leaf(at), 1, u32::try_from(at).unwrap())).collect();
    let map = map_of(&mut memory, GIB, &sets);
    let before = memory.reads();
    let reader = MapReader::new(memory, 8);
    for _ in 0..3 {
        assert_eq!(map.lookup(&reader, leaf(7)).unwrap(), map.lookup(reader.nodes(), leaf(7)).unwrap());
    }
    assert_eq!(reader.nodes().reads() - before, 2 + 3 * 2, "an inner node and a leaf, once for the reader");
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let reader = &reader;
            scope.spawn(move || {
                let mut seeded = Seeded::new(thread);
                for _ in 0..2000 {
                    let at = seeded.below(200) as u64;
                    let pieces = map.lookup(reader, leaf(at)).unwrap();
                    assert_eq!(pieces[0].source, Some((chunk(1), u32::try_from(at).unwrap())));
                }
            });
        }
    });
    assert_eq!(reader.held(), 8);
    let large = MapReader::new(reader.nodes(), 4096);
    assert_eq!(map.lookup(&large, 0..GIB).unwrap().len(), 400);
    assert_eq!(large.held(), 201);
}
