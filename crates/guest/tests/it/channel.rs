//! The channel itself: garbage, lost hosts, other versions, hostile guests.

use std::sync::atomic::{AtomicU64, Ordering};

use burgeon_api::{ErrorKind, exec::Exit};
use burgeon_guest::{
    client::{AgentClient, AgentEvent, ExecEvent},
    protocol::{
        About, Answer, Decoder, FLUSH_BYTES, GuestMessage, HEADER_BYTES, Hello, HostMessage, Kind, Received, Request,
        decode_control, encode_control, encode_frame,
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    net::UnixStream,
    time::{Duration, Instant},
};

use crate::harness::{Guest, options, output, sh, soon, spec, started};

fn control<T: serde::Serialize>(sequence: u16, message: &T) -> Vec<u8> {
    let mut frame = Vec::new();
    encode_control(&mut frame, sequence, message).unwrap();
    frame
}

/// Passes frames on, with garbage before each of them.
async fn disturb(mut from: impl AsyncReadExt + Unpin, mut to: impl AsyncWriteExt + Unpin, count: &AtomicU64) {
    let mut decoder = Decoder::new();
    loop {
        match from.read(decoder.space()).await {
            Ok(read) if read > 0 => decoder.filled(read),
            _ => return,
        }
        while let Some(received) = decoder.next() {
            let Received::Frame(frame) = received else { panic!("{received:?}") };
            let mut out = b"noise Bgn BgnF\x01\x02 more of it".to_vec();
            out.extend(&out.clone()[..usize::from(frame.sequence) % 20]);
            encode_frame(&mut out, frame.kind, frame.sequence, frame.stream, frame.payload);
            count.fetch_add(1, Ordering::Relaxed);
            if to.write_all(&out).await.is_err() {
                return;
            }
        }
    }
}

#[tokio::test]
async fn garbage_between_frames_on_both_sides() {
    let guest = Guest::start();
    let (ours, theirs) = duplex(1 << 20);
    let agent = guest.accept().await;
    tokio::spawn(async move {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let (agent_read, agent_write) = agent.into_split();
        let (host_read, host_write) = tokio::io::split(theirs);
        tokio::join!(disturb(agent_read, host_write, &COUNT), disturb(host_read, agent_write, &COUNT))
    });
    let client = AgentClient::connect(ours, options(1));
    let mut events = client.events();
    soon(client.wait_ready(Instant::now() + Duration::from_secs(20))).await.unwrap();
    for _ in 0..20 {
        assert_eq!(output(&client, sh("head -c 300000 /dev/zero | wc -c")).await.0, "300000\n");
    }
    let (out, _, exit) = output(&client, sh("head -c 300000 /dev/zero")).await;
    assert_eq!((out.len(), exit), (300_000, Exit::Code { code: 0 }));
    let (mut guest_noise, mut host_noise) = (false, false);
    while !(guest_noise && host_noise) {
        match soon(events.recv()).await.unwrap() {
            AgentEvent::GuestNoise { skipped } => guest_noise = skipped > 0,
            AgentEvent::HostNoise { skipped } => host_noise = skipped > 0,
            _ => {}
        }
    }
}

#[tokio::test]
async fn a_new_session_ends_what_the_old_one_ran() {
    let guest = Guest::start();
    let client = guest.attach(1).await;
    let mut exec = soon(client.exec(sh("echo $$; yes"))).await.unwrap();
    let Some(ExecEvent::Stdout(first)) = soon(exec.output.next()).await else { panic!("no output") };
    let pid = String::from_utf8_lossy(&first).lines().next().unwrap().to_string();
    // The host dies in mid-stream.
    client.close();
    assert_eq!(soon(client.wait_ended()).await.kind, ErrorKind::Unavailable);
    let client = guest.attach(2).await;
    let gone = format!("while kill -0 {pid} 2>/dev/null; do sleep 0.01; done");
    assert_eq!(output(&client, sh(&gone)).await.2, Exit::Code { code: 0 });
    let (.., exit) = soon(exec.output.collect(1 << 20)).await;
    assert!(matches!(exit, Exit::Lost { .. }), "{exit:?}");
}

/// The agent's connection stays, as a virtio port does; its host is replaced in the middle of a frame.
#[tokio::test]
async fn a_new_host_on_the_same_connection() {
    let guest = Guest::start();
    let mut agent = guest.accept().await;
    let hello = |session: u8| {
        let hello = Hello { version: 1, session: [session; 16], host_time_ns: 0, vm_name: String::new() };
        control(0, &HostMessage::Hello(hello))
    };
    agent.write_all(&hello(1)).await.unwrap();
    let exec = burgeon_guest::protocol::Exec {
        stream: 4,
        argv: vec![b"yes".to_vec()],
        cwd: Some(b"/".to_vec()),
        ..Default::default()
    };
    agent.write_all(&control(1, &HostMessage::Request { id: 1, request: Request::Exec(exec) })).await.unwrap();
    // Reads a part of the flood, then begins a frame and stops in it.
    let mut some = vec![0; 100_000];
    soon(agent.read_exact(&mut some)).await.unwrap();
    let mut half = Vec::new();
    encode_frame(&mut half, Kind::Data, 0, 4, &[b'x'; 60_000]);
    agent.write_all(&half[..30_000]).await.unwrap();
    // The next host knows nothing of this.
    let client = AgentClient::connect(agent, options(2));
    soon(client.wait_ready(Instant::now() + Duration::from_secs(20))).await.unwrap();
    assert_eq!(output(&client, spec(&["echo", "well"])).await.0, "well\n");
}

#[tokio::test]
async fn an_unknown_version_is_refused_by_name() {
    let guest = Guest::start();
    // By the agent: first a Hello of another version, then a header of one.
    for newer_header in [false, true] {
        let mut agent = guest.accept().await;
        let hello = Hello { version: 7, session: [1; 16], host_time_ns: 0, vm_name: String::new() };
        let mut frame = control(0, &HostMessage::Hello(hello));
        if newer_header {
            frame[4] = 7;
            let sum = crc32(&frame[..16]);
            frame[16..20].copy_from_slice(&sum);
        }
        agent.write_all(&frame).await.unwrap();
        let refusal = soon(guest_message(&mut agent, |message| matches!(message, GuestMessage::Refused { .. }))).await;
        let GuestMessage::Refused { version: 1, reason } = refusal else { panic!("{refusal:?}") };
        assert_eq!(reason, "the host speaks protocol version 7; this agent speaks version 1");
    }
    // By the client.
    let (ours, mut theirs) = duplex(1 << 20);
    let client = AgentClient::connect(ours, options(1));
    let about = About { protocol_version: 9, ..About::default() };
    theirs.write_all(&control(0, &GuestMessage::Ready(about))).await.unwrap();
    let error = soon(client.wait_ready(Instant::now() + Duration::from_secs(20))).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Refused);
    assert!(error.message.contains("version 9") && error.message.contains("version 1"), "{error}");
}

