//! The recipes in `images/`, built for real.

use std::{env, fs, path::PathBuf, sync::Mutex, time::Instant};

use burgeon_api::{ErrorKind, history::Origin, http::Progress, image::Image};
use burgeon_image::{BuildRequest, build, show};

use crate::{
    runner,
    support::{Kept, Nothing, built, copied, images, request, tools},
};

#[test]
fn an_initramfs_is_reproducible_and_built_once() {
    let root = tempfile::tempdir().unwrap();
    let added = "\n[[file]]\nto = \"/sbin/hello\"\ncontent = \"echo hi\"\nmode = \"0755\"\n";
    let mut request = copied("tiny", root.path(), added);
    request.locked = true;
    let first = built(&request, &Nothing).unwrap();
    let files = |root: &std::path::Path| {
        [Image::KERNEL, Image::INITRAMFS].map(|file| fs::read(root.join("images/tiny").join(file)).unwrap())
    };
    let bytes = files(root.path());
    request.now_s = 77;
    assert_eq!(built(&request, &Nothing).unwrap(), first, "nothing changed, and it was built again");
    request.force = true;
    let again = built(&request, &Nothing).unwrap();
    assert_eq!((again.created_s, &again.digest), (77, &first.digest));
    assert_eq!((first.history.len(), again.history.len(), again.history[0].when_s), (1, 1, 77));
    let built_from = Origin::Built { recipe: request.document.file.clone(), digest: first.recipe.clone() };
    assert_eq!(again.history[0].origin, built_from);
    assert!(bytes == files(root.path()), "two builds differ");
    request.force = false;
    request.document.text.push_str("mode = \"0700\"\n".replace("mode", "#").as_str());
    assert_eq!(built(&request, &Nothing).unwrap(), again, "a comment changes no image");
    request.document.text = request.document.text.replace("echo hi", "echo ho");
    assert_ne!(built(&request, &Nothing).unwrap().digest, first.digest);
    // The path goes through the link /sbin.
    let text = String::from_utf8_lossy(&bytes[1]).into_owned();
    assert!(text.contains("bin/hello") && !text.contains("sbin/hello"));
    for word in ["burgeon/modules.root", "virtio_blk.ko\n", "bin/busybox", "etc/passwd"] {
        assert!(text.contains(word), "{word}");
    }
}

#[test]
fn a_lock_that_does_not_fit_is_an_error_when_locked() {
    let root = tempfile::tempdir().unwrap();
    let mut request = copied("tiny", root.path(), "");
    request.document.text = request.document.text.replace("linux-image-cloud-amd64", "linux-image-amd64");
    request.locked = true;
    let error = built(&request, &Nothing).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Conflict, "{error}");
    fs::remove_file(&request.lock_path).unwrap();
    assert_eq!(built(&request, &Nothing).unwrap_err().kind, ErrorKind::NotFound);
    assert!(show(&request.data, "tiny").is_err());
}

#[test]
fn packages_that_the_archive_lost_are_chosen_anew_and_told() {
    let root = tempfile::tempdir().unwrap();
    let mut request = copied("tiny", root.path(), "");
    let old = fs::read_to_string(&request.lock_path).unwrap();
    let busybox = old.find("name = \"busybox-static\"").unwrap();
    let at = busybox + old[busybox..].find("sha256 = \"").unwrap() + 10;
    let gone = format!("{}{}{}", &old[..at], "0".repeat(64), &old[at + 64..]).replace("1.35.0-4", "1.35.0-1");
    fs::write(&request.lock_path, &gone).unwrap();
    request.locked = true;
    let error = built(&request, &Nothing).unwrap_err();
    assert!(error.kind == ErrorKind::NotFound && error.hint.is_some(), "{error}");
    request.locked = false;
    let notes = Mutex::new(String::new());
    let progress = |progress: Progress| {
        if let Progress::Note(note) = progress {
            notes.lock().unwrap().push_str(&note);
        }
    };
    build(&request, &tools(), &Nothing, &Kept(&request.data), &progress, &|| false).unwrap();
    let notes = notes.into_inner().unwrap();
    assert!(notes.contains("busybox-static 1:1.35.0-1"), "{notes}");
    assert_ne!(fs::read_to_string(&request.lock_path).unwrap(), gone);
    // Where the lock cannot be written, it is kept with the data.
    request.lock_path = root.path().join("no-such-directory/tiny.lock");
    build(&request, &tools(), &Nothing, &Kept(&request.data), &|_| {}, &|| false).unwrap();
    assert!(request.data.cache.join("locks/tiny.lock").exists());
    fs::remove_file(request.data.cache.join("locks/tiny.lock")).unwrap();
}

#[test]
fn packages_that_do_not_exist_are_told_with_their_line() {
    let root = tempfile::tempdir().unwrap();
    let mut request = copied("tiny", root.path(), "");
    request.document.text = request.document.text.replace("linux-image-cloud-amd64", "no-such-kernel");
    let error = built(&request, &Nothing).unwrap_err();
    let line = request.document.text.lines().position(|line| line.starts_with("kernel")).unwrap() + 1;
    assert_eq!(error.location.as_ref().map(|at| at.line as usize), Some(line), "{error}");
    assert!(error.message.contains("no-such-kernel"));
    let mut request = copied("tiny", root.path(), "modules = [\"overlay\", \"warp-drive\"]\n");
    request.force = true;
    let error = built(&request, &Nothing).unwrap_err();
    assert!(error.message.contains("no module warp_drive") && error.location.is_some(), "{error}");
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
    let image =
        build(request, &tools(), &runner::Qemu, &Kept(&request.data), &progress, &|| false).unwrap_or_else(|error| {
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
