//! What the tests of this crate share.

/// A xorshift generator: the same numbers from the same seed, on every machine.
pub(crate) struct Seeded(u64);

impl Seeded {
    pub(crate) fn new(seed: u64) -> Seeded {
        Seeded(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `bound`.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound.max(1) as u64).unwrap()
    }
}

/// Bytes without structure.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut seeded = Seeded::new(seed);
    let mut bytes: Vec<u8> = (0..length.div_ceil(8)).flat_map(|_| seeded.next().to_le_bytes()).collect();
    bytes.truncate(length);
    bytes
}

/// Changes valid bytes in one of the ways in which files break: flips, a shorter end, a longer one, a part copied
/// over another.
pub(crate) fn damage(seeded: &mut Seeded, bytes: &mut Vec<u8>) {
    for _ in 0..=seeded.below(3) {
        let length = bytes.len();
        match seeded.below(6) {
            0..3 if length > 0 => bytes[seeded.below(length)] ^= 1 << seeded.below(8),
            3 if length > 0 => {
                let at = seeded.below(length);
                let end = (at + 1 + seeded.below(8)).min(length);
                bytes[at..end].fill(if seeded.below(2) == 0 { 0 } else { 0xff });
            }
            4 => bytes.truncate(seeded.below(length + 1)),
            _ => {
                let more = seeded.below(100);
                bytes.extend((0..more).map(|_| seeded.next().to_le_bytes()[0]));
            }
        }
    }
}
