//! File names as text. Linux names are bytes; JSON is UTF-8.
//!
//! A name that is valid UTF-8 is itself. In a name that is not, each byte outside UTF-8 becomes
//! `%XX`, and so does every `%`, so that such a name can be told back into its bytes.

/// The text of a name, and whether it holds escapes.
pub fn encode(bytes: &[u8]) -> (String, bool) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        return (text.to_string(), false);
    }
    let mut out = String::with_capacity(bytes.len() + 8);
    for chunk in bytes.utf8_chunks() {
        out.push_str(&chunk.valid().replace('%', "%25"));
        for byte in chunk.invalid() {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    (out, true)
}

/// The bytes of a name told by [`encode`].
pub fn decode(text: &str, escaped: bool) -> Vec<u8> {
    if !escaped {
        return text.as_bytes().to_vec();
    }
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = (bytes[at] == b'%')
            .then(|| text.get(at + 1..at + 3))
            .flatten()
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        if let Some(byte) = hex {
            out.push(byte);
            at += 3;
        } else {
            out.push(bytes[at]);
            at += 1;
        }
    }
    out
}

/// Text that is safe to show on a terminal: control characters become `\xNN`, `\n` and the like.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive() {
        for name in [&b"plain"[..], b"new\nline", "\u{e9}t\u{e9}".as_bytes(), b"100%", b"\xff\xfe%41", b"a\xe9b"] {
            let (text, escaped) = encode(name);
            assert_eq!(decode(&text, escaped), name, "{text}");
        }
        assert_eq!(encode(b"100%"), ("100%".to_string(), false));
        assert_eq!(encode(b"\xff%"), ("%FF%25".to_string(), true));
        assert_eq!(printable("a\nb\u{1b}[0m"), "a\\nb\\u{1b}[0m");
    }
}
