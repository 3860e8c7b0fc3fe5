//! A control process in a data directory of its own, with one image and a host that is played.

use std::{fs, path::PathBuf, time::Duration};

use burgeon_api::{
    Error, Result, VmId,
    http::{CreateVm, Progress},
    image::{Boot, Image},
    profile::Profile,
    vm::VmView,
};
use burgeon_control::Options;
use burgeon_store::places::Elsewhere;
use http_body_util::{BodyExt, Full};
use hyper::{Request, body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::{net::UnixStream, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::host::Host;

/// Nothing here takes longer, or it hangs.
const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) struct Desk {
    directory: tempfile::TempDir,
    pub(crate) host: Host,
    shutdown: CancellationToken,
    serving: Option<JoinHandle<Result<()>>>,
}

impl Desk {
    pub(crate) async fn open() -> Desk {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("d/images/tiny");
        fs::create_dir_all(&image).unwrap();
        fs::write(directory.path().join("d/burgeon-data"), "1\n").unwrap();
        let about = Image {
            format: Image::FORMAT,
            name: "tiny".into(),
            description: String::new(),
            boot: Boot::Agent,
            digest: "0".repeat(64),
            recipe: String::new(),
            kernel_release: String::new(),
            disk: None,
            map: None,
            modules: Vec::new(),
            kernel_parameters: Vec::new(),
            init: String::new(),
            created_s: 0,
            history: Vec::new(),
        };
        fs::write(image.join(Image::FILE), serde_json::to_vec(&about).unwrap()).unwrap();
        fs::write(image.join(Image::KERNEL), "MZ").unwrap();
        fs::write(image.join(Image::INITRAMFS), "070701").unwrap();
        let host = Host::listen(&directory.path().join("d"));
        let mut desk = Desk { directory, host, shutdown: CancellationToken::new(), serving: None };
        desk.serve().await;
        desk
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.directory.path().join("d")
    }

    pub(crate) fn meta(&self) -> rusqlite::Connection {
        rusqlite::Connection::open(self.data().join("meta.db")).unwrap()
    }

    pub(crate) async fn serve(&mut self) {
        self.shutdown = CancellationToken::new();
        let options = Options {
            data: self.data(),
            version: "test".into(),
            idle_exit: None,
            elsewhere: Elsewhere::default(),
            settings: Vec::new(),
        };
        self.serving = Some(tokio::spawn(burgeon_control::run(options, self.shutdown.clone())));
        let socket = self.data().join("control.sock");
        let up = async {
            while UnixStream::connect(&socket).await.is_err() {
                tokio::task::yield_now().await;
            }
        };
        timeout(DEADLINE, up).await.unwrap();
    }

    /// Asks the process to leave; what comes back ends when it has left.
    pub(crate) fn leave(&mut self) -> impl Future<Output = ()> + use<> {
        self.shutdown.cancel();
        let serving = self.serving.take().unwrap();
        async move { timeout(DEADLINE, serving).await.unwrap().unwrap().unwrap() }
    }

    pub(crate) async fn restart(&mut self) {
        self.leave().await;
        self.serve().await;
    }

    pub(crate) fn ask<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: &serde_json::Value,
    ) -> impl Future<Output = Result<T>> + use<T> {
        let asking = self.ask_bytes(method, path, body);
        async move { asking.await.map(|body| serde_json::from_slice(&body).unwrap()) }
    }

    /// The last line of the answer to long work.
    pub(crate) async fn work(&self, path: &str, body: &serde_json::Value) -> Result<Progress> {
        let lines = self.ask_bytes("POST", path, body).await?;
        let last = lines.split(|byte| *byte == b'\n').rfind(|line| !line.is_empty()).unwrap();
        Ok(serde_json::from_slice(last).unwrap())
    }

    fn ask_bytes(
        &self,
        method: &str,
        path: &str,
        body: &serde_json::Value,
    ) -> impl Future<Output = Result<Bytes>> + use<> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "burgeon")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body.to_string())))
            .unwrap();
        let socket = self.data().join("control.sock");
        async move {
            let asking = async {
                let stream = UnixStream::connect(socket).await.unwrap();
                let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
                tokio::spawn(connection);
                let response = sender.send_request(request).await.unwrap();
                let good = response.status().is_success();
                let body = response.into_body().collect().await.unwrap().to_bytes();
                let body = if body.is_empty() { Bytes::from_static(b"null") } else { body };
                if good { Ok(body) } else { Err(serde_json::from_slice::<Error>(&body).unwrap()) }
            };
            timeout(DEADLINE, asking).await.unwrap()
        }
    }

    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.ask("GET", path, &json!(null)).await
    }

    pub(crate) async fn post(&self, path: &str) -> Result<VmView> {
        self.ask("POST", path, &json!({})).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Result<()> {
        self.ask("DELETE", path, &json!(null)).await
    }

    pub(crate) async fn create(&self, name: &str) -> VmView {
        let request = CreateVm {
            id: VmId::generate(),
            name: Some(name.into()),
            image: "tiny".into(),
            profile: Profile::named("tiny").unwrap(),
            life: burgeon_api::life::SetLife::default(),
            provisions: burgeon_api::provisions::Provisions::default(),
        };
        self.ask("POST", "/v1/vms", &json!(request)).await.unwrap()
    }

    /// A VM that runs.
    pub(crate) async fn running(&self, name: &str) -> VmView {
        self.create(name).await;
        self.get(&format!("/v1/vms/{name}/wait")).await.unwrap()
    }

    /// Asks until it is so; for what the reconcile loop does in its own time.
    pub(crate) async fn until(&self, name: &str, so: impl Fn(&VmView) -> bool) -> VmView {
        let looking = async {
            loop {
                let view: VmView = self.get(&format!("/v1/vms/{name}")).await.unwrap();
                if so(&view) {
                    return view;
                }
                tokio::task::yield_now().await;
            }
        };
        timeout(DEADLINE, looking).await.unwrap()
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}
