//! What storing a second image costs beside a first, for each way to cut: `dedup FIRST SECOND`. The pair that the table
//! in `src/cut.rs` is of: a tree, made into an image by `mke2fs -d` with a fixed UUID and hash seed; then the same tree
//! with an insert into one file of twenty, and a new file.
#![allow(clippy::print_stdout, reason = "it shows what it measured")]

use std::{collections::HashSet, env, fs::File, io::Read};

use burgeon_api::{Error, Result};
use burgeon_store::{
    ChunkId,
    chunk::Encoder,
    cut::{Blocks, Content, Cuts, Cutter},
};

fn main() -> Result<()> {
    let paths: Vec<String> = env::args().skip(1).collect();
    let [first, second] = paths.as_slice() else {
        return Err(Error::invalid("usage: dedup FIRST SECOND"));
    };
    let open = |path: &str| File::open(path).map_err(|error| Error::io(format!("open {path}"), &error));
    let mut blocks = Blocks::default();
    let mut file = open(first)?;
    let mut buffer = vec![0; 1 << 20];
    let mut address = 0;
    loop {
        let mut got = 0;
        while got < buffer.len() {
            match file.read(&mut buffer[got..]).map_err(|error| Error::io("read", &error))? {
                0 => break,
                more => got += more,
            }
        }
        if got == 0 {
            break;
        }
        blocks.add(address, &buffer[..got]);
        address += got as u64;
    }
    for cutter in Cutter::ALL {
        let mut seen = HashSet::new();
        let base = store(Cuts::new(open(first)?, cutter), &mut seen)?;
        let next = match cutter {
            Cutter::Template => store(Cuts::template(open(second)?, &blocks), &mut seen)?,
            _ => store(Cuts::new(open(second)?, cutter), &mut seen)?,
        };
        println!("{cutter:16} first {base}; second {next}");
    }
    Ok(())
}

/// Chunks that were not seen before.
fn store(mut cuts: Cuts<'_, File>, seen: &mut HashSet<ChunkId>) -> Result<String> {
    let mut encoder = Encoder::new()?;
    let (mut chunks, mut plain, mut stored, mut stretches) = (0_u32, 0.0, 0.0, 0_u32);
    while let Some(cut) = cuts.next()? {
        stretches += 1;
        let Content::Data(bytes) = cut.content else { continue };
        let id = ChunkId::of(bytes);
        if seen.insert(id) {
            chunks += 1;
            plain += f64::from(u32::try_from(bytes.len()).unwrap_or(u32::MAX)) / 1e6;
            let encoded = encoder.encode_as(id, bytes)?;
            stored += f64::from(u32::try_from(encoded.stored.len()).unwrap_or(u32::MAX)) / 1e6;
        }
    }
    Ok(format!("{chunks} chunks, {plain:.1} MB, stored {stored:.1} MB, {stretches} stretches"))
}
