//! Virtual machines.

use std::path::PathBuf;

use burgeon_api::{
    Error, Result, VmId,
    disk::CloneVm,
    document::Document,
    http::{CreateVm, ServerView, StopVm},
    image::Boot,
    life::SetLife,
    login::{Login, check_key},
    profile::Profile,
    substrate::{ActivateVms, Keep},
    vm::{Accelerator, Observed, Resize, Resized, Size, VmView},
};
use http_body_util::BodyExt;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixListener,
};

use super::{Context, copy};
use crate::{
    arguments::{LifeArguments, SizeArguments, VmCommand, VmName},
    client::{Client, escape},
    output, terminal,
};

pub(super) async fn run(context: &Context, command: VmCommand) -> Result<u8> {
    match command {
        VmCommand::Create {
            substrate, snapshot, name, count, keep_connections, size, provide, life, no_wait, ..
        } if substrate.is_some() || snapshot.is_some() => {
            let source = match (substrate, snapshot) {
                (Some(substrate), _) => super::substrate::of(&substrate),
                (None, snapshot) => super::snapshot::named(&snapshot.unwrap_or_default())?,
            };
            let provisions = super::provisions::read(provide)?;
            let (ids, names) = super::substrate::new_vms(name, count);
            let keep = Keep { connections: keep_connections, secrets: false };
            let request = ActivateVms { ids, names, life: set_life(life), keep, resize: resize(size), provisions };
            super::substrate::activate(context, &source, request, !no_wait).await
        }
        VmCommand::Create { image, name, profile, ssh_key, user, size, provide, life, no_wait, .. } => {
            if resize(size) != Resize::default() {
                return Err(Error::invalid("a VM that boots has the memory and the CPUs that its profile says")
                    .with_hint("name another profile: --profile; or change the VM later: burgeon vm set"));
            }
            let image = image.ok_or_else(|| Error::invalid("neither an image nor a substrate is named"))?;
            let mut profile = read_profile(&profile)?;
            if !ssh_key.is_empty() {
                profile.login = Some(read_login(&ssh_key, user)?);
            }
            let provisions = super::provisions::read(provide)?;
            let (id, life) = (VmId::generate(), set_life(life));
            create(context, CreateVm { id, name, image, profile, life, provisions }, !no_wait).await
        }
        VmCommand::Show { vm, timing } => show(context, &vm, timing).await,
        VmCommand::Console(VmName { vm }) => console(context, &vm).await,
        VmCommand::Display { vm, socket } => display(context, &vm, socket).await,
        VmCommand::Ssh { vm, arguments } => ssh(context, &vm, &arguments).await,
        VmCommand::Cp { from, to, recursive } => copy::copy(&context.client()?, &from, &to, recursive).await,
        VmCommand::Clone { vm, name, snapshot, no_wait } => clone(context, &vm, name, snapshot, !no_wait).await,
        VmCommand::Start { vms, no_wait } => start(context, &vms, !no_wait).await,
        VmCommand::Stop { vms, force } => stop(context, &vms, force).await,
        VmCommand::Rm { vms, force } => remove(context, &vms, force).await,
        VmCommand::Park { vms } => each(context, &vms, "park").await,
        VmCommand::Set { vms, size, life } => set(context, &vms, resize(size), set_life(life)).await,
        VmCommand::Pause { vms } => each(context, &vms, "pause").await,
        VmCommand::Resume { vms } => each(context, &vms, "resume").await,
        VmCommand::Snapshot { vm, name } => super::snapshot::take(context, &vm, name).await,
        VmCommand::Snapshots { vm, rm } if rm.is_empty() => super::snapshot::list(context, &vm).await,
        VmCommand::Snapshots { vm, rm } => super::snapshot::remove(context, &vm, &rm).await,
        VmCommand::Rollback { vm, snapshot } => super::snapshot::roll_back(context, &vm, snapshot).await,
        VmCommand::Receipt { vm, all: true } => super::substrate::receipts(context, &vm).await,
        VmCommand::Receipt { vm, all: false } => super::substrate::receipt(context, &vm).await,
        VmCommand::Freeze(VmName { vm }) => verb(context, &vm, "freeze").await,
        VmCommand::Thaw(VmName { vm }) => verb(context, &vm, "thaw").await,
        // These have short forms, and are met before.
        VmCommand::Fork(_)
        | VmCommand::Ls(_)
        | VmCommand::Exec(_)
        | VmCommand::Shell(_)
        | VmCommand::Logs(_)
        | VmCommand::Disk(_) => Ok(2),
    }
}

