//! The recipe's own files: read once, so that what is hashed is what is used.

use std::{fs, path::Path};

use burgeon_api::{
    Error, Result,
    document::{Document, Part},
    recipe::Recipe,
};
use sha2::{Digest, Sha256};

use crate::{
    hash,
    tree::{Meta, Tree},
};

/// A file of the recipe with its bytes.
#[derive(Debug)]
pub(crate) struct Added {
    /// Where it goes, without a leading slash.
    pub(crate) path: Vec<u8>,
    pub(crate) mode: u32,
    pub(crate) body: Body,
}

#[derive(Debug)]
pub(crate) enum Body {
    Directory,
    File(Vec<u8>),
    Link(Vec<u8>),
}

/// Reads all files that a recipe adds.
///
/// # Errors
/// With the line of the recipe: a file that is not there or lies outside the recipe's directory.
pub(crate) fn read(recipe: &Recipe, document: &Document, directory: &Path) -> Result<Vec<Added>> {
    let mut added = Vec::new();
    for (index, file) in recipe.files.iter().enumerate() {
        let body = if let Some(content) = &file.content {
            Body::File(content.clone().into_bytes())
        } else if let Some(target) = &file.link {
            Body::Link(target.clone().into_bytes())
        } else if let Some(from) = &file.from {
            let at = [Part::Key("file"), Part::Index(index), Part::Key("from")];
            Body::File(beside(directory, from).map_err(|error| document.locate(&at, error))?)
        } else {
            Body::Directory
        };
        let path = crate::tree::entry_path(file.to.as_bytes())?;
        added.push(Added { path, mode: file.mode_bits()?, body });
    }
    Ok(added)
}

fn beside(directory: &Path, name: &str) -> Result<Vec<u8>> {
    let resolve = |path: &Path| {
        fs::canonicalize(path).map_err(|error| Error::io(format!("cannot open {}", path.display()), &error))
    };
    let (directory, path) = (resolve(directory)?, resolve(&directory.join(name))?);
    // A recipe that came from elsewhere must not read the user's other files.
    if !path.starts_with(&directory) {
        return Err(Error::invalid(format!("\"{name}\" lies outside the recipe's directory")));
    }
    if !path.is_file() {
        return Err(Error::invalid(format!("\"{name}\" is no file")));
    }
    fs::read(&path).map_err(|error| Error::io(format!("cannot read {}", path.display()), &error))
}

/// A digest of the files' places, modes and bytes.
pub(crate) fn digest(files: &[Added]) -> String {
    let mut hasher = Sha256::new();
    let mut part = |bytes: &[u8]| {
        hasher.update((bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    for file in files {
        let (kind, bytes): (&[u8], &[u8]) = match &file.body {
            Body::Directory => (b"directory", b""),
            Body::File(bytes) => (b"file", bytes),
            Body::Link(target) => (b"link", target),
        };
        part(&file.path);
        part(&file.mode.to_le_bytes());
        part(kind);
        part(bytes);
    }
    hash::hex(&hasher.finalize())
}

/// Puts the files into a tree.
pub(crate) fn put(files: &[Added], tree: &mut Tree) -> Result<()> {
    for file in files {
        let path = tree.canonical(&file.path)?;
        tree.make_parents(&path)?;
        match &file.body {
            Body::Directory => tree.put_directory(&path, Meta::root(file.mode))?,
            Body::File(bytes) => tree.put_file(&path, Meta::root(file.mode), &mut bytes.as_slice())?,
            Body::Link(target) => tree.put_link(&path, Meta::root(0o777), target)?,
        }
    }
    Ok(())
}

/// The files as a tar, for the VM in which the image is configured: there they come after the
/// packages, which may otherwise take them for configuration files changed by a user.
pub(crate) fn archive(files: &[Added]) -> Result<Vec<u8>> {
    let mut builder = tar::Builder::new(Vec::new());
    let failed = |error: std::io::Error| Error::internal(format!("cannot pack the recipe's files: {error}"));
    let name = |bytes: &[u8]| std::ffi::OsString::from(String::from_utf8_lossy(bytes).into_owned());
    for file in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(file.mode);
        match &file.body {
            Body::Directory => {
                header.set_entry_type(tar::EntryType::Directory);
                header.set_size(0);
                builder.append_data(&mut header, name(&file.path), &[][..]).map_err(failed)?;
            }
            Body::File(bytes) => {
                header.set_size(bytes.len() as u64);
                builder.append_data(&mut header, name(&file.path), bytes.as_slice()).map_err(failed)?;
            }
            Body::Link(target) => {
                header.set_entry_type(tar::EntryType::Symlink);
                header.set_size(0);
                builder.append_link(&mut header, name(&file.path), name(target)).map_err(failed)?;
            }
        }
    }
    builder.into_inner().map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(files: &str) -> (Document, Recipe) {
        let text = format!(
            "format = 1\nname = \"t\"\nkind = \"initramfs\"\nsuite = \"bookworm\"\nkernel = \"linux-image-cloud-amd64\"\n{files}"
        );
        let document = Document::new("t.toml", text);
        let recipe = Recipe::read(&document).unwrap();
        (document, recipe)
    }

    #[test]
    fn files_outside_the_recipes_directory_are_refused_with_their_line() {
        let directory = tempfile::tempdir().unwrap();
        let inside = directory.path().join("recipe");
        fs::create_dir(&inside).unwrap();
        fs::write(directory.path().join("secret"), "s").unwrap();
        fs::write(inside.join("good"), "g").unwrap();
        std::os::unix::fs::symlink("../secret", inside.join("link")).unwrap();
        for (from, word) in
            [("../secret", "outside"), ("link", "outside"), ("gone", "cannot open"), ("/etc/passwd", "outside")]
        {
            let (document, recipe) = recipe(&format!("[[file]]\nto = \"/a\"\nfrom = \"{from}\"\n"));
            let error = read(&recipe, &document, &inside).unwrap_err();
            assert!(error.message.contains(word), "{error}");
            assert_eq!(error.location.unwrap().line, 8);
        }
        let (document, recipe) = recipe("[[file]]\nto = \"/a\"\nfrom = \"good\"\nmode = \"0600\"\n");
        let files = read(&recipe, &document, &inside).unwrap();
        let before = digest(&files);
        fs::write(inside.join("good"), "h").unwrap();
        assert_ne!(before, digest(&read(&recipe, &document, &inside).unwrap()));
        assert_eq!((files[0].path.as_slice(), files[0].mode), (&b"a"[..], 0o600));
    }
}
