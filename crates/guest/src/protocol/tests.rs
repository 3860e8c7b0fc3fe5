use proptest::prelude::*;

use super::*;

/// A frame with its payload outside a decoder.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Owned {
    kind: Kind,
    sequence: u16,
    stream: u32,
    payload: Vec<u8>,
}

fn decode_in_pieces(bytes: &[u8], sizes: &[usize]) -> (Vec<Owned>, Decoder) {
    let mut decoder = Decoder::new();
    let mut found = Vec::new();
    let (mut at, mut turn) = (0, 0);
    while at < bytes.len() {
        let size = sizes.get(turn % sizes.len().max(1)).copied().unwrap_or(bytes.len()).max(1);
        turn += 1;
        at += decoder.feed(&bytes[at..bytes.len().min(at + size)]);
        while let Some(received) = decoder.next() {
            if let Received::Frame(Frame { kind, sequence, stream, payload }) = received {
                found.push(Owned { kind, sequence, stream, payload: payload.to_vec() });
            }
        }
    }
    (found, decoder)
}

fn encoded(frames: &[Owned]) -> Vec<u8> {
    let mut out = Vec::new();
    for frame in frames {
        encode_frame(&mut out, frame.kind, frame.sequence, frame.stream, &frame.payload);
    }
    out
}

#[test]
fn the_header_has_pinned_bytes() {
    let header = Header { kind: Kind::Data, sequence: 0x0102, stream: 0x0a0b_0c0d, length: 0x1234 };
    let bytes = header.encode();
    assert_eq!(&bytes[..16], b"BgnF\x01\x02\x02\x01\x0d\x0c\x0b\x0a\x34\x12\0\0");
    assert_eq!(hex(&bytes[16..]), PINNED_HEADER_SUM);
    let mut window = Vec::new();
    encode_frame(&mut window, Kind::Window, 0, 5, &70_000u32.to_le_bytes());
    assert_eq!(&window[20..], b"\x70\x11\x01\0");
}

const PINNED_HEADER_SUM: &str = "15f80a0a";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn host_messages() -> Vec<(&'static str, HostMessage)> {
    let size = TerminalSize { rows: 24, columns: 300 };
    let exec = Exec {
        stream: 4,
        argv: vec![b"ls".to_vec(), vec![0xff]],
        env: vec![(b"A".to_vec(), b"b".to_vec())],
        cwd: Some(b"/".to_vec()),
        user: None,
        terminal: Some(size),
        time_limit_ms: Some(1000),
    };
    let ask = |request| HostMessage::Request { id: 7, request };
    let path = || b"/a".to_vec();
    vec![
        (
            "000109090909090909090909090909090909ac0202766d",
            HostMessage::Hello(Hello { version: 1, session: [9; 16], host_time_ns: 300, vm_name: "vm".into() }),
        ),
        ("0107000402026c7301ff010141016201012f000118ac0201e807", ask(Request::Exec(exec))),
        ("010701041e", ask(Request::Signal { stream: 4, signal: 15 })),
        ("0107020418ac02", ask(Request::Resize { stream: 4, size })),
        ("01070304", ask(Request::Close { stream: 4 })),
        ("01070408022f61ed0305", ask(Request::Put { stream: 8, path: path(), mode: 0o755, size: 5 })),
        ("01070508022f61", ask(Request::Get { stream: 8, path: path() })),
        ("010706022f61017a", ask(Request::List { path: path(), after: b"z".to_vec() })),
        ("010707022f61c003", ask(Request::MakeDirectory { path: path(), mode: 0o700 })),
        ("01070801", ask(Request::Clock { time_ns: 1 })),
        ("010709", ask(Request::Figures)),
        ("01070a", ask(Request::Freeze)),
        ("01070b", ask(Request::Thaw)),
        ("01070c00", ask(Request::Stop { how: StopHow::PowerOff })),
        ("01070c01", ask(Request::Stop { how: StopHow::Reboot })),
        ("01070d016e", ask(Request::Identity { host_name: "n".into() })),
        ("01070e", ask(Request::Grow)),
        ("01070f01", ask(Request::Settle { generalise: true })),
        ("010710050505050505050505050505050505050109070168000102000000000101", ask(Request::Renew(identity()))),
        (
            "01071105050505050505050505050505050505010907016800010200000000010102000170017501",
            ask(Request::RenewWith {
                identity: identity(),
                more: vec![
                    Provision::SshHostKey { private: b"p".to_vec(), public: b"u".to_vec() },
                    Provision::KeepSecrets,
                ],
            }),
        ),
        (
            "0107120203010141016204016b0173",
            ask(Request::Provide {
                more: vec![
                    Provision::Environment(vec![(b"A".to_vec(), b"b".to_vec())]),
                    Provision::Secret { name: b"k".to_vec(), content: b"s".to_vec() },
                ],
            }),
        ),
        ("0107130103", ask(Request::Cpus { online: Some(3) })),
    ]
}

