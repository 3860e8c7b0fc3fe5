//! Images from files made elsewhere: disks as they are, and root file systems as tar or as OCI images.

#[cfg(fuzzing)]
pub mod fuzzing;
mod layers;
mod layout;

use std::{
    fs::{self, File},
    io::{self, BufReader, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    time::Duration,
};

use burgeon_api::{
    ByteSize, Error, Result,
    history::{self, Container, Origin},
    http::Progress,
    image::{Boot, Image},
    name,
};

use crate::{
    deb::{id, put_entry},
    ext4::Disk,
    hash,
    history::with_step,
    process::{self, Limits, Streaming, Tools},
    qcow2,
    room::{self, Bounded},
    store::{self, DiskStore, Stored},
    tree::{Kind, Meta, Tree, entry_path, shown},
    work::{DataPaths, WorkDirectory},
};

use self::{layers::Layer, layout::Layout};

const CONVERT_DEADLINE: Duration = Duration::from_secs(3600);
const MIB: u64 = 1 << 20;
/// As for a recipe: a smaller ext4 has no room for its journal.
const LEAST_DISK: u64 = 64 * MIB;
/// After so many unpacked bytes the free space is looked at.
const LOOK: u64 = 64 * MIB;
/// The longest file whose hash goes into the history: a second of reading.
const MOST_HASHED: u64 = 1 << 30;

/// What to import.
#[derive(Clone, Debug)]
pub struct ImportRequest {
    /// A raw or qcow2 disk that firmware can start, or a root file system as tar, which may be
    /// compressed by gzip, xz or zstd; or an OCI image layout, as a directory or a tar. What it is, is told by its
    /// contents.
    pub file: PathBuf,
    pub name: String,
    pub description: String,
    /// For tar: the image whose kernel it gets; without a name, the newest that has one.
    pub kernel_of: Option<String>,
    /// For tar: size of the disk; without one, twice what the files take, and 1 GiB at least.
    pub size: Option<ByteSize>,
    /// The largest disk that may come of it.
    pub max_size: ByteSize,
    /// For OCI: which of its images, such as `linux/amd64`, which it is without one.
    pub platform: Option<String>,
    pub data: DataPaths,
    /// Seconds since 1970, for `Image::created_s`.
    pub now_s: u64,
}

enum Format {
    Raw,
    Qcow2,
    Tar,
    Gzip,
    Xz,
    Zstd,
    Oci(Layout),
}

/// Makes an image out of a file. The file itself is only read.
///
/// # Errors
/// `Invalid` where the file is none of the known kinds; `Refused` where it leads to other files, or becomes
/// more than is allowed or than there is space for.
pub fn import(
    request: &ImportRequest,
    tools: &Tools,
    disks: &dyn DiskStore,
    progress: &(dyn Fn(Progress) + Sync),
    cancelled: &(dyn Fn() -> bool + Sync),
) -> Result<Image> {
    name::check("image", &request.name)?;
    let limits = Limits { deadline: CONVERT_DEADLINE, cancelled };
    let io = |error: io::Error| Error::io(format!("cannot read {}", request.file.display()), &error);
    let about = fs::metadata(&request.file).map_err(io)?;
    let mut file = File::open(&request.file).map_err(io)?;
    let (head, format) = if about.is_dir() {
        let layout = Layout::of_directory(&request.file).ok_or_else(|| {
            Error::invalid(format!("{} is a directory, and no OCI image layout", request.file.display()))
                .with_hint(format!("such a layout holds a file {}; import other directories as tar", layout::MARKER))
        })?;
        (Vec::new(), Format::Oci(layout))
    } else if about.is_file() {
        let head = head(&mut file).map_err(io)?;
        let format = detect(&head)
            .ok_or_else(|| Error::invalid(format!("{} is neither a disk nor a tar", request.file.display())))
            .map_err(|error| error.with_hint("known are raw disks with a boot sector, qcow2, tar, tar.gz, tar.xz, tar.zst and OCI image layouts; others can be converted by qemu-img convert"))?;
        let layout = matches!(format, Format::Tar).then(|| Layout::of_tar(&request.file));
        (head, layout.transpose().map_err(io)?.flatten().map_or(format, Format::Oci))
    } else {
        return Err(Error::invalid(format!("{} is no ordinary file", request.file.display())));
    };
    if request.platform.is_some() && !matches!(format, Format::Oci(_)) {
        return Err(Error::invalid(format!("{} is no OCI image, and so for no platform", request.file.display()))
            .with_hint("leave out --platform"));
    }
    let work = WorkDirectory::create(&request.data.temporary)?;
    let out = work.path().join("image");
    fs::create_dir(&out).map_err(|error| Error::io("cannot create the image's directory", &error))?;
    let step = |done| progress(Progress::Step { phase: "import".into(), done, total: 2, bytes: false });
    step(0);
    let import = Import { request, tools, limits, work: work.path(), out: &out, progress };
    let sha256 = short_enough(&file).map_err(io)?.then(|| hash::of_file(&request.file)).transpose()?;
    let told = match format {
        Format::Raw => history::Format::Raw,
        Format::Qcow2 => history::Format::Qcow2,
        Format::Tar | Format::Gzip | Format::Xz | Format::Zstd => history::Format::Tar,
        Format::Oci(_) => history::Format::Oci,
    };
    let mut container = None;
    let (image, kernel_of) = match format {
        Format::Raw => (import.raw(&mut file)?, None),
        Format::Qcow2 => (import.qcow2(&head)?, None),
        Format::Tar => import.tar(BufReader::new(file))?,
        Format::Gzip => import.tar(flate2::read::MultiGzDecoder::new(BufReader::new(file)))?,
        Format::Xz => import.decompressed(&tools.xz)?,
        Format::Zstd => import.decompressed(&tools.zstd)?,
        Format::Oci(layout) => {
            let (image, kernel_of, about) = import.oci(&layout)?;
            container = Some(Box::new(about));
            (image, Some(kernel_of))
        }
    };
    step(1);
    limits.check_cancelled()?;
    let image = Image { created_s: request.now_s, ..store::sealed(image, &out)? };
    let (image, disk) = store::keep_disk(disks, image, &out, progress)?;
    let file = request.file.display().to_string();
    let origin = Origin::Imported { file, format: told, sha256, kernel_of, container };
    let image = with_step(image, origin, &disk, request.now_s);
    limits.check_cancelled()?;
    store::publish(&request.data, &image, &out)?;
    step(2);
    Ok(image)
}

/// Whether a file is short enough to be read once more for its hash.
fn short_enough(file: &File) -> io::Result<bool> {
    let about = file.metadata()?;
    Ok(about.is_file() && about.len() <= MOST_HASHED)
}

fn head(file: &mut File) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    file.take(qcow2::HEAD).read_to_end(&mut head)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(head)
}

