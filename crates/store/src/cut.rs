//! Cutting bytes into chunks. It owns the ways to cut and their names, which manifests keep: bytes are found again
//! only if they are cut as before. No input or output but the reader that is cut.
//!
//! Which way for what, by `examples/dedup.rs` (700 MB in 34,000 files of /usr, as ext4; the same tree with an insert
//! into 5 % of the files and 4 MB more; 48.6 MB of its 4 KiB blocks are new):
//!
//! | way | new MB | for |
//! |---|---|---|
//! | [`Cutter::Fixed64K`] | 740.7 | disks and memories that are written in place |
//! | [`Cutter::FastCdc16K`] | 131.1 | files, archives, images without a known relative |
//! | [`Cutter::Template`] with the old image's [`Blocks`] | 48.7 | images that are built again |

use std::{
    collections::HashMap,
    fmt,
    io::{self, Read},
    str::FromStr,
};

use burgeon_api::{Error, Result};
use fastcdc::v2020::FastCDC;

use crate::{chunk::is_zero, ids::ChunkId};

/// What file systems move: zeros and known bytes are found in blocks of this size.
pub const BLOCK_BYTES: usize = 4 << 10;
/// No way makes longer chunks.
pub const MOST_CUT: usize = 64 << 10;
/// The content-defined way: least, average and most bytes of a chunk. Averages other than powers of two would be
/// rounded to one.
const CDC_BYTES: [usize; 3] = [4 << 10, 16 << 10, MOST_CUT];
const BUFFER_BYTES: usize = 1 << 20;

/// A way to cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cutter {
    /// At multiples of 64 KiB.
    Fixed64K,
    /// Where the contents say so (FastCDC, Xia et al. 2020), 16 KiB on average, and around blocks of zeros.
    FastCdc16K,
    /// Runs of blocks of 4 KiB that are neither zeros nor known, at most 64 KiB together.
    Template,
}

impl Cutter {
    pub const ALL: [Cutter; 3] = [Cutter::Fixed64K, Cutter::FastCdc16K, Cutter::Template];

    /// The name in manifests.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Cutter::Fixed64K => "fixed/64k",
            Cutter::FastCdc16K => "fastcdc2020/16k",
            Cutter::Template => "template/4k",
        }
    }
}

impl fmt::Display for Cutter {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl FromStr for Cutter {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Cutter::ALL.into_iter().find(|cutter| cutter.name() == text).ok_or_else(|| {
            let text = burgeon_api::path_text::printable(text);
            let known = Cutter::ALL.map(Cutter::name).join(", ");
            Error::refused(format!("\"{text}\" is no way to cut that this Burgeon knows: {known}"))
                .with_hint("use the newer Burgeon that wrote it")
        })
    }
}

/// The blocks of an address space whose bytes are stored already, by their BLAKE3.
#[derive(Debug, Default)]
pub struct Blocks {
    addresses: HashMap<ChunkId, u64>,
}

impl Blocks {
    /// Adds bytes that stand at an address, a multiple of 4 KiB. Zeros and a last part of a block are left out; of
    /// equal blocks, the first counts.
    pub fn add(&mut self, address: u64, bytes: &[u8]) {
        for (index, block) in bytes.chunks_exact(BLOCK_BYTES).enumerate() {
            if !is_zero(block) {
                self.addresses.entry(ChunkId::of(block)).or_insert(address + (index * BLOCK_BYTES) as u64);
            }
        }
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.addresses.is_empty()
    }

    /// Different blocks; each takes about 50 bytes of memory.
    #[must_use]
    pub fn len(&self) -> usize {
        self.addresses.len()
    }

    fn find(&self, block: &[u8]) -> Option<u64> {
        if self.addresses.is_empty() || block.len() < BLOCK_BYTES {
            return None;
        }
        self.addresses.get(&ChunkId::of(block)).copied()
    }
}

/// A stretch of the bytes that were cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut<'a> {
    /// From the first byte that was read.
    pub offset: u64,
    pub length: u64,
    pub content: Content<'a>,
}

/// What a stretch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content<'a> {
    /// Nothing to store.
    Zeros,
    /// A chunk.
    Data(&'a [u8]),
    /// The bytes that stand at this address of the space whose [`Blocks`] are known.
    Known(u64),
}

/// Cuts what a reader gives, in one pass and with a buffer of 1 MiB.
pub struct Cuts<'a, R> {
    reader: R,
    cutter: Cutter,
    known: Option<&'a Blocks>,
    buffer: Vec<u8>,
    /// What of the buffer is not cut yet.
    start: usize,
    end: usize,
    /// Of the byte at `start`.
    offset: u64,
    at_end: bool,
}

impl<R: Read> Cuts<'static, R> {
    pub fn new(reader: R, cutter: Cutter) -> Cuts<'static, R> {
        Cuts { reader, cutter, known: None, buffer: vec![0; BUFFER_BYTES], start: 0, end: 0, offset: 0, at_end: false }
    }
}

