//! What of a data directory's server lies elsewhere, and the file that remembers it.
//!
//! A server whose environment lost a setting would begin with an empty database beside VMs that it does not know, and
//! remove them. So what was elsewhere once has to be told each time, and what is here is not left behind.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use burgeon_api::{Error, Result, path_text::printable};
use serde::{Deserialize, Serialize};

use super::{CATALOG, Owner, Places};
#[cfg(feature = "s3")]
use crate::objects::{Bucket, S3Settings};
use crate::{
    ids::OwnerId,
    sql::{self, Address},
};

const FORMAT: u32 = 1;

/// The settings: none means that it is in the data directory.
#[derive(Clone, Debug, Default)]
pub struct Elsewhere {
    #[cfg(feature = "s3")]
    pub objects: Option<S3Settings>,
    pub catalog: Option<Address>,
    pub meta: Option<Address>,
}

/// Where a data directory has what lies in it.
#[derive(Clone, Debug)]
pub struct Files {
    /// What remembers what lies elsewhere.
    pub record: PathBuf,
    pub store: PathBuf,
    pub meta: PathBuf,
    /// For people: `HOST:DIRECTORY`.
    pub name: String,
}

/// The file. What is absent from it is in the data directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    format: u32,
    owner: String,
    /// Addresses for people, as they were when it was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    objects: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    catalog: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    meta: Option<String>,
}

/// A part, what the settings say of it, what the record does, and the variable that sets it.
struct Part<'a> {
    name: &'static str,
    variable: &'static str,
    given: Option<String>,
    recorded: Option<&'a str>,
    here: Option<PathBuf>,
}

impl Elsewhere {
    /// Whether nothing is.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        self.objects_address().is_none() && self.catalog.is_none() && self.meta.is_none()
    }

    pub(super) fn has_objects(&self) -> bool {
        self.objects_address().is_some()
    }

    /// Whether a record tells of the same parts.
    pub(super) fn is_of(&self, record: &Record) -> bool {
        let given = [self.has_objects(), self.catalog.is_some(), self.meta.is_some()];
        given == [record.objects.is_some(), record.catalog.is_some(), record.meta.is_some()]
    }

    fn objects_address(&self) -> Option<String> {
        #[cfg(feature = "s3")]
        return self.objects.as_ref().map(ToString::to_string);
        #[cfg(not(feature = "s3"))]
        None
    }

    /// Compares the settings with what the data directory remembers and holds; the first time, it remembers them. For
    /// the process that has meta. `id` is a new random one.
    ///
    /// # Errors
    /// `Refused` for settings that leave behind what is here, or that lack what is elsewhere. Then nothing was changed.
    pub fn settle(&self, files: &Files, id: [u8; 16]) -> Result<Places> {
        let record = read(&files.record)?;
        for part in self.parts(files, record.as_ref()) {
            part.check(record.is_some(), files)?;
        }
        let record = match record {
            None if self.is_nothing() => return Ok(self.places(files, None)),
            None => write(&files.record, self, OwnerId(id))?,
            Some(record) => record,
        };
        Ok(self.places(files, Some(owner(&record, files)?)))
    }

    /// As [`Self::settle`], for those who do not have meta: nothing is remembered, and its address not looked at.
    ///
    /// # Errors
    /// As there; `Unavailable` before a server has settled it.
    pub fn settled(&self, files: &Files) -> Result<Places> {
        let record = read(&files.record)?;
        for part in self.parts(files, record.as_ref()).into_iter().filter(|part| part.name != META) {
            part.check(record.is_some(), files)?;
        }
        match record {
            None if self.is_nothing() => Ok(self.places(files, None)),
            None => Err(Error::unavailable(format!("no server has been started for {} yet", files.name))
                .with_hint("start one with the same settings: burgeon serve")),
            Some(record) => Ok(self.places(files, Some(owner(&record, files)?))),
        }
    }

    /// Where meta is.
    #[must_use]
    pub fn meta_address(&self, files: &Files) -> Address {
        self.meta.clone().unwrap_or_else(|| Address::Sqlite(files.meta.clone()))
    }

    /// Asks each server that is named, so that what is wrong with it is told. Blocks.
    ///
    /// # Errors
    /// In the answers, by what was asked: `objects`, `catalog`, `meta`.
    #[must_use]
    pub fn check(&self) -> Vec<(&'static str, String, Result<()>)> {
        let mut checked = Vec::new();
        #[cfg(feature = "s3")]
        if let Some(settings) = &self.objects {
            let found = Bucket::new(settings.clone()).and_then(|bucket| bucket.check());
            checked.push(("objects", settings.to_string(), found));
        }
        for (name, address) in [("catalog", &self.catalog), (META, &self.meta)] {
            if let Some(address) = address {
                checked.push((name, address.to_string(), sql::check(address)));
            }
        }
        checked
    }

    pub(super) fn places(&self, files: &Files, owner: Option<Owner>) -> Places {
        Places {
            directory: files.store.clone(),
            #[cfg(feature = "s3")]
            objects: self.objects.clone(),
            catalog: self.catalog.clone(),
            owner,
        }
    }

    fn parts<'a>(&self, files: &Files, record: Option<&'a Record>) -> [Part<'a>; 3] {
        let filled = |path: PathBuf| fs::metadata(&path).is_ok_and(|about| about.len() > 0).then_some(path);
        let packs = files.store.join("packs");
        let has_packs = fs::read_dir(&packs).is_ok_and(|mut entries| entries.next().is_some());
        [
            Part {
                name: "objects",
                variable: "BURGEON_OBJECTS",
                given: self.objects_address(),
                recorded: record.and_then(|record| record.objects.as_deref()),
                here: has_packs.then_some(packs),
            },
            Part {
                name: "catalog",
                variable: "BURGEON_DATABASE",
                given: self.catalog.as_ref().map(ToString::to_string),
                recorded: record.and_then(|record| record.catalog.as_deref()),
                here: filled(files.store.join(CATALOG)),
            },
            Part {
                name: META,
                variable: "BURGEON_DATABASE or BURGEON_META_DATABASE",
                given: self.meta.as_ref().map(ToString::to_string),
                recorded: record.and_then(|record| record.meta.as_deref()),
                here: filled(files.meta.clone()),
            },
        ]
    }
}

