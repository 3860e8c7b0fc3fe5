//! Finds the places of a text where a licence could be named, and cuts them out, normalised.
//!
//! Every rule of `classify` needs one of a dozen words, the [`TRIGGERS`]. A text without any of them names no licence,
//! and of a long one only the surroundings of these words matter: 1 MB of changelog becomes a few lines. So most
//! bytes are looked at once, two at a time: a table says for each pair of bytes whether a trigger can lie here, and
//! each trigger puts one pair of each parity into it, the rarest that it has in ordinary English.

/// Bytes of text kept on each side of a trigger. `classify` looks no further than this.
pub(crate) const CONTEXT: usize = 512;

/// Stands between two passages, so that no phrase is read across the gap.
pub(crate) const GAP: char = '\u{c}';

/// A word, where its telling pairs begin (an even and an odd place), and what must stand around it.
struct Trigger {
    word: &'static [u8],
    pairs: [usize; 2],
    fits: fn(before: &[u8], after: &[u8]) -> bool,
}

const fn trigger(word: &'static str, pairs: [usize; 2]) -> Trigger {
    Trigger { word: word.as_bytes(), pairs, fits: |_, _| true }
}

const TRIGGERS: &[Trigger] = &[
    trigger("licen", [2, 1]),
    trigger("gpl", [0, 1]),
    trigger("gfdl", [0, 1]),
    trigger("cc0", [0, 1]),
    trigger("cc-by", [0, 1]),
    trigger("mpl-", [2, 1]),
    trigger("-clause", [0, 3]),
    Trigger { word: b"domain", pairs: [2, 3], fits: |before, _| ends_with_word(before, b"public") },
    Trigger { word: b"terms", pairs: [2, 3], fits: |_, after| starts_with_word(after, b"as") },
    Trigger {
        word: b"apache",
        pairs: [0, 1],
        fits: |_, after| matches!(after, [b'-', b'1' | b'2', b'.', b'0' | b'1', ..]),
    },
];

fn ends_with_word(before: &[u8], word: &[u8]) -> bool {
    let end = before.iter().rposition(u8::is_ascii_alphanumeric).map_or(0, |at| at + 1);
    end + 16 > before.len() && end >= word.len() && before[end - word.len()..end].eq_ignore_ascii_case(word)
}

fn starts_with_word(after: &[u8], word: &[u8]) -> bool {
    let start = after.iter().position(u8::is_ascii_alphanumeric).unwrap_or(after.len());
    start < 16 && after.len() >= start + word.len() && after[start..start + word.len()].eq_ignore_ascii_case(word)
}

/// For each pair of bytes: 0, or one more than the index of its entry in `candidates`.
pub(crate) struct Finder {
    table: Box<[u8; 1 << 16]>,
    /// Triggers to try, and how far before the pair they begin.
    candidates: Vec<Vec<(&'static Trigger, usize)>>,
}

impl Finder {
    pub(crate) fn new() -> Self {
        let mut finder = Self { table: Box::new([0; 1 << 16]), candidates: Vec::new() };
        for trigger in TRIGGERS {
            for at in trigger.pairs {
                finder.add(trigger, at);
            }
        }
        finder
    }

    fn add(&mut self, trigger: &'static Trigger, at: usize) {
        let cases = |letter: u8| [letter.to_ascii_lowercase(), letter.to_ascii_uppercase()];
        let first = trigger.word[at];
        let second = trigger.word[at + 1];
        let lower = usize::from(u16::from_le_bytes([first, second]));
        let entry = match self.table[lower] {
            0 => {
                self.candidates.push(Vec::new());
                u8::try_from(self.candidates.len()).unwrap_or(u8::MAX)
            }
            entry => entry,
        };
        self.candidates[usize::from(entry) - 1].push((trigger, at));
        for a in cases(first) {
            for b in cases(second) {
                self.table[usize::from(u16::from_le_bytes([a, b]))] = entry;
            }
        }
    }

    /// The passages of `text` around its triggers, in lower case, with single spaces and kept line ends.
    pub(crate) fn passages(&self, text: &[u8]) -> String {
        let mut out = String::new();
        let mut open: Option<(usize, usize)> = None;
        for at in self.triggers(text) {
            let (from, to) = (at.saturating_sub(CONTEXT), (at + CONTEXT).min(text.len()));
            open = Some(match open {
                Some((start, end)) if from <= end => (start, to),
                Some((start, end)) => {
                    normalise(&text[start..end], &mut out);
                    out.push(GAP);
                    (from, to)
                }
                None => (from, to),
            });
        }
        if let Some((start, end)) = open {
            normalise(&text[start..end], &mut out);
        }
        out
    }