impl<'a, R: Read> Cuts<'a, R> {
    /// Cuts as [`Cutter::Template`], and finds the blocks that are known.
    pub fn template(reader: R, known: &'a Blocks) -> Cuts<'a, R> {
        Cuts { known: Some(known), ..Cuts::new(reader, Cutter::Template) }
    }

    /// The next stretch; none at the end. Stretches follow each other without gaps; zeros and known bytes may come in
    /// several parts.
    ///
    /// # Errors
    /// The reader's.
    #[expect(clippy::should_implement_trait, reason = "what it gives is borrowed from it")]
    pub fn next(&mut self) -> Result<Option<Cut<'_>>> {
        self.fill().map_err(|error| Error::io("read what is to be stored", &error))?;
        let bytes = &self.buffer[self.start..self.end];
        if bytes.is_empty() {
            return Ok(None);
        }
        let (length, content) = match self.cutter {
            Cutter::Fixed64K => {
                let length = bytes.len().min(MOST_CUT);
                (length, if is_zero(&bytes[..length]) { Content::Zeros } else { Content::Data(&bytes[..length]) })
            }
            Cutter::FastCdc16K => cut_contents(bytes, self.offset),
            Cutter::Template => cut_blocks(bytes, self.known),
        };
        let cut = Cut { offset: self.offset, length: length as u64, content };
        self.start += length;
        self.offset += length as u64;
        Ok(Some(cut))
    }

    /// Reads on, unless there is enough for the longest cut.
    fn fill(&mut self) -> io::Result<()> {
        if self.at_end || self.end - self.start >= 2 * MOST_CUT {
            return Ok(());
        }
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        while self.end < self.buffer.len() {
            match self.reader.read(&mut self.buffer[self.end..]) {
                Ok(0) => {
                    self.at_end = true;
                    break;
                }
                Ok(more) => self.end += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Content-defined, from `offset` on. Blocks of zeros end a chunk, so that what follows a hole is cut as if it began
/// there.
fn cut_contents(bytes: &[u8], offset: u64) -> (usize, Content<'_>) {
    let past = usize::try_from(offset % BLOCK_BYTES as u64).unwrap_or_default();
    let to_block = (BLOCK_BYTES - past) % BLOCK_BYTES;
    let zeros = if to_block == 0 { leading_zeros(bytes) } else { 0 };
    if zeros > 0 {
        return (zeros, Content::Zeros);
    }
    let window = &bytes[..bytes.len().min(MOST_CUT)];
    let mut blocks = (to_block..window.len()).step_by(BLOCK_BYTES);
    let end = blocks.find(|at| is_zero(&bytes[*at..bytes.len().min(at + BLOCK_BYTES)])).unwrap_or(window.len());
    let [least, average, most] = CDC_BYTES;
    let cut = FastCDC::new(&window[..end], least, average, most).next();
    let length = cut.map_or(end, |chunk| chunk.length);
    (length, Content::Data(&bytes[..length]))
}

/// By blocks; `bytes` begin at one.
fn cut_blocks<'b>(bytes: &'b [u8], known: Option<&Blocks>) -> (usize, Content<'b>) {
    let zeros = leading_zeros(bytes);
    if zeros > 0 {
        return (zeros, Content::Zeros);
    }
    let find = |block: &[u8]| known.and_then(|known| known.find(block));
    let mut blocks = bytes[..bytes.len().min(MOST_CUT)].chunks(BLOCK_BYTES);
    let Some(first) = blocks.next() else { return (0, Content::Zeros) };
    if let Some(address) = find(first) {
        let follows =
            |(index, block): (usize, &[u8])| find(block) == Some(address + ((index + 1) * BLOCK_BYTES) as u64);
        let more = blocks.enumerate().take_while(|next| follows(*next)).count();
        return ((1 + more) * BLOCK_BYTES, Content::Known(address));
    }
    let new = blocks.take_while(|block| !is_zero(block) && find(block).is_none());
    let length = first.len() + new.map(<[u8]>::len).sum::<usize>();
    (length, Content::Data(&bytes[..length]))
}

/// Bytes of whole blocks of zeros; the last block may be shorter.
fn leading_zeros(bytes: &[u8]) -> usize {
    bytes.chunks(BLOCK_BYTES).take_while(|block| is_zero(block)).map(<[u8]>::len).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;

    /// A reader that gives a few bytes at a time.
    struct Slow<'a>(&'a [u8]);

    impl Read for Slow<'_> {
        fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
            let most = bytes.len().min(7_919);
            self.0.read(&mut bytes[..most])
        }
    }