fn identity() -> Identity {
    Identity {
        generation: [5; 16],
        entropy: vec![9],
        time_ns: 7,
        host_name: "h".into(),
        machine_id: None,
        hardware_addresses: vec![[2, 0, 0, 0, 0, 1]],
        end_connections: true,
    }
}

fn receipt() -> Receipt {
    Receipt {
        generation: [5; 16],
        sample: [6; 16],
        time_ns: 7,
        host_name: "h".into(),
        machine_id: "m".into(),
        boot_id: "b".into(),
        hardware_addresses: vec![[2, 0, 0, 0, 0, 1]],
        ended_connections: 1,
        hooks: vec![("k".into(), 2)],
    }
}

fn guest_messages() -> Vec<(&'static str, GuestMessage)> {
    let about = || About {
        agent_version: "0.1.0".into(),
        protocol_version: 1,
        boot_id: "b".into(),
        kernel: "6.1".into(),
        host_name: "h".into(),
        is_init: true,
        uptime_ms: 2000,
        nonce: 3,
        warnings: vec!["w".into()],
    };
    let reply = |result| GuestMessage::Reply { id: 7, result };
    let entry = |kind| FileEntry { name: b"f".to_vec(), kind, mode: 0o644, size: 9, modified_s: -1 };
    let kinds = [FileKind::File, FileKind::Directory, FileKind::Link, FileKind::Other];
    let figures = Figures { uptime_ms: 1, load_hundredths: 2, memory_total: 3, memory_available: 4, processes: 5 };
    let fail = |kind| reply(Err(Failure { kind, message: "m".into() }));
    let exited = |status| GuestMessage::Exited { stream: 4, status, cpu_us: 1000 };
    vec![
        ("0005302e312e3001016203362e31016801d00f03010177", GuestMessage::Ready(about())),
        (
            "010909090909090909090909090909090905302e312e3001016203362e31016801d00f03010177",
            GuestMessage::Welcome { session: [9; 16], about: about() },
        ),
        ("02010172", GuestMessage::Refused { version: 1, reason: "r".into() }),
        ("03070000", reply(Ok(Answer::Done))),
        ("03070001c801", reply(Ok(Answer::Started { pid: 200 }))),
        ("03070002a40309", reply(Ok(Answer::File { mode: 0o644, size: 9 }))),
        (
            "0307000304016600a4030901016601a4030901016602a4030901016603a403090101",
            reply(Ok(Answer::Entries { entries: kinds.into_iter().map(entry).collect(), more: true })),
        ),
        ("030700040102030405", reply(Ok(Answer::Figures(figures)))),
        (
            "030700050505050505050505050505050505050506060606060606060606060606060606070168016d0162010200000000010101016b02",
            reply(Ok(Answer::Receipt(receipt()))),
        ),
        (
            "030700060505050505050505050505050505050506060606060606060606060606060606070168016d0162010200000000010101016b0202000301016b",
            reply(Ok(Answer::Renewed {
                receipt: receipt(),
                more: vec![Proof::KeptConnections(3), Proof::SshHostKey(b"k".to_vec())],
            })),
        ),
        ("03070100016d", fail(FailureKind::Invalid)),
        ("03070101016d", fail(FailureKind::NotFound)),
        ("03070102016d", fail(FailureKind::PermissionDenied)),
        ("03070103016d", fail(FailureKind::Exists)),
        ("03070104016d", fail(FailureKind::Unsupported)),
        ("03070105016d", fail(FailureKind::Limit)),
        ("03070106016d", fail(FailureKind::Io)),
        ("04040006e807", exited(ExitStatus::Code(3))),
        ("04040112e807", exited(ExitStatus::Signal(9))),
        ("040402e807", exited(ExitStatus::TimeLimit)),
        ("05040172", GuestMessage::StreamFailed { stream: 4, reason: "r".into() }),
        ("0601730172", GuestMessage::BootFailed { stage: "s".into(), reason: "r".into() }),
        ("07ac02", GuestMessage::Noise { skipped: 300 }),
    ]
}

