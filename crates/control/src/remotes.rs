//! Images to and from remotes.

use std::{fs::File, io};

use burgeon_api::{
    Error, Result, VmId,
    history::Origin,
    http::Progress,
    image::Image,
    remote::{self, Moved, PullImage, PushImage, RemoteImage},
};
use burgeon_image::KeptDisk;
use burgeon_store::remote::{PHASES_IN_BYTES, Pulled, Pushed, Remote, pull as fetch, push as send};
use tokio::{runtime::Handle, sync::mpsc};

use crate::{
    disks, images,
    state::{Shared, blocking, now_s},
    store::watch,
};

/// Copies an image to a remote.
pub(crate) fn push(state: &Shared, image: Image, request: PushImage) -> Result<mpsc::Receiver<Progress>> {
    if image.disk.is_some() && image.map.is_none() {
        return Err(Error::refused(format!("the disk of image {} is not in the store", image.name))
            .with_hint("build or import it again"));
    }
    Ok(images::run(state, move |state, tell, cancelled| {
        let remote = Remote::create(&request.remote, Handle::current())?;
        let directory = state.layout.image(&image.name);
        let hold = format!("{}/{}", image.name, VmId::generate());
        let pushed = send(&state.store, &remote, &image, &directory, &hold, &mut told(tell, cancelled))?;
        let Pushed { chunks, bytes, new_chunks, new_bytes, sent_bytes } = pushed;
        tracing::info!(image = image.name, remote = remote.url(), ?pushed, "an image is pushed");
        Ok(Progress::Pushed(Moved {
            image: Box::new(image),
            remote: remote.url().into(),
            chunks,
            bytes,
            new_chunks,
            new_bytes,
            moved_bytes: sent_bytes,
        }))
    }))
}

/// Copies an image from a remote, in place of one of its name.
pub(crate) fn pull(state: &Shared, request: PullImage) -> mpsc::Receiver<Progress> {
    images::run(state, move |state, tell, cancelled| {
        let remote = Remote::open(&request.remote, Handle::current())?;
        let manifest = remote.manifest(&request.name, request.digest.as_deref())?;
        let data = state.data_paths();
        let url = remote.url().to_string();
        if let Ok((image, _)) = burgeon_image::show(&data, &request.name)
            && image.digest == manifest.image.digest
            && image.map == manifest.image.map
        {
            tell(Progress::Note(format!("image {} is here already", image.name)));
            return Ok(Progress::Pulled(moved(image, url, Pulled::default())));
        }
        let mut watch = told(tell, cancelled);
        let mut pulled = Pulled::default();
        let image = burgeon_image::receive(&data, &mut |directory| {
            let mut write = |stored: &burgeon_store::remote::StoredFile, reader: &mut dyn io::Read| {
                let path = directory.join(&stored.name);
                let copied = File::create_new(&path).and_then(|mut file| io::copy(reader, &mut file));
                copied.map(drop).map_err(|error| Error::io(format!("write {}", path.display()), &error))
            };
            let keep = |map| disks::root(&manifest.image.name, map);
            pulled = fetch(&state.store, &remote, &manifest, keep, &mut write, &mut watch)?;
            let image = Image { format: Image::FORMAT, ..manifest.image.clone() };
            let disk = KeptDisk {
                map: image.map.clone().unwrap_or_default(),
                bytes: pulled.held_bytes,
                new_bytes: pulled.new_bytes,
            };
            let origin = Origin::Pulled { remote: url.clone() };
            Ok(burgeon_image::with_step(image, origin, &disk, now_s()))
        })?;
        images::let_go(state);
        tracing::info!(image = image.name, remote = url, ?pulled, "an image is pulled");
        Ok(Progress::Pulled(moved(image, url, pulled)))
    })
}

/// Tells the progress of copies: some phases count bytes, the others things.
fn told<'a>(
    tell: &'a (dyn Fn(Progress) + Sync),
    cancelled: &'a (dyn Fn() -> bool + Sync),
) -> impl FnMut(&'static str, u64, u64) -> Result<()> + 'a {
    let (mut sized, mut counted) = (watch(true, tell, cancelled), watch(false, tell, cancelled));
    move |phase, done, total| {
        if PHASES_IN_BYTES.contains(&phase) { sized(phase, done, total) } else { counted(phase, done, total) }
    }
}

fn moved(image: Image, remote: String, pulled: Pulled) -> Moved {
    let Pulled { chunks, bytes, new_chunks, new_bytes, read_bytes, .. } = pulled;
    Moved { image: Box::new(image), remote, chunks, bytes, new_chunks, new_bytes, moved_bytes: read_bytes }
}

/// What a remote holds.
pub(crate) async fn list(remote: remote::Remote) -> Result<Vec<RemoteImage>> {
    blocking("look at the remote", move || Remote::open(&remote, Handle::current())?.images()).await
}
