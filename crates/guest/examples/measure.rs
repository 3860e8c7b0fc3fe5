//! Measures a guest's agent channel: `measure SOCKET [RAW_SOCKET]`.
//!
//! SOCKET is the chardev of the port `burgeon.agent.0`. RAW_SOCKET, if given, is that of a second port named `raw.0`,
//! and plain `dd` to and from it is measured beside the agent. Sizes and counts are fixed; times are medians.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a tool for developers: it prints, and stops at any error"
)]

use std::time::{Duration, Instant};

use burgeon_api::exec::ExecSpec;
use burgeon_guest::{
    client::{AgentClient, ExecEvent, Options},
    protocol::StopHow,
};
use bytes::Bytes;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

const MEBIBYTES: usize = 32;

async fn connect(path: &str) -> UnixStream {
    loop {
        match UnixStream::connect(path).await {
            Ok(stream) => return stream,
            Err(_) => tokio::time::sleep(Duration::from_millis(2)).await,
        }
    }
}

fn spec(words: &[&str]) -> ExecSpec {
    ExecSpec { argv: words.iter().map(ToString::to_string).collect(), ..ExecSpec::default() }
}

async fn run(client: &AgentClient, script: &str) -> (String, i32) {
    let mut exec = client.exec(spec(&["sh", "-c", script])).await.unwrap();
    let (out, errors, exit) = exec.output.collect(1 << 20).await;
    (String::from_utf8_lossy(&[out, errors].concat()).into_owned(), exit.code())
}

fn rate(bytes: usize, time: Duration) -> String {
    format!("{:.0} MB/s", bytes as f64 / 1e6 / time.as_secs_f64())
}

async fn receive(client: &AgentClient) -> String {
    let count = format!("count={}", MEBIBYTES * 16);
    let mut exec = client.exec(spec(&["dd", "if=/dev/zero", "bs=64k", &count])).await.unwrap();
    let (begun, mut bytes) = (Instant::now(), 0);
    while let Some(event) = exec.output.next().await {
        if let ExecEvent::Stdout(data) = event {
            bytes += data.len();
        }
    }
    assert_eq!(bytes, MEBIBYTES << 20);
    rate(bytes, begun.elapsed())
}

async fn send(client: &AgentClient) -> String {
    let exec = client.exec(spec(&["dd", "of=/dev/null", "bs=64k"])).await.unwrap();
    let (mut stdin, mut output, _control) = exec.split();
    let piece = Bytes::from(vec![0; 65_536]);
    let begun = Instant::now();
    for _ in 0..MEBIBYTES * 16 {
        stdin.send(piece.clone()).await.unwrap();
    }
    stdin.finish();
    output.collect(1000).await;
    rate(MEBIBYTES << 20, begun.elapsed())
}

async fn raw(client: &AgentClient, path: &str) -> (String, String) {
    let mut port = connect(path).await;
    let find = "for p in /sys/class/virtio-ports/*; do read n < $p/name; [ $n = raw.0 ] && P=/dev/${p##*/}; done; ";
    let script = format!("{find} dd if=/dev/zero of=$P bs=64k count={} 2>/dev/null", MEBIBYTES * 16);
    let exec = client.exec(spec(&["sh", "-c", &script])).await.unwrap();
    let mut buffer = vec![0; 1 << 20];
    let mut left = MEBIBYTES << 20;
    let mut begun = None;
    while left > 0 {
        left -= port.read(&mut buffer).await.unwrap();
        begun.get_or_insert_with(Instant::now);
    }
    let out = rate(MEBIBYTES << 20, begun.unwrap().elapsed());
    drop(exec);
    let script = format!(
        "{find} echo go; exec dd if=$P of=/dev/null bs=64k iflag=fullblock count={} 2>/dev/null",
        MEBIBYTES * 16
    );
    let mut exec = client.exec(spec(&["sh", "-c", &script])).await.unwrap();
    exec.output.next().await;
    let begun = Instant::now();
    port.write_all(&vec![0; MEBIBYTES << 20]).await.unwrap();
    exec.output.collect(1000).await;
    (out, rate(MEBIBYTES << 20, begun.elapsed()))
}

async fn piped(client: &AgentClient, path: &str) -> String {
    let mut port = connect(path).await;
    let find = "for p in /sys/class/virtio-ports/*; do read n < $p/name; [ $n = raw.0 ] && P=/dev/${p##*/}; done; ";
    let script =
        format!("{find} dd if=/dev/zero bs=64k count={} 2>/dev/null | dd of=$P bs=64k 2>/dev/null", MEBIBYTES * 16);
    let _exec = client.exec(spec(&["sh", "-c", &script])).await.unwrap();
    let mut buffer = vec![0; 1 << 20];
    let mut left = MEBIBYTES << 20;
    let mut begun = None;
    while left > 0 {
        left -= port.read(&mut buffer).await.unwrap();
        begun.get_or_insert_with(Instant::now);
    }
    rate(MEBIBYTES << 20, begun.unwrap().elapsed())
}

