//! Step `extract`: unpacks a file and hands on, normalised, the passages that could name a licence.
//!
//! Attributes: `package` (the first part of the path), `format` (what the file was, after unpacking), `packed` (what
//! it was packed with), `text_bytes` (size of the unpacked text). What is no text is told and handed on empty, so
//! that `review` lists it with its format.

use std::io::Read;

use flate2::bufread::MultiGzDecoder;
use serde_json::{Map, Value};

use crate::passages::Finder;
use crate::step::{Item, Outcome};

/// The most that a file may unpack to.
const MOST_UNPACKED: usize = 64 << 20;
/// As much of a file as tells its format.
const HEAD: usize = 4 << 10;
/// Memory for unpacked text that is kept from one file to the next.
const KEPT: usize = 4 << 20;

pub(crate) struct Extract {
    finder: Finder,
    unpacked: Vec<u8>,
}

impl Extract {
    pub(crate) fn new() -> Self {
        Self { finder: Finder::new(), unpacked: Vec::new() }
    }

    pub(crate) fn step(&mut self, item: &Item) -> Outcome {
        let package = item.name.split('/').next().unwrap_or_default();
        let mut attrs = Map::from_iter([("package".to_string(), Value::from(package))]);
        let mut text = item.payload;
        let mut format = format_of(text);
        if format == "gzip" {
            attrs.insert("packed".to_string(), "gzip".into());
            match self.unpack(item.payload) {
                Ok(inner) => format = inner,
                Err(error) => return Outcome { attrs, ..Outcome::failed(error) },
            }
            text = &self.unpacked;
        }
        attrs.insert("format".to_string(), format.into());
        if format != "text" {
            return Outcome { attrs, ..Outcome::default() };
        }
        attrs.insert("text_bytes".to_string(), text.len().into());
        Outcome { attrs, payload: self.finder.passages(text).into_bytes(), ..Outcome::default() }
    }

    /// Unpacks as much as the format of the contents asks for: all of a text, else the head.
    fn unpack(&mut self, packed: &[u8]) -> Result<&'static str, String> {
        let damaged = |error: std::io::Error| format!("gzip data cannot be unpacked: {error}");
        self.unpacked.clear();
        self.unpacked.shrink_to(KEPT);
        let mut unpacker = MultiGzDecoder::new(packed);
        unpacker.by_ref().take(HEAD as u64).read_to_end(&mut self.unpacked).map_err(damaged)?;
        let format = format_of(&self.unpacked);
        if format == "text" {
            // The last four bytes tell the size, if the file is not damaged and has one part.
            let told = packed.last_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes) as usize);
            self.unpacked.reserve(told.min(MOST_UNPACKED));
            let rest = MOST_UNPACKED + 1 - self.unpacked.len();
            unpacker.take(rest as u64).read_to_end(&mut self.unpacked).map_err(damaged)?;
            if self.unpacked.len() > MOST_UNPACKED {
                return Err(format!("gzip data unpacks to more than {} MiB", MOST_UNPACKED >> 20));
            }
        }
        Ok(format)
    }
}

/// Formats known by how they begin.
const MAGICS: &[(&[u8], &str)] = &[
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\0", "xz"),
    (b"BZh", "bzip2"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"PK\x03\x04", "zip"),
    (b"7z\xbc\xaf", "7z"),
    (b"!<arch>\n", "ar archive"),
    (b"%PDF-", "pdf"),
    (b"%!PS", "postscript"),
    (b"\x89PNG", "png"),
    (b"\xff\xd8\xff", "jpeg"),
    (b"GIF8", "gif"),
    (b"\x7fELF", "elf"),
    (b"wOFF", "font"),
    (b"wOF2", "font"),
    (b"SQLite format 3\0", "sqlite"),
    (b"\xfe\xff", "utf-16 text"),
    (b"\xff\xfe", "utf-16 text"),
];

/// The format of a file by its contents: one of `MAGICS`, `tar`, `empty`, `binary` or `text`.
fn format_of(bytes: &[u8]) -> &'static str {
    if bytes.is_empty() {
        return "empty";
    }
    if let Some((_, format)) = MAGICS.iter().find(|(magic, _)| bytes.starts_with(magic)) {
        return format;
    }
    let head = &bytes[..bytes.len().min(HEAD)];
    if head.get(257..262) == Some(b"ustar") {
        "tar"
    } else if head.contains(&0) {
        "binary"
    } else {
        "text"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compression, write::GzEncoder};
    use std::io::Write;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut packer = GzEncoder::new(Vec::new(), Compression::fast());
        packer.write_all(bytes).unwrap();
        packer.finish().unwrap()
    }

    fn extract(name: &str, payload: &[u8]) -> Outcome {
        Extract::new().step(&Item { name, attrs: &Map::new(), payload })
    }

    fn format(payload: &[u8]) -> String {
        extract("a", payload).attrs["format"].as_str().unwrap().to_string()
    }

    #[test]
    fn plain_and_packed_text_give_the_same() {
        let text = b"License: GPL-2\n\tand  more\n";
        for payload in [text.to_vec(), gzip(text), [gzip(&text[..9]), gzip(&text[9..])].concat()] {
            let outcome = extract("bash/copyright", &payload);
            assert_eq!(outcome.payload, b"license: gpl-2\nand more\n");
            assert_eq!(outcome.attrs["package"], "bash");
            assert_eq!(outcome.attrs["format"], "text");
            assert_eq!(outcome.attrs["text_bytes"], text.len());
        }
        assert_eq!(extract("a", &gzip(text)).attrs["packed"], "gzip");
    }

    #[test]
    fn other_formats_are_told_and_handed_on_empty() {
        assert_eq!(format(b""), "empty");
        assert_eq!(format(&gzip(b"")), "empty");
        assert_eq!(format(b"\x89PNG\r\n\x1a\n"), "png");
        assert_eq!(format(&gzip(b"%PDF-1.4 GPL")), "pdf");
        assert_eq!(format(b"GPL\0"), "binary");
        assert_eq!(format(&gzip(&gzip(b"GPL"))), "gzip");
        let mut tar = vec![b'a'; 512];
        tar[257..262].copy_from_slice(b"ustar");
        assert_eq!(format(&gzip(&tar)), "tar");
        assert!(extract("a", b"%PDF-1.4 GPL").payload.is_empty());
    }

    #[test]
    fn damaged_and_boundless_data_fail_with_the_reason() {
        let mut packed = gzip("some GPL text ".repeat(1000).as_bytes());
        packed.truncate(packed.len() - 9);
        assert!(extract("a", &packed).error.unwrap().starts_with("gzip data cannot be unpacked"));
        assert!(extract("a", b"\x1f\x8bnonsense").error.is_some());
        let bomb = gzip(&vec![b' '; MOST_UNPACKED + 1]);
        assert_eq!(extract("a", &bomb).error.unwrap(), "gzip data unpacks to more than 64 MiB");
    }

    #[test]
    fn one_extract_serves_many_items() {
        let mut extract = Extract::new();
        let mut step = |payload: &[u8]| extract.step(&Item { name: "a", attrs: &Map::new(), payload }).payload;
        assert_eq!(step(&gzip(b"under the GPL")), b"under the gpl");
        assert_eq!(step(&gzip(b"LGPL")), b"lgpl");
    }
}
