//! The bytes of packs, and what readers refuse.

use burgeon_api::ErrorKind;

use super::*;
use crate::{
    chunk::{Codec, Encoded, Encoder},
    testing::{Seeded, damage, noise},
};

const PACK: PackId = PackId([0x11; 16]);

fn raw(plain: &[u8]) -> Encoded {
    let length = u32::try_from(plain.len()).unwrap();
    Encoded { id: ChunkId::of(plain), codec: Codec::Raw, length, stored: plain.to_vec() }
}

/// A pack with data, a map node and compressed data.
fn some_pack() -> (Vec<u8>, Vec<Entry>, Vec<Vec<u8>>) {
    let mut encoder = Encoder::new().unwrap();
    let mut writer = PackWriter::new(PACK, Vec::new()).unwrap();
    let plains = vec![b"hello".to_vec(), noise(7, 3000), vec![9; 50_000]];
    for (plain, kind) in plains.iter().zip([Kind::Data, Kind::MapNode, Kind::Data]) {
        let encoded = encoder.encode(plain).unwrap();
        let place = writer.append(kind, &encoded).unwrap();
        assert_eq!(writer.append(Kind::Data, &encoded).unwrap(), place, "the same chunk is not written twice");
        assert_eq!(writer.place(encoded.id), Some(place));
    }
    assert_eq!(writer.chunks(), 3);
    let length = writer.length();
    let finished = writer.finish().unwrap();
    assert_eq!((finished.length, finished.sink.len() as u64), (length, length));
    (finished.sink, finished.entries, plains)
}

fn index(pack: &[u8]) -> Result<Vec<Entry>> {
    match read_index(PACK, pack, pack.len() as u64)? {
        Tail::Index(entries) => Ok(entries),
        Tail::More(range) => panic!("the whole pack was given, and {range:?} is missing"),
    }
}

fn record<'a>(pack: &'a [u8], entry: &Entry) -> &'a [u8] {
    let at = usize::try_from(entry.place.offset).unwrap();
    &pack[at..at + RECORD_HEADER_BYTES + entry.place.stored as usize]
}

#[test]
fn bytes_of_version_1() {
    let mut writer = PackWriter::new(PackId(*b"0123456789abcdef"), Vec::new()).unwrap();
    writer.append(Kind::Data, &raw(b"hello")).unwrap();
    let bytes = writer.finish().unwrap().sink;
    let hexadecimal: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let expected = [
        // The pack's header: magic, version, reserved, id, checksum.
        "42676e50",
        "01",
        "00000000000000",
        "30313233343536373839616263646566",
        "e33463e5",
        // A record's header: magic, version, codec, kind, reserved, lengths, chunk, reserved, checksum.
        "42676e52",
        "01",
        "00",
        "01",
        "00",
        "05000000",
        "05000000",
        "ea8f163db38682925e4491c5e58d4bb3506ef8c14eb78a86e908c5624a67200f",
        "000000000000000000000000",
        "67c6669c",
        "68656c6c6f",
        // The index: chunk, offset, stored, length, kind, reserved.
        "ea8f163db38682925e4491c5e58d4bb3506ef8c14eb78a86e908c5624a67200f",
        "2000000000000000",
        "05000000",
        "05000000",
        "01",
        "000000",
        // The trailer: magic, version, reserved, entries, checksum of the index, where it is, length, id, reserved,
        // checksum.
        "42676e49",
        "01",
        "000000",
        "01000000",
        "18c5dd4b",
        "6500000000000000",
        "d900000000000000",
        "30313233343536373839616263646566",
        "000000000000000000000000",
        "07430d12",
    ];
    assert_eq!(hexadecimal, expected.concat());
}

