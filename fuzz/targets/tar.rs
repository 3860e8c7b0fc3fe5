//! An archive of strangers, unpacked: whatever it says, nothing appears outside the directory that it was given.
#![no_main]

use std::{fs, path::Path, sync::OnceLock};

use burgeon_api::ErrorKind;
use burgeon_image::fuzzing::unpack;
use libfuzzer_sys::fuzz_target;

/// In memory where the machine has such a place.
fn place() -> &'static Path {
    static PLACE: OnceLock<std::path::PathBuf> = OnceLock::new();
    PLACE.get_or_init(|| {
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() };
        parent.join(format!("burgeon-fuzz-{}", std::process::id()))
    })
}

fuzz_target!(|bytes: &[u8]| {
    let place = place();
    let work = place.join("work");
    fs::create_dir_all(&work).unwrap();
    if let Err(error) = unpack(bytes, &work) {
        assert!(
            matches!(error.kind, ErrorKind::Damaged | ErrorKind::Refused | ErrorKind::Invalid),
            "{:?}: {error}",
            error.kind
        );
    }
    let names = |directory: &Path| -> Vec<_> {
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    };
    assert_eq!(names(place), ["work"]);
    assert!(names(&work).iter().all(|name| name == "tree"), "{:?}", names(&work));
    fs::remove_dir_all(place).unwrap();
});
