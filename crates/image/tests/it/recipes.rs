//! The recipes in `images/`, built for real.

use std::{
    env, fs,
    path::{Path, PathBuf},
    sync::Mutex,
    time::Instant,
};

use burgeon_api::{document::Document, http::Progress, image::Image};
use burgeon_image::{BuildRequest, DataPaths, Tools, build};

use crate::runner;

fn images() -> PathBuf {
    if let Some(directory) = env::var_os("BURGEON_TEST_IMAGES") {
        return directory.into();
    }
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../images")
}

pub(crate) fn cache() -> PathBuf {
    env::var_os("BURGEON_TEST_CACHE")
        .map_or_else(|| Path::new(env!("CARGO_TARGET_TMPDIR")).join("burgeon-test-cache"), PathBuf::from)
}

pub(crate) fn tools() -> Tools {
    Tools::find(&env::var_os("PATH").unwrap_or_default())
}

pub(crate) fn request(recipe: &Path, data: &Path) -> BuildRequest {
    BuildRequest {
        document: Document::new(recipe.display().to_string(), fs::read_to_string(recipe).unwrap()),
        recipe_directory: recipe.parent().unwrap().to_owned(),
        lock_path: recipe.with_extension("lock"),
        locked: false,
        force: false,
        archive: None,
        data: DataPaths { images: data.join("images"), cache: cache(), temporary: data.join("tmp") },
        now_s: 0,
    }
}

/// Builds and prints when each phase ended.
fn timed(request: &BuildRequest) -> Image {
    let start = Instant::now();
    let last = Mutex::new((String::new(), 0.0));
    let progress = |progress: Progress| {
        let seconds = start.elapsed().as_secs_f32();
        match progress {
            Progress::Step { phase, done, total, .. } => {
                let mut last = last.lock().unwrap();
                if last.0 != phase || done == total || seconds - last.1 > 0.7 {
                    println!("{seconds:7.2} {phase} {done}/{total}");
                }
                *last = (phase, seconds);
            }
            other => println!("{seconds:7.2} {other:?}"),
        }
    };
    let image = build(request, &tools(), &runner::Qemu, &progress, &|| false).unwrap_or_else(|error| {
        panic!("{error}\n{:?}", error.hint);
    });
    println!("{:7.2} {} {}", start.elapsed().as_secs_f32(), image.name, image.digest);
    image
}

/// Builds the recipes in `images/` twice each into `$BURGEON_BY_HAND`, with times.
#[test]
#[ignore = "takes a minute; the way to measure and to refresh the lock files"]
fn by_hand() {
    let data = PathBuf::from(env::var_os("BURGEON_BY_HAND").expect("set BURGEON_BY_HAND to a directory"));
    for name in env::var("BURGEON_RECIPES").unwrap_or_else(|_| "tiny debian-minimal".into()).split(' ') {
        let mut request = request(&images().join(format!("{name}.toml")), &data);
        let first = timed(&request);
        assert_eq!(timed(&request).digest, first.digest);
        request.force = true;
        assert_eq!(timed(&request).digest, first.digest, "two builds differ");
    }
}
