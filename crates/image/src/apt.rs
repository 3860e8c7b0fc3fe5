//! apt, run as an ordinary user in a directory of its own: it knows the machine's archive, checks
//! its signatures, resolves and fetches. It sees no package of this machine as installed.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::File,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use burgeon_api::{Error, ErrorKind, Result};

use crate::{
    control::{Paragraph, dependency_names, paragraphs},
    lock::{Locked, Role},
    process::{self, Limits, Tools},
    work,
};

const UPDATE_DEADLINE: Duration = Duration::from_secs(600);
const RESOLVE_DEADLINE: Duration = Duration::from_secs(120);
const FETCH_DEADLINE: Duration = Duration::from_secs(3600);
const DEBIAN_KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// One line of the private sources list.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Source {
    /// Such as `bookworm-security`.
    archive: String,
    /// With a slash at its end.
    uri: String,
}

pub(crate) struct Apt<'a> {
    tools: &'a Tools,
    limits: Limits<'a>,
    root: PathBuf,
    sources: Vec<Source>,
    /// One at a time: two processes would replace each other's sources list.
    _lock: File,
}

/// A package as apt chose it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Chosen {
    uri: String,
    name: String,
    version: String,
    architecture: String,
}

impl<'a> Apt<'a> {
    /// Prepares the private directory for a suite. `archive` is used instead of the machine's own
    /// archives where it is given.
    pub(crate) fn open(
        cache: &Path,
        suite: &str,
        architecture: &str,
        archive: Option<&str>,
        tools: &'a Tools,
        limits: Limits<'a>,
    ) -> Result<Apt<'a>> {
        let root = cache.join("apt").join(suite);
        for directory in ["state/lists/partial", "cache/archives/partial"] {
            work::create_directories(&root.join(directory))?;
        }
        if root.as_os_str().as_encoded_bytes().iter().any(|byte| b"\"\\\n;{}".contains(byte)) {
            return Err(Error::refused(format!("apt cannot work in {}: it holds a special character", root.display())));
        }
        let lock = work::lock_file(&root.join("lock"))?;
        let sources = match archive {
            Some(uri) => given_sources(uri, suite)?,
            None => machine_sources(tools, suite, limits)?,
        };
        let apt = Apt { tools, limits, root, sources, _lock: lock };
        apt.write_configuration(architecture)?;
        Ok(apt)
    }

    fn write_configuration(&self, architecture: &str) -> Result<()> {
        let root = self.root.display();
        // Hooks of the machine's apt belong to the machine: as an ordinary user they would fail.
        let configuration = format!(
            "#clear APT::Update::Pre-Invoke;\n#clear APT::Update::Post-Invoke;\n#clear APT::Update::Post-Invoke-Success;\n\
             #clear DPkg::Pre-Install-Pkgs;\n#clear APT::Architectures;\n#clear APT::Default-Release;\n\
             Dir::State \"{root}/state\";\nDir::State::lists \"{root}/state/lists\";\n\
             Dir::State::status \"{root}/state/status\";\nDir::State::extended_states \"{root}/state/extended\";\n\
             Dir::Cache \"{root}/cache\";\nDir::Cache::archives \"{root}/cache/archives\";\n\
             Dir::Log \"{root}/cache\";\n\
             Dir::Etc::sourcelist \"{root}/sources.list\";\nDir::Etc::sourceparts \"/dev/null\";\n\
             Dir::Etc::preferences \"/dev/null\";\nDir::Etc::preferencesparts \"/dev/null\";\n\
             APT::Architecture \"{architecture}\";\nAPT::Architectures {{ \"{architecture}\"; }};\n\
             APT::Install-Recommends \"false\";\nAPT::Install-Suggests \"false\";\n\
             APT::Sandbox::User \"root\";\nAPT::Update::Error-Mode \"any\";\n\
             Acquire::Languages \"none\";\nAcquire::Retries \"2\";\nDebug::NoLocking \"true\";\n"
        );
        let keyring =
            if Path::new(DEBIAN_KEYRING).is_file() { format!(" signed-by={DEBIAN_KEYRING}") } else { String::new() };
        let sources: String = self
            .sources
            .iter()
            .map(|source| {
                format!("deb [target=Packages arch={architecture}{keyring}] {} {} main\n", source.uri, source.archive)
            })
            .collect();
        work::write_atomically(&self.root.join("apt.conf"), configuration.as_bytes())?;
        work::write_atomically(&self.root.join("sources.list"), sources.as_bytes())?;
        work::write_atomically(&self.root.join("state/status"), b"")
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = process::command(program);
        command.arg("-c").arg(self.root.join("apt.conf")).current_dir(&self.root);
        command
    }

    /// Fetches the archive's lists.
    pub(crate) fn update(&self) -> Result<()> {
        let mut command = self.command(&self.tools.apt_get);
        command.args(["-q", "update"]);
        process::run_ok(command, self.limits.within(UPDATE_DEADLINE)).map(drop).map_err(|error| match error.kind {
            ErrorKind::Internal => Error::unavailable(error.message)
                .context("cannot fetch the package lists")
                .with_hint("check the network and the machine's apt sources"),
            _ => error,
        })
    }

    /// Names of the packages marked essential, and whether `wanted` exist.
    pub(crate) fn essential(&self, wanted: &[&str]) -> Result<(Vec<String>, Vec<bool>)> {
        let mut command = self.command(&self.tools.apt_cache);
        command.arg("dumpavail");
        let output = process::run_ok(command, self.limits.within(RESOLVE_DEADLINE))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let mut essential = Vec::new();
        let mut found = vec![false; wanted.len()];
        for block in text.split("\n\n") {
            if let Some(name) = block.strip_prefix("Package: ").and_then(|rest| rest.lines().next()) {
                if block.contains("\nEssential: yes") {
                    essential.push(name.to_string());
                }
                for (index, wanted) in wanted.iter().enumerate() {
                    found[index] |= name == *wanted;
                }
            }
        }
        essential.sort();
        essential.dedup();
        if essential.is_empty() {
            return Err(Error::unavailable("the archive's lists name no essential package")
                .with_hint("the archive may be incomplete; try again later"));
        }
        Ok((essential, found))
    }

    /// The packages and all that they depend on.
    pub(crate) fn resolve(&self, packages: &[String]) -> Result<Vec<Locked>> {
        let mut command = self.command(&self.tools.apt_get);
        command.args(["-q", "-y", "--print-uris", "install", "--"]).args(packages);
        let output = process::run(command, self.limits.within(RESOLVE_DEADLINE))?;
        if !output.status.success() {
            return Err(unresolvable(&output));
        }
        self.describe(&String::from_utf8_lossy(&output.stdout), Role::System)
    }

    /// One package without what it depends on.
    pub(crate) fn single(&self, name: &str, role: Role) -> Result<Locked> {
        let mut command = self.command(&self.tools.apt_get);
        command.args(["-q", "--print-uris", "download", "--", name]);
        let output = process::run(command, self.limits.within(RESOLVE_DEADLINE))?;
        if !output.status.success() {
            return Err(unresolvable(&output));
        }
        let mut found = self.describe(&String::from_utf8_lossy(&output.stdout), role)?;
        match (found.pop(), found.pop()) {
            (Some(package), None) => Ok(package),
            _ => Err(Error::unavailable(format!("apt does not tell where package {name} is"))),
        }
    }

    /// The kernel package behind a name: the name itself, or what a meta package depends on.
    pub(crate) fn kernel(&self, name: &str) -> Result<Locked> {
        let mut name = name.to_string();
        for _ in 0..4 {
            let paragraphs = self.show(&[OsString::from(&name)])?;
            let Some(package) = paragraphs.iter().find(|package| package.is("Package", &name)) else {
                return Err(Error::invalid(format!("the archive has no package {name}")));
            };
            let depends = package.get("Depends").unwrap_or_default();
            match dependency_names(depends).find(|name| name.starts_with("linux-image-")) {
                Some(next) => name = next.to_string(),
                None => return self.single(&name, Role::Kernel),
            }
        }
        Err(Error::invalid(format!("package {name} leads to no kernel")))
    }

    fn show(&self, packages: &[OsString]) -> Result<Vec<Paragraph>> {
        let mut command = self.command(&self.tools.apt_cache);
        command.args(["show", "--no-all-versions", "--"]).args(packages);
        let output = process::run(command, self.limits.within(RESOLVE_DEADLINE))?;
        Ok(paragraphs(&String::from_utf8_lossy(&output.stdout)).collect())
    }

    /// Completes what `--print-uris` says with size and SHA-256 from the signed lists.
    fn describe(&self, uris: &str, role: Role) -> Result<Vec<Locked>> {
        let chosen: Vec<Chosen> = uris.lines().filter_map(chosen).collect();
        let arguments: Vec<OsString> =
            chosen.iter().map(|package| format!("{}={}", package.name, package.version).into()).collect();
        let mut known = BTreeMap::new();
        for paragraph in self.show(&arguments)? {
            let field = |name| paragraph.get(name).unwrap_or_default().to_string();
            known.insert((field("Package"), field("Version"), field("Architecture")), paragraph);
        }
        let mut locked = Vec::new();
        for package in chosen {
            let key = (package.name.clone(), package.version.clone(), package.architecture.clone());
            let unknown = || Error::unavailable(format!("apt does not tell the SHA-256 of package {}", key.0));
            let paragraph = known.get(&key).ok_or_else(unknown)?;
            let source = self
                .sources
                .iter()
                .filter(|source| package.uri.starts_with(&source.uri))
                // `debian/` must not claim what is below `debian/security/`.
                .max_by_key(|source| (source.uri.len(), std::cmp::Reverse(source.archive.len())))
                .ok_or_else(|| Error::unavailable(format!("apt takes package {} from an unknown archive", key.0)))?;
            locked.push(Locked {
                name: package.name,
                version: package.version,
                architecture: package.architecture,
                role,
                archive: source.archive.clone(),
                file: decoded(&package.uri[source.uri.len()..]),
                size: paragraph.get("Size").and_then(|size| size.parse().ok()).ok_or_else(unknown)?,
                sha256: paragraph.get("SHA256").map(str::to_string).ok_or_else(unknown)?,
            });
        }
        Ok(locked)
    }

    /// Fetches packages into `directory`, each under its SHA-256. `tick` is called meanwhile.
    ///
    /// # Errors
    /// `NotFound` where the archive no longer holds one of them, `Unavailable` for other failures.
    pub(crate) fn fetch(&self, packages: &[&Locked], directory: &Path, tick: &mut dyn FnMut()) -> Result<()> {
        let mut command = self.command(&self.tools.apt_helper);
        command.args(["-q", "download-file"]).current_dir(directory);
        for package in packages {
            let source =
                self.sources.iter().find(|source| source.archive == package.archive).ok_or_else(|| {
                    Error::not_found(format!("this machine's apt has no archive {}", package.archive))
                })?;
            command
                .arg(format!("{}{}", source.uri, encoded(&package.file)))
                .arg(directory.join(&package.sha256))
                .arg(format!("SHA256:{}", package.sha256));
        }
        let finished = process::run_watched(command, self.limits.within(FETCH_DEADLINE), tick)?;
        if finished.status.success() {
            return Ok(());
        }
        let gone = String::from_utf8_lossy(&finished.stderr);
        let error = process::failed("apt", &finished).context("cannot fetch packages");
        Err(if error.kind == ErrorKind::Refused {
            error
        } else if ["404", "File not found", "Hash Sum mismatch"].iter().any(|word| gone.contains(word)) {
            Error::not_found(error.message)
        } else {
            Error::unavailable(error.message).with_hint("check the network, and try again")
        })
    }
}

