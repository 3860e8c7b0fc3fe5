//! What the figures of the store are measured with: real files, noise, CPU time.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

/// At most this much of one file, so that a few large ones are not all there is.
const MOST_OF_A_FILE: usize = 8 << 20;
/// In which /proc tells CPU time on every Linux for x86-64.
const TICKS_PER_SECOND: f64 = 100.0;

/// The regular files below a directory, in the order of their names, without what links lead to.
pub(crate) fn files(directory: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    let mut entries: Vec<_> = fs::read_dir(directory).map(|entries| entries.flatten().collect()).unwrap_or_default();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => all.extend(files(&entry.path())),
            Ok(kind) if kind.is_file() => all.push(entry.path()),
            _ => {}
        }
    }
    all
}

/// Contents of the files below /usr/lib, one after the other, up to `most` bytes.
pub(crate) fn library(most: usize) -> Result<Vec<u8>> {
    let mut data = Vec::with_capacity(most);
    for path in files(Path::new("/usr/lib")) {
        // Not all of them are for everybody.
        let Ok(content) = fs::read(&path) else { continue };
        let room = MOST_OF_A_FILE.min(most - data.len()).min(content.len());
        data.extend_from_slice(&content[..room]);
        if data.len() == most {
            break;
        }
    }
    anyhow::ensure!(!data.is_empty(), "there are no files below /usr/lib");
    Ok(data)
}

/// Numbers without an order, the same in every run (xorshift).
pub(crate) struct Noise(pub(crate) u64);

impl Noise {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// That many bytes, in steps of 8.
    pub(crate) fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length / 8).flat_map(|_| self.next().to_le_bytes()).collect()
    }
}

/// Seconds of CPU time of a process, this one where none is named; threads that have ended count.
pub(crate) fn cpu_seconds(process: Option<u32>) -> Result<f64> {
    let path = process.map_or_else(|| "/proc/self/stat".to_string(), |id| format!("/proc/{id}/stat"));
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    // The second field is the program's name, which may hold anything; user and system time are the 14th and 15th.
    let (_, fields) = text.rsplit_once(") ").context("/proc tells no CPU time")?;
    let ticks: f64 = fields.split(' ').skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
    Ok(ticks / TICKS_PER_SECOND)
}

/// Millions.
pub(crate) fn millions(count: u64) -> f64 {
    count as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_told() {
        let before = cpu_seconds(None).unwrap();
        let mut noise = Noise(7);
        while cpu_seconds(Some(std::process::id())).unwrap() - before < 0.02 {
            assert_eq!(noise.bytes(1 << 20).len(), 1 << 20);
        }
    }
}