const META: &str = "meta";

impl Part<'_> {
    /// Which server it is need not be compared: those who hold something know whose it is.
    fn check(&self, is_recorded: bool, files: &Files) -> Result<()> {
        let Part { name, variable, given, recorded, here } = self;
        match (given, recorded) {
            (None, Some(recorded)) => Err(Error::refused(format!(
                "the {name} of {} is in {}, and the settings do not say so",
                files.name,
                printable(recorded)
            ))
            .with_hint(format!("set {variable} as it was, for the server and for this command"))),
            (Some(given), None) if is_recorded => Err(Error::refused(format!(
                "the {name} of {} is in its directory, and {variable} says {given}",
                files.name
            ))
            .with_hint("take the setting away, or choose a new data directory: --data DIR")),
            (Some(given), None) => match here {
                Some(here) => Err(Error::refused(format!(
                    "the {name} of {} is in {}, and {variable} says {given}",
                    files.name,
                    here.display()
                ))
                .with_hint("take the setting away, or choose a new data directory: --data DIR")),
                None => Ok(()),
            },
            _ => Ok(()),
        }
    }
}

pub(super) fn owner(record: &Record, files: &Files) -> Result<Owner> {
    let id = record.owner.parse().map_err(|error| damaged(&files.record, &error))?;
    Ok(Owner { id, name: files.name.clone() })
}

fn damaged(file: &Path, why: &dyn std::fmt::Display) -> Error {
    Error::damaged(format!("{} does not read: {why}", file.display()))
        .with_hint("it says where this data directory's store is: bring it back from a copy")
}

pub(super) fn read(file: &Path) -> Result<Option<Record>> {
    let text = match fs::read(file) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(format!("read {}", file.display()), &error)),
    };
    let value: serde_json::Value = serde_json::from_slice(&text).map_err(|error| damaged(file, &error))?;
    match value.get("format").and_then(serde_json::Value::as_u64) {
        Some(format) if format == u64::from(FORMAT) => {}
        Some(format) => {
            return Err(Error::refused(format!("{} has format {format}; this Burgeon knows {FORMAT}", file.display()))
                .with_hint("use the newer Burgeon that wrote it, or another data directory"));
        }
        None => return Err(damaged(file, &"it has no format")),
    }
    serde_json::from_value(value).map(Some).map_err(|error| damaged(file, &error))
}

