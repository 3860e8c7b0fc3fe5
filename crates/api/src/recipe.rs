//! How an image is made: the TOML file given to `burgeon image build`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    ByteSize, Error, Result,
    document::{Document, Part},
    name, path_text,
};

/// What is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A Debian system on an ext4 disk.
    Disk,
    /// The agent and busybox in an initramfs: nothing else to load, starts fastest.
    Initramfs,
}

/// A recipe for an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The version of this file format: 1.
    pub format: u32,
    /// The image's name.
    pub name: String,
    /// A line for people.
    #[serde(default)]
    pub description: String,
    pub kind: Kind,
    /// The Debian release from whose archive packages come, by code name.
    pub suite: String,
    /// The package that holds the kernel and its modules. A package that depends on the current one will do.
    pub kernel: String,
    /// Kernel modules loaded before the root disk is mounted, beyond those every Burgeon guest loads.
    #[serde(default)]
    pub modules: Vec<String>,
    /// More words for the kernel's command line.
    #[serde(default)]
    pub kernel_parameters: Vec<String>,
    /// Debian packages, beside those marked essential. What they depend on comes with them.
    #[serde(default)]
    pub packages: Vec<String>,
    /// Size of the disk; kind `disk` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<ByteSize>,
    /// The program that becomes process 1; kind `disk` only.
    #[serde(default = "default_init")]
    pub init: String,
    /// Files and directories added after the packages.
    #[serde(default, rename = "file")]
    pub files: Vec<File>,
    /// Commands run inside a VM, in order, as root, with the new system as their root.
    #[serde(default, rename = "run")]
    pub commands: Vec<Command>,
}

fn default_init() -> String {
    "/sbin/init".to_string()
}

/// A file, directory or symbolic link put into the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// Where it goes, from the image's root.
    pub to: String,
    /// The text of the file. Exactly one of `content`, `from`, `link` and `directory` is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// A file beside the recipe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// Target of a symbolic link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<String>,
    /// Make a directory.
    #[serde(default)]
    pub directory: bool,
    /// Permission bits in octal; `0644` for files and `0755` for directories when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
}

impl File {
    /// The permission bits.
    ///
    /// # Errors
    /// `Invalid` where `mode` is not octal or beyond `7777`.
    pub fn mode_bits(&self) -> Result<u32> {
        match &self.mode {
            None => Ok(if self.directory { 0o755 } else { 0o644 }),
            Some(text) => octal_mode(text),
        }
    }
}

/// Reads permission bits such as `0755`.
///
/// # Errors
/// `Invalid` where the text is not octal or beyond `7777`.
pub fn octal_mode(text: &str) -> Result<u32> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|bits| *bits <= 0o7777 && !text.is_empty())
        .ok_or_else(|| Error::invalid(format!("mode \"{}\" is not octal up to 7777", path_text::printable(text))))
}

/// A command run inside a VM while the image is built.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Command {
    /// Given to `/bin/sh -c`.
    pub command: String,
}

impl Recipe {
    /// The version of the format that this code reads.
    pub const FORMAT: u32 = 1;

    /// Reads and checks a recipe.
    ///
    /// # Errors
    /// `Invalid`, with file and line.
    pub fn read(document: &Document) -> Result<Recipe> {
        let recipe: Recipe = document.parse()?;
        recipe.check(document)?;
        Ok(recipe)
    }

