//! A record of a pack, from any bytes.
#![no_main]

use burgeon_api::ErrorKind;
use burgeon_store::{ChunkId, pack::read_record};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    // The chunk as the header has it, so that the rest is reached.
    let id = ChunkId(std::array::from_fn(|at| bytes.get(16 + at).copied().unwrap_or_default()));
    match read_record(bytes, id) {
        Ok(record) => assert_eq!(ChunkId::of(&record.plain), id),
        Err(error) => assert!(matches!(error.kind, ErrorKind::Damaged | ErrorKind::Refused), "{error}"),
    }
});