#[test]
fn every_message_has_pinned_bytes() {
    fn check<T>(pinned: &str, message: &T)
    where
        T: serde::Serialize + serde::de::DeserializeOwned + std::fmt::Debug + PartialEq,
    {
        let mut frame = Vec::new();
        encode_control(&mut frame, 0, message).unwrap();
        let payload = &frame[HEADER_BYTES..];
        assert_eq!(hex(&payload[..payload.len() - 4]), pinned, "{message:?}");
        assert_eq!(&decode_control::<T>(payload).unwrap(), message);
    }
    for (pinned, message) in host_messages() {
        check(pinned, &message);
    }
    for (pinned, message) in guest_messages() {
        check(pinned, &message);
    }
}

#[test]
fn a_damaged_or_longer_message_is_refused() {
    let mut frame = Vec::new();
    encode_control(&mut frame, 0, &HostMessage::Request { id: 1, request: Request::Thaw }).unwrap();
    let mut payload = frame.split_off(HEADER_BYTES);
    payload[0] ^= 1;
    assert_eq!(decode_control::<HostMessage>(&payload), Err(ControlFault::Checksum));
    assert_eq!(decode_control::<HostMessage>(b"abc"), Err(ControlFault::Checksum));
    for body in [&b"\x63"[..], b"\x01\x01\x0b\0"] {
        let whole = [body, &crc32fast::hash(body).to_le_bytes()].concat();
        assert_eq!(decode_control::<HostMessage>(&whole), Err(ControlFault::Shape));
    }
    let large = HostMessage::Request { id: 1, request: Request::Get { stream: 4, path: vec![b'x'; MOST_PAYLOAD] } };
    let mut out = vec![1];
    assert_eq!(encode_control(&mut out, 0, &large), Err(ControlFault::TooLarge));
    assert_eq!(out, [1]);
}

#[test]
fn another_version_is_told_by_name() {
    let mut header = Header { kind: Kind::Control, sequence: 0, stream: 0, length: 0 }.encode();
    header[4] = 2;
    let sum = crc32fast::hash(&header[..16]);
    header[16..].copy_from_slice(&sum.to_le_bytes());
    let mut decoder = Decoder::new();
    decoder.feed(&header);
    assert_eq!(decoder.next(), Some(Received::OtherVersion(2)));
    assert_eq!(decoder.next(), None);
    assert_eq!(decoder.skipped(), 0);
}

#[test]
fn zeros_complete_any_half_frame_and_are_no_noise() {
    let half = Owned { kind: Kind::Data, sequence: 0, stream: 4, payload: vec![1; MOST_PAYLOAD] };
    let next = Owned { kind: Kind::DataEnd, sequence: 0, stream: 0, payload: Vec::new() };
    for cut in [1, 4, 19, 20, 21, 70, 65_555] {
        let bytes = [
            &encoded(std::slice::from_ref(&half))[..cut],
            &[0; FLUSH_BYTES],
            &encoded(std::slice::from_ref(&next))[..],
        ]
        .concat();
        let (found, decoder) = decode_in_pieces(&bytes, &[4096]);
        assert_eq!(found.last(), Some(&next), "cut at {cut}");
        assert!(decoder.skipped() < 20);
    }
}

