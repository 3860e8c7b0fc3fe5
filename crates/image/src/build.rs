//! From a recipe to an image.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufReader, BufWriter, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use burgeon_api::{
    Error, Result,
    document::{Document, Part},
    history::Origin,
    http::Progress,
    image::{Boot, Image},
    recipe::{Kind, Recipe},
};

use crate::{
    changes, clean,
    configure::Configure,
    deb::{self, Unpacker},
    dpkg::{self, Database},
    ext4::Disk,
    files::{self, Added},
    guest::GuestRunner,
    hash,
    history::with_step,
    initramfs,
    kernel::{Kernel, Selection},
    lock::{Lock, Locked, Role},
    newc::Archive,
    packages::Chooser,
    process::{Limits, Tools},
    store::{self, DiskStore},
    tree::Tree,
    work::{DataPaths, WorkDirectory},
};

/// Part of every image's recipe digest: raise it when the same recipe gives other bytes.
const BUILDER: &str = "burgeon image builder 5";

/// What to build, and where.
#[derive(Clone, Debug)]
pub struct BuildRequest {
    /// The recipe's text, under the name by which its user knows it.
    pub document: Document,
    /// Where files named by `from` are.
    pub recipe_directory: PathBuf,
    /// The lock file, usually the recipe's name with `.lock`.
    pub lock_path: PathBuf,
    /// Fail where the lock does not fit, instead of writing a new one.
    pub locked: bool,
    /// Build even where an image made from the same recipe and lock is there.
    pub force: bool,
    /// An archive of Debian packages to use instead of the machine's own, usually the value of
    /// `BURGEON_DEBIAN_ARCHIVE`.
    pub archive: Option<String>,
    pub data: DataPaths,
    /// Seconds since 1970, for `Image::created_s`.
    pub now_s: u64,
}

/// Builds an image, or gives back the one that is there already.
///
/// # Errors
/// With the line of the recipe where it is at fault. `Cancelled` when `cancelled` says so. Nothing
/// half-made is left in any case.
pub fn build(
    request: &BuildRequest,
    tools: &Tools,
    runner: &dyn GuestRunner,
    disks: &dyn DiskStore,
    progress: &(dyn Fn(Progress) + Sync),
    cancelled: &(dyn Fn() -> bool + Sync),
) -> Result<Image> {
    let document = &request.document;
    let recipe = Recipe::read(document)?;
    if recipe.kind == Kind::Initramfs && !recipe.packages.is_empty() {
        return Err(document.error_at(&[Part::Key("packages")], "packages go only into recipes of kind \"disk\""));
    }
    let limits = Limits { deadline: Duration::from_secs(600), cancelled };
    let files = files::read(&recipe, document, &request.recipe_directory)?;
    let chooser = Chooser {
        recipe: &recipe,
        document,
        lock_path: &request.lock_path,
        locked: request.locked,
        archive: request.archive.as_deref(),
        cache: &request.data.cache,
        tools,
        limits,
        progress,
    };
    let lock = chooser.lock()?;
    if !request.force
        && let Ok((image, _)) = store::show(&request.data, &recipe.name)
        && image.recipe == digest(&recipe, &files, &lock)?
    {
        return Ok(image);
    }
    let (lock, packages) = chooser.fetch(lock)?;
    let work = WorkDirectory::create(&request.data.temporary)?;
    let build = Build {
        request,
        recipe: &recipe,
        files: &files,
        lock: &lock,
        packages,
        tools,
        limits,
        progress,
        work: work.path(),
    };
    let image = build.run(runner)?;
    limits.check_cancelled()?;
    let image = Image { recipe: digest(&recipe, &files, &lock)?, created_s: request.now_s, ..image };
    let (image, disk) = store::keep_disk(disks, image, &build.image_directory(), progress)?;
    let origin = Origin::Built { recipe: document.file.clone(), digest: image.recipe.clone() };
    let image = with_step(image, origin, &disk, request.now_s);
    limits.check_cancelled()?;
    store::publish(&request.data, &image, &build.image_directory())?;
    Ok(image)
}

/// Whatever an image is made from.
fn digest(recipe: &Recipe, files: &[Added], lock: &Lock) -> Result<String> {
    let recipe = serde_json::to_string(recipe).map_err(|error| Error::internal(format!("recipe: {error}")))?;
    let text = format!("{BUILDER}\n{recipe}\n{}\n{}", files::digest(files), lock.text()?);
    Ok(hash::of_bytes(text.as_bytes()))
}

struct Build<'a> {
    request: &'a BuildRequest,
    recipe: &'a Recipe,
    files: &'a [Added],
    lock: &'a Lock,
    /// Files of packages by SHA-256.
    packages: BTreeMap<String, PathBuf>,
    tools: &'a Tools,
    limits: Limits<'a>,
    progress: &'a (dyn Fn(Progress) + Sync),
    work: &'a Path,
}

