//! What a client of a disk says. Beside the disk stands a model of it: bytes in memory.
#![no_main]

use std::{
    io,
    sync::{Arc, Mutex},
};

use burgeon_qemu::nbd::{Export, converse};
use libfuzzer_sys::fuzz_target;

const SIZE: usize = 64 << 10;

/// A disk that must never be asked for what it has not.
struct Memory(Mutex<Vec<u8>>);

impl Memory {
    fn range(offset: u64, length: u64) -> std::ops::Range<usize> {
        let (from, to) = (offset, offset.checked_add(length).expect("no number is too large"));
        assert!(to <= SIZE as u64, "{length} bytes at {offset} are behind the end");
        from as usize..to as usize
    }
}

impl Export for Memory {
    fn size(&self) -> u64 {
        SIZE as u64
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn is_near(&self, offset: u64, length: u64) -> bool {
        Memory::range(offset, length);
        // Both ways of answering are met.
        offset % 1024 < 512
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        bytes.copy_from_slice(&self.0.lock().unwrap()[Memory::range(offset, bytes.len() as u64)]);
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.lock().unwrap()[Memory::range(offset, bytes.len() as u64)].copy_from_slice(bytes);
        Ok(())
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        self.0.lock().unwrap()[Memory::range(offset, length)].fill(0);
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.zero(offset, length)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn hole(&self, offset: u64, end: u64) -> io::Result<(bool, u64)> {
        assert!(offset < end && end <= SIZE as u64, "{offset}..{end}");
        Ok((offset % 3 == 0, (end - offset).min(1000)))
    }
}

/// The negotiation of a client that wants structured replies, or none.
fn negotiated(structured: bool) -> Vec<u8> {
    let mut said = 3_u32.to_be_bytes().to_vec();
    let mut option = |number: u32, data: &[u8]| {
        said.extend(0x4948_4156_454f_5054_u64.to_be_bytes());
        said.extend(number.to_be_bytes());
        said.extend((data.len() as u32).to_be_bytes());
        said.extend(data);
    };
    if structured {
        option(8, &[]);
        let mut contexts = [0_u32.to_be_bytes(), 1_u32.to_be_bytes(), 15_u32.to_be_bytes()].concat();
        contexts.extend(b"base:allocation");
        option(10, &contexts);
    }
    option(1, &[]);
    said
}

fuzz_target!(|bytes: &[u8]| {
    let Some((how, rest)) = bytes.split_first() else { return };
    let export: Arc<dyn Export> = Arc::new(Memory(Mutex::new(vec![7; SIZE])));
    let mut said = match how % 3 {
        0 => Vec::new(),
        1 => negotiated(false),
        _ => negotiated(true),
    };
    if how % 3 == 0 {
        said.extend(rest);
    } else {
        // The magic number of each request is ours, so that the fuzzer need not find it.
        for request in rest.chunks(24) {
            said.extend(0x2560_9513_u32.to_be_bytes());
            said.extend(request);
        }
    }
    let answer = converse(&said, &export);
    assert!(answer.starts_with(b"NBDMAGICIHAVEOPT"));
});