fn given_sources(uri: &str, suite: &str) -> Result<Vec<Source>> {
    if uri.is_empty() || uri.chars().any(|c| c.is_whitespace() || c.is_control() || c == '[') {
        return Err(Error::invalid("the address of the archive is empty or holds spaces"));
    }
    let uri = format!("{}/", uri.trim_end_matches('/'));
    let source = |archive: String| Source { archive, uri: uri.clone() };
    Ok(vec![source(suite.to_string()), source(format!("{suite}-updates"))])
}

/// The archives of a suite in the machine's own apt configuration.
fn machine_sources(tools: &Tools, suite: &str, limits: Limits<'_>) -> Result<Vec<Source>> {
    let mut command = process::command(&tools.apt_get);
    command.args([
        "indextargets",
        "--format",
        "$(ORIGIN)\t$(CODENAME)\t$(RELEASE)\t$(COMPONENT)\t$(REPO_URI)",
        "Created-By: Packages",
    ]);
    let output = process::run_ok(command, limits.within(RESOLVE_DEADLINE))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let sources = select_sources(&text, suite);
    if sources.iter().any(|source| source.archive == suite) {
        return Ok(sources);
    }
    Err(Error::refused(format!("this machine's apt has no Debian archive of suite \"{suite}\"")).with_hint(format!(
        "add {suite} to the machine's apt sources, or give an archive by BURGEON_DEBIAN_ARCHIVE=URI"
    )))
}

