//! What the tests share.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use burgeon_api::{Result, document::Document, image::Image};
use burgeon_image::{BuildRequest, DataPaths, DiskStore, GuestJob, GuestOutput, GuestRunner, KeptDisk, Tools, build};

/// The recipes of the project.
pub(crate) fn images() -> PathBuf {
    env::var_os("BURGEON_TEST_IMAGES")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../images"), PathBuf::from)
}

pub(crate) fn tools() -> Tools {
    Tools::find(&env::var_os("PATH").unwrap_or_default())
}

pub(crate) fn data(root: &Path) -> DataPaths {
    let cache = env::var_os("BURGEON_TEST_CACHE")
        .map_or_else(|| Path::new(env!("CARGO_TARGET_TMPDIR")).join("burgeon-test-cache"), PathBuf::from);
    DataPaths { images: root.join("images"), cache, temporary: root.join("tmp") }
}

/// A recipe of the project with its lock, copied into `root`, with lines added at the end.
pub(crate) fn copied(name: &str, root: &Path, more: &str) -> BuildRequest {
    let directory = root.join("recipes");
    fs::create_dir_all(&directory).unwrap();
    let recipe = directory.join(format!("{name}.toml"));
    let text = fs::read_to_string(images().join(format!("{name}.toml"))).unwrap() + more;
    fs::write(&recipe, text).unwrap();
    let lock = recipe.with_extension("lock");
    fs::copy(images().join(format!("{name}.lock")), &lock).unwrap();
    request(&recipe, root)
}

pub(crate) fn request(recipe: &Path, root: &Path) -> BuildRequest {
    BuildRequest {
        document: Document::new(recipe.display().to_string(), fs::read_to_string(recipe).unwrap()),
        recipe_directory: recipe.parent().unwrap().to_owned(),
        lock_path: recipe.with_extension("lock"),
        locked: false,
        force: false,
        archive: None,
        data: data(root),
        now_s: 0,
    }
}

pub(crate) fn built(request: &BuildRequest, runner: &dyn GuestRunner) -> Result<Image> {
    build(request, &tools(), runner, &Kept(&request.data), &|_| {}, &|| false)
}

/// A runner for what needs no VM.
pub(crate) struct Nothing;

impl GuestRunner for Nothing {
    fn run(&self, _: GuestJob<'_>) -> Result<GuestOutput> {
        panic!("this image needs no VM");
    }
}

/// The output of a program that must succeed.
pub(crate) fn output(program: &str, arguments: &[&str]) -> String {
    let path = env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let output = Command::new(program).args(arguments).env("PATH", path).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

pub(crate) fn is_empty(directory: &Path) -> bool {
    fs::read_dir(directory).map_or(true, |mut entries| entries.next().is_none())
}

/// Plays the store: a disk is kept as it is, beside the images.
pub(crate) struct Kept<'a>(pub(crate) &'a DataPaths);

impl DiskStore for Kept<'_> {
    fn keep(&self, image: &str, disk: &Path, _: &mut dyn FnMut(u64, u64)) -> Result<KeptDisk> {
        let to = kept_disk(self.0.images.parent().unwrap(), image);
        if to.exists() {
            fs::remove_file(&to).unwrap();
        }
        fs::hard_link(disk, to).unwrap();
        Ok(KeptDisk { map: "map".into(), bytes: 7, new_bytes: 5 })
    }
}

/// The disk of an image as [`Kept`] has it.
pub(crate) fn kept_disk(root: &Path, image: &str) -> PathBuf {
    root.join(format!("kept-{image}.raw"))
}