async fn file(client: &AgentClient) -> (String, String) {
    let begun = Instant::now();
    let content = vec![0; MEBIBYTES << 20];
    client.put(b"/run/measured", 0o600, content.len() as u64, &content[..]).await.unwrap();
    let put = rate(MEBIBYTES << 20, begun.elapsed());
    let begun = Instant::now();
    let (.., mut pieces) = client.get(b"/run/measured").await.unwrap();
    let mut bytes = 0;
    while let Some(piece) = pieces.next().await.unwrap() {
        bytes += piece.len();
    }
    assert_eq!(bytes, MEBIBYTES << 20);
    (rate(bytes, begun.elapsed()), put)
}

async fn median(client: &AgentClient, words: &[&str], count: usize) -> String {
    let mut times = Vec::new();
    for _ in 0..count {
        let begun = Instant::now();
        let mut exec = client.exec(spec(words)).await.unwrap();
        exec.output.collect(1000).await;
        times.push(begun.elapsed());
    }
    times.sort();
    format!(
        "{:.2} ms median, {:.2} p95",
        times[count / 2].as_secs_f64() * 1e3,
        times[count * 95 / 100].as_secs_f64() * 1e3
    )
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let paths: Vec<String> = std::env::args().skip(1).collect();
    let begun = Instant::now();
    let options = |session| Options::new([session; 16], "measured", || 0);
    let client = AgentClient::connect(connect(&paths[0]).await, options(1));
    let about = client.wait_ready(tokio::time::Instant::now() + Duration::from_secs(60)).await.unwrap();
    println!("ready after {:.0} ms (guest uptime {} ms)", begun.elapsed().as_secs_f64() * 1e3, about.uptime_ms);
    println!("{about:?}");
    println!(
        "{}",
        run(&client, "ps | grep -v '\\['; ls -a /; cat /proc/cgroups | wc -l; cat /proc/meminfo | head -3").await.0
    );
    let mut times = Vec::new();
    for _ in 0..300 {
        let begun = Instant::now();
        client.figures().await.unwrap();
        times.push(begun.elapsed());
    }
    times.sort();
    println!("request round trip {:.3} ms median", times[150].as_secs_f64() * 1e3);
    println!("{}", run(&client, "time sh -c 'i=0; while [ $i -lt 100 ]; do /bin/true; i=$((i+1)); done'").await.0);
    println!("exec true: {}", median(&client, &["true"], 100).await);
    println!("exec sh -c true: {}", median(&client, &["sh", "-c", "true"], 50).await);
    for _ in 0..3 {
        let (out, into) = if let Some(path) = paths.get(1) { raw(&client, path).await } else { Default::default() };
        println!("out {} (raw {out}), in {} (raw {into})", receive(&client).await, send(&client).await);
        if let Some(path) = paths.get(1) {
            println!("raw out through a pipe: {}", piped(&client, path).await);
        }
        let (get, put) = file(&client).await;
        println!("get {get}, put {put}");
    }
    let ticker = client.exec(spec(&["sh", "-c", "while :; do echo tick; sleep 0.02; done"])).await.unwrap();
    let (_stdin, mut ticks, _control) = ticker.split();
    ticks.next().await;
    let begun = Instant::now();
    client.freeze().await.unwrap();
    println!("freeze took {:.1} ms", begun.elapsed().as_secs_f64() * 1e3);
    let mut late = 0;
    while tokio::time::timeout(Duration::from_millis(300), ticks.next()).await.is_ok() {
        late += 1;
    }
    println!(
        "ticks that were still on their way: {late}; exec while frozen: {:?}",
        client.exec(spec(&["true"])).await.map(|_| ())
    );
    client.thaw().await.unwrap();
    println!("tick after thaw: {:?}", tokio::time::timeout(Duration::from_secs(2), ticks.next()).await.is_ok());
    // The host is lost in mid-stream, and another comes.
    let _flood = client.exec(spec(&["yes"])).await.unwrap();
    client.close();
    client.wait_ended().await;
    let begun = Instant::now();
    let client = AgentClient::connect(connect(&paths[0]).await, options(2));
    client.wait_ready(tokio::time::Instant::now() + Duration::from_secs(20)).await.unwrap();
    println!(
        "attached anew after {:.1} ms; left of `yes`: {:?}",
        begun.elapsed().as_secs_f64() * 1e3,
        run(&client, "ps | grep -c '[y]es'").await
    );
    println!("{:?}", client.figures().await);
    client.stop(StopHow::PowerOff).await.unwrap();
    println!("stop accepted; {}", client.wait_ended().await);
}
