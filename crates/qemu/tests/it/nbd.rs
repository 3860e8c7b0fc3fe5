//! The NBD server before clients that we did not write: QEMU's tools and libnbd's.

use std::{
    fs,
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    process::Command,
    sync::Arc,
    time::Duration,
};

use burgeon_qemu::nbd::{Owner, Server};
use burgeon_store::disk::{Disk, Nothing, Stack};

const SIZE: u64 = 48 << 20;

fn disk(directory: &Path) -> Arc<Disk> {
    fs::create_dir(directory.join("disk")).unwrap();
    Arc::new(Disk::create(&directory.join("disk"), SIZE, Stack::default(), &|_, _| Ok(Arc::new(Nothing))).unwrap())
}

/// Runs a tool; gives what it said.
fn tool(directory: &Path, words: &str) -> String {
    let words: Vec<&str> = words.split(' ').collect();
    let output = Command::new(words[0]).args(&words[1..]).current_dir(directory).output();
    let output = output.unwrap_or_else(|error| panic!("run {}: {error}; ./x setup installs it", words[0]));
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{words:?}: {text}");
    text
}

/// Bytes that nothing compresses, with holes between them.
fn picture(path: &Path) {
    let mut state = 7_u64;
    let mut bytes = vec![0_u8; usize::try_from(SIZE).unwrap()];
    for (number, piece) in bytes.chunks_mut(100_000).enumerate() {
        if number % 3 != 0 {
            for byte in piece {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                *byte = state.to_le_bytes()[7];
            }
        }
    }
    fs::write(path, bytes).unwrap();
}

#[test]
fn tools_of_others_read_what_others_wrote() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    let disk = disk(at);
    let server = Server::start(&at.join("disk.sock"), disk.clone(), None).unwrap();
    let about = tool(at, "nbdinfo nbd+unix:///?socket=disk.sock");
    for wanted in ["export-size: 50331648", "is_read_only: false", "can_multi_conn: true", "base:allocation"] {
        assert!(about.contains(wanted), "{wanted} is not in {about}");
    }
    assert!(tool(at, "nbdinfo --list nbd+unix:///?socket=disk.sock").contains("export=\"\""));
    picture(&at.join("picture"));
    // Many requests at once on several connections; QEMU's way; and back.
    tool(at, "nbdcopy --flush picture nbd+unix:///?socket=disk.sock");
    tool(at, "qemu-img compare -f raw -F raw picture nbd+unix:///?socket=disk.sock");
    assert!(disk.own_bytes() < SIZE * 3 / 4, "zeros take no place: {}", disk.own_bytes());
    let map = tool(at, "nbdinfo --map nbd+unix:///?socket=disk.sock");
    assert!(map.contains("hole,zero"), "{map}");
    tool(at, "nbdcopy nbd+unix:///?socket=disk.sock back");
    assert!(fs::read(at.join("picture")).unwrap() == fs::read(at.join("back")).unwrap());
    // What a guest's controller may do, and what none should.
    let script = [
        "write -P 0x61 4095 3",
        "read -P 0x61 4095 3",
        "write -f -P 0x62 8192 4k",
        "write -z 12288 1M",
        "read -P 0 12288 1M",
        "discard 2M 4M",
        "read -P 0 2M 4M",
        "aio_write -P 0x63 10M 8M",
        "aio_read 18M 8M",
        "aio_flush",
        "read -P 0x63 10M 8M",
        "write -P 0x64 50331136 512",
        "flush",
    ];
    let output = Command::new("qemu-io")
        .args(["-f", "raw", "nbd+unix:///?socket=disk.sock"])
        .args(script.iter().flat_map(|line| ["-c", line]))
        .current_dir(at)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success() && !said.contains("verification failed") && !said.contains("rror"), "{said}");
    drop(server);
    assert!(!at.join("disk.sock").exists());
    // Given to a user, it is made in another place first; whatever had its name is replaced.
    fs::write(at.join("disk.sock"), "in the way").unwrap();
    let owner = Owner { user: rustix::process::geteuid().as_raw(), made_at: &at.join("elsewhere") };
    let server = Server::start(&at.join("disk.sock"), disk.clone(), Some(owner)).unwrap();
    assert!(tool(at, "nbdinfo --size nbd+unix:///?socket=disk.sock").contains("50331648"));
    assert!(!at.join("elsewhere").exists());
    drop(server);
    fs::write(at.join("disk.sock"), "in the way").unwrap();
    assert!(Server::start(&at.join("disk.sock"), disk.clone(), None).is_err());
    let mut bytes = [0; 3];
    disk.read(4095, &mut bytes).unwrap();
    assert_eq!(bytes, *b"aaa");
}