    fn check(&self, document: &Document) -> Result<()> {
        let at = |key: &'static str, message: String| document.error_at(&[Part::Key(key)], message);
        if self.format != Self::FORMAT {
            return Err(at(
                "format",
                format!("recipe format {} is not known; this Burgeon reads format 1", self.format),
            ));
        }
        name::check("image", &self.name).map_err(|error| document.locate(&[Part::Key("name")], error))?;
        package_name(&self.suite).map_err(|message| at("suite", message))?;
        package_name(&self.kernel).map_err(|message| at("kernel", message))?;
        for (index, package) in self.packages.iter().enumerate() {
            package_name(package)
                .map_err(|message| document.error_at(&[Part::Key("packages"), Part::Index(index)], message))?;
        }
        match (self.kind, self.size) {
            (Kind::Disk, None) => {
                return Err(at("kind", "a recipe of kind \"disk\" needs a size, such as size = \"2G\"".into()));
            }
            (Kind::Disk, Some(size))
                if size < ByteSize::mib(64) || size > ByteSize::gib(1024) || size.0 % (1 << 20) != 0 =>
            {
                return Err(at("size", format!("size {size:#} is not a whole number of MiB between 64M and 1024G")));
            }
            (Kind::Initramfs, Some(_)) => {
                return Err(at("size", "an initramfs has no size; leave the key out".into()));
            }
            _ => {}
        }
        if self.kind == Kind::Initramfs && !self.commands.is_empty() {
            return Err(at("run", "commands run only in recipes of kind \"disk\"".into()));
        }
        if self.kind == Kind::Initramfs && document.has("init") {
            return Err(at("init", "in an initramfs the agent stays process 1; leave the key out".into()));
        }
        if !self.init.starts_with('/') {
            return Err(at("init", format!("init \"{}\" is no absolute path", path_text::printable(&self.init))));
        }
        for (index, file) in self.files.iter().enumerate() {
            let at_file = |key: &'static str, message: String| {
                document.error_at(&[Part::Key("file"), Part::Index(index), Part::Key(key)], message)
            };
            check_guest_path(&file.to).map_err(|message| at_file("to", message))?;
            let sources = usize::from(file.content.is_some())
                + usize::from(file.from.is_some())
                + usize::from(file.link.is_some())
                + usize::from(file.directory);
            if sources != 1 {
                return Err(at_file("to", "give exactly one of content, from, link and directory".into()));
            }
            file.mode_bits().map_err(|error| at_file("mode", error.message))?;
        }
        for (index, command) in self.commands.iter().enumerate() {
            if command.command.trim().is_empty() {
                return Err(document.error_at(&[Part::Key("run"), Part::Index(index)], "the command is empty"));
            }
        }
        Ok(())
    }
}

fn package_name(package: &str) -> std::result::Result<(), String> {
    let good = |c: char| matches!(c, 'a'..='z' | '0'..='9' | '+' | '-' | '.');
    if package.len() >= 2 && package.chars().all(good) && package.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        Ok(())
    } else {
        Err(format!("\"{}\" is no Debian name", path_text::printable(package)))
    }
}

/// Checks an absolute path inside a guest: no `..`, no NUL.
///
/// # Errors
/// A message for the user.
pub fn check_guest_path(path: &str) -> std::result::Result<(), String> {
    let shown = path_text::printable(path);
    if !path.starts_with('/') || path == "/" {
        return Err(format!("\"{shown}\" is no absolute path below the root"));
    }
    if path.contains('\0') || path.split('/').any(|part| part == "..") {
        return Err(format!("\"{shown}\" holds \"..\" or a NUL byte"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "format = 1\nname = \"d\"\nkind = \"disk\"\nsuite = \"bookworm\"\nkernel = \"linux-image-cloud-amd64\"\nsize = \"2G\"\n";

    fn read(text: &str) -> Result<Recipe> {
        Recipe::read(&Document::new("r.toml", text))
    }

    #[test]
    fn a_good_recipe_reads() {
        assert_eq!(read(GOOD).unwrap().init, "/sbin/init");
    }

    #[test]
    fn bad_recipes_name_file_and_line() {
        for (text, line, word) in [
            (GOOD.replace("format = 1", "format = 9"), 1, "format 9"),
            (GOOD.replace("\"d\"", "\"D d\""), 2, "name"),
            (GOOD.replace("2G", "1k"), 6, "size"),
            (GOOD.replace("2G", "soon"), 6, "size"),
            (GOOD.replace("suite", "suit"), 4, "did you mean `suite`"),
            (format!("{GOOD}[[file]]\nto = \"/a/../b\"\ncontent = \"\"\n"), 8, ".."),
            (format!("{GOOD}[[file]]\nto = \"/a\"\n"), 8, "exactly one"),
            (format!("{GOOD}[[file]]\nto = \"/a\"\ncontent = \"\"\nmode = \"9\"\n"), 10, "octal"),
            (
                GOOD.replace("size = \"2G\"", "init = \"/sbin/init\"").replace("\"disk\"", "\"initramfs\""),
                6,
                "agent stays process 1",
            ),
            (format!("{GOOD}packages = [\"ok\", \"x; rm -rf\"]\n"), 7, "Debian name"),
        ] {
            let error = read(&text).unwrap_err();
            let at = error.location.clone().unwrap();
            assert_eq!((at.file.as_str(), at.line), ("r.toml", line), "{error}");
            assert!(error.message.contains(word), "{error}");
        }
    }
}