#[test]
fn oversize_lengths_and_unknown_kinds_are_skipped() {
    let good = Owned { kind: Kind::Data, sequence: 0, stream: 4, payload: b"x".to_vec() };
    for (kind, length) in [(2, 65_537u32), (1, u32::MAX), (3, 1), (4, 3), (0, 0), (5, 0)] {
        let mut header = Header { kind: Kind::Data, sequence: 0, stream: 4, length }.encode();
        header[5] = kind;
        let sum = crc32fast::hash(&header[..16]);
        header[16..].copy_from_slice(&sum.to_le_bytes());
        let (found, decoder) = decode_in_pieces(&[&header[..], &encoded(std::slice::from_ref(&good))].concat(), &[7]);
        assert_eq!(found, std::slice::from_ref(&good), "kind {kind}, length {length}");
        assert!(decoder.skipped() > 0);
    }
}

#[test]
fn a_gap_shows() {
    let mut sequence = Sequence::default();
    assert!(sequence.accept(0) && sequence.accept(1));
    assert!(!sequence.accept(3));
    let mut sender = Sequence::default();
    let mut receiver = Sequence::default();
    assert!((0..70_000).all(|_| receiver.accept(sender.take())));
}

fn frame() -> impl Strategy<Value = Owned> {
    let payload = prop_oneof![
        4 => prop::collection::vec(any::<u8>(), 0..300),
        1 => (60_000..=MOST_PAYLOAD).prop_map(|length| vec![b'B'; length]),
    ];
    (0..4u8, any::<u16>(), any::<u32>(), payload).prop_map(|(kind, sequence, stream, payload)| match kind {
        0 => Owned { kind: Kind::DataEnd, sequence, stream, payload: Vec::new() },
        1 => Owned { kind: Kind::Window, sequence, stream, payload: vec![1, 2, 3, 4] },
        2 => Owned { kind: Kind::Control, sequence, stream, payload },
        _ => Owned { kind: Kind::Data, sequence, stream, payload },
    })
}

/// Garbage that holds no whole true header: that could not be told from a frame. Beginnings of the magic are likely.
fn garbage() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        Just(b"BgnF".to_vec()),
        Just(b"Bgn".to_vec()),
        Just(vec![0; 30]),
        prop::collection::vec(any::<u8>(), 0..40),
    ];
    prop::collection::vec(piece, 0..6).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn frames_survive_garbage_and_cuts(
        parts in prop::collection::vec((garbage(), frame()), 1..8),
        tail in garbage(),
        sizes in prop::collection::vec(1..70_000usize, 1..6),
    ) {
        let mut bytes = Vec::new();
        let mut stray = 0;
        for (noise, frame) in &parts {
            bytes.extend(noise);
            stray += noise.iter().filter(|byte| **byte != 0).count() as u64;
            bytes.extend(encoded(std::slice::from_ref(frame)));
        }
        bytes.extend(&tail);
        let frames: Vec<Owned> = parts.into_iter().map(|(_, frame)| frame).collect();
        let (found, decoder) = decode_in_pieces(&bytes, &sizes);
        prop_assert_eq!(found, frames);
        prop_assert!(decoder.skipped() >= stray);
    }

    #[test]
    fn every_cut_gives_the_same(frames in prop::collection::vec(frame(), 1..3), size in 1..9usize) {
        let (found, decoder) = decode_in_pieces(&encoded(&frames), &[size]);
        prop_assert_eq!(found, frames);
        prop_assert_eq!((decoder.skipped(), decoder.is_mid_frame()), (0, false));
    }

    #[test]
    fn random_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..5000)) {
        decode_in_pieces(&bytes, &[100]);
        drop(decode_control::<HostMessage>(&bytes));
        drop(decode_control::<GuestMessage>(&bytes));
        let whole = [&bytes[..], &crc32fast::hash(&bytes).to_le_bytes()].concat();
        drop(decode_control::<HostMessage>(&whole));
        drop(decode_control::<GuestMessage>(&whole));
    }
}