/// Writes the record, unless somebody else just did; answers what it is then.
pub(super) fn write(file: &Path, elsewhere: &Elsewhere, owner: OwnerId) -> Result<Record> {
    let record = Record {
        format: FORMAT,
        owner: owner.to_string(),
        objects: elsewhere.objects_address(),
        catalog: elsewhere.catalog.as_ref().map(ToString::to_string),
        meta: elsewhere.meta.as_ref().map(ToString::to_string),
    };
    let failed = |error: io::Error| Error::io(format!("write {}", file.display()), &error);
    let mut text = serde_json::to_vec_pretty(&record).map_err(|error| failed(error.into()))?;
    text.push(b'\n');
    let unfinished = file.with_extension(format!("new-{}", std::process::id()));
    let written = File::create(&unfinished).and_then(|mut file| file.write_all(&text).and_then(|()| file.sync_all()));
    // A second name that replaces nothing.
    let linked = written.and_then(|()| fs::hard_link(&unfinished, file));
    let removed = fs::remove_file(&unfinished);
    match linked {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        linked => linked.and(removed).map_err(failed)?,
    }
    sync_folder(file).map_err(failed)?;
    read(file)?.ok_or_else(|| Error::internal("a file that was written is not there"))
}

/// Gives a record its name, for good.
pub(super) fn put_in_place(unfinished: &Path, file: &Path) -> Result<()> {
    let failed = |error: io::Error| Error::io(format!("write {}", file.display()), &error);
    fs::rename(unfinished, file).and_then(|()| sync_folder(file)).map_err(failed)
}

fn sync_folder(of: &Path) -> io::Result<()> {
    File::open(of.parent().unwrap_or(Path::new("/")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(directory: &Path) -> Files {
        Files {
            record: directory.join("places.json"),
            store: directory.join("store"),
            meta: directory.join("meta.db"),
            name: "host:/data".into(),
        }
    }

    fn on_postgres() -> Elsewhere {
        let address = || Some("postgres://ann:secret@db.lan/burgeon".parse().unwrap());
        let mut elsewhere = Elsewhere { catalog: address(), ..Elsewhere::default() };
        elsewhere.meta = address();
        elsewhere
    }

    #[test]
    fn what_is_elsewhere_is_remembered_without_its_secrets() {
        let directory = tempfile::tempdir().unwrap();
        let files = files(directory.path());
        let nothing = Elsewhere::default();
        assert!(nothing.settle(&files, [1; 16]).unwrap().owner.is_none());
        assert!(!files.record.exists(), "nothing to remember");

        let elsewhere = on_postgres();
        assert!(elsewhere.settled(&files).unwrap_err().hint.unwrap().contains("burgeon serve"));
        let first = elsewhere.settle(&files, [1; 16]).unwrap();
        assert_eq!(elsewhere.settle(&files, [2; 16]).unwrap().owner, first.owner, "the first owner stays");
        assert_eq!(elsewhere.settled(&files).unwrap().owner, first.owner);
        let text = fs::read_to_string(&files.record).unwrap();
        assert!(text.contains("db.lan") && !text.contains("secret"), "{text}");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "no unfinished file");

        // The host process is not told of meta.
        let host = Elsewhere { meta: None, ..on_postgres() };
        assert_eq!(host.settled(&files).unwrap().owner, first.owner);
        for forgetful in [Elsewhere::default(), host] {
            let error = forgetful.settle(&files, [3; 16]).unwrap_err();
            assert!(
                error.message.contains("db.lan") && error.hint.unwrap().contains("BURGEON_DATABASE"),
                "{}",
                error.message
            );
        }
        fs::write(&files.record, text.replace("\"format\": 1", "\"format\": 2")).unwrap();
        assert!(elsewhere.settle(&files, [4; 16]).unwrap_err().message.contains("format 2"));
    }

    #[test]
    fn what_is_here_is_not_left_behind() {
        let directory = tempfile::tempdir().unwrap();
        let files = files(directory.path());
        fs::write(&files.meta, "a database").unwrap();
        let error = on_postgres().settle(&files, [1; 16]).unwrap_err();
        assert!(error.message.contains("meta.db") && !error.message.contains("secret"), "{error}");
        assert!(!files.record.exists());
        // The catalog alone may be there.
        let catalog = Elsewhere { meta: None, ..on_postgres() };
        catalog.settle(&files, [1; 16]).unwrap();
        let error = on_postgres().settle(&files, [1; 16]).unwrap_err();
        assert!(error.message.contains("meta of host:/data is in its directory"), "{error}");
    }
}
