//! Substrates to and from files: the bytes go to and come from a client, which has the file.

use std::{
    fs::{self, File},
    io::{self, BufReader, Read, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use burgeon_api::{
    Error, Result, VmId,
    bundle::{self, BundledDisk, BundledFile, Manifest},
    disk::DiskView,
    host::{Begin, Launch, TakeIn},
    http::Progress,
    image::{Boot, Image},
    substrate::Keep,
    vm::{Observed, Resize},
};
use burgeon_store::{
    ChunkId,
    bundle::{Bundle, hold_file, write},
    chunk_store::{ChunkStore, MapBytes, Watch},
    hold::{Hold, Purpose},
    map::Map,
    meta::VmRow,
    steps::{Step, reached},
};
use tokio::runtime::Handle;

use crate::{
    disks,
    state::{Shared, check_profile},
    store::watch,
    substrates,
};

/// How long the layers of a substrate's disks may take into the store, and between two looks.
const STORED: Duration = Duration::from_secs(600);
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// What work tells its client, and when it is to end.
pub(crate) struct Client<'a> {
    pub(crate) tell: &'a (dyn Fn(Progress) + Sync),
    pub(crate) cancelled: &'a (dyn Fn() -> bool + Sync),
}

/// A directory for files on their way. The next control process removes one that was left.
struct Work(PathBuf);

impl Work {
    fn create(state: &Shared) -> Result<Work> {
        let path = state.layout.temporary().join(format!("build-{}", VmId::generate().short()));
        fs::create_dir_all(&path).map_err(|error| Error::io("make a directory for a substrate", &error))?;
        Ok(Work(path))
    }

    fn text(&self) -> String {
        self.0.display().to_string()
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!(directory = %self.0.display(), %error, "a part of a substrate's file takes room until the next start");
        }
    }
}

/// Writes a substrate to a file.
///
/// # Errors
/// `Conflict` for one that is not docked; those of host, store, `out`, and the client's end.
pub(crate) fn export(state: &Shared, row: &VmRow, out: &mut dyn Write, client: &Client<'_>) -> Result<()> {
    let runtime = Handle::current();
    let mut watch = watch(true, client.tell, client.cancelled);
    watch("look", 0, 0)?;
    let docked = runtime.block_on(substrates::docked(state, row))?;
    let image = runtime.block_on(state.host.image_of(row.id))?;
    let work = Work::create(state)?;
    let ports = runtime.block_on(state.host.lay_out(row.id, work.text()))?.ports;
    let port = |disk: &str| ports.iter().find(|(name, _)| name == disk).map(|(_, port)| *port);
    let disks: Vec<BundledDisk> = stored_disks(state, row.id, &mut watch)?
        .into_iter()
        .map(|disk| BundledDisk { port: port(&disk.name), name: disk.name, size: disk.size.bytes(), map: disk.map })
        .collect();
    let mut held = Held { state, name: VmId::generate().to_string(), holds: Vec::new() };
    let mut files = Vec::new();
    for name in [bundle::DEVICES, bundle::KERNEL, bundle::INITRAMFS] {
        files.push(held.file(name, &work.0.join(name))?);
    }
    match image_files(state, &image) {
        Some(directory) => {
            files.push(held.file(bundle::IMAGE_KERNEL, &directory.join(Image::KERNEL))?);
            files.push(held.file(bundle::IMAGE_INITRAMFS, &directory.join(Image::INITRAMFS))?);
        }
        None => (client.tell)(Progress::Note(format!(
            "image {} is not what the substrate was made of any more: it does not go along",
            image.name
        ))),
    }
    let manifest = Manifest {
        format: Manifest::FORMAT,
        name: row.name.clone(),
        burgeon: state.version.clone(),
        created_s: row.created_s,
        image,
        profile: row.profile.clone(),
        recipe: row.substrate.clone().unwrap_or_default(),
        docked,
        disks,
        files,
    };
    let maps = manifest.maps().map(str::parse).collect::<Result<Vec<ChunkId>>>()?;
    maps.iter().try_for_each(|map| held.map(*map))?;
    let text = serde_json::to_vec(&manifest).map_err(|error| Error::internal(error.to_string()))?;
    write(&state.store, &text, &maps, out, &mut watch)
}

/// Its disks, once all that they hold is in the store: nobody writes to them any more.
fn stored_disks(state: &Shared, substrate: VmId, watch: &mut Watch<'_>) -> Result<Vec<DiskView>> {
    let until = Instant::now() + STORED;
    loop {
        let disks = Handle::current().block_on(state.host.disks(substrate))?;
        let Some(late) = disks.iter().find(|disk| disk.unstored_layers > 0) else { return Ok(disks) };
        if Instant::now() > until {
            return Err(Error::deadline(format!("disk {} is still on its way into the store", late.name)));
        }
        watch("store", 0, 0)?;
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// The directory of an image, if it is still that image.
fn image_files(state: &Shared, image: &Image) -> Option<PathBuf> {
    let (found, directory) = burgeon_image::show(&state.data_paths(), &image.name).ok()?;
    (found.digest == image.digest && found.map == image.map).then_some(directory)
}

/// What an export has kept so far.
struct Held<'a> {
    state: &'a Shared,
    name: String,
    holds: Vec<Hold>,
}

impl Held<'_> {
    fn next_name(&self) -> String {
        format!("{}/{}", self.name, self.holds.len())
    }

    fn file(&mut self, name: &str, path: &Path) -> Result<BundledFile> {
        let (length, hold) = hold_file(&self.state.store, Purpose::Exported, path, self.next_name())?;
        let map = hold.map().to_string();
        self.holds.push(hold);
        Ok(BundledFile { name: name.into(), length, map })
    }

    fn map(&mut self, map: ChunkId) -> Result<()> {
        self.holds.push(Hold::share(&self.state.store, Purpose::Exported, self.next_name(), map)?);
        Ok(())
    }
}

