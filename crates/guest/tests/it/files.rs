use std::os::unix::{ffi::OsStrExt, fs::PermissionsExt};

use burgeon_api::ErrorKind;
use burgeon_guest::protocol::FileKind;
use bytes::Bytes;

use crate::harness::{soon, started};

#[tokio::test]
async fn put_get_and_list_with_modes() {
    let (guest, client) = started().await;
    let directory = guest.path("a/b");
    soon(client.make_directory(directory.as_os_str().as_bytes(), 0o750)).await.unwrap();
    soon(client.make_directory(directory.as_os_str().as_bytes(), 0o750)).await.unwrap();
    let content: Vec<u8> = (0..1_000_003u32).map(|number| number.to_le_bytes()[number as usize % 4]).collect();
    let file = [directory.as_os_str().as_bytes(), b"/odd\xff"].concat();
    soon(client.put(&file, 0o4711, content.len() as u64, &content[..])).await.unwrap();
    let (mode, size, mut pieces) = soon(client.get(&file)).await.unwrap();
    assert_eq!((mode, size), (0o4711, content.len() as u64));
    let mut read: Vec<u8> = Vec::new();
    while let Some(piece) = soon(pieces.next()).await.unwrap() {
        read.extend(&piece);
    }
    assert!(read == content);
    soon(client.put(&[directory.as_os_str().as_bytes(), b"/empty"].concat(), 0o600, 0, &b""[..])).await.unwrap();

    let entries = soon(client.list(directory.as_os_str().as_bytes())).await.unwrap();
    let told: Vec<_> = entries.iter().map(|entry| (&entry.name[..], entry.kind, entry.mode, entry.size)).collect();
    assert_eq!(
        told,
        [(&b"empty"[..], FileKind::File, 0o600, 0), (&b"odd\xff"[..], FileKind::File, 0o4711, content.len() as u64)]
    );
}

#[tokio::test]
async fn a_long_directory_comes_in_parts() {
    let (guest, client) = started().await;
    let directory = guest.path("many");
    std::fs::create_dir(&directory).unwrap();
    for number in 0..3000 {
        std::fs::write(directory.join(format!("a-rather-long-name-{number:05}")), "").unwrap();
    }
    let entries = soon(client.list(directory.as_os_str().as_bytes())).await.unwrap();
    assert_eq!(entries.len(), 3000);
    assert_eq!(entries[2999].name, b"a-rather-long-name-02999");
}

#[tokio::test]
async fn a_put_that_breaks_leaves_nothing() {
    let (guest, client) = started().await;
    let directory = guest.path("d");
    std::fs::create_dir(&directory).unwrap();
    let file = directory.join("f");
    let path = file.as_os_str().as_bytes();
    let left = || std::fs::read_dir(&directory).unwrap().count();

    let mut put = soon(client.begin_put(path, 0o644, 100)).await.unwrap();
    soon(put.send(Bytes::from_static(b"half"))).await.unwrap();
    drop(put);
    soon(client.figures()).await.unwrap();
    assert_eq!(left(), 0, "dropped");

    let short = soon(client.put(path, 0o644, 100, &b"short"[..])).await.unwrap_err();
    assert_eq!(short.kind, ErrorKind::Invalid);
    let mut put = soon(client.begin_put(path, 0o644, 3)).await.unwrap();
    soon(put.send(Bytes::from_static(b"longer"))).await.unwrap();
    assert_eq!(soon(put.finish()).await.unwrap_err().kind, ErrorKind::Invalid);
    soon(client.figures()).await.unwrap();
    assert_eq!(left(), 0, "of another size");

    std::fs::write(&file, "old").unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let put = soon(client.begin_put(path, 0o644, 100)).await.unwrap();
    // The host goes away, and another session begins.
    drop((put, client));
    let client = guest.attach(2).await;
    assert_eq!((std::fs::read(&file).unwrap(), left()), (b"old".to_vec(), 1));
    soon(client.put(path, 0o640, 3, &b"new"[..])).await.unwrap();
    assert_eq!((std::fs::read(&file).unwrap(), left()), (b"new".to_vec(), 1));
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o640);
}

#[tokio::test]
async fn refusals() {
    let (guest, client) = started().await;
    let directory = guest.directory.path().as_os_str().as_bytes();
    let missing = [directory, b"/no/such"].concat();
    assert_eq!(soon(client.get(&missing)).await.map(|_| ()).unwrap_err().kind, ErrorKind::NotFound);
    assert_eq!(soon(client.list(&missing)).await.unwrap_err().kind, ErrorKind::NotFound);
    assert_eq!(soon(client.put(&missing, 0o644, 1, &b"x"[..])).await.unwrap_err().kind, ErrorKind::NotFound);
    assert_eq!(soon(client.put(directory, 0o644, 1, &b"x"[..])).await.unwrap_err().kind, ErrorKind::Conflict);
    assert_eq!(soon(client.get(directory)).await.map(|_| ()).unwrap_err().kind, ErrorKind::Invalid);
    assert_eq!(soon(client.get(b"/dev/zero")).await.map(|_| ()).unwrap_err().kind, ErrorKind::Invalid);
    assert_eq!(soon(client.freeze()).await.unwrap_err().kind, ErrorKind::Refused, "not its machine");
    let large = vec![7; 900_000];
    assert_eq!(soon(client.put(&missing, 0o644, 900_000, &large[..])).await.unwrap_err().kind, ErrorKind::NotFound);
    assert!(soon(client.figures()).await.unwrap().memory_total > 0);
}
