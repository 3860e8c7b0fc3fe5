//! The HTTP client of the command line, over the control process's unix socket. Where no server runs,
//! one is started that leaves again when it is idle.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use burgeon_api::{Error, Result, path_text};
use burgeon_host::layout::{Layout, Lock};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{Method, Request, Response, StatusCode, body::Incoming, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{net::UnixStream, time::Instant};

/// How long a server may take to start.
const START_DEADLINE: Duration = Duration::from_secs(20);
/// How long a server that breaks off before it answers is asked again.
const REPEAT: Duration = Duration::from_secs(10);
/// A server that is only asked about itself answers within this.
const ANSWER_DEADLINE: Duration = Duration::from_secs(15);
const BROKE_OFF: &str = "the server broke off";
/// A server that was started for a command leaves after this time without use.
pub(crate) const IDLE_EXIT: &str = "60s";
const SERVER_LOG: &str = "serve.log";
/// A log longer than this becomes `serve.log.1` when the next server starts.
const MOST_LOG: u64 = 1 << 20;

pub(crate) type Body = BoxBody<Bytes, std::io::Error>;
pub(crate) type Upgraded = TokioIo<hyper::upgrade::Upgraded>;

#[derive(Clone, Debug)]
pub(crate) struct Client {
    pub(crate) layout: Layout,
}

impl Client {
    pub(crate) fn new(data: &Path) -> Result<Client> {
        Ok(Client { layout: Layout::create(data)? })
    }

    /// For asking a server that may not be there: makes nothing.
    pub(crate) fn at(data: &Path) -> Result<Client> {
        let data = std::path::absolute(data).map_err(|error| Error::io("resolve the data directory", &error))?;
        Ok(Client { layout: Layout { data } })
    }

    /// The answer of a server that runs; none is started.
    pub(crate) async fn get_if_served<T: DeserializeOwned>(&self, path: &str) -> Result<Option<T>> {
        let Ok(stream) = UnixStream::connect(self.layout.control_socket()).await else { return Ok(None) };
        let asking = async {
            let response = Self::exchange(stream, Self::request(Method::GET, path, empty())?).await?;
            Self::answer(response).await
        };
        tokio::time::timeout(ANSWER_DEADLINE, asking)
            .await
            .map_err(|_| {
                Error::deadline(format!("the server did not answer within {} s", ANSWER_DEADLINE.as_secs()))
                    .with_hint("its log tells more: serve.log in the data directory")
            })?
            .map(Some)
    }

    /// Connects, and starts a server where none listens.
    async fn connect(&self) -> Result<UnixStream> {
        let socket = self.layout.control_socket();
        if let Ok(stream) = UnixStream::connect(&socket).await {
            return Ok(stream);
        }
        let said_before = fs::metadata(self.layout.data.join(SERVER_LOG)).map_or(0, |about| about.len());
        let mut server = self.start_server()?;
        let deadline = Instant::now() + START_DEADLINE;
        let mut ended = None;
        loop {
            if let Ok(stream) = UnixStream::connect(&socket).await {
                return Ok(stream);
            }
            if ended.is_none()
                && let Ok(Some(status)) = server.try_wait()
            {
                // Perhaps another command started one at the same moment; its socket may come yet.
                ended = Some((Instant::now(), status));
            }
            let given_up = ended.is_some_and(|(at, _)| at.elapsed() > Duration::from_secs(2));
            if given_up || Instant::now() > deadline {
                let log = self.layout.data.join(SERVER_LOG);
                // What earlier servers said stays in the log, and is none of this one's words.
                let length = fs::metadata(&log).map_or(0, |about| about.len());
                let new = length.checked_sub(said_before).unwrap_or(length);
                let said = burgeon_qemu::process::log_tail(&log, new.min(1500));
                return Err(Error::unavailable(format!("the server did not start: {said}"))
                    .with_hint("burgeon doctor checks what it may lack"));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn start_server(&self) -> Result<std::process::Child> {
        let program = std::env::current_exe().map_err(|error| Error::io("find this program", &error))?;
        let log = open_log(&self.layout)?;
        let errors = log.try_clone().map_err(|error| Error::io("share the server's log", &error))?;
        std::process::Command::new(program)
            .arg("--data")
            .arg(&self.layout.data)
            .args(["serve", "--idle-exit", IDLE_EXIT])
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .current_dir("/")
            .spawn()
            .map_err(|error| Error::io("start the server", &error))
    }

    /// Sends a request and returns the answer's head; a refusal is an error.
    pub(crate) async fn send(&self, request: Request<Body>) -> Result<Response<Incoming>> {
        Self::exchange(self.connect().await?, request).await
    }

    async fn exchange(stream: UnixStream, request: Request<Body>) -> Result<Response<Incoming>> {
        let broke = |error: hyper::Error| Error::unavailable(format!("{BROKE_OFF}: {error}"));
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broke)?;
        tokio::spawn(connection.with_upgrades());
        let response = sender.send_request(request).await.map_err(broke)?;
        if response.status().is_success() || response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response);
        }
        let status = response.status();
        let body = response.into_body().collect().await.map_err(broke)?.to_bytes();
        Err(serde_json::from_slice(&body).unwrap_or_else(|_| {
            let text = String::from_utf8_lossy(&body);
            Error::internal(format!("the server answered {status}: {}", path_text::printable(text.trim())))
        }))
    }

    /// Sends a request that may be repeated, as all of the API but the upload of files may: what is created
    /// has an id of the client's choice. A server that is killed between accepting and answering is
    /// followed by another, which is asked again.
    async fn ask(&self, make: impl Fn() -> Result<Request<Body>>) -> Result<Response<Incoming>> {
        let begun = Instant::now();
        loop {
            match self.send(make()?).await {
                Err(error) if error.message.starts_with(BROKE_OFF) && begun.elapsed() < REPEAT => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                outcome => return outcome,
            }
        }
    }

    fn request(method: Method, path: &str, body: Body) -> Result<Request<Body>> {
        Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "burgeon")
            .header(header::CONTENT_TYPE, "application/json")
            .body(body)
            .map_err(|error| Error::invalid(format!("{path}: {error}")))
    }

    async fn answer<T: DeserializeOwned>(response: Response<Incoming>) -> Result<T> {
        let body = response
            .into_body()
            .collect()
            .await
            .map_err(|error| Error::unavailable(format!("the server broke off: {error}")))?
            .to_bytes();
        let body: &[u8] = if body.is_empty() { b"null" } else { &body };
        serde_json::from_slice(body)
            .map_err(|error| Error::damaged(format!("the server's answer does not read: {error}")))
    }

    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        Self::answer(self.ask(|| Self::request(Method::GET, path, empty())).await?).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Result<()> {
        Self::answer(self.ask(|| Self::request(Method::DELETE, path, empty())).await?).await
    }

    pub(crate) async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        Self::answer(self.ask(|| Self::request(Method::POST, path, json(body)?)).await?).await
    }

    /// Sends a body as it is; for files.
    pub(crate) async fn put(&self, path: &str, length: u64, body: Body) -> Result<()> {
        let mut request = Self::request(Method::PUT, path, body)?;
        request.headers_mut().insert(header::CONTENT_LENGTH, length.into());
        Self::answer(self.send(request).await?).await
    }

    pub(crate) async fn get_raw(&self, path: &str) -> Result<Response<Incoming>> {
        self.ask(|| Self::request(Method::GET, path, empty())).await
    }

    /// A stream of JSON lines. `body` absent: a GET.
    pub(crate) async fn lines<T: DeserializeOwned>(
        &self,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Lines<T>> {
        let request = || match body {
            Some(body) => Self::request(Method::POST, path, json(body)?),
            None => Self::request(Method::GET, path, empty()),
        };
        let body = self.ask(request).await?.into_body();
        Ok(Lines { body, buffer: Vec::new(), kind: std::marker::PhantomData })
    }

    /// Opens a stream by upgrading the connection.
    pub(crate) async fn upgrade(&self, path: &str) -> Result<Upgraded> {
        let request = || {
            let mut request = Self::request(Method::POST, path, empty())?;
            request.headers_mut().insert(header::CONNECTION, header::HeaderValue::from_static("upgrade"));
            request.headers_mut().insert(header::UPGRADE, header::HeaderValue::from_static("burgeon-stream"));
            Ok(request)
        };
        let response = self.ask(request).await?;
        let upgraded = hyper::upgrade::on(response)
            .await
            .map_err(|error| Error::unavailable(format!("the server broke off: {error}")))?;
        Ok(TokioIo::new(upgraded))
    }
}