/// Makes a substrate of a file. `id` is chosen by the client.
///
/// # Errors
/// `Conflict` for a name that is taken; `Invalid`, `Refused` and `Damaged` for what the file is; those of the store, the
/// image and the host. Then there is no such substrate.
pub(crate) fn import(
    state: &Shared,
    id: VmId,
    name: Option<String>,
    input: impl Read,
    client: &Client<'_>,
) -> Result<VmRow> {
    let runtime = Handle::current();
    if let Ok(made) = runtime.block_on(state.meta.vm(&id.to_string())) {
        return Ok(made);
    }
    let bundle = Bundle::open(BufReader::with_capacity(1 << 20, input))?;
    let manifest = Manifest::read(bundle.manifest())?;
    let name = name.unwrap_or_else(|| manifest.name.clone());
    runtime.block_on(check_free(state, &name))?;
    check_profile(&manifest.profile)?;
    let maps = manifest.maps().map(str::parse).collect::<Result<Vec<ChunkId>>>()?;
    let mut watch = watch(true, client.tell, client.cancelled);
    let holds = bundle.store(&state.store, &maps, &id.to_string(), &mut watch)?;
    reached(Step::BundleStored);
    watch("take in", 0, 0)?;
    bring_image(state, &manifest, client)?;
    let work = Work::create(state)?;
    for name in [bundle::DEVICES, bundle::KERNEL, bundle::INITRAMFS] {
        restore(&state.store, &manifest, name, &work.0.join(name))?;
    }
    let row = VmRow {
        substrate: Some(manifest.recipe.clone()),
        observed: Observed::Docked,
        launched: true,
        ..VmRow::new(id, name, manifest.image.name.clone(), manifest.profile.clone(), manifest.created_s)
    };
    let launch = Launch {
        id,
        name: row.name.clone(),
        image_directory: state.layout.image(&row.image).display().to_string(),
        image: manifest.image,
        profile: manifest.profile,
        source: None,
        begin: Begin::BootForSubstrate,
        keep: Keep::default(),
        resize: Resize::default(),
    };
    let request = TakeIn { launch, docked: manifest.docked, disks: manifest.disks, directory: work.text() };
    // Until it has a row it is nobody's, and not to be removed for that.
    state.forking.send_modify(|forking| forking.extend([id]));
    let made = runtime.block_on(async {
        state.host.take_in(request).await?;
        reached(Step::TakenInByHost);
        state.meta.create_vm(row).await
    });
    state.forking.send_modify(|forking| forking.retain(|forked| *forked != id));
    state.kick.notify_one();
    drop(holds);
    made
}

/// # Errors
/// `Invalid` for what is no name, `Conflict` for one that is taken.
async fn check_free(state: &Shared, name: &str) -> Result<()> {
    burgeon_api::name::check("substrate", name)?;
    if state.meta.vm(name).await.is_err() {
        return Ok(());
    }
    Err(Error::conflict(format!("a VM or a substrate named \"{name}\" exists"))
        .with_hint("choose another name: burgeon substrate import FILE NAME"))
}

/// Makes the image that the substrate was made of, where there is none of its name.
fn bring_image(state: &Shared, manifest: &Manifest, client: &Client<'_>) -> Result<()> {
    let (data, image) = (state.data_paths(), &manifest.image);
    if let Ok((found, _)) = burgeon_image::show(&data, &image.name) {
        if found.digest != image.digest {
            let note = format!("image {} is another one here, and stays: the substrate needs none", image.name);
            (client.tell)(Progress::Note(note));
        }
        return Ok(());
    }
    if !manifest.has_image() || image.boot != Boot::Agent {
        (client.tell)(Progress::Note(format!("image {} is not in the file: the substrate needs none", image.name)));
        return Ok(());
    }
    burgeon_image::receive(&data, &mut |directory| {
        restore(&state.store, manifest, bundle::IMAGE_KERNEL, &directory.join(Image::KERNEL))?;
        restore(&state.store, manifest, bundle::IMAGE_INITRAMFS, &directory.join(Image::INITRAMFS))?;
        if let Some(map) = &image.map {
            let root = disks::root(&image.name, map.parse()?);
            state.store.catalog().blocking_share_root(root, disks::now_us())?;
        }
        Ok(Image { format: Image::FORMAT, ..image.clone() })
    })?;
    (client.tell)(Progress::Note(format!("image {} came along", image.name)));
    Ok(())
}

/// Writes one of the manifest's files.
fn restore(store: &ChunkStore, manifest: &Manifest, name: &str, to: &Path) -> Result<()> {
    let missing = || Error::damaged(format!("the file holds no {name}"));
    let file = manifest.files.iter().find(|file| file.name == name).ok_or_else(missing)?;
    let map = Map::open(store, file.map.parse()?)?;
    if file.length > map.length() {
        return Err(Error::damaged(format!("{name} is longer than its map")));
    }
    let mut reader = BufReader::with_capacity(1 << 20, MapBytes::new(store, map)).take(file.length);
    let failed = |error: io::Error| Error::io(format!("write {}", to.display()), &error);
    let mut out = File::create_new(to).map_err(failed)?;
    io::copy(&mut reader, &mut out).and_then(|_| out.sync_all()).map_err(failed)
}