#[test]
fn a_pack_tells_what_it_holds() {
    let (pack, entries, plains) = some_pack();
    assert_eq!(index(&pack).unwrap(), entries);
    for plain in plains {
        let entry = entries.iter().find(|entry| entry.id == ChunkId::of(&plain)).unwrap();
        let read = read_record(record(&pack, entry), entry.id).unwrap();
        assert_eq!((read.kind, read.plain), (entry.kind, plain));
    }
    let Tail::More(range) = read_index(PACK, &pack[pack.len() - 100..], pack.len() as u64).unwrap() else {
        panic!("100 bytes do not hold three entries");
    };
    assert_eq!(range, (pack.len() - TRAILER_BYTES - 3 * ENTRY_BYTES) as u64..pack.len() as u64);
    let tail = &pack[usize::try_from(range.start).unwrap()..];
    assert_eq!(read_index(PACK, tail, pack.len() as u64).unwrap(), Tail::Index(entries));
}

#[test]
fn an_empty_pack_is_one() {
    let finished = PackWriter::new(PACK, Vec::new()).unwrap().finish().unwrap();
    assert!(index(&finished.sink).unwrap().is_empty());
    assert_eq!(scan(PACK, finished.sink.as_slice()).unwrap().stopped, None);
}

#[test]
fn a_broken_pack_gives_its_whole_records() {
    let (pack, mut entries, _) = some_pack();
    entries.sort_by_key(|entry| entry.place.offset);
    let whole = scan(PACK, pack.as_slice()).unwrap();
    assert_eq!((&whole.entries, &whole.stopped), (&entries, &None));
    let end = usize::try_from(whole.end).unwrap();

    for length in FILE_HEADER_BYTES..pack.len() {
        let cut = scan(PACK, &pack[..length]).unwrap();
        let fitting = entries.iter().filter(|entry| {
            entry.place.offset + RECORD_HEADER_BYTES as u64 + u64::from(entry.place.stored) <= length as u64
        });
        assert_eq!(cut.entries, fitting.copied().collect::<Vec<_>>(), "{length} bytes");
        assert_eq!(cut.stopped.unwrap().kind, ErrorKind::Damaged);
    }
    let mut bad_footer = pack.clone();
    bad_footer[end + 3] ^= 1;
    let salvage = scan(PACK, bad_footer.as_slice()).unwrap();
    assert_eq!(salvage.entries, entries);
    assert!(salvage.stopped.unwrap().message.starts_with(&format!("byte {end}: ")));

    let second = usize::try_from(entries[1].place.offset).unwrap();
    let mut bad_record = pack.clone();
    bad_record[second + RECORD_HEADER_BYTES + 8] ^= 1;
    let salvage = scan(PACK, bad_record.as_slice()).unwrap();
    assert_eq!((salvage.entries.len(), salvage.end), (1, second as u64));
    let longer = [pack.as_slice(), b"x"].concat();
    assert!(scan(PACK, longer.as_slice()).unwrap().stopped.is_some());
    assert_eq!(scan(PackId([0; 16]), pack.as_slice()).unwrap_err().kind, ErrorKind::Damaged);
    assert_eq!(scan(PACK, &pack[..20]).unwrap_err().kind, ErrorKind::Damaged);
}

#[test]
fn what_a_newer_burgeon_writes_is_refused_by_name() {
    let (pack, entries, _) = some_pack();
    let entry = entries.iter().find(|entry| entry.kind == Kind::MapNode).unwrap();
    for (at, value, told) in
        [(4, 2, "version 2"), (5, 9, "codec 9"), (6, 7, "kind 7"), (7, 1, "reserved"), (50, 1, "reserved")]
    {
        let mut bytes = record(&pack, entry).to_vec();
        bytes[at] = value;
        assert_eq!(read_record(&bytes, entry.id).unwrap_err().kind, ErrorKind::Damaged, "the checksum is wrong");
        wire::seal(&mut bytes[..RECORD_HEADER_BYTES]);
        let error = read_record(&bytes, entry.id).unwrap_err();
        assert!(error.kind == ErrorKind::Refused && error.message.contains(told), "{error}");
    }
    for (at, value, told) in [(4, 3, "version 3"), (5, 1, "reserved"), (50, 1, "reserved")] {
        let mut bytes = pack.clone();
        let trailer = bytes.len() - TRAILER_BYTES;
        bytes[trailer + at] = value;
        wire::seal(&mut bytes[trailer..]);
        let error = index(&bytes).unwrap_err();
        assert!(error.kind == ErrorKind::Refused && error.message.contains(told), "{error}");
    }
    let mut header = file_header(PACK);
    header[4] = 9;
    wire::seal(&mut header);
    assert!(read_file_header(&header).unwrap_err().message.contains("version 9"));
}