pub(super) fn path(vm: &str) -> String {
    format!("/v1/vms/{}", escape(vm))
}

pub(super) fn read_profile(text: &str) -> Result<Profile> {
    if !text.contains('/') && !text.ends_with(".toml") {
        return Profile::named(text);
    }
    let content =
        std::fs::read_to_string(text).map_err(|error| Error::io(format!("read the profile {text}"), &error))?;
    let document = Document::new(text, content);
    let profile: Profile = document.parse()?;
    profile.check().map_err(|(key, error)| document.locate(&[key.into()], error))?;
    Ok(profile)
}

fn read_login(files: &[PathBuf], user: Option<String>) -> Result<Login> {
    let read = |file: &PathBuf| {
        let shown = file.display();
        let bytes = std::fs::read(file).map_err(|error| Error::io(format!("read the key {shown}"), &error))?;
        let text = String::from_utf8(bytes).map_err(|_| Error::invalid(format!("{shown}: the key is not UTF-8")))?;
        let key = text.strip_suffix('\n').unwrap_or(&text).trim_end_matches(['\r', ' ']);
        check_key(key).map_err(|error| error.context(shown))?;
        Ok(key.to_string())
    };
    let login = Login { user, keys: files.iter().map(read).collect::<Result<_>>()? };
    login.check().map_err(|error| error.context("--user"))?;
    Ok(login)
}

/// A foreign image has no agent to open a shell.
fn tell_way_in(vm: &VmView) {
    let name = &vm.name;
    match &vm.profile.login {
        None => output::note(&format!(
            "no agent, and the seed names no user: log in on its console, burgeon vm console {name} (or create it with --ssh-key FILE --user NAME)"
        )),
        Some(login) => {
            let user = login.user.as_deref().unwrap_or("the image's own user");
            output::note(&format!(
                "no agent: where the image runs cloud-init and an SSH server, {user} may log in with the key; its console: burgeon vm console {name}"
            ));
        }
    }
}

async fn create(context: &Context, mut request: CreateVm, wait: bool) -> Result<u8> {
    let client = context.client()?;
    let about: burgeon_api::image::ImageView = client.get(&format!("/v1/images/{}", escape(&request.image))).await?;
    let foreign = about.image.as_ref().is_some_and(|image| image.boot == Boot::Firmware);
    if about.image.is_some_and(|image| image.disk.is_none()) {
        // An image without a disk has no init of its own to start.
        request.profile.init = burgeon_api::profile::Init::None;
    }
    let vm: VmView = client.post("/v1/vms", &request).await?;
    let vm = if wait { wait_until_up(&client, &vm).await? } else { vm };
    if foreign {
        tell_way_in(&vm);
    }
    if context.json {
        output::json(&vm)?;
    } else {
        output::print(&format!("{}\n", vm.name));
    }
    Ok(0)
}

async fn clone(context: &Context, vm: &str, name: Option<String>, snapshot: Option<String>, wait: bool) -> Result<u8> {
    let client = context.client()?;
    let request = CloneVm { id: VmId::generate(), name, snapshot };
    let vm: VmView = client.post(&format!("{}/clone", path(vm)), &request).await?;
    let vm = if wait { wait_until_up(&client, &vm).await? } else { vm };
    if context.json {
        output::json(&vm)?;
    } else {
        output::print(&format!("{}\n", vm.name));
    }
    Ok(0)
}

