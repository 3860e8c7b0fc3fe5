//! What a VM is to be given, as the command line names it.

use std::{
    fs::File,
    io::{Read, stdin},
    path::Path,
};

use burgeon_api::{
    Error, Result,
    provisions::{Content, MOST_FILES, MOST_SECRETS, ProvidedFile, Provisions, readable},
};

use crate::arguments::ProvideArguments;

/// A file with variables is not longer.
const MOST_VARIABLES_FILE: usize = 1 << 20;

/// Reads what the arguments name, and checks all of it.
///
/// # Errors
/// `Invalid`, with the argument; the system's, with the file.
pub(super) fn read(arguments: ProvideArguments) -> Result<Provisions> {
    let ProvideArguments { env, env_file, file, secret } = arguments;
    let mut provisions = Provisions::default();
    for path in &env_file {
        let text = read_whole("--env-file", path, MOST_VARIABLES_FILE)?;
        let text = String::from_utf8(text)
            .map_err(|_| Error::invalid(format!("--env-file {}: it is not UTF-8", path.display())))?;
        for (number, line) in text.lines().enumerate() {
            if let Some((name, value)) = variable(line)
                .map_err(|error| error.context(format!("--env-file {}:{}", path.display(), number + 1)))?
            {
                provisions.environment.insert(name, value);
            }
        }
    }
    for pair in &env {
        let (name, value) =
            pair.split_once('=').ok_or_else(|| Error::invalid(format!("--env {pair}: it is not KEY=VALUE")))?;
        provisions.environment.insert(name.into(), value.into());
    }
    for argument in &file {
        provisions.files.push(provided_file(argument)?);
    }
    for argument in &secret {
        let (name, path) = argument
            .split_once('=')
            .filter(|(_, path)| !path.is_empty())
            // What is not a file's name may be the secret itself, and is not shown.
            .ok_or_else(|| Error::invalid("--secret: it is not NAME=FILE, or NAME=- for standard input"))?;
        let content = match path {
            "-" if secret.iter().filter(|other| other.ends_with("=-")).count() > 1 => {
                return Err(Error::invalid("--secret: only one secret can come from standard input"));
            }
            "-" => whole("--secret", "standard input", stdin().lock(), MOST_SECRETS)?,
            path => read_whole("--secret", Path::new(path), MOST_SECRETS)?,
        };
        if provisions.secrets.insert(name.into(), Content(content)).is_some() {
            return Err(Error::invalid(format!("--secret {name}: it is given twice")));
        }
    }
    provisions.check()?;
    Ok(provisions)
}

/// A line of a file of variables; nothing for an empty one or a comment.
fn variable(line: &str) -> Result<Option<(String, String)>> {
    let line = line.trim_start();
    if line.is_empty() || line.starts_with('#') {
        return Ok(None);
    }
    let (name, value) = line.split_once('=').ok_or_else(|| Error::invalid("the line is not KEY=VALUE"))?;
    Ok(Some((name.into(), value.into())))
}

/// `GUEST_PATH=HOST_FILE[:MODE]`.
fn provided_file(argument: &str) -> Result<ProvidedFile> {
    let (path, from) = argument
        .split_once('=')
        .ok_or_else(|| Error::invalid(format!("--file {argument}: it is not GUEST_PATH=HOST_FILE[:MODE]")))?;
    let (from, mode) = match from.rsplit_once(':') {
        Some((from, mode)) if (3..=4).contains(&mode.len()) => match u32::from_str_radix(mode, 8) {
            Ok(mode) => (from, mode),
            Err(_) => {
                return Err(Error::invalid(format!("--file {argument}: {mode} are no permission bits, as 0644 are")));
            }
        },
        _ => (from, readable()),
    };
    let content = Content(read_whole("--file", Path::new(from), MOST_FILES)?);
    Ok(ProvidedFile { path: path.into(), mode, content })
}

fn read_whole(argument: &str, path: &Path, most: usize) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(|error| Error::io(format!("{argument} {}", path.display()), &error))?;
    whole(argument, &path.display().to_string(), file, most)
}

fn whole(argument: &str, name: &str, from: impl Read, most: usize) -> Result<Vec<u8>> {
    let mut content = Vec::new();
    from.take(most as u64 + 1)
        .read_to_end(&mut content)
        .map_err(|error| Error::io(format!("{argument} {name}"), &error))?;
    if content.len() > most {
        return Err(Error::invalid(format!("{argument} {name}: it has more than the {most} bytes that can be given")));
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments() -> ProvideArguments {
        ProvideArguments { env: vec![], env_file: vec![], file: vec![], secret: vec![] }
    }

    #[test]
    fn arguments_name_what_is_given() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str, text: &str| {
            let path = directory.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let (vars, config) = (at("vars", "# some\n\nA=1\n  B=x=y \n"), at("config", "text"));
        let shown = config.display().to_string();
        let read_all = read(ProvideArguments {
            env: vec!["A=2".into()],
            env_file: vec![vars],
            file: vec![format!("/etc/a={shown}"), format!("/etc/b={shown}:0600")],
            secret: vec![format!("key={shown}")],
        });
        let provisions = read_all.unwrap();
        assert_eq!((provisions.environment["A"].as_str(), provisions.environment["B"].as_str()), ("2", "x=y "));
        assert_eq!(provisions.files.iter().map(|file| file.mode).collect::<Vec<_>>(), [0o644, 0o600]);
        assert_eq!(provisions.secrets["key"].0, b"text");

        let wrong = |arguments: ProvideArguments| read(arguments).unwrap_err().to_string();
        assert!(
            wrong(ProvideArguments { env: vec!["A".into()], ..arguments() }).contains("--env A: it is not KEY=VALUE")
        );
        assert!(wrong(ProvideArguments { env: vec!["1=a".into()], ..arguments() }).contains("env \"1\""));
        let bad = at("bad", "A=1\nnothing\n");
        assert!(wrong(ProvideArguments { env_file: vec![bad], ..arguments() }).contains("bad:2: the line is not"));
        assert!(
            wrong(ProvideArguments { file: vec!["/a=/no/file".into()], ..arguments() }).contains("--file /no/file")
        );
        let mode = format!("/a={shown}:0999");
        assert!(wrong(ProvideArguments { file: vec![mode], ..arguments() }).contains("0999 are no permission bits"));
        let told = wrong(ProvideArguments { secret: vec!["hunter2".into()], ..arguments() });
        assert!(told.contains("--secret") && !told.contains("hunter2"), "{told}");
        let twice = vec!["a=-".into(), "b=-".into()];
        assert!(wrong(ProvideArguments { secret: twice, ..arguments() }).contains("only one secret"));
        let large = at("large", &"x".repeat(MOST_SECRETS + 1)).display().to_string();
        assert!(
            wrong(ProvideArguments { secret: vec![format!("a={large}")], ..arguments() }).contains("more than the")
        );
    }
}