fn detect(head: &[u8]) -> Option<Format> {
    let starts = |at: usize, magic: &[u8]| head.get(at..at + magic.len()) == Some(magic);
    Some(match () {
        () if starts(0, qcow2::MAGIC) => Format::Qcow2,
        () if starts(0, b"\x1f\x8b") => Format::Gzip,
        () if starts(0, b"\xfd7zXZ\0") => Format::Xz,
        () if starts(0, b"\x28\xb5\x2f\xfd") => Format::Zstd,
        () if starts(257, b"ustar") => Format::Tar,
        // The mark of a boot sector; disks with a GPT have it too.
        () if starts(510, b"\x55\xaa") => Format::Raw,
        () => return None,
    })
}

struct Import<'a> {
    request: &'a ImportRequest,
    tools: &'a Tools,
    limits: Limits<'a>,
    work: &'a Path,
    out: &'a Path,
    progress: &'a (dyn Fn(Progress) + Sync),
}

impl Import<'_> {
    /// Copies a disk; blocks of zeros become holes.
    fn raw(&self, file: &mut File) -> Result<Image> {
        use std::os::unix::fs::{FileExt, MetadataExt};
        let about = file.metadata().map_err(|error| Error::io("cannot read the disk", &error))?;
        room::check_size(about.len(), self.request.max_size)?;
        // Holes stay holes.
        room::check_space(about.len().min(about.blocks().saturating_mul(512)), self.work)?;
        let copy = || -> io::Result<Option<u64>> {
            let length = file.metadata()?.len();
            let to = File::create_new(self.out.join(Image::DISK))?;
            to.set_len(length.next_multiple_of(MIB))?;
            let mut buffer = vec![0; 1 << 18];
            let mut offset = 0;
            while offset < length {
                if (self.limits.cancelled)() {
                    return Ok(None);
                }
                let count = file.read_at(&mut buffer, offset)?;
                if count == 0 {
                    break;
                }
                if buffer[..count].iter().any(|byte| *byte != 0) {
                    to.write_all_at(&buffer[..count], offset)?;
                }
                offset += count as u64;
            }
            Ok(Some(length.next_multiple_of(MIB)))
        };
        match copy().map_err(|error| Error::io("cannot copy the disk", &error))? {
            Some(size) => Ok(self.metadata(Boot::Firmware, size)),
            None => Err(process::cancelled()),
        }
    }

    fn qcow2(&self, head: &[u8]) -> Result<Image> {
        qcow2::check(head)?;
        let shape = qcow2::Shape::of(head)?;
        room::check_size(shape.size, self.request.max_size)?;
        let path = fs::canonicalize(&self.request.file)
            .map_err(|error| Error::io(format!("cannot open {}", self.request.file.display()), &error))?;
        let path = path.to_str().ok_or_else(|| Error::invalid("the file's name is not UTF-8"))?;
        // Named as JSON, so that no name is taken for a protocol, and with the backing file ruled
        // out once more, should the file change after the check.
        let source = serde_json::json!({
            "driver": "qcow2", "backing": null, "file": { "driver": "file", "filename": path }
        });
        let source = format!("json:{source}");
        let written = self.clusters(&source)?.saturating_mul(shape.cluster).min(shape.size);
        room::check_space(written, self.work)?;
        let disk = self.out.join(Image::DISK);
        let mut command = process::command(&self.tools.qemu_img);
        command.args(["convert", "-O", "raw", &source]).arg(&disk);
        process::run_ok(command, self.limits)?;
        let size = || -> io::Result<u64> {
            let file = File::options().write(true).open(&disk)?;
            let size = file.metadata()?.len().next_multiple_of(MIB);
            file.set_len(size)?;
            Ok(size)
        };
        let size = size().map_err(|error| Error::io("cannot read the converted disk", &error))?;
        Ok(self.metadata(Boot::Firmware, size))
    }

    /// Clusters of a qcow2 file that hold something.
    fn clusters(&self, source: &str) -> Result<u64> {
        /// What qemu-img says of a file in which some clusters belong to nothing.
        const LEAKS: i32 = 3;
        let mut command = process::command(&self.tools.qemu_img);
        command.args(["check", "--output=json", source]);
        let found = process::run(command, self.limits)?;
        let about: serde_json::Value = serde_json::from_slice(&found.stdout).unwrap_or_default();
        if !found.status.success() && found.status.code() != Some(LEAKS) {
            let said = String::from_utf8_lossy(&found.stderr);
            let said = burgeon_api::path_text::printable(said.lines().last().unwrap_or("qemu-img check says no more"));
            return Err(Error::damaged(format!("the qcow2 file is damaged: {said}"))
                .with_hint("qemu-img check FILE tells more"));
        }
        Ok(about["allocated-clusters"].as_u64().unwrap_or(0))
    }

    fn decompressed(&self, tool: &Path) -> Result<(Image, Option<String>)> {
        let file = File::open(&self.request.file).map_err(|error| Error::io("cannot open the file", &error))?;
        let mut command = process::command(tool);
        command.args(["--decompress", "--stdout", "--quiet"]).stdin(file);
        let mut stream: Streaming = process::stream(command)?;
        let image = self.tar(&mut stream)?;
        stream.finish()?;
        Ok(image)
    }

    fn inflated(&self) -> Error {
        let most = self.request.max_size;
        Error::refused(format!("the archive holds more than the {most} that its disk may have at most"))
            .with_hint("allow more with --max-size SIZE")
    }

    /// The image, and the name of the one whose kernel it got.
    fn tar(&self, archive: impl Read) -> Result<(Image, Option<String>)> {
        let (from, kernel) = self.kernel()?;
        let mut tree = Tree::create(&self.work.join("tree"))?;
        let mut archive = Bounded::new(archive, self.request.max_size);
        let mut contents = Contents { bytes: 0, newest: 0 };
        let unpacked = self.unpack(&mut tree, &mut archive, &mut contents, None);
        if unpacked.is_ok() {
            // What stands behind the archive's end is nothing, or more than anybody wants: only that matters.
            drop(io::copy(&mut archive, &mut io::sink()));
        }
        if archive.over {
            return Err(self.inflated());
        }
        let kernel_of = from.name.clone();
        unpacked?;
        Ok((self.root_file_system(tree, &contents, from, &kernel)?, Some(kernel_of)))
    }

    /// The image, the name of the one whose kernel it got, and what the OCI image says of its programs.
    fn oci(&self, layout: &Layout) -> Result<(Image, String, Container)> {
        let (from, kernel) = self.kernel()?;
        let mut tree = Tree::create(&self.work.join("tree"))?;
        let (contents, container) = self.layers(layout, &mut tree)?;
        let kernel_of = from.name.clone();
        Ok((self.root_file_system(tree, &contents, from, &kernel)?, kernel_of, container))
    }

    /// Makes a disk of a root file system and takes the kernel of another image.
    fn root_file_system(&self, mut tree: Tree, contents: &Contents, from: Image, kernel: &Path) -> Result<Image> {
        let init = ["/sbin/init", "/init", "/bin/sh"]
            .into_iter()
            .find(|init| tree.canonical(init.as_bytes()).is_ok_and(|path| tree.get(&path).is_some()))
            .ok_or_else(|| {
                Error::invalid("the archive holds no /sbin/init, /init or /bin/sh: it is no root file system")
            })?;
        for directory in ["dev", "proc", "run", "sys", "tmp"] {
            if tree.get(directory.as_bytes()).is_none() {
                tree.put_directory(directory.as_bytes(), Meta::root(if directory == "tmp" { 0o1777 } else { 0o755 }))?;
            }
        }
        let wish = (contents.bytes * 2).max(1 << 30).next_multiple_of(MIB);
        let size = self.request.size.unwrap_or(ByteSize(wish)).min(ByteSize(self.request.max_size.bytes() / MIB * MIB));
        room::check_space(contents.bytes, self.work)?;
        room::check_size(LEAST_DISK, self.request.max_size)?;
        let identity = hash::of_bytes(format!("import {} {}", self.request.name, contents.bytes).as_bytes());
        Disk { size, identity: &identity, epoch: contents.newest }.write(
            &tree,
            &self.out.join(Image::DISK),
            self.work,
            self.tools,
            self.limits,
        )?;
        for file in [Image::KERNEL, Image::INITRAMFS] {
            fs::copy(kernel.join(file), self.out.join(file))
                .map_err(|error| Error::io(format!("cannot copy the kernel of image {}", from.name), &error))?;
        }
        (self.progress)(Progress::Note(format!("{} boots with the kernel of image {}", self.request.name, from.name)));
        Ok(Image {
            kernel_release: from.kernel_release,
            modules: from.modules,
            kernel_parameters: from.kernel_parameters,
            init: init.into(),
            ..self.metadata(Boot::Agent, size.0)
        })
    }

    /// The image whose kernel is taken.
    fn kernel(&self) -> Result<(Image, PathBuf)> {
        let usable = |image: &Image| image.boot == Boot::Agent && image.name != self.request.name;
        if let Some(name) = &self.request.kernel_of {
            let (image, directory) = store::show(&self.request.data, name)?;
            return if image.boot == Boot::Agent {
                Ok((image, directory))
            } else {
                Err(Error::refused(format!("image {name} has no kernel of ours")))
            };
        }
        store::list(&self.request.data)?
            .into_iter()
            .filter_map(|stored| match stored {
                Stored::Good { image, .. } if usable(&image) => Some(image),
                _ => None,
            })
            .max_by_key(|image| (image.created_s, image.name.clone()))
            .map(|image| (self.request.data.images.join(&image.name), image))
            .map(|(directory, image)| (image, directory))
            .ok_or_else(|| {
                Error::refused("a root file system needs a kernel, and there is no image to take one from")
                    .with_hint("build one first: burgeon image build images/tiny.toml")
            })
    }

    /// Adds what an archive holds to the tree; `layer` is there for archives that lie above others.
    fn unpack(
        &self,
        tree: &mut Tree,
        archive: impl Read,
        contents: &mut Contents,
        mut layer: Option<&mut Layer>,
    ) -> Result<()> {
        let damaged = |error: io::Error| Error::damaged(format!("the tar cannot be read: {error}"));
        let mut archive = tar::Archive::new(archive);
        let mut unlooked = 0_u64;
        for entry in archive.entries().map_err(damaged)? {
            self.limits.check_cancelled()?;
            let mut entry = entry.map_err(damaged)?;
            let path = tree.canonical(&entry_path(&entry.path_bytes())?)?;
            let header = entry.header();
            let meta = Meta {
                mode: header.mode().map_err(damaged)? & 0o7777,
                uid: id(header.uid().map_err(damaged)?)?,
                gid: id(header.gid().map_err(damaged)?)?,
                mtime: header.mtime().map_err(damaged)?,
                ..Meta::root(0)
            };
            contents.newest = contents.newest.max(meta.mtime);
            let bytes = entry.size().checked_next_multiple_of(4096).unwrap_or(u64::MAX).saturating_add(512);
            contents.bytes = contents.bytes.saturating_add(bytes);
            // Before it is unpacked: a file's size is told in front of it.
            room::check_size(contents.bytes, self.request.max_size)?;
            unlooked = unlooked.saturating_add(bytes);
            if unlooked >= LOOK {
                room::check_space(bytes, self.work)?;
                unlooked = 0;
            }
            if let Some(layer) = &layer
                && layer.whiteout(tree, &path)?
            {
                continue;
            }
            tree.make_parents(&path)?;
            if header.entry_type().is_dir() {
                // A plain archive may be of a tree whose links were followed; a layer replaces what is below it.
                let link = layer.is_none() && tree.get(&path).is_some_and(|node| matches!(node.kind, Kind::Link(_)));
                if !link {
                    tree.put_directory(&path, meta)?;
                }
            } else {
                put_entry(tree, &path, meta, &mut entry)
                    .map_err(|error| error.context(format!("/{}", shown(&path))))?;
            }
            if let Some(layer) = &mut layer {
                layer.add(path);
            }
        }
        Ok(())
    }

    fn metadata(&self, boot: Boot, disk: u64) -> Image {
        Image {
            format: Image::FORMAT,
            name: self.request.name.clone(),
            description: self.request.description.clone(),
            boot,
            digest: String::new(),
            recipe: String::new(),
            kernel_release: String::new(),
            disk: Some(ByteSize(disk)),
            map: None,
            modules: Vec::new(),
            kernel_parameters: Vec::new(),
            init: String::new(),
            created_s: 0,
            history: Vec::new(),
        }
    }
}

struct Contents {
    bytes: u64,
    newest: u64,
}