impl Build<'_> {
    fn image_directory(&self) -> PathBuf {
        self.work.join("image")
    }

    fn run(&self, runner: &dyn GuestRunner) -> Result<Image> {
        let out = self.image_directory();
        fs::create_dir(&out).map_err(|error| Error::io(format!("cannot create {}", out.display()), &error))?;
        let kernel_package = self.lock.of_role(Role::Kernel)?;
        let total = 2 + self.lock.system().count() as u64;
        self.step("unpack", 0, total);
        let kernel = Kernel::read(self.file(kernel_package)?, self.tools, self.work, self.limits)?;
        let selection = kernel.select(self.recipe, &self.request.document)?;
        self.step("unpack", 1, total);
        let busybox = initramfs::busybox(self.file(self.lock.of_role(Role::Busybox)?)?, self.tools, self.limits)?;
        self.step("unpack", 2, total);
        write_file(&out.join(Image::KERNEL), &kernel.image)?;
        let mut archive = Archive::default();
        initramfs::put_modules(&mut archive, &kernel, &selection);
        match self.recipe.kind {
            Kind::Initramfs => {
                let mut tree = initramfs::busybox_tree(&self.work.join("tree"), &busybox)?;
                files::put(self.files, &mut tree)?;
                initramfs::put_tree(&mut archive, &tree)?;
            }
            Kind::Disk => self.disk(&kernel, &selection, &busybox, runner)?,
        }
        self.step("write", 1, 2);
        initramfs::write(&archive, &out.join(Image::INITRAMFS))?;
        self.limits.check_cancelled()?;
        let image = store::sealed(self.metadata(&kernel, &selection), &out)?;
        self.step("write", 2, 2);
        Ok(image)
    }

    fn metadata(&self, kernel: &Kernel, selection: &Selection) -> Image {
        // In an initramfs there is nothing to hand over to.
        let stays = self.recipe.kind == Kind::Initramfs;
        Image {
            format: Image::FORMAT,
            name: self.recipe.name.clone(),
            description: self.recipe.description.clone(),
            boot: Boot::Agent,
            digest: String::new(),
            recipe: String::new(),
            kernel_release: kernel.release.clone(),
            disk: self.recipe.size.filter(|_| self.recipe.kind == Kind::Disk),
            map: None,
            modules: selection.early.iter().chain(&selection.root).chain(&selection.growth).cloned().collect(),
            kernel_parameters: self.recipe.kernel_parameters.clone(),
            init: if stays { String::new() } else { self.recipe.init.clone() },
            created_s: 0,
            history: Vec::new(),
        }
    }

    /// Makes `disk.raw`.
    fn disk(&self, kernel: &Kernel, selection: &Selection, busybox: &[u8], runner: &dyn GuestRunner) -> Result<()> {
        let size = self.recipe.size.ok_or_else(|| Error::internal("a disk without a size"))?;
        let mut tree = Tree::create(&self.work.join("tree"))?;
        dpkg::merge_directories(&mut tree)?;
        let mut database = Database::create(&mut tree)?;
        let mut unpacker = Unpacker::default();
        let mut system: Vec<&Locked> = self.lock.system().collect();
        // Directories take owner and mode from the first package that holds them; its are the right ones.
        system.sort_by_key(|package| package.name != "base-files");
        let paths = system.iter().map(|package| self.file(package).cloned()).collect::<Result<Vec<PathBuf>>>()?;
        let total = 2 + system.len() as u64;
        deb::read_all(&paths, self.tools, self.limits, |index, deb| {
            let context = |error: Error| error.context(format!("package {}", system[index].name));
            let unpacked = unpacker.unpack(&deb, &mut tree).map_err(context)?;
            database.add(&mut tree, &deb, &unpacked).map_err(context)?;
            self.step("unpack", 3 + index as u64, total);
            self.limits.check_cancelled()
        })?;
        kernel.install(&mut tree, self.recipe)?;
        let (packages, preinsts) = (database.len(), database.finish(&mut tree)?);
        let epoch = unpacker.newest;
        self.step("configure", 0, packages as u64);
        let disk = |identity: &str, path: &Path, tree: &Tree| {
            Disk { size, identity, epoch }.write(tree, path, self.work, self.tools, self.limits)
        };
        let draft = self.work.join("draft.raw");
        disk("draft", &draft, &tree)?;
        let changed = self.work.join("changes.tar");
        let io = |error: std::io::Error| Error::io("cannot keep the changes of the VM", &error);
        let mut writer = BufWriter::new(File::create_new(&changed).map_err(io)?);
        let configure = Configure {
            recipe: self.recipe,
            document: &self.request.document,
            files: self.files,
            kernel,
            selection,
            busybox,
            preinsts: &preinsts,
            packages,
            epoch,
            runner,
            limits: self.limits,
            progress: self.progress,
        };
        configure.run(&self.image_directory().join(Image::KERNEL), &draft, self.work, &mut writer)?;
        writer.flush().map_err(io)?;
        drop(writer);
        self.step("write", 0, 2);
        changes::apply(&mut tree, BufReader::new(File::open(&changed).map_err(io)?))
            .map_err(|error| error.context("cannot take over what the VM changed"))?;
        clean::normalise(&mut tree, epoch)?;
        for path in [&draft, &changed] {
            fs::remove_file(path).map_err(io)?;
        }
        let identity = digest(self.recipe, self.files, self.lock)?;
        disk(&identity, &self.image_directory().join(Image::DISK), &tree)
    }

    fn file(&self, package: &Locked) -> Result<&PathBuf> {
        let missing = || Error::internal(format!("package {} was not fetched", package.name));
        self.packages.get(&package.sha256).ok_or_else(missing)
    }

    fn step(&self, phase: &str, done: u64, total: u64) {
        (self.progress)(Progress::Step { phase: phase.into(), done, total, bytes: false });
    }
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).map_err(|error| Error::io(format!("cannot write {}", path.display()), &error))
}
