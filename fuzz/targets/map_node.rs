//! A node of a block map, from any bytes.
#![no_main]

use burgeon_api::ErrorKind;
use burgeon_store::{ChunkId, map::Node};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    match Node::decode(ChunkId([0; 32]), bytes) {
        Ok(node) => assert_eq!(node.encode(), bytes, "there is one way to write a node"),
        Err(error) => assert!(matches!(error.kind, ErrorKind::Damaged | ErrorKind::Refused), "{error}"),
    }
});
