//! The head of a qcow2 file, from any bytes: what passes names no other file.
#![no_main]

use burgeon_api::ErrorKind;
use burgeon_image::fuzzing::qcow2;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    match qcow2(bytes) {
        Ok((_, cluster)) => {
            assert!(bytes.starts_with(b"QFI\xfb") && cluster.is_power_of_two());
            assert_eq!(bytes[8..16], [0; 8], "no backing file");
        }
        Err(error) => {
            assert!(matches!(error.kind, ErrorKind::Damaged | ErrorKind::Refused | ErrorKind::Invalid), "{error}")
        }
    }
});