async fn wait_until_decided(client: &Client, vm: &VmView) -> Result<VmView> {
    client.get(&format!("{}/wait", path(&vm.id.to_string()))).await
}

pub(super) async fn wait_until_up(client: &Client, vm: &VmView) -> Result<VmView> {
    let up = wait_until_decided(client, vm).await?;
    match &up.observed {
        Observed::Failed { reason } | Observed::Stopped { reason } => {
            let error = Error::unavailable(format!("VM {} did not come up: {reason}", up.name));
            // Nothing half-made stays behind; its console is told in the reason.
            client.delete(&path(&up.id.to_string())).await?;
            Err(error)
        }
        _ => {
            tell_accelerator(client, &up).await?;
            Ok(up)
        }
    }
}

async fn tell_accelerator(client: &Client, vm: &VmView) -> Result<()> {
    if vm.on_host.as_ref().is_some_and(|host| host.accelerator == Accelerator::Tcg) {
        let server: ServerView = client.get("/v1/server").await?;
        output::note(&format!("emulated, without KVM: {}", server.accelerator_reason));
    }
    Ok(())
}

pub(super) async fn list(context: &Context, quiet: bool) -> Result<u8> {
    let vms: Vec<VmView> = context.client()?.get("/v1/vms").await?;
    if context.json {
        output::json(&vms)?;
    } else if quiet {
        output::print(&vms.iter().map(|vm| format!("{}\n", vm.name)).collect::<String>());
    } else {
        let now = now_s();
        let rows = vms
            .iter()
            .map(|vm| {
                let host = vm.on_host.as_ref();
                let size = size_of(vm);
                vec![
                    vm.name.clone(),
                    vm.observed.name().to_string(),
                    vm.image.clone(),
                    format!("{:#}", size.memory),
                    size.cpus.to_string(),
                    host.map(|host| host.accelerator.name().to_string()).unwrap_or_default(),
                    host.and_then(|host| host.pid).map(|pid| pid.to_string()).unwrap_or_default(),
                    output::age(now.saturating_sub(vm.created_s)),
                    vm.observed.detail().to_string(),
                ]
            })
            .collect();
        output::table(&["name", "state", "image", "memory", "cpus", "accel", "pid", "age", "detail"], rows);
    }
    Ok(0)
}

#[expect(clippy::disallowed_methods, reason = "ages in tables are told against the user's clock")]
pub(super) fn now_s() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// What it has now; of one that does not run, what it began with.
fn size_of(vm: &VmView) -> Size {
    vm.on_host.as_ref().and_then(|host| host.size).unwrap_or(vm.profile.size())
}

