//! The file that keeps a disk's record: one line for each state, the last good one counts. So a change costs one write
//! at the end, which survives this process, and one sync, after which it survives a power cut.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use burgeon_api::{Error, Result};

use super::record::Record;

const FILE: &str = "disk.record";
/// A longer file is written anew, with the last state alone.
const MOST_BYTES: u64 = 256 << 10;

pub(super) struct Journal {
    directory: PathBuf,
    file: File,
    /// Of the good lines.
    end: u64,
}

/// CRC-32 of the record in eight hexadecimal digits, the record in JSON.
fn line(record: &Record) -> Result<Vec<u8>> {
    let text =
        serde_json::to_string(record).map_err(|error| Error::internal(format!("write a disk's record: {error}")))?;
    Ok(format!("{:08x} {text}\n", crc32fast::hash(text.as_bytes())).into_bytes())
}

/// The last good line, and where the good ones end.
fn last(bytes: &[u8]) -> Option<(&[u8], usize)> {
    let mut found = None;
    let mut end = 0;
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        let (Some(text), Some(sum)) = (line.get(9..line.len() - 1), line.get(..8)) else { break };
        if !line.ends_with(b"\n") || format!("{:08x}", crc32fast::hash(text)).as_bytes() != sum {
            break;
        }
        end += line.len();
        found = Some((text, end));
    }
    found
}

impl Journal {
    pub(super) fn create(directory: &Path, record: &Record) -> Result<Journal> {
        let (new, path) = (directory.join(FILE).with_extension("new"), directory.join(FILE));
        let line = line(record)?;
        let write = || -> io::Result<File> {
            let mut file = File::options().read(true).write(true).create(true).truncate(true).open(&new)?;
            file.write_all(&line)?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            File::open(directory)?.sync_all()?;
            Ok(file)
        };
        let file = write().map_err(|error| Error::io(format!("write {}", path.display()), &error))?;
        Ok(Journal { directory: directory.to_path_buf(), file, end: line.len() as u64 })
    }

    /// # Errors
    /// `NotFound` where there is none; `Damaged` for one without a good line; `Refused` for a newer version.
    pub(super) fn open(directory: &Path) -> Result<(Journal, Record)> {
        let path = directory.join(FILE);
        let file = File::options().read(true).write(true).open(&path);
        let (file, bytes) = file
            .and_then(|file| Ok((file, fs::read(&path)?)))
            .map_err(|error| Error::io(format!("read {}", path.display()), &error))?;
        let damaged = |why: &dyn std::fmt::Display| Error::damaged(format!("{} is damaged: {why}", path.display()));
        let (text, end) = last(&bytes).ok_or_else(|| damaged(&"no line of it is whole"))?;
        let record: Record = serde_json::from_slice(text).map_err(|error| damaged(&error))?;
        record.check().map_err(|error| error.context(path.display()))?;
        Ok((Journal { directory: directory.to_path_buf(), file, end: end as u64 }, record))
    }

    /// Writes a state down. It survives this process; a power cut only after [`Self::sync`].
    pub(super) fn append(&mut self, record: &Record) -> Result<()> {
        if self.end > MOST_BYTES {
            *self = Journal::create(&self.directory, record)?;
            return Ok(());
        }
        let line = line(record)?;
        let written = self.file.write_all_at(&line, self.end);
        written.map_err(|error| Error::io("write a disk's record", &error))?;
        self.end += line.len() as u64;
        Ok(())
    }

    pub(super) fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|error| Error::io("sync a disk's record", &error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::record::Stack;

    #[test]
    fn the_last_whole_line_counts() {
        let directory = tempfile::tempdir().unwrap();
        let mut record = Record::new(4096, Stack::default(), None).unwrap();
        let mut journal = Journal::create(directory.path(), &record).unwrap();
        let mut states = vec![record.clone()];
        for count in 1..40 {
            record = record.sealed(4096 * count, false);
            journal.append(&record).unwrap();
            states.push(record.clone());
        }
        journal.sync().unwrap();
        assert_eq!(Journal::open(directory.path()).unwrap().1, record);
        // Broken off anywhere, what was written before counts, and what follows goes behind it.
        let path = directory.path().join(FILE);
        let whole = fs::read(&path).unwrap();
        let first = whole.iter().position(|byte| *byte == b'\n').unwrap() + 1;
        for cut in (first..whole.len()).step_by(97) {
            fs::write(&path, &whole[..cut]).unwrap();
            let lines = whole[..cut].iter().filter(|byte| **byte == b'\n').count();
            let (mut journal, found) = Journal::open(directory.path()).unwrap();
            assert_eq!(found, states[lines - 1]);
            journal.append(&record).unwrap();
            assert_eq!(Journal::open(directory.path()).unwrap().1, record);
        }
        fs::write(&path, &whole[..first - 1]).unwrap();
        assert_eq!(Journal::open(directory.path()).map(drop).unwrap_err().kind, burgeon_api::ErrorKind::Damaged);
    }

    #[test]
    fn a_long_file_is_written_anew() {
        let directory = tempfile::tempdir().unwrap();
        let record = Record::new(4096, Stack::default(), None).unwrap();
        let mut journal = Journal::create(directory.path(), &record).unwrap();
        let most = 2 * usize::try_from(MOST_BYTES).unwrap();
        for _ in 0..most / line(&record).unwrap().len() {
            journal.append(&record).unwrap();
        }
        assert!(fs::metadata(directory.path().join(FILE)).unwrap().len() < most as u64 * 3 / 4);
        assert_eq!(Journal::open(directory.path()).unwrap().1, record);
    }
}