    /// Where triggers begin, in rising order; a place may be told twice.
    fn triggers<'a>(&'a self, text: &'a [u8]) -> impl Iterator<Item = usize> + 'a {
        let mut pairs = text.chunks_exact(2).enumerate();
        std::iter::from_fn(move || {
            for (index, pair) in pairs.by_ref() {
                let entry = self.table[usize::from(u16::from_le_bytes([pair[0], pair[1]]))];
                if entry != 0
                    && let Some(at) = self.check(text, index * 2, entry)
                {
                    return Some(at);
                }
            }
            None
        })
    }

    #[inline(never)]
    fn check(&self, text: &[u8], pair: usize, entry: u8) -> Option<usize> {
        self.candidates[usize::from(entry) - 1].iter().find_map(|(trigger, offset)| {
            let start = pair.checked_sub(*offset)?;
            let end = start + trigger.word.len();
            let word = text.get(start..end)?;
            (word.eq_ignore_ascii_case(trigger.word) && (trigger.fits)(&text[..start], &text[end..])).then_some(start)
        })
    }
}

/// Adds `text`, which is UTF-8 or else Latin-1, to `out`: in lower case, each run of white space as one space, or as
/// one line end where it holds one.
fn normalise(text: &[u8], out: &mut String) {
    out.reserve(text.len());
    // A cut may have split a character.
    let start = text.iter().take(3).take_while(|byte| (0x80..0xc0).contains(*byte)).count();
    let text = &text[start..];
    match std::str::from_utf8(text) {
        Ok(text) => normalise_chars(text.chars(), out),
        Err(error) if error.error_len().is_none() => {
            normalise_chars(String::from_utf8_lossy(&text[..error.valid_up_to()]).chars(), out);
        }
        Err(_) => normalise_chars(text.iter().map(|byte| char::from(*byte)), out),
    }
}

fn normalise_chars(text: impl Iterator<Item = char>, out: &mut String) {
    let mut space = None;
    for letter in text {
        if letter == '\n' {
            space = Some('\n');
        } else if letter.is_whitespace() || letter.is_control() {
            space = space.or(Some(' '));
        } else {
            if let Some(space) = space.take() {
                out.push(space);
            }
            out.push(letter.to_ascii_lowercase());
        }
    }
    out.extend(space);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passages(text: &[u8]) -> String {
        Finder::new().passages(text)
    }

    #[test]
    fn every_trigger_is_found_at_every_place_in_any_case() {
        for trigger in TRIGGERS {
            let [even, odd] = trigger.pairs;
            assert!(even % 2 == 0 && odd % 2 == 1 && odd.max(even) + 2 <= trigger.word.len());
            let word = std::str::from_utf8(trigger.word).unwrap();
            for shift in 0..6 {
                for word in [word.to_string(), word.to_uppercase()] {
                    let text = format!("{}public {word} as -2", "#".repeat(shift));
                    let text = if trigger.word == b"apache" { text.replace(" as -2", "-2.0") } else { text };
                    assert!(passages(text.as_bytes()).contains(&word.to_lowercase()), "{text}");
                }
            }
        }
    }

    #[test]
    fn text_without_a_trigger_is_skipped() {
        assert_eq!(passages(b"Submit your domain to apache, in terms of gp and cc, apache-2."), "");
        assert_eq!(passages(b""), "");
        assert_eq!(passages(b"g"), "");
    }

    #[test]
    fn far_text_is_cut_and_near_text_joined() {
        let far = "x ".repeat(4000);
        let kept = passages(format!("A GPL b {far}c GPL d GPL{far}").as_bytes());
        assert_eq!(kept.matches(GAP).count(), 1);
        assert!(kept.starts_with("a gpl b x x") && kept.len() < 5 * CONTEXT);
        assert!(kept.contains("c gpl d gpl"));
    }

    #[test]
    fn white_space_case_and_latin_1() {
        assert_eq!(passages("GNU  \tGPL\r\n\n  für\u{a0}alle ".as_bytes()), "gnu gpl\nfür alle ");
        assert_eq!(passages(b"GPL f\xfcr alle"), "gpl für alle");
    }

    #[test]
    fn a_split_character_does_not_make_a_passage_latin_1() {
        let mut text = "ü".repeat(600).into_bytes();
        text.insert(0, b'-');
        text.extend_from_slice(b" GPL");
        text.extend_from_slice("ü".repeat(600).as_bytes());
        let kept = passages(&text);
        assert!(kept.chars().all(|letter| letter == 'ü' || " gpl-".contains(letter)), "{kept}");
    }
}