    /// The stretches of `bytes`, after a check that they are `bytes`: data by `d`, zeros by `z`, known bytes by `k`.
    fn cut(mut cuts: Cuts<'_, impl Read>, bytes: &[u8], base: &[u8]) -> Vec<(char, usize)> {
        let (mut all, mut found): (Vec<u8>, Vec<(char, usize)>) = (Vec::new(), Vec::new());
        while let Some(cut) = cuts.next().unwrap() {
            assert_eq!(cut.offset, all.len() as u64);
            let length = usize::try_from(cut.length).unwrap();
            let kind = match cut.content {
                Content::Zeros => {
                    all.resize(all.len() + length, 0);
                    'z'
                }
                Content::Data(data) => {
                    assert!(data.len() == length && length <= MOST_CUT && !is_zero(data));
                    all.extend_from_slice(data);
                    'd'
                }
                Content::Known(address) => {
                    let address = usize::try_from(address).unwrap();
                    all.extend_from_slice(&base[address..address + length]);
                    'k'
                }
            };
            match found.last_mut() {
                Some(last) if kind != 'd' && last.0 == kind => last.1 += length,
                _ => found.push((kind, length)),
            }
        }
        assert!(all == bytes, "other bytes");
        found
    }

    fn lengths(cutter: Cutter, bytes: &[u8]) -> Vec<(char, usize)> {
        let fast = cut(Cuts::new(bytes, cutter), bytes, &[]);
        assert_eq!(fast, cut(Cuts::new(Slow(bytes), cutter), bytes, &[]), "however the bytes come");
        fast
    }

    #[test]
    fn cuts_of_known_bytes() {
        let sizes = |bytes: &[u8]| lengths(Cutter::FastCdc16K, bytes).into_iter().map(|(_, length)| length).collect();
        let found: Vec<usize> = sizes(&noise(1, 200_000));
        assert_eq!(found, [19_314, 24_259, 30_543, 36_239, 17_067, 18_194, 21_300, 18_699, 14_385]);
        let text: String = noise(8, 70_000).iter().map(|byte| format!("{byte} ")).collect();
        let found: Vec<usize> = sizes(&text.as_bytes()[..200_000]);
        assert_eq!(found, [31_970, 25_748, 32_983, 16_608, 25_506, 24_520, 18_585, 21_113, 2_967]);
    }

    #[test]
    fn zeros_are_holes() {
        let mut bytes = noise(2, 300_000);
        bytes[20_480..20_480 + 8192].fill(0);
        bytes[131_072..131_072 + 65_536].fill(0);
        let all = |found: &[(char, usize)], kind| {
            found.iter().filter(|(of, _)| *of == kind).map(|(_, length)| length).sum::<usize>()
        };
        for (cutter, zeros) in [(Cutter::Fixed64K, 65_536), (Cutter::FastCdc16K, 73_728), (Cutter::Template, 73_728)] {
            assert_eq!(all(&lengths(cutter, &bytes), 'z'), zeros, "{cutter}");
            assert_eq!(lengths(cutter, &vec![0; 3_000_001]), [('z', 3_000_001)]);
            assert_eq!(lengths(cutter, &[]), []);
            assert_eq!(lengths(cutter, &[1]), [('d', 1)]);
        }
        // What follows a hole is cut as it would be alone.
        let whole = lengths(Cutter::FastCdc16K, &bytes);
        let alone = lengths(Cutter::FastCdc16K, &bytes[196_608..]);
        assert!(whole.ends_with(&alone));
    }

    #[test]
    fn an_insert_changes_the_chunks_around_it_only() {
        let before = noise(3, 2 << 20);
        let after = [&before[..700_000], b"inserted", &before[700_000..]].concat();
        let ids = |bytes: &[u8]| {
            let mut at = 0;
            let cuts = lengths(Cutter::FastCdc16K, bytes).into_iter().map(|(_, length)| {
                at += length;
                ChunkId::of(&bytes[at - length..at])
            });
            cuts.collect::<std::collections::HashSet<_>>()
        };
        assert!(ids(&after).difference(&ids(&before)).count() <= 3);
    }

    #[test]
    fn known_blocks_are_told_by_their_address() {
        let base = [noise(4, 200 * 4096), vec![0; 8192], noise(5, 5000)].concat();
        let mut known = Blocks::default();
        known.add(0, &base[..100 * 4096]);
        known.add(100 * 4096, &base[100 * 4096..]);
        assert_eq!((known.len(), known.is_empty()), (201, false));
        let bytes =
            [&base[50 * 4096..70 * 4096], &noise(6, 20 * 4096), &base[8192..16_384], &[0; 4096], b"end"].concat();
        let found = cut(Cuts::template(bytes.as_slice(), &known), &bytes, &base);
        assert_eq!(found, [('k', 20 * 4096), ('d', 16 * 4096), ('d', 4 * 4096), ('k', 8192), ('z', 4096), ('d', 3)]);
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for cutter in Cutter::ALL {
            assert_eq!(cutter.to_string().parse::<Cutter>().unwrap(), cutter);
        }
        let error = "fastcdc2016/8k".parse::<Cutter>().unwrap_err();
        assert!(error.message.contains("fixed/64k, fastcdc2020/16k, template/4k"), "{error}");
    }

    #[test]
    fn a_reader_that_fails_is_told() {
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::ErrorKind::PermissionDenied.into())
            }
        }
        assert!(Cuts::new(Broken, Cutter::Fixed64K).next().is_err());
    }
}