async fn show(context: &Context, vm: &str, timing: bool) -> Result<u8> {
    let client = context.client()?;
    let view: VmView = client.get(&path(vm)).await?;
    if context.json {
        output::json(&view)?;
        return Ok(0);
    }
    let host = view.on_host.as_ref();
    if timing {
        let times = host.map(|host| host.start_times.clone()).unwrap_or_default();
        let longest = times.iter().map(|time| time.microseconds).max().unwrap_or(0);
        let rows = times
            .iter()
            .map(|time| {
                let time_ms = format!("{:.1} ms", micro(time.microseconds));
                vec![time.phase.clone(), time_ms, bar(time.microseconds, longest)]
            })
            .collect();
        output::table(&["phase", "time", ""], rows);
        return Ok(0);
    }
    let profile = &view.profile;
    let has = size_of(&view);
    let mut memory = format!("{:#}", has.memory);
    if let Some(most) = profile.max_memory {
        memory += &format!(" ({:#} to {most:#})", profile.memory);
    }
    let mut cpus = has.cpus.to_string();
    if let Some(most) = profile.max_cpus {
        cpus += &format!(" (1 to {most})");
    }
    let mut lines = vec![
        ("name", view.name.clone()),
        ("id", view.id.to_string()),
        ("state", format!("{} {}", view.observed.name(), view.observed.detail()).trim_end().to_string()),
        ("image", view.image.clone()),
        ("memory", memory),
        ("cpus", cpus),
        ("network", format!("{:?}", view.profile.network).to_lowercase()),
        ("display", if view.profile.display { "yes" } else { "no" }.to_string()),
        ("version", view.version.to_string()),
        ("started again", view.starts.to_string()),
    ];
    if let Some(end) = view.life.expires_s {
        lines.push(("removed in", output::age(end.saturating_sub(now_s()))));
    }
    if let Some(limit) = view.life.idle_park_s {
        lines.push(("parked when idle for", output::age(limit)));
    }
    if let Some(pipeline) = &view.pipeline {
        lines.push(("pipeline", pipeline.clone()));
    }
    if let Some(host) = host {
        lines.push(("accelerator", host.accelerator.name().to_string()));
        lines.push(("pid", host.pid.map(|pid| pid.to_string()).unwrap_or_default()));
        lines.push(("resident", host.resident.map(|size| size.to_string()).unwrap_or_default()));
        lines.push(("cpu time", host.cpu_milliseconds.map(output::time).unwrap_or_default()));
        lines.push(("adoptions", host.adoptions.to_string()));
        lines.push(("snapshots", host.snapshots.to_string()));
        if let Some(guest) = &host.guest {
            lines.push(("kernel", guest.kernel.clone()));
            lines.push(("agent", guest.agent_version.clone()));
            lines.push(("boot id", guest.boot_id.clone()));
        }
    }
    output::pairs(&lines);
    if let Some(host) = host {
        output::print("\n");
        let rows = host
            .limits
            .iter()
            .map(|limit| vec![limit.name.clone(), limit.value.clone(), limit.enforcement.clone()])
            .collect();
        output::table(&["limit", "value", "enforcement"], rows);
    }
    Ok(0)
}

/// As long as its part of the longest, which has 30 signs; what took any time has one.
fn bar(time: u64, longest: u64) -> String {
    let signs = time.saturating_mul(30).div_ceil(longest.max(1));
    "#".repeat(usize::try_from(signs).unwrap_or(30).min(30))
}

#[expect(clippy::cast_precision_loss, reason = "a time for people")]
fn micro(microseconds: u64) -> f64 {
    microseconds as f64 / 1000.0
}

pub(super) async fn logs(context: &Context, vm: &str) -> Result<u8> {
    let response = context.client()?.get_raw(&format!("{}/log", path(vm))).await?;
    let body = response
        .into_body()
        .collect()
        .await
        .map_err(|error| Error::unavailable(format!("the server broke off: {error}")))?;
    // The guest's own bytes may hold escapes for the terminal; only text and line ends go out.
    let text = String::from_utf8_lossy(&body.to_bytes()).into_owned();
    let clean: String = text.chars().filter(|c| *c == '\n' || *c == '\t' || !c.is_control()).collect();
    output::print(&clean);
    Ok(0)
}

async fn verb(context: &Context, vm: &str, verb: &str) -> Result<u8> {
    context.client()?.post::<()>(&format!("{}/{verb}", path(vm)), &json!({})).await?;
    Ok(0)
}

fn set_life(arguments: LifeArguments) -> SetLife {
    SetLife { ttl: arguments.ttl, idle_park: arguments.idle_park }
}

fn resize(arguments: SizeArguments) -> Resize {
    Resize { memory: arguments.memory, cpus: arguments.cpus }
}

