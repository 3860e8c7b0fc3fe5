//! OCI image layouts, made by hand: good ones, and those that are refused.

use std::{
    fs,
    path::{Path, PathBuf},
};

use burgeon_api::{
    ByteSize, Error, ErrorKind,
    history::{Format, Origin},
    image::Image,
};
use burgeon_image::{ImportRequest, import};
use serde_json::{Value, json};

use crate::support::{Kept, Nothing, built, copied, data, is_empty, kept_disk, output, tools};

/// A layout that is being made.
struct Layout {
    directory: PathBuf,
    manifests: Vec<Value>,
}

/// An entry of a layer: name, kind, target or contents.
type Entry<'a> = (&'a str, tar::EntryType, &'a str);

const FILE: tar::EntryType = tar::EntryType::Regular;
const DIRECTORY: tar::EntryType = tar::EntryType::Directory;
const LINK: tar::EntryType = tar::EntryType::Symlink;
const HARD: tar::EntryType = tar::EntryType::Link;

/// A tar whose names may be anything.
fn layer(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, kind, text) in entries {
        let mut header = tar::Header::new_ustar();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        let data = if *kind == FILE { text.as_bytes() } else { b"" };
        if *kind == LINK || *kind == HARD {
            header.as_mut_bytes()[157..157 + text.len()].copy_from_slice(text.as_bytes());
        }
        header.set_entry_type(*kind);
        header.set_mode(0o755);
        header.set_uid(3);
        header.set_gid(4);
        header.set_mtime(77);
        header.set_size(data.len() as u64);
        header.set_cksum();
        builder.append(&header, data).unwrap();
    }
    builder.into_inner().unwrap()
}