fn select_sources(targets: &str, suite: &str) -> Vec<Source> {
    let names = [suite.to_string(), format!("{suite}-updates"), format!("{suite}-security")];
    let mut sources = Vec::new();
    for line in targets.lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        let [origin, codename, release, component, uri] = fields[..] else { continue };
        // Where the machine has not fetched its lists, the fields that come from them stay
        // unexpanded or empty, and only the release named in the sources is known.
        let known = |field: &str| !field.is_empty() && !field.starts_with("$(");
        let archive = if known(codename) { codename } else { release };
        if component != "main" || (known(origin) && origin != "Debian") || !names.iter().any(|name| name == archive) {
            continue;
        }
        let source = Source { archive: archive.to_string(), uri: format!("{}/", uri.trim_end_matches('/')) };
        // The first is the one that the machine prefers.
        if !sources.iter().any(|other: &Source| other.archive == source.archive) {
            sources.push(source);
        }
    }
    sources
}

fn unresolvable(output: &process::Finished) -> Error {
    let said = String::from_utf8_lossy(&output.stderr);
    for line in said.lines() {
        let missing = line
            .strip_prefix("E: Unable to locate package ")
            .or_else(|| line.strip_prefix("E: No packages found"))
            .or_else(|| line.strip_prefix("E: Can't find a source to download "));
        if let Some(name) = missing {
            return Error::invalid(format!("the archive has no package {name}"));
        }
    }
    let unmet: Vec<String> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .skip_while(|line| !line.contains("unmet dependencies"))
        .skip(1)
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .filter(|line| !line.is_empty())
        .collect();
    let error = process::failed("apt", output).context("cannot choose packages");
    Error::invalid(if unmet.is_empty() { error.message } else { format!("{}; {}", error.message, unmet.join("; ")) })
}

