//! The store through the API: what images leave is collected, damage is told.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use burgeon_api::{
    ByteSize, ErrorKind,
    http::Progress,
    image::Image,
    store::{Checked, StoreView},
};
use burgeon_store::{
    catalog::NewRoot,
    chunk_store::{ChunkStore, Source, Writer, ingest},
    cut::Cutter,
    disk::{Disk, Nothing, Stack},
    places::Elsewhere,
};
use serde_json::json;

use crate::desk::Desk;

/// 1 MiB of noise, 16 MiB of zeros, and noise again.
fn picture() -> Vec<u8> {
    let mut state = 7_u64;
    let mut noise = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0]
    };
    let mut bytes: Vec<u8> = (0..1 << 20).map(|_| noise()).collect();
    bytes.resize(17 << 20, 0);
    bytes.extend((0..1 << 20).map(|_| noise()));
    bytes
}

/// An image with a disk in the store, as a build leaves it, but long ago.
fn image(desk: &Desk, name: &str, bytes: &[u8]) {
    let next = AtomicU64::new(1);
    let unique = u128::from((bytes.len() + name.len()) as u64) << 64;
    let source = Source {
        now_us: Arc::new(|| 1_000_000),
        uuid: Arc::new(move || (unique + u128::from(next.fetch_add(1, Ordering::Relaxed))).to_be_bytes()),
    };
    let store = ChunkStore::open(&desk.data().join("store"), source).unwrap();
    let mut writer = Writer::new(&store);
    let map = ingest(&store, &mut writer, bytes, Cutter::Fixed64K, None, &mut |_| {}).unwrap().map.root();
    let root = NewRoot {
        kind: "image".into(),
        name: format!("{name}/{map}"),
        expected: None,
        map,
        relied: Vec::new(),
        expires_us: None,
        note: String::new(),
    };
    writer.finish(root).unwrap();
    let images = desk.data().join("images");
    let mut about: Image = serde_json::from_slice(&fs::read(images.join("tiny/image.json")).unwrap()).unwrap();
    about.name = name.into();
    about.map = Some(map.to_string());
    about.disk = Some(ByteSize(bytes.len() as u64));
    fs::create_dir(images.join(name)).unwrap();
    for file in [Image::KERNEL, Image::INITRAMFS] {
        fs::copy(images.join("tiny").join(file), images.join(name).join(file)).unwrap();
    }
    fs::write(images.join(name).join(Image::FILE), serde_json::to_vec(&about).unwrap()).unwrap();
}

async fn checked(desk: &Desk, path: &str) -> Checked {
    match desk.work(path, &json!({})).await.unwrap() {
        Progress::Checked(checked) => checked,
        other => panic!("{other:?}"),
    }
}