/// The log of servers that commands start. It is only added to: another server may be writing it at this
/// moment. A long one makes room once nobody has it.
fn open_log(layout: &Layout) -> Result<fs::File> {
    let path = layout.data.join(SERVER_LOG);
    let long = fs::metadata(&path).is_ok_and(|about| about.len() > MOST_LOG);
    let served = ["serve", "host", "control"].iter().any(|kind| Lock::is_taken(layout, kind));
    if long
        && !served
        && let Err(error) = fs::rename(&path, layout.data.join(format!("{SERVER_LOG}.1")))
    {
        tracing::debug!(%error, "the long log stays");
    }
    let opened = fs::File::options().append(true).create(true).open(&path);
    opened.map_err(|error| Error::io(format!("open {}", path.display()), &error))
}

pub(crate) fn empty() -> Body {
    full(Bytes::new())
}

pub(crate) fn full(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(|never| match never {}).boxed()
}

fn json(body: &impl Serialize) -> Result<Body> {
    serde_json::to_vec(body).map(|bytes| full(bytes.into())).map_err(|error| Error::internal(error.to_string()))
}

/// JSON lines of an answer.
pub(crate) struct Lines<T> {
    body: Incoming,
    buffer: Vec<u8>,
    kind: std::marker::PhantomData<T>,
}