/// A client that says what it should not: each is refused or cut off, and the next one is served.
#[test]
fn bad_clients_harm_only_themselves() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.sock");
    let disk = disk(directory.path());
    let _server = Server::start(&path, disk.clone(), None).unwrap();
    let connect = || {
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.read_exact(&mut [0; 18]).unwrap();
        stream
    };
    let ended = |mut stream: UnixStream| stream.read_to_end(&mut Vec::new());
    let option = |number: u32, length: u32| {
        [&3_u32.to_be_bytes()[..], b"IHAVEOPT", &number.to_be_bytes(), &length.to_be_bytes()].concat()
    };
    for start in [
        b"\xff\xff\xff\xff".to_vec(),
        b"\0\0\0\0".to_vec(),
        [b"\0\0\0\x03".to_vec(), b"no option at all".to_vec()].concat(),
        option(7, u32::MAX),
    ] {
        let mut stream = connect();
        stream.write_all(&start).unwrap();
        // What it sent is not read to its end, so the kernel may tell a reset.
        assert!(ended(stream).map_or(true, |count| count == 0));
    }
    let export = || {
        let mut stream = connect();
        stream.write_all(&option(1, 0)).unwrap();
        let mut about = [0; 10];
        stream.read_exact(&mut about).unwrap();
        assert_eq!(about[..8], SIZE.to_be_bytes());
        stream
    };
    let request = |kind: u16, offset: u64, length: u32| {
        [
            &0x2560_9513_u32.to_be_bytes()[..],
            &[0, 0],
            &kind.to_be_bytes(),
            &[9; 8],
            &offset.to_be_bytes(),
            &length.to_be_bytes(),
        ]
        .concat()
    };
    for (kind, offset, length, error) in [
        (0, SIZE - 1, 2, 22_u32),
        (0, u64::MAX, 512, 22),
        (0, 0, u32::MAX, 22),
        (4, SIZE, 512, 28),
        (6, SIZE - 512, 1024, 28),
        (7, 0, 512, 22),
        (99, 0, 512, 22),
        (4, 0, 0, 22),
    ] {
        let mut stream = export();
        stream.write_all(&request(kind, offset, length)).unwrap();
        let mut reply = [0; 16];
        stream.read_exact(&mut reply).unwrap();
        assert_eq!(reply[4..8], error.to_be_bytes(), "{kind} {offset} {length}");
        assert_eq!(reply[8..], [9; 8]);
        stream.write_all(&request(3, 0, 0)).unwrap();
        stream.read_exact(&mut reply).unwrap();
        assert_eq!(reply[4..8], [0; 4], "the connection goes on");
    }
    let mut stream = export();
    stream.write_all(&request(1, SIZE - 512, 1024)).unwrap();
    stream.write_all(&[1; 1024]).unwrap();
    let mut reply = [0; 16];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(reply[4..8], 28_u32.to_be_bytes());
    for wrong in [vec![0; 28], request(1, 0, u32::MAX)] {
        let mut stream = export();
        stream.write_all(&wrong).unwrap();
        assert!(ended(stream).map_or(true, |count| count == 0));
    }
    // A write that breaks off in the middle of its data.
    let mut stream = export();
    stream.write_all(&request(1, 0, 4096)).unwrap();
    stream.write_all(&[1; 100]).unwrap();
    drop(stream);
    assert_eq!(disk.own_bytes(), 0, "nothing was written by any of them");
}
