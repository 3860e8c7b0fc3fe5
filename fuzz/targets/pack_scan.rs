//! What can be saved of a pack, from any bytes.
#![no_main]

use burgeon_api::ErrorKind;
use burgeon_store::{PackId, pack::scan};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let pack = PackId(std::array::from_fn(|at| bytes.get(12 + at).copied().unwrap_or_default()));
    match scan(pack, bytes) {
        Ok(salvage) => assert!(salvage.end <= bytes.len() as u64),
        Err(error) => assert!(matches!(error.kind, ErrorKind::Damaged | ErrorKind::Refused), "{error}"),
    }
});