fn crc32(bytes: &[u8]) -> [u8; 4] {
    let mut sum = !0u32;
    for byte in bytes {
        sum ^= u32::from(*byte);
        for _ in 0..8 {
            sum = (sum >> 1) ^ (0xedb8_8320 & (sum & 1).wrapping_neg());
        }
    }
    (!sum).to_le_bytes()
}

async fn guest_message(from: &mut UnixStream, wanted: impl Fn(&GuestMessage) -> bool) -> GuestMessage {
    let mut decoder = Decoder::new();
    loop {
        while let Some(received) = decoder.next() {
            if let Received::Frame(frame) = received
                && frame.kind == Kind::Control
            {
                let message = decode_control(frame.payload).unwrap();
                if wanted(&message) {
                    return message;
                }
            }
        }
        let count = from.read(decoder.space()).await.unwrap();
        assert!(count > 0, "the agent went away");
        decoder.filled(count);
    }
}

/// A guest of our own making, for what an honest agent never does.
struct Impostor {
    channel: DuplexStream,
    decoder: Decoder,
    sequence: u16,
}

impl Impostor {
    async fn attach() -> (Self, AgentClient) {
        let (ours, channel) = duplex(1 << 20);
        let client = AgentClient::connect(ours, options(1));
        let mut impostor = Self { channel, decoder: Decoder::new(), sequence: 0 };
        let HostMessage::Hello(hello) = impostor.heard().await else { panic!("no hello") };
        let about = About { protocol_version: 1, ..About::default() };
        impostor.say(&GuestMessage::Welcome { session: hello.session, about }).await;
        soon(client.wait_ready(Instant::now() + Duration::from_secs(20))).await.unwrap();
        (impostor, client)
    }

    async fn say(&mut self, message: &GuestMessage) {
        let frame = control(self.sequence, message);
        self.sequence += 1;
        self.raw(&frame).await;
    }

    async fn raw(&mut self, bytes: &[u8]) {
        soon(self.channel.write_all(bytes)).await.unwrap();
    }

    async fn heard(&mut self) -> HostMessage {
        loop {
            while let Some(received) = self.decoder.next() {
                if let Received::Frame(frame) = received
                    && frame.kind == Kind::Control
                {
                    return decode_control(frame.payload).unwrap();
                }
            }
            let count = soon(self.channel.read(self.decoder.space())).await.unwrap();
            assert!(count > 0, "the client went away");
            self.decoder.filled(count);
        }
    }