fn damage(packs: &Path) {
    let folder = fs::read_dir(packs).unwrap().next().unwrap().unwrap().path();
    let pack = fs::read_dir(folder).unwrap().next().unwrap().unwrap().path();
    let mut bytes = fs::read(&pack).unwrap();
    bytes[200_000] ^= 1;
    fs::write(&pack, bytes).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_image_leaves_is_collected_when_nothing_keeps_it() {
    let desk = Desk::open().await;
    tokio::task::block_in_place(|| image(&desk, "disk", &picture()));
    let view: StoreView = desk.get("/v1/store").await.unwrap();
    assert_eq!((view.roots.get("image"), view.packs, view.cache_bytes), (Some(&1), 1, 0));
    assert!(view.live_permille > 990 && view.plain_bytes > 2 << 20, "{view:?}");
    for path in ["/v1/store/fsck", "/v1/store/scrub", "/v1/images/disk/verify"] {
        let checked = checked(&desk, path).await;
        assert!(checked.problems.is_empty() && checked.chunks > 30, "{checked:?}");
    }
    let Progress::Collected(nothing) = desk.work("/v1/store/gc", &json!({})).await.unwrap() else { panic!() };
    assert_eq!((nothing.roots, nothing.chunks_deleted, nothing.chunks_kept), (1, 0, view.chunks));

    desk.delete("/v1/images/disk").await.unwrap();
    let view: StoreView = desk.get("/v1/store").await.unwrap();
    assert!(view.roots.is_empty() && view.chunks > 30, "{view:?}");
    let Progress::Collected(all) = desk.work("/v1/store/gc", &json!({})).await.unwrap() else { panic!() };
    assert_eq!((all.roots, all.chunks_deleted, all.packs_dropped), (0, view.chunks, 1));
    let view: StoreView = desk.get("/v1/store").await.unwrap();
    assert_eq!((view.chunks, view.packs, view.pack_bytes, view.live_permille), (0, 0, 0, 1000));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_is_exported_whole_or_not_at_all() {
    let desk = Desk::open().await;
    let picture = picture();
    tokio::task::block_in_place(|| image(&desk, "disk", &picture));
    let out = desk.data().join("out");
    fs::create_dir(&out).unwrap();
    let file = out.join("disk.raw");
    let request = json!({"file": file});
    let Progress::Exported(exported) = desk.work("/v1/images/disk/export", &request).await.unwrap() else { panic!() };
    assert_eq!((exported.length, exported.written), (18 << 20, 2 << 20));
    assert!(fs::read(&file).unwrap() == picture);
    assert!(fs::metadata(&file).unwrap().blocks() * 512 < 4 << 20, "zeros are holes");

    let taken = desk.work("/v1/images/disk/export", &request).await.unwrap_err();
    assert!(taken.kind == ErrorKind::Conflict && taken.hint.is_some_and(|hint| hint.contains("--force")));
    fs::write(&file, "other").unwrap();
    let forced = json!({"file": file, "force": true});
    desk.work("/v1/images/disk/export", &forced).await.unwrap();
    assert!(fs::read(&file).unwrap() == picture);
    let relative = desk.work("/v1/images/disk/export", &json!({"file": "disk.raw"})).await.unwrap_err();
    assert_eq!(relative.kind, ErrorKind::Invalid);
    let no_disk = desk.work("/v1/images/tiny/export", &json!({"file": out.join("tiny")})).await.unwrap_err();
    assert!(no_disk.message.contains("no disk"), "{no_disk}");

    damage(&desk.data().join("store/packs"));
    let broken = json!({"file": out.join("broken.raw")});
    let failed = desk.work("/v1/images/disk/export", &broken).await;
    assert!(matches!(&failed, Ok(Progress::Failed(error)) if error.kind == ErrorKind::Damaged), "{failed:?}");
    assert_eq!(fs::read_dir(&out).unwrap().count(), 1, "nothing is left of it");
    for path in ["/v1/images/disk/verify", "/v1/store/scrub"] {
        let checked = checked(&desk, path).await;
        assert_eq!(checked.problems.len(), 1, "{checked:?}");
        let Progress::Checked(again) = desk.work(path, &json!({})).await.unwrap() else { panic!() };
        assert_eq!(again.problems, checked.problems);
    }
    assert!(checked(&desk, "/v1/store/fsck").await.problems.is_empty(), "it reads no data");
    let rate = desk.work("/v1/store/scrub", &json!({"rate": 0})).await.unwrap_err();
    assert_eq!(rate.kind, ErrorKind::Invalid);
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_is_healed_by_a_repair_and_the_same_bytes() {
    let desk = Desk::open().await;
    let picture = picture();
    tokio::task::block_in_place(|| image(&desk, "disk", &picture));
    damage(&desk.data().join("store/packs"));
    let told = checked(&desk, "/v1/store/scrub").await;
    assert_eq!((told.problems.len(), told.repairable, told.repaired), (1, 1, 0), "{told:?}");
    assert_eq!(told.needed_by, ["image disk"]);
    let repaired = desk.work("/v1/store/scrub", &json!({"repair": true})).await.unwrap();
    assert!(matches!(&repaired, Progress::Checked(checked) if checked.repaired == 1), "{repaired:?}");
    assert_eq!(checked(&desk, "/v1/images/disk/verify").await.problems.len(), 1);
    tokio::task::block_in_place(|| image(&desk, "disk-again", &picture));
    for path in ["/v1/images/disk/verify", "/v1/images/disk-again/verify", "/v1/store/fsck", "/v1/store/scrub"] {
        let checked = checked(&desk, path).await;
        assert!(checked.problems.is_empty() && checked.needed_by.is_empty(), "{path}: {checked:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_catalog_is_made_anew_while_no_server_runs() {
    let mut desk = Desk::open().await;
    tokio::task::block_in_place(|| image(&desk, "disk", &picture()));
    let data = desk.data();
    let rebuild =
        || tokio::task::block_in_place(|| burgeon_control::rebuild(&data, &Elsewhere::default(), &|_| (), &|| false));
    let served = rebuild().unwrap_err();
    assert!(served.kind == ErrorKind::Conflict && served.hint.unwrap().contains("stop the server"));
    desk.leave().await;

    // A VM's disk stands on the image's, and a record of another does not read.
    let about: Image = serde_json::from_slice(&fs::read(data.join("images/disk/image.json")).unwrap()).unwrap();
    let below = Stack { base: Some(about.map.as_deref().unwrap().parse().unwrap()), layers: Vec::new() };
    let launch = json!({
        "id": burgeon_api::VmId::generate(), "name": "one", "image": about, "image_directory": "",
        "profile": burgeon_api::profile::Profile::default(),
    });
    let record = json!({
        "format": 2, "launch": launch, "accelerator": "tcg", "host_boot_id": "", "process": null, "limits": [],
        "adoptions": 0, "ended": null,
    });
    for (name, text) in [("one", record.to_string()), ("two", "half a rec".to_string())] {
        let directory = data.join("vms").join(name);
        let disk = directory.join("disks/root");
        fs::create_dir_all(&disk).unwrap();
        fs::write(directory.join("vm.json"), text).unwrap();
        Disk::create(&disk, 1 << 20, below.clone(), &|_, _| Ok(Arc::new(Nothing))).unwrap();
    }
    for ending in ["", "-wal", "-shm"] {
        drop(fs::remove_file(data.join(format!("store/catalog.db{ending}"))));
    }
    let rebuilt = rebuild().unwrap();
    assert_eq!((rebuilt.packs, rebuilt.roots, rebuilt.problems.len()), (1, 2, 1), "{rebuilt:?}");
    assert!(rebuilt.problems[0].place.ends_with("vms/two/disks/root"), "{rebuilt:?}");

    desk.serve().await;
    let view: StoreView = desk.get("/v1/store").await.unwrap();
    assert_eq!((view.roots.get("image"), view.roots.get("disk")), (Some(&1), Some(&1)));
    for path in ["/v1/images/disk/verify", "/v1/store/fsck", "/v1/store/scrub"] {
        assert!(checked(&desk, path).await.problems.is_empty(), "{path}");
    }
}
