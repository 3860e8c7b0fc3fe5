//! A small blocking HTTP client over a unix socket: one connection per request, as the command line does it.
//! Blocking, so that no scheduler of ours stands between the wire and the clock.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::{Serialize, de::DeserializeOwned};

/// A VM may take this long to come up.
const DEADLINE: Duration = Duration::from_secs(200);
const MOST_HEAD: usize = 64 << 10;

#[derive(Clone, Debug)]
pub(crate) struct Client {
    pub(crate) socket: PathBuf,
}

/// The head of an answer; the body is still on the connection.
pub(crate) struct Response {
    status: u16,
    length: usize,
    pub(crate) connection: BufReader<UnixStream>,
}

impl Client {
    pub(crate) fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.send("GET", path, "", &[])?.json()
    }

    pub(crate) fn delete(&self, path: &str) -> Result<()> {
        self.send("DELETE", path, "", &[])?.json()
    }

    pub(crate) fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        self.send("POST", path, "Content-Type: application/json\r\n", &serde_json::to_vec(body)?)?.json()
    }

    pub(crate) fn put(&self, path: &str, body: &[u8]) -> Result<()> {
        self.send("PUT", path, "", body)?.json()
    }

    /// An answer of exactly the size of `body`.
    pub(crate) fn get_into(&self, path: &str, body: &mut [u8]) -> Result<()> {
        let mut response = self.send("GET", path, "", &[])?;
        ensure!(response.length == body.len(), "{path} has {} bytes, not {}", response.length, body.len());
        response.connection.read_exact(body).context("read the answer")
    }

    /// Turns the connection into a stream of bytes.
    pub(crate) fn upgrade(&self, path: &str) -> Result<BufReader<UnixStream>> {
        let response = self.send("POST", path, "Connection: upgrade\r\nUpgrade: burgeon-stream\r\n", &[])?;
        ensure!(response.status == 101, "{path}: status {} where 101 was expected", response.status);
        Ok(response.connection)
    }

    fn send(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> Result<Response> {
        let mut stream = UnixStream::connect(&self.socket).context("connect to the server")?;
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.set_write_timeout(Some(DEADLINE))?;
        let length = body.len();
        let head = format!("{method} {path} HTTP/1.1\r\nHost: burgeon\r\n{headers}Content-Length: {length}\r\n\r\n");
        stream.write_all(head.as_bytes()).with_context(|| format!("send {method} {path}"))?;
        // A server that refuses stops reading; its reason is in the answer.
        let sent = stream.write_all(body);
        let mut connection = BufReader::with_capacity(64 << 10, stream);
        let response = read_head(&mut connection).and_then(|(status, length)| {
            let response = Response { status, length, connection };
            if matches!(status, 200..300 | 101) { Ok(response) } else { Err(response.refusal()) }
        });
        let response = response.with_context(|| format!("{method} {path}"))?;
        sent.with_context(|| format!("send {method} {path}"))?;
        Ok(response)
    }
}

fn read_head(connection: &mut impl BufRead) -> Result<(u16, usize)> {
    let mut head = String::new();
    let mut status = None;
    let mut content = 0;
    loop {
        let mut line = String::new();
        let count = connection.read_line(&mut line).context("read the answer")?;
        head.push_str(&line);
        ensure!(count > 0 && head.len() < MOST_HEAD, "the server broke off");
        let line = line.trim_end();
        if status.is_none() {
            status = line.split(' ').nth(1).and_then(|code| code.parse().ok());
            ensure!(status.is_some(), "\"{line}\" begins no HTTP answer");
        } else if line.is_empty() {
            return Ok((status.unwrap_or(0), content));
        } else if let Some((name, value)) = line.split_once(':') {
            match name.to_ascii_lowercase().as_str() {
                "content-length" => content = value.trim().parse().context("read Content-Length")?,
                "transfer-encoding" => bail!("an answer of unknown length is not expected here"),
                _ => {}
            }
        }
    }
}

impl Response {
    fn body(mut self) -> Result<Vec<u8>> {
        let mut body = vec![0; self.length];
        self.connection.read_exact(&mut body).context("read the answer")?;
        Ok(body)
    }

    fn json<T: DeserializeOwned>(self) -> Result<T> {
        let body = self.body()?;
        let body: &[u8] = if body.is_empty() { b"null" } else { &body };
        serde_json::from_slice(body).context("read the answer")
    }

    fn refusal(self) -> anyhow::Error {
        let status = self.status;
        match self.json::<burgeon_api::Error>() {
            Ok(error) => error.into(),
            Err(_) => anyhow!("the server answered {status}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::read_head;

    #[test]
    fn heads_are_read_and_bad_ones_refused() {
        let read = |text: &str| read_head(&mut text.as_bytes());
        assert_eq!(read("HTTP/1.1 200 OK\r\nContent-Length: 12\r\nx: y\r\n\r\nrest").unwrap(), (200, 12));
        assert_eq!(read("HTTP/1.1 101 Switching Protocols\r\n\r\n").unwrap(), (101, 0));
        for bad in
            ["", "nonsense\r\n\r\n", "HTTP/1.1 200 OK\r\n", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"]
        {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