async fn set(context: &Context, vms: &[String], resize: Resize, life: SetLife) -> Result<u8> {
    if resize == Resize::default() && life == SetLife::default() {
        return Err(Error::invalid("nothing is to be set")
            .with_hint("give --memory SIZE, --cpus N, --ttl TIME or --idle-park TIME"));
    }
    let client = context.client()?;
    let mut views: Vec<VmView> = Vec::new();
    for vm in vms {
        if resize != Resize::default() {
            let resized: Resized = client.post(&format!("{}/size", path(vm)), &resize).await?;
            resized.notes.iter().for_each(|note| output::note(&format!("VM {vm}: {note}")));
        }
        views.push(match life == SetLife::default() {
            true => client.get(&path(vm)).await?,
            false => client.post(&format!("{}/life", path(vm)), &life).await?,
        });
    }
    if context.json {
        output::json(&views)?;
    }
    Ok(0)
}

/// Something that is done to one VM after the other.
async fn each(context: &Context, vms: &[String], verb: &str) -> Result<u8> {
    let client = context.client()?;
    let mut views: Vec<VmView> = Vec::new();
    for vm in vms {
        views.push(client.post(&format!("{}/{verb}", path(vm)), &json!({})).await?);
    }
    if context.json {
        output::json(&views)?;
    }
    Ok(0)
}

async fn start(context: &Context, vms: &[String], wait: bool) -> Result<u8> {
    let client = context.client()?;
    for vm in vms {
        let mut view: VmView = client.post(&format!("{}/start", path(vm)), &json!({})).await?;
        if view.observed == Observed::Running {
            // A start takes longer than the answer to its request.
            output::note(&format!("VM {} runs already", view.name));
        } else if wait {
            view = wait_until_decided(&client, &view).await?;
            if let Observed::Failed { reason } | Observed::Stopped { reason } | Observed::Parked { reason } =
                &view.observed
            {
                return Err(Error::unavailable(format!("VM {} did not come up: {reason}", view.name))
                    .with_hint(format!("what its guest said last: burgeon logs {}", view.name)));
            }
        }
        if context.json {
            output::json(&view)?;
        } else {
            output::print(&format!("{}\n", view.name));
        }
    }
    Ok(0)
}

async fn stop(context: &Context, vms: &[String], force: bool) -> Result<u8> {
    let client = context.client()?;
    for vm in vms {
        drop::<VmView>(client.post(&format!("{}/stop", path(vm)), &StopVm { force }).await?);
    }
    Ok(0)
}

async fn remove(context: &Context, vms: &[String], force: bool) -> Result<u8> {
    let client = context.client()?;
    let mut code = 0;
    for vm in vms {
        match client.delete(&path(vm)).await {
            Err(error) if force && error.kind == burgeon_api::ErrorKind::NotFound => {}
            Err(error) => {
                output::fail(&error);
                code = 1;
            }
            Ok(()) => {}
        }
    }
    Ok(code)
}

async fn console(context: &Context, vm: &str) -> Result<u8> {
    let mut stream = context.client()?.upgrade(&format!("{}/console", path(vm))).await?;
    output::note("joined the console; Ctrl-] leaves");
    let raw = terminal::Raw::enter();
    let (mut input, mut typed, mut said) = (tokio::io::stdin(), [0; 1024], vec![0; 16 << 10]);
    let mut open = true;
    loop {
        tokio::select! {
            count = stream.read(&mut said) => match count {
                Ok(count @ 1..) => {
                    use std::io::Write;
                    let mut out = std::io::stdout().lock();
                    if out.write_all(&said[..count]).and_then(|()| out.flush()).is_err() {
                        break;
                    }
                }
                _ => break,
            },
            count = input.read(&mut typed), if open => match count {
                Ok(count @ 1..) => {
                    if typed[..count].contains(&0x1d) || stream.write_all(&typed[..count]).await.is_err() {
                        break;
                    }
                }
                _ => open = false,
            },
        }
    }
    drop(raw);
    output::note("");
    Ok(0)
}