#[test]
fn an_index_that_does_not_fit_its_pack_is_damaged() {
    let (pack, entries, _) = some_pack();
    let refused = |change: &dyn Fn(&mut Vec<Entry>)| {
        let mut wrong = entries.clone();
        change(&mut wrong);
        let end = pack.len() - TRAILER_BYTES - 3 * ENTRY_BYTES;
        let bytes = [&pack[..end], &footer::footer(PACK, &wrong, end as u64).unwrap()].concat();
        assert_eq!(index(&bytes).unwrap_err().kind, ErrorKind::Damaged, "{wrong:?}");
    };
    refused(&|entries| entries.swap(0, 1));
    refused(&|entries| entries[1] = entries[0]);
    refused(&|entries| entries.truncate(2));
    refused(&|entries| entries[0].place.offset = u64::MAX);
    refused(&|entries| entries[0].place.offset = 0);
    refused(&|entries| entries[0].place.stored += 1);
    refused(&|entries| entries[0].place.length = 0);
    refused(&|entries| entries[0].place.length = u32::MAX);
    let error = read_index(PackId([0; 16]), &pack, pack.len() as u64).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Damaged);
    assert_eq!(read_index(PACK, &pack, pack.len() as u64 + 1).unwrap_err().kind, ErrorKind::Damaged);
}

#[test]
fn damage_gives_errors_and_never_other_bytes() {
    let (pack, entries, _) = some_pack();
    let mut seeded = Seeded::new(1);
    let typed = |error: Error| assert!(matches!(error.kind, ErrorKind::Damaged | ErrorKind::Refused), "{error}");
    for round in 0..20_000_u32 {
        let entry = &entries[seeded.below(entries.len())];
        let mut bytes = record(&pack, entry).to_vec();
        // Behind a right checksum too.
        damage(&mut seeded, &mut bytes);
        if round % 2 == 0 && bytes.len() >= RECORD_HEADER_BYTES {
            wire::seal(&mut bytes[..RECORD_HEADER_BYTES]);
        }
        match read_record(&bytes, entry.id) {
            Ok(read) => assert_eq!(ChunkId::of(&read.plain), entry.id),
            Err(error) => typed(error),
        }
        let mut tail = pack[pack.len() - TRAILER_BYTES - 3 * ENTRY_BYTES..].to_vec();
        damage(&mut seeded, &mut tail);
        if round % 2 == 0 && tail.len() >= TRAILER_BYTES {
            let trailer = tail.len() - TRAILER_BYTES;
            let sum = crc32fast::hash(&tail[..trailer]);
            wire::put(&mut tail, trailer + 12, &sum.to_le_bytes());
            wire::seal(&mut tail[trailer..]);
        }
        if let Err(error) = read_index(PACK, &tail, pack.len() as u64) {
            typed(error);
        }
        if round % 20 == 0 {
            let mut whole = pack.clone();
            damage(&mut seeded, &mut whole);
            if let Err(error) = scan(PACK, whole.as_slice()) {
                typed(error);
            }
        }
    }
}

/// A sink that takes so many bytes and no more.
struct Full(usize);

impl std::io::Write for Full {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0 == 0 {
            return Err(std::io::ErrorKind::StorageFull.into());
        }
        let taken = bytes.len().min(self.0);
        self.0 -= taken;
        Ok(taken)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_sink_that_fails_ends_the_pack() {
    assert_eq!(PackWriter::new(PACK, Full(31)).err().unwrap().kind, ErrorKind::Refused);
    let mut writer = PackWriter::new(PACK, Full(98)).unwrap();
    assert_eq!(writer.append(Kind::Data, &raw(b"hello")).unwrap_err().kind, ErrorKind::Refused);
    assert_eq!(writer.append(Kind::Data, &raw(b"again")).unwrap_err().kind, ErrorKind::Internal);
    assert!(writer.finish().is_err());
}
