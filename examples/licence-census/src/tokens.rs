//! Normalised text as words.

use crate::passages::GAP;

/// A word of letters, digits, and inner `.`, `+`, `-` and `_`; other marks stand between words and are dropped.
pub(crate) struct Token<'a> {
    /// Empty for a gap between passages.
    pub(crate) word: &'a str,
    /// Where it begins in the text.
    pub(crate) at: usize,
    /// The first word of its line.
    pub(crate) starts_line: bool,
    /// A full stop or a gap follows.
    pub(crate) ends_sentence: bool,
    /// A colon or an equals sign follows, perhaps after a quotation mark.
    pub(crate) is_key: bool,
    /// Only a slash lies between this word and the one before.
    pub(crate) after_slash: bool,
}

fn is_word_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'+' | b'-' | b'_') || byte >= 0x80
}

pub(crate) fn tokens(text: &str) -> Vec<Token<'_>> {
    let bytes = text.as_bytes();
    let mut all: Vec<Token> = Vec::with_capacity(bytes.len() / 5);
    let mut at = 0;
    let mut new_line = true;
    let mut after_slash = false;
    while at < bytes.len() {
        let byte = bytes[at];
        if !is_word_byte(byte) {
            match byte {
                b'\n' => new_line = true,
                b':' | b'=' => {
                    if let Some(last) = all.last_mut().filter(|_| !new_line) {
                        last.is_key = true;
                    }
                }
                _ if char::from(byte) == GAP => {
                    all.push(token("", at, false, true, false));
                    new_line = false;
                }
                _ => {}
            }
            after_slash = byte == b'/';
            at += 1;
            continue;
        }
        let length = bytes[at..].iter().position(|byte| !is_word_byte(*byte)).unwrap_or(bytes.len() - at);
        let whole = &text[at..at + length];
        at += length;
        let stop = whole.ends_with('.') && bytes.get(at).is_none_or(u8::is_ascii_whitespace);
        let word = whole.trim_end_matches(['.', '-', '_']).trim_start_matches(['.', '-', '_', '+']);
        if word.is_empty() {
            if let Some(last) = all.last_mut().filter(|_| stop) {
                last.ends_sentence = true;
            }
            continue;
        }
        let start = at - length;
        if word.contains("_or_") || word.contains("_and_") {
            for part in word.split('_').filter(|part| !part.is_empty()) {
                all.push(token(part, start, std::mem::take(&mut new_line), false, false));
            }
        } else {
            all.push(token(word, start, std::mem::take(&mut new_line), stop, std::mem::take(&mut after_slash)));
        }
    }
    all
}

fn token(word: &str, at: usize, starts_line: bool, ends_sentence: bool, after_slash: bool) -> Token<'_> {
    Token { word, at, starts_line, ends_sentence, is_key: false, after_slash }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_their_marks() {
        let text = "license: (gpl-2+), \"mit/x11\".\n * e.g. lgplv3+_or_gplv2+ export_symbol_gpl\u{c}end.";
        let tokens = tokens(text);
        let words: Vec<_> = tokens.iter().map(|token| token.word).collect();
        assert_eq!(
            words,
            ["license", "gpl-2+", "mit", "x11", "e.g", "lgplv3+", "or", "gplv2+", "export_symbol_gpl", "", "end"]
        );
        assert!(tokens[0].is_key && tokens[0].starts_line);
        assert!(tokens[3].after_slash && tokens[3].ends_sentence && !tokens[2].ends_sentence);
        assert!(tokens[4].starts_line && !tokens[5].starts_line);
    }

    #[test]
    fn a_key_may_be_quoted() {
        let tokens = tokens("\"license\": \"mit\"");
        assert!(tokens[0].is_key && !tokens[1].is_key);
    }
}
