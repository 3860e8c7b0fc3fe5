//! The index of a pack, from any bytes at its end.
#![no_main]

use burgeon_api::ErrorKind;
use burgeon_store::{
    PackId,
    pack::{TRAILER_BYTES, read_index},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    // Pack and length as the trailer has them, so that the rest is reached.
    let trailer = bytes.last_chunk::<TRAILER_BYTES>();
    let pack = trailer.map_or([0; 16], |trailer| std::array::from_fn(|at| trailer[32 + at]));
    let length = trailer.map_or([0; 8], |trailer| std::array::from_fn(|at| trailer[24 + at]));
    if let Err(error) = read_index(PackId(pack), bytes, u64::from_le_bytes(length)) {
        assert!(matches!(error.kind, ErrorKind::Damaged | ErrorKind::Refused), "{error}");
    }
});