impl<T: DeserializeOwned> Lines<T> {
    /// The next line; `None` at the end. Safe to cancel.
    pub(crate) async fn next(&mut self) -> Result<Option<T>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return serde_json::from_slice(&line)
                    .map(Some)
                    .map_err(|error| Error::damaged(format!("the server's answer does not read: {error}")));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.buffer.extend_from_slice(data);
                    }
                }
                Some(Err(error)) => return Err(Error::unavailable(format!("the server broke off: {error}"))),
            }
        }
    }
}

/// A part of a URL's path or query, with everything escaped that is no letter, digit, `-`, `.`, `_` or `~`.
pub(crate) fn escape(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

/// Where data is kept when nobody says otherwise.
pub(crate) fn default_data() -> Result<PathBuf> {
    if let Some(data) = std::env::var_os("XDG_DATA_HOME").filter(|value| !value.is_empty()) {
        return Ok(PathBuf::from(data).join("burgeon"));
    }
    std::env::var_os("HOME")
        .filter(|value| !value.is_empty())
        .map(|home| PathBuf::from(home).join(".local/share/burgeon"))
        .ok_or_else(|| {
            Error::invalid("neither BURGEON_DATA nor XDG_DATA_HOME nor HOME is set").with_hint("give --data DIR")
        })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn the_log_of_a_live_server_is_added_to_and_a_long_one_is_put_aside_when_nobody_writes_it() {
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::create(directory.path()).unwrap();
        let (log, aside) = (layout.data.join(SERVER_LOG), layout.data.join("serve.log.1"));
        open_log(&layout).unwrap().write_all(b"first\n").unwrap();
        open_log(&layout).unwrap().write_all(b"second\n").unwrap();
        assert_eq!(fs::read_to_string(&log).unwrap(), "first\nsecond\n");
        fs::write(&log, vec![b'x'; 2 << 20]).unwrap();
        let live = Lock::take(&layout, "control").unwrap();
        open_log(&layout).unwrap().write_all(b"third\n").unwrap();
        assert!(fs::read(&log).unwrap().ends_with(b"third\n") && !aside.exists());
        drop(live);
        drop(open_log(&layout).unwrap());
        assert_eq!(fs::metadata(&log).unwrap().len(), 0);
        assert!(fs::read(&aside).unwrap().ends_with(b"third\n"));
    }
}
