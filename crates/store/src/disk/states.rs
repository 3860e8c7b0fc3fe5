//! What a layer knows of each of its blocks: two bits, in memory that is used only where something was written.

use std::sync::{
    OnceLock,
    atomic::{AtomicU64, Ordering},
};

/// Bytes of a block: the unit in which a layer has something of its own.
pub(crate) const BLOCK: u64 = 4096;
/// Blocks in a word.
pub(super) const BLOCKS_IN_WORD: u64 = 32;
/// Words in a part; parts without anything are never made.
const WORDS_IN_PART: usize = 512;

/// What a layer has of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Nothing: it is as below.
    Absent = 0,
    /// In the layer's file.
    Data = 1,
    /// Zeros, whatever is below and in the file.
    Zero = 2,
}

impl State {
    fn of(bits: u64) -> State {
        match bits & 3 {
            0 => State::Absent,
            1 => State::Data,
            _ => State::Zero,
        }
    }
}

type Part = Box<[AtomicU64; WORDS_IN_PART]>;

pub(super) struct States {
    parts: Box<[OnceLock<Part>]>,
    blocks: u64,
}

impl States {
    pub(super) fn new(blocks: u64) -> States {
        let words = usize::try_from(blocks.div_ceil(BLOCKS_IN_WORD)).unwrap_or(usize::MAX);
        States { parts: (0..words.div_ceil(WORDS_IN_PART)).map(|_| OnceLock::new()).collect(), blocks }
    }

    pub(super) fn words(&self) -> u64 {
        self.blocks.div_ceil(BLOCKS_IN_WORD)
    }

    fn split(word: u64) -> (usize, usize) {
        let word = usize::try_from(word).unwrap_or(usize::MAX);
        (word / WORDS_IN_PART, word % WORDS_IN_PART)
    }

    pub(super) fn word(&self, word: u64) -> u64 {
        let (part, index) = Self::split(word);
        self.parts.get(part).and_then(OnceLock::get).map_or(0, |part| part[index].load(Ordering::Acquire))
    }

    /// Only one thread may change a word at a time.
    pub(super) fn set_word(&self, word: u64, value: u64) {
        let (part, index) = Self::split(word);
        if let Some(part) = self.parts.get(part) {
            let part = part.get_or_init(|| Box::new([const { AtomicU64::new(0) }; WORDS_IN_PART]));
            part[index].store(value, Ordering::Release);
        }
    }

    pub(super) fn get(&self, block: u64) -> State {
        State::of(self.word(block / BLOCKS_IN_WORD) >> (block % BLOCKS_IN_WORD * 2))
    }

    /// From `block` on, how many blocks up to `end` have the same state.
    pub(super) fn run(&self, block: u64, end: u64) -> (State, u64) {
        let state = self.get(block);
        let alike = u64::from_le_bytes([0x55 * state as u8; 8]);
        let mut next = block + 1;
        while next < end {
            if next.is_multiple_of(BLOCKS_IN_WORD) && self.word(next / BLOCKS_IN_WORD) == alike {
                next += BLOCKS_IN_WORD;
            } else if self.get(next) == state {
                next += 1;
            } else {
                break;
            }
        }
        (state, next.min(end) - block)
    }

    /// The word of `block` with other states from `block` up to `end` or the word's end; and that end.
    pub(super) fn changed(&self, block: u64, end: u64, state: State) -> (u64, u64, u64) {
        let word = block / BLOCKS_IN_WORD;
        let end = end.min((word + 1) * BLOCKS_IN_WORD);
        let mut value = self.word(word);
        for block in block..end {
            let shift = block % BLOCKS_IN_WORD * 2;
            value = value & !(3 << shift) | (state as u64) << shift;
        }
        (word, value, end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cross_words_and_parts() {
        let states = States::new(100_000);
        let mut block = 1000;
        while block < 50_000 {
            let (word, value, end) = states.changed(block, 50_000, State::Data);
            states.set_word(word, value);
            block = end;
        }
        assert_eq!(states.run(0, 100_000), (State::Absent, 1000));
        assert_eq!(states.run(1000, 100_000), (State::Data, 49_000));
        assert_eq!(states.run(1000, 2000), (State::Data, 1000));
        assert_eq!(states.run(50_000, 100_000), (State::Absent, 50_000));
        let (word, value, _) = states.changed(1001, 1002, State::Zero);
        states.set_word(word, value);
        assert_eq!(states.run(1000, 100_000), (State::Data, 1));
        assert_eq!(states.run(1001, 100_000), (State::Zero, 1));
    }
}