async fn display(context: &Context, vm: &str, socket: Option<PathBuf>) -> Result<u8> {
    let client = context.client()?;
    let view: VmView = client.get(&path(vm)).await?;
    // Refusals come before the socket is made.
    drop(client.upgrade(&format!("{}/display", path(vm))).await?);
    let socket = socket.unwrap_or_else(|| context.data.join(format!("{}.vnc", view.id.short())));
    let listener =
        UnixListener::bind(&socket).map_err(|error| Error::io(format!("listen on {}", socket.display()), &error))?;
    let _remove = RemoveOnDrop(socket.clone());
    std::fs::set_permissions(&socket, std::os::unix::fs::PermissionsExt::from_mode(0o600))
        .map_err(|error| Error::io("protect the socket", &error))?;
    output::print(&format!("{}\n", socket.display()));
    output::note("VNC clients may connect there; Ctrl-C ends it");
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
        .map_err(|error| Error::io("wait for signals", &error))?;
    loop {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => return Ok(0),
            _ = terminate.recv() => return Ok(0),
            accepted = listener.accept() => {
                let (mut viewer, _) = accepted.map_err(|error| Error::io("accept a viewer", &error))?;
                let (client, path) = (client.clone(), format!("{}/display", path(vm)));
                tokio::spawn(async move {
                    if let Ok(mut screen) = client.upgrade(&path).await {
                        // Either side may leave.
                        drop(tokio::io::copy_bidirectional(&mut viewer, &mut screen).await);
                    }
                });
            }
        }
    }
}

struct RemoveOnDrop(PathBuf);

impl Drop for RemoveOnDrop {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            tracing::debug!(%error, "the socket stays");
        }
    }
}

async fn ssh(context: &Context, vm: &str, arguments: &[String]) -> Result<u8> {
    let client = context.client()?;
    let view: VmView = client.get(&path(vm)).await?;
    let (identity, key) = ["id_ed25519", "id_ecdsa", "id_rsa"]
        .iter()
        .filter_map(|name| Some(PathBuf::from(std::env::var_os("HOME")?).join(".ssh").join(name)))
        .find_map(|file| std::fs::read(file.with_extension("pub")).ok().map(|key| (file, key)))
        .ok_or_else(|| Error::not_found("there is no ssh key of yours").with_hint("make one: ssh-keygen -t ed25519"))?;
    copy::put_bytes(&client, vm, "/run/burgeon/authorized_keys", "0600", key.into()).await?;
    let program = std::env::current_exe().map_err(|error| Error::io("find this program", &error))?;
    let quote = |text: &str| format!("'{}'", text.replace('\'', "'\\''").replace('%', "%%"));
    // One host key is made where there is none: all kinds of them would take an emulated guest many seconds.
    let server = "mkdir -p /run/sshd && key=/etc/ssh/ssh_host_ed25519_key && \
        { [ -e $key ] || ssh-keygen -q -t ed25519 -N '' -f $key; } && exec /usr/sbin/sshd -i -o HostKey=$key \
        -o AuthorizedKeysFile=/run/burgeon/authorized_keys -o PermitRootLogin=prohibit-password";
    let proxy = format!(
        "{} --data {} exec {} -- /bin/sh -c {}",
        quote(&program.display().to_string()),
        quote(&context.data.display().to_string()),
        quote(&view.id.to_string()),
        quote(server)
    );
    let known = context.data.join("known_hosts");
    let status = tokio::process::Command::new("ssh")
        .arg("-o")
        .arg(format!("ProxyCommand={proxy}"))
        .arg("-o")
        .arg(format!("UserKnownHostsFile={}", known.display()))
        // ssh takes the home directory from the list of users, we from the environment: the key is the same one.
        .arg("-o")
        .arg(format!("IdentityFile={}", identity.display()))
        .args(["-o", "StrictHostKeyChecking=accept-new", "-o"])
        .arg(format!("HostKeyAlias=burgeon-{}", view.id))
        .args(["-l", "root"])
        .arg(&view.name)
        .args(arguments)
        .status()
        .await
        .map_err(|error| Error::io("run ssh", &error).with_hint("apt-get install openssh-client"))?;
    Ok(u8::try_from(status.code().unwrap_or(255) & 0xff).unwrap_or(255))
}
