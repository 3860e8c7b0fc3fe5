//! What a remote tells of an image, from any bytes.
#![no_main]

use burgeon_api::ErrorKind;
use burgeon_store::remote::Manifest;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    match Manifest::read(bytes, "web", "d1", "the manifest") {
        Ok(manifest) => {
            let again = serde_json::to_vec(&manifest).unwrap();
            assert_eq!(Manifest::read(&again, "web", "d1", "the manifest").unwrap(), manifest);
        }
        Err(error) => assert!(matches!(error.kind, ErrorKind::Damaged | ErrorKind::Refused), "{error}"),
    }
});
