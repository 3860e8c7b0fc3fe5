//! Plays the host process: VMs run as soon as they are launched, and what a test holds back waits for it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{Arc, Mutex},
};

use burgeon_api::{
    Result, VmId,
    host::{DiskRequest, Envelope, Launch, Reply, Request},
    image::{Boot, Image},
    substrate::{Child, Forked},
    vm::{Accelerator, HostVm, Observed},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::watch,
};

#[derive(Clone)]
pub(crate) struct Host {
    vms: Arc<Mutex<BTreeMap<VmId, HostVm>>>,
    images: Arc<Mutex<BTreeMap<VmId, Image>>>,
    /// Requests that have come, as `remove NAME`; and those that get no answer for now.
    pub(crate) asked: Arc<watch::Sender<Vec<String>>>,
    held: Arc<watch::Sender<BTreeSet<String>>>,
    changed: Arc<watch::Sender<u64>>,
}

impl Host {
    pub(crate) fn listen(data: &Path) -> Host {
        let listener = UnixListener::bind(data.join("host.sock")).unwrap();
        let host = Host {
            vms: Arc::default(),
            images: Arc::default(),
            asked: Arc::new(watch::Sender::new(Vec::new())),
            held: Arc::new(watch::Sender::new(BTreeSet::new())),
            changed: Arc::new(watch::Sender::new(0)),
        };
        let served = host.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let host = served.clone();
                // A client that leaves ends its own connection and no more.
                tokio::spawn(async move { drop(host.answer(stream).await) });
            }
        });
        host
    }

    /// Holds back the answers to such requests (`remove NAME`).
    pub(crate) fn hold(&self, request: &str) {
        self.held.send_modify(|held| {
            held.insert(request.into());
        });
    }

    pub(crate) fn release(&self, request: &str) {
        self.held.send_modify(|held| {
            held.remove(request);
        });
    }

    /// Waits until such a request has come.
    pub(crate) async fn was_asked(&self, request: &str) {
        let mut asked = self.asked.subscribe();
        asked.wait_for(|asked| asked.iter().any(|one| one == request)).await.unwrap();
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.vms.lock().unwrap().values().any(|vm| vm.name == name)
    }

    /// Something happened in a VM.
    pub(crate) fn set(&self, name: &str, observed: &Observed) {
        for vm in self.vms.lock().unwrap().values_mut().filter(|vm| vm.name == name) {
            vm.observed = observed.clone();
        }
        self.changed.send_modify(|count| *count += 1);
    }

    fn name(&self, id: VmId) -> String {
        self.vms.lock().unwrap().get(&id).map_or_else(|| id.to_string(), |vm| vm.name.clone())
    }

    async fn note(&self, verb: &str, name: &str) {
        let request = format!("{verb} {name}");
        self.asked.send_modify(|asked| asked.push(request.clone()));
        self.held.subscribe().wait_for(|held| !held.contains(&request)).await.unwrap();
    }

    async fn answer(&self, mut stream: UnixStream) -> std::io::Result<()> {
        let length = stream.read_u32_le().await?;
        let mut message = vec![0; length as usize];
        stream.read_exact(&mut message).await?;
        let request = serde_json::from_slice::<Envelope>(&message)?.request;
        if matches!(request, Request::Watch) {
            send(&mut stream, &Reply::Stream).await?;
            let mut changed = self.changed.subscribe();
            while changed.changed().await.is_ok() {
                send(&mut stream, &"changed").await?;
            }
            return Ok(());
        }
        let quiet = matches!(request, Request::List);
        let reply = self.act(request).await.unwrap_or_else(Reply::Refused);
        if !quiet {
            self.changed.send_modify(|count| *count += 1);
        }
        send(&mut stream, &reply).await
    }

    async fn act(&self, request: Request) -> Result<Reply> {
        let stopped = || Observed::Stopped { reason: "asked to".into() };
        match request {
            Request::List => return Ok(Reply::Vms(self.vms.lock().unwrap().values().cloned().collect())),
            Request::Launch(launch) => {
                self.note("launch", &launch.name).await;
                self.images.lock().unwrap().insert(launch.id, launch.image.clone());
                self.vms.lock().unwrap().entry(launch.id).or_insert_with(|| running(launch.id, launch.name));
            }
            Request::Disk { vm, request: DiskRequest::Image } => {
                let image = self.images.lock().unwrap().get(&vm).unwrap().clone();
                return Ok(Reply::Image(Box::new(image)));
            }
            // A child whose name says so does not come up.
            Request::Fork { vm, children, .. } => {
                self.note("fork", &self.name(vm)).await;
                let one = |launch: Launch| {
                    let error = launch.name.ends_with("bad").then(|| burgeon_api::Error::unavailable("it is bad"));
                    if error.is_none() {
                        self.vms.lock().unwrap().insert(launch.id, running(launch.id, launch.name.clone()));
                    }
                    Child { id: launch.id, name: launch.name, error }
                };
                let children = children.into_iter().map(one).collect();
                return Ok(Reply::Forked(Forked { children, ..Forked::default() }));
            }
            Request::Start { vm, starts } => {
                self.note("start", &self.name(vm)).await;
                let mut vms = self.vms.lock().unwrap();
                let vm = vms.get_mut(&vm).unwrap();
                (vm.observed, vm.starts) = (Observed::Running, starts);
            }
            Request::Stop { vm, .. } => {
                self.note("stop", &self.name(vm)).await;
                if let Some(vm) = self.vms.lock().unwrap().get_mut(&vm) {
                    vm.observed = stopped();
                }
            }
            Request::Remove { vm } => {
                self.note("remove", &self.name(vm)).await;
                self.vms.lock().unwrap().remove(&vm);
            }
            other => panic!("nobody plays {other:?}"),
        }
        Ok(Reply::Done)
    }
}

fn running(id: VmId, name: String) -> HostVm {
    HostVm {
        id,
        name,
        observed: Observed::Running,
        pid: None,
        accelerator: Accelerator::Tcg,
        boot: Boot::Agent,
        limits: Vec::new(),
        guest: None,
        start_times: Vec::new(),
        resident: None,
        cpu_milliseconds: None,
        adoptions: 0,
        starts: 0,
        receipt: None,
        docked: None,
        snapshots: 0,
        size: None,
    }
}

async fn send(stream: &mut UnixStream, value: &impl serde::Serialize) -> std::io::Result<()> {
    let message = serde_json::to_vec(value)?;
    stream.write_u32_le(u32::try_from(message.len()).unwrap()).await?;
    stream.write_all(&message).await
}