    async fn exec(&mut self, client: &AgentClient) -> burgeon_guest::client::ExecHandle {
        let asking = tokio::spawn({
            let client = client.clone();
            async move { client.exec(spec(&["x"])).await }
        });
        let HostMessage::Request { id, .. } = self.heard().await else { panic!("no request") };
        self.say(&GuestMessage::Reply { id, result: Ok(Answer::Started { pid: 1 }) }).await;
        soon(asking).await.unwrap().unwrap()
    }
}

#[tokio::test]
async fn a_guest_that_overruns_its_credit_loses_the_stream() {
    let (mut impostor, client) = Impostor::attach().await;
    let mut exec = impostor.exec(&client).await;
    let mut frames = Vec::new();
    // One byte costs 256: 4,096 frames are all that may wait.
    for sequence in 0..4097 {
        encode_frame(&mut frames, Kind::Data, sequence, 5, b"x");
    }
    impostor.raw(&frames).await;
    let HostMessage::Request { request: Request::Close { stream: 4 }, .. } = impostor.heard().await else {
        panic!("not closed")
    };
    let (out, _, exit) = soon(exec.output.collect(10_000)).await;
    assert!(out.len() == 4096 && matches!(exit, Exit::Lost { .. }), "{exit:?}");
}

#[tokio::test]
async fn a_gap_fails_the_stream_and_a_gap_in_control_the_session() {
    let (mut impostor, client) = Impostor::attach().await;
    let mut exec = impostor.exec(&client).await;
    let mut frames = Vec::new();
    encode_frame(&mut frames, Kind::Data, 0, 5, b"a");
    encode_frame(&mut frames, Kind::Data, 2, 5, b"c");
    impostor.raw(&frames).await;
    let (out, _, exit) = soon(exec.output.collect(10_000)).await;
    assert!(out == b"a" && matches!(exit, Exit::Lost { .. }), "{exit:?}");

    let mut events = client.events();
    impostor.sequence += 1;
    impostor.say(&GuestMessage::Noise { skipped: 1 }).await;
    loop {
        if let AgentEvent::SessionLost { .. } = soon(events.recv()).await.unwrap() {
            break;
        }
    }
    loop {
        if let HostMessage::Hello(hello) = impostor.heard().await {
            assert_ne!(hello.session, [1; 16]);
            break;
        }
    }
}

#[tokio::test]
async fn a_flood_of_garbage_damages_the_channel() {
    let (mut impostor, client) = Impostor::attach().await;
    impostor.raw(&[b'z'; 500_000]).await;
    assert!(client.ended().is_none());
    let mut unknown = Vec::new();
    for sequence in 0..10 {
        encode_frame(&mut unknown, Kind::Data, sequence, 77, &[0; 65_536]);
    }
    let _ended_meanwhile = impostor.channel.write_all(&unknown).await;
    let error = soon(client.wait_ended()).await;
    assert_eq!(error.kind, ErrorKind::Damaged, "{error}");
}

#[tokio::test]
async fn a_silent_guest_meets_deadlines() {
    let (ours, _theirs) = duplex(1 << 20);
    let client = AgentClient::connect(ours, options(1)).with_deadline(Duration::from_millis(50));
    let error = soon(client.wait_ready(Instant::now() + Duration::from_millis(50))).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Deadline);
    assert_eq!(soon(client.figures()).await.unwrap_err().kind, ErrorKind::Deadline);
    assert_eq!(soon(client.exec(spec(&["true"]))).await.map(|_| ()).unwrap_err().kind, ErrorKind::Deadline);
}

#[tokio::test]
async fn the_agent_survives_any_bytes() {
    let (guest, client) = started().await;
    drop(client);
    let mut agent = guest.accept().await;
    let mut state = 1u64;
    let mut bytes = vec![0; 300_000];
    for byte in &mut bytes {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        *byte = state.to_le_bytes()[7];
    }
    // True headers around untrue messages, streams that do not exist, credit for nobody.
    for kind in [Kind::Control, Kind::Data, Kind::Window, Kind::DataEnd] {
        let payload: &[u8] = if kind == Kind::DataEnd { b"" } else { b"\xff\xff\xff\xff" };
        for stream in [0, 4, u32::MAX] {
            encode_frame(&mut bytes, kind, 9, stream, payload);
        }
    }
    for stream in [0, u32::MAX, 4] {
        let exec = burgeon_guest::protocol::Exec { stream, argv: vec![b"".to_vec()], ..Default::default() };
        bytes.extend(control(0, &HostMessage::Request { id: 1, request: Request::Exec(exec) }));
    }
    assert!(bytes.len() > FLUSH_BYTES + HEADER_BYTES);
    agent.write_all(&bytes).await.unwrap();
    let client = AgentClient::connect(agent, options(9));
    soon(client.wait_ready(Instant::now() + Duration::from_secs(20))).await.unwrap();
    assert_eq!(output(&client, spec(&["echo", "alive"])).await.0, "alive\n");
}