impl Layout {
    fn new(directory: PathBuf) -> Layout {
        fs::create_dir_all(directory.join("blobs/sha256")).unwrap();
        fs::write(directory.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Layout { directory, manifests: Vec::new() }
    }

    fn blob(&self, kind: &str, bytes: &[u8]) -> Value {
        let path = self.directory.join("blob");
        fs::write(&path, bytes).unwrap();
        let sum = output("sha256sum", &[path.to_str().unwrap()]);
        let hex = sum.split(' ').next().unwrap();
        fs::rename(path, self.directory.join("blobs/sha256").join(hex)).unwrap();
        json!({"mediaType": kind, "digest": format!("sha256:{hex}"), "size": bytes.len()})
    }

    /// Adds an image; its layers are compressed in turn by nothing, gzip and zstd.
    fn image(&mut self, architecture: &str, layers: &[Vec<u8>]) {
        let config = json!({
            "os": "linux", "architecture": architecture,
            "config": {"Env": ["A=b"], "Cmd": ["run"], "Entrypoint": ["/start"], "WorkingDir": "/srv", "User": "7"}
        });
        let config = self.blob("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
        let plain = self.directory.join("plain");
        let layers: Vec<Value> = layers
            .iter()
            .zip(["cat", "gzip", "zstd"].iter().cycle())
            .map(|(bytes, tool)| {
                fs::write(&plain, bytes).unwrap();
                let packed = self.directory.join("packed");
                output("sh", &["-c", &format!("{tool} <{} >{}", plain.display(), packed.display())]);
                let blob = self.blob("application/vnd.oci.image.layer.v1.tar", &fs::read(&packed).unwrap());
                fs::remove_file(packed).unwrap();
                blob
            })
            .collect();
        fs::remove_file(plain).unwrap();
        let manifest = json!({"schemaVersion": 2, "config": config, "layers": layers});
        let mut blob = self.blob("application/vnd.oci.image.manifest.v1+json", manifest.to_string().as_bytes());
        blob["platform"] = json!({"os": "linux", "architecture": architecture});
        self.manifests.push(blob);
        self.write();
    }

    fn write(&self) {
        let index = json!({"schemaVersion": 2, "manifests": self.manifests});
        fs::write(self.directory.join("index.json"), index.to_string()).unwrap();
    }

    fn path_of(&self, blob: &Value) -> PathBuf {
        self.directory.join("blobs/sha256").join(&blob["digest"].as_str().unwrap()[7..])
    }

    /// The blob of the first image's layer.
    fn layer(&self, index: usize) -> PathBuf {
        let manifest: Value = serde_json::from_slice(&fs::read(self.path_of(&self.manifests[0])).unwrap()).unwrap();
        self.path_of(&manifest["layers"][index])
    }
}

/// A directory for images, with one to take the kernel of.
fn root() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    built(&copied("tiny", root.path(), ""), &Nothing).unwrap();
    root
}

fn request(file: &Path, root: &Path) -> ImportRequest {
    ImportRequest {
        file: file.to_owned(),
        name: "imported".into(),
        description: String::new(),
        kernel_of: None,
        size: None,
        max_size: ByteSize::gib(16),
        platform: None,
        data: data(root),
        now_s: 5,
    }
}

fn imported(request: &ImportRequest) -> Result<Image, Error> {
    import(request, &tools(), &Kept(&request.data), &|_| {}, &|| false)
}

fn refused(layout: &Layout, root: &Path) -> Error {
    let error = imported(&request(&layout.directory, root)).unwrap_err();
    assert!(is_empty(&root.join("tmp")) && !root.join("images/imported").exists(), "something is left");
    error
}

/// What a path of the imported disk is, by debugfs.
fn at(root: &Path, command: &str) -> String {
    output("debugfs", &["-R", command, kept_disk(root, "imported").to_str().unwrap()])
}

fn base() -> Vec<u8> {
    layer(&[
        ("./sbin/init", FILE, "#!/bin/sh\n"),
        ("etc/gone", FILE, "x"),
        ("etc/kept", FILE, "kept"),
        ("opaque/below", FILE, "x"),
        ("opaque/deep/below", FILE, "x"),
        ("whole/a/b", FILE, "x"),
        ("usr/lib/", DIRECTORY, ""),
        ("lib", LINK, "usr/lib"),
        ("replaced", LINK, "etc"),
    ])
}

#[test]
fn layers_lie_above_each_other_and_what_is_whited_out_is_gone() {
    let root = root();
    let mut layout = Layout::new(root.path().join("layout"));
    let second = layer(&[
        ("etc/.wh.gone", FILE, ""),
        ("etc/.wh.never-was", FILE, ""),
        ("nowhere/.wh.never-was", FILE, ""),
        // Its own files stay, whichever comes first.
        ("opaque/above", FILE, "above"),
        ("opaque/.wh..wh..opq", FILE, ""),
        ("opaque/later", FILE, "later"),
        (".wh.whole", FILE, ""),
        (".wh..wh.plnk", FILE, ""),
        ("lib/through", FILE, "a link is followed inside"),
        ("replaced/", DIRECTORY, ""),
    ]);
    let third =
        layer(&[("etc/second-name", HARD, "etc/kept"), ("etc/link", LINK, "/../../outside"), ("bin", LINK, "sbin")]);
    layout.image("amd64", &[base(), second, third]);
    layout.image("arm64", &[base()]);
    let image = imported(&request(&layout.directory, root.path())).unwrap();
    assert_eq!(image.init, "/sbin/init");
    output("e2fsck", &["-fn", kept_disk(root.path(), "imported").to_str().unwrap()]);
    let names = |directory: &str| at(root.path(), &format!("ls -p {directory}"));
    let etc = names("/etc");
    assert!(etc.contains("/kept/") && etc.contains("/second-name/") && !etc.contains("/gone/"), "{etc}");
    let opaque = names("/opaque");
    assert!(opaque.contains("/above/") && opaque.contains("/later/"), "{opaque}");
    assert!(!opaque.contains("/below/") && !opaque.contains("/deep/"), "{opaque}");
    let top = names("/");
    assert!(!top.contains("/whole/") && !top.contains(".wh."), "{top}");
    assert!(names("/usr/lib").contains("/through/"));
    assert!(at(root.path(), "stat /replaced").contains("Type: directory"));
    assert!(at(root.path(), "stat /sbin/init").contains("User:     3   Group:     4"));
    assert!(at(root.path(), "stat /etc/kept").contains("Links: 2"));

    let [step] = image.history.as_slice() else { panic!("{:?}", image.history) };
    let Origin::Imported { format: Format::Oci, sha256: None, container: Some(container), kernel_of, .. } =
        &step.origin
    else {
        panic!("{step:?}");
    };
    assert_eq!(kernel_of.as_deref(), Some("tiny"));
    assert_eq!(container.manifest, layout.manifests[0]["digest"].as_str().unwrap());
    assert_eq!((container.platform.as_str(), container.working_directory.as_str()), ("linux/amd64", "/srv"));
    assert_eq!((&container.entrypoint, &container.command), (&vec!["/start".to_string()], &vec!["run".to_string()]));
    assert_eq!((&container.env, container.user.as_str()), (&vec!["A=b".to_string()], "7"));

    // The same as a tar, in two orders, is the same image.
    let directory = layout.directory.to_str().unwrap();
    for (name, first) in [("first.tar", "blobs index.json oci-layout"), ("dot.tar", ".")] {
        let tar = root.path().join(name);
        output("sh", &["-c", &format!("tar -C {directory} -cf {} {first}", tar.display())]);
        assert_eq!(imported(&request(&tar, root.path())).unwrap().digest, image.digest, "{name}");
    }
    // An index within the index, and a manifest that leaves its platform to the configuration.
    let mut manifest = layout.manifests[0].clone();
    manifest.as_object_mut().unwrap().remove("platform");
    let inner = json!({"schemaVersion": 2, "manifests": [manifest]});
    layout.manifests = vec![layout.blob("application/vnd.oci.image.index.v1+json", inner.to_string().as_bytes())];
    layout.write();
    assert_eq!(imported(&request(&layout.directory, root.path())).unwrap().digest, image.digest);
}

#[test]
fn layouts_that_are_not_whole_or_not_for_us_are_refused() {
    let root = root();
    let made = |name: &str, architecture: &str, layers: &[Vec<u8>]| {
        let mut layout = Layout::new(root.path().join(name));
        layout.image(architecture, layers);
        layout
    };
    let changed = made("changed", "amd64", &[base()]);
    let blob = changed.layer(0);
    let mut bytes = fs::read(&blob).unwrap();
    bytes[600] ^= 1;
    fs::write(&blob, &bytes).unwrap();
    let error = refused(&changed, root.path());
    assert!(error.kind == ErrorKind::Damaged && error.message.contains("its digest is sha256:"), "{error}");
    bytes.push(0);
    fs::write(&blob, &bytes).unwrap();
    let error = refused(&changed, root.path());
    assert!(error.kind == ErrorKind::Damaged && error.message.contains("it has other than"), "{error}");
    fs::remove_file(&blob).unwrap();
    let error = refused(&changed, root.path());
    let hex = blob.file_name().unwrap().to_str().unwrap().to_string();
    assert!(error.kind == ErrorKind::NotFound && error.message.contains(&hex) && error.hint.is_some(), "{error:?}");

    let foreign = made("foreign", "arm64", &[base()]);
    let error = refused(&foreign, root.path());
    assert!(error.kind == ErrorKind::Refused && error.message.contains("but for linux/arm64"), "{error}");
    let mut wish = request(&foreign.directory, root.path());
    wish.platform = Some("linux/arm64".into());
    let error = imported(&wish).unwrap_err();
    assert!(error.kind == ErrorKind::Invalid && error.hint.unwrap().contains("linux/amd64"));

    let mut two = made("two", "amd64", &[base()]);
    two.image("amd64", &[base(), layer(&[("a", FILE, "b")])]);
    let error = refused(&two, root.path());
    assert!(error.kind == ErrorKind::Refused && error.message.contains("2 images"), "{error}");

    for (index, name) in ["../outside", "a/../../../outside", "/../outside"].into_iter().enumerate() {
        let out = made(&format!("out-{index}"), "amd64", &[base(), layer(&[(name, FILE, "evil")])]);
        let outcome = imported(&request(&out.directory, root.path()));
        assert!(outcome.is_err() || at(root.path(), "ls -p /").contains("/outside/"), "{name}: {outcome:?}");
        assert!(!root.path().join("outside").exists() && !root.path().join("tmp/outside").exists(), "{name}");
        drop(fs::remove_dir_all(root.path().join("images/imported")));
    }
    // Through a link that a lower layer made.
    let through = layer(&[("way", LINK, "../../../../../../../../../../tmp")]);
    let evil = format!("way/burgeon-oci-{}", std::process::id());
    let out = made("through", "amd64", &[base(), through, layer(&[(&evil, FILE, "evil")])]);
    let outcome = imported(&request(&out.directory, root.path()));
    assert!(!Path::new("/tmp").join(&evil[4..]).exists(), "{outcome:?}");
    drop(fs::remove_dir_all(root.path().join("images/imported")));

    let nothing = made("nothing", "amd64", &[base(), layer(&[("etc/.wh.", FILE, "")])]);
    assert_eq!(refused(&nothing, root.path()).kind, ErrorKind::Invalid);

    // A layer of few bytes that become many.
    let mut bomb = Layout::new(root.path().join("bomb"));
    let zeros = "\0".repeat(40 << 20);
    bomb.image("amd64", &[base(), layer(&[("zeros", FILE, &zeros)])]);
    assert!(fs::metadata(bomb.layer(1)).unwrap().len() < 1 << 20);
    let mut limited = request(&bomb.directory, root.path());
    limited.max_size = ByteSize::mib(32);
    let error = imported(&limited).unwrap_err();
    assert!(error.kind == ErrorKind::Refused && error.hint.unwrap().contains("--max-size"), "{}", error.message);
    limited.max_size = ByteSize::mib(128);
    imported(&limited).unwrap();

    let plain = root.path().join("plain");
    fs::create_dir(&plain).unwrap();
    let error = imported(&request(&plain, root.path())).unwrap_err();
    assert!(error.kind == ErrorKind::Invalid && error.hint.unwrap().contains("oci-layout"));
    let tar = root.path().join("root.tar");
    fs::write(&tar, base()).unwrap();
    let mut wish = request(&tar, root.path());
    imported(&wish).unwrap();
    wish.platform = Some("linux/amd64".into());
    assert!(imported(&wish).unwrap_err().message.contains("no OCI image"));
    assert!(is_empty(&root.path().join("tmp")));
}