/// Reads a line such as `'URI' name_version_architecture.deb 123 HASH`.
fn chosen(line: &str) -> Option<Chosen> {
    let (uri, rest) = line.strip_prefix('\'')?.split_once("' ")?;
    let file = decoded(rest.split_whitespace().next()?);
    let mut parts = file.strip_suffix(".deb")?.splitn(3, '_');
    Some(Chosen {
        uri: uri.to_string(),
        name: parts.next()?.to_string(),
        version: parts.next()?.to_string(),
        architecture: parts.next()?.to_string(),
    })
}

/// Undoes the percent-encoding of an address.
fn decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let escape = (bytes[at] == b'%').then(|| text.get(at + 1..at + 3)).flatten();
        match escape.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(value) => {
                out.push(value);
                at += 3;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Percent-encodes what is not plain in the path of an address.
fn encoded(path: &str) -> String {
    let mut out = String::new();
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._/".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02x}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_chosen_packages_read() {
        let line = "'http://a.example/debian/pool/main/u/util-linux/mount_2.38.1-5%2bdeb12u3_amd64.deb' mount_1%3a2.38.1-5+deb12u3_amd64.deb 12 MD5Sum:00";
        let package = chosen(line).unwrap();
        assert_eq!((package.name.as_str(), package.version.as_str()), ("mount", "1:2.38.1-5+deb12u3"));
        assert_eq!(chosen("Reading package lists..."), None);
        let path = "pool/main/b/b_1+2~3_all.deb";
        assert_eq!(encoded(path), "pool/main/b/b_1%2b2%7e3_all.deb");
        assert_eq!(decoded(&encoded(path)), path);
    }

    #[test]
    fn only_debian_archives_of_the_suite_are_taken() {
        let targets = "Debian\tbookworm\tbookworm\tmain\thttp://a.example/debian/\n\
            Debian\tbookworm\tbookworm\tcontrib\thttp://a.example/debian/\n\
            Debian\tbookworm-security\tbookworm-security\tmain\thttp://a.example/security\n\
            Debian\ttrixie\ttrixie\tmain\thttp://a.example/debian/\n\
            Other\tbookworm\tbookworm\tmain\thttp://b.example/\n\
            $(ORIGIN)\t$(CODENAME)\tbookworm-updates\tmain\thttp://c.example/debian\n";
        let found: Vec<(String, String)> =
            select_sources(targets, "bookworm").into_iter().map(|source| (source.archive, source.uri)).collect();
        let expected = [
            ("bookworm", "http://a.example/debian/"),
            ("bookworm-security", "http://a.example/security/"),
            ("bookworm-updates", "http://c.example/debian/"),
        ];
        assert_eq!(found, expected.map(|(archive, uri)| (archive.to_string(), uri.to_string())));
    }
}
