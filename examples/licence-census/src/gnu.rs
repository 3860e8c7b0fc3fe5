//! The GNU licences and their versions: `GPL-2+`, "GPL v2 or later", "the GNU Lesser General Public License as
//! published by the Free Software Foundation; either version 2.1 of the License, or (at your option) any later version".

use crate::classify::is_licence;
use crate::tokens::Token;

/// Licences named at one place.
#[derive(Debug, PartialEq)]
pub(crate) struct Names {
    pub(crate) licences: Vec<String>,
    /// The place only says where a text can be read.
    pub(crate) is_pointer: bool,
}

const LATER: &[&str] = &["later", "newer", "higher", "above", "greater", "upwards"];
const VERSION: &[&str] = &["version", "versions", "v", "ver", "vers"];

/// Whether a word may lie between a name and its version, or a version and "later".
#[rustfmt::skip]
fn is_bridge(word: &str) -> bool {
    matches!(
        word,
        "a" | "and" | "any" | "as" | "at" | "by" | "either" | "his" | "its" | "of" | "option" | "or" | "our" | "published"
            | "terms" | "that" | "the" | "their" | "this" | "under" | "ver" | "version" | "versions" | "your"
            | "affero" | "agpl" | "documentation" | "foundation" | "free" | "fsf" | "general" | "gfdl" | "gnu" | "gpl"
            | "inc" | "lesser" | "lgpl" | "library" | "licence" | "license" | "public" | "software"
    )
}

/// The most words of a bridge.
const LONGEST_BRIDGE: usize = 20;

/// Versions that there are, as written in the report.
fn known_versions(family: &str) -> &'static [&'static str] {
    match family {
        "LGPL" => &["2", "2.1", "3"],
        "AGPL" => &["1", "3"],
        "GFDL" | "GFDL-NIV" => &["1.1", "1.2", "1.3"],
        _ => &["1", "2", "3"],
    }
}

fn write(family: &str, version: &str, or_later: bool) -> Option<String> {
    let version = version.strip_suffix(".0").unwrap_or(version);
    let plus = if or_later { "+" } else { "" };
    known_versions(family).contains(&version).then(|| format!("{family}-{version}{plus}"))
}

/// A version number: `2`, `v2.1`, `3.0+`; with whether it ends in `+`.
pub(crate) fn number(word: &str) -> Option<(&str, bool)> {
    let number = word.strip_prefix('v').unwrap_or(word);
    let (number, or_later) = number.strip_suffix('+').map_or((number, false), |number| (number, true));
    matches!(number.as_bytes(), [b'0'..=b'9'] | [b'0'..=b'9', b'.', b'0'..=b'9']).then_some((number, or_later))
}

/// A GNU licence written as one word: `gpl`, `lgplv2.1+`, `gpl-3.0-or-later`, `gfdl-niv-1.3`.
pub(crate) fn identifier(word: &str) -> Option<Names> {
    if !word.starts_with(['l', 'a', 'g']) {
        return None;
    }
    let (family, rest) =
        [("lgpl", "LGPL"), ("agpl", "AGPL"), ("gpl", "GPL"), ("gfdl-niv", "GFDL-NIV"), ("gfdl", "GFDL")]
            .iter()
            .find_map(|(start, family)| Some((*family, word.strip_prefix(start)?)))?;
    let (number, after) = {
        let rest = rest.trim_start_matches(['-', 'v']);
        let rest = rest.strip_suffix(".html").or(rest.strip_suffix(".txt")).unwrap_or(rest);
        rest.split_at(rest.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(rest.len()))
    };
    let licence = if number.is_empty() && (rest.is_empty() || rest.starts_with(['-', '+'])) {
        family.to_string()
    } else if after.is_empty() || after.starts_with(['+', '-']) {
        write(family, number, ["+", "-or-later", "-or-newer"].iter().any(|later| after.starts_with(later)))?
    } else {
        return None;
    };
    Some(Names { licences: vec![licence], is_pointer: false })
}

/// The GNU licence whose name begins or lies at `at`.
pub(crate) fn named_at(tokens: &[Token], at: usize) -> Option<Names> {
    let word = |at: usize| tokens.get(at).map_or("", |token| token.word);
    let before = |distance: usize| at.checked_sub(distance).map_or("", word);
    let (family, end) = match word(at) {
        "general" if word(at + 1) == "public" && is_licence(word(at + 2)) => match before(1) {
            "gnu" | "the" | "a" => ("GPL", at + 3),
            other => (kind(other)?, at + 3),
        },
        "documentation" if before(1) == "free" && is_licence(word(at + 1)) => ("GFDL", at + 2),
        "fdl" if before(1) == "gnu" => ("GFDL", at + 1),
        name => {
            let mut names = identifier(name)?;
            let Some(family) =
                ["GPL", "LGPL", "AGPL", "GFDL", "GFDL-NIV"].into_iter().find(|family| names.licences[0] == *family)
            else {
                // It has its version; "or later" may yet follow.
                if !names.licences[0].ends_with('+') && !tokens[at].ends_sentence && later_after(tokens, at) {
                    names.licences[0].push('+');
                }
                return Some(names);
            };
            (if family == "GPL" { kind(before(1)).unwrap_or(family) } else { family }, at + 1)
        }
    };
    let mut versions = if tokens[end - 1].ends_sentence { Vec::new() } else { versions_after(tokens, end) };
    let mut start = at;
    if versions.is_empty()
        && let Some((from, version)) = version_before(tokens, at)
    {
        start = from;
        versions.push(version);
    }
    let family = if family == "GFDL" && no_invariant_sections(tokens, end) { "GFDL-NIV" } else { family };
    let mut licences: Vec<_> =
        versions.iter().filter_map(|(version, or_later)| write(family, version, *or_later)).collect();
    if licences.is_empty() {
        licences.push(family.to_string());
    }
    // "text of the", "copy of version 2 of the".
    let is_pointer = (2..=6).any(|distance| {
        start.checked_sub(distance).is_some_and(|at| matches!(word(at), "text" | "copy") && word(at + 1) == "of")
    });
    Some(Names { licences, is_pointer })
}

fn kind(word: &str) -> Option<&'static str> {
    match word {
        "lesser" | "library" => Some("LGPL"),
        "affero" => Some("AGPL"),
        _ => None,
    }
}

/// The versions told at `start`, right there or after words of a bridge; with "or later".
pub(crate) fn versions_after(tokens: &[Token], start: usize) -> Vec<(String, bool)> {
    let word = |at: usize| tokens.get(at).map_or("", |token| token.word);
    let mut versions = Vec::new();
    let mut at = start;
    // To the first number.
    loop {
        let is_number = number(word(at)).is_some();
        if is_number && (at == start || word(at).starts_with('v') || VERSION.contains(&word(at - 1))) {
            break;
        }
        let passes = VERSION.contains(&word(at)) || is_bridge(word(at));
        if !passes || tokens[at].ends_sentence && word(at) != "v" || at - start > LONGEST_BRIDGE {
            return versions;
        }
        at += 1;
    }
    // "2", "2 or 3", "2 or version 3".
    while let Some((version, or_later)) = number(word(at)) {
        let ends = tokens[at].ends_sentence;
        versions.push((version.to_string(), or_later || (!ends && later_after(tokens, at))));
        let next = match (word(at + 1), VERSION.contains(&word(at + 2))) {
            ("or" | "and", true) => at + 3,
            ("or" | "and", false) => at + 2,
            _ => break,
        };
        if ends {
            break;
        }
        at = next;
    }
    versions
}

/// Whether "or any later version" follows the version at `at` in its sentence.
fn later_after(tokens: &[Token], at: usize) -> bool {
    for token in tokens.iter().skip(at + 1).take(LONGEST_BRIDGE) {
        if LATER.contains(&token.word) {
            return true;
        }
        if token.ends_sentence || !is_bridge(token.word) {
            return false;
        }
    }
    false
}

/// "version 2 or later of the" before the name at `at`: where it begins, and the version.
fn version_before(tokens: &[Token], at: usize) -> Option<(usize, (String, bool))> {
    let mut later = false;
    let mut of = false;
    for place in (at.saturating_sub(12)..at).rev() {
        let token = &tokens[place];
        if token.ends_sentence {
            return None;
        }
        if let Some((version, plus)) = number(token.word) {
            let told = token.word.starts_with('v') || place > 0 && VERSION.contains(&tokens[place - 1].word);
            return (of && told).then(|| (place.saturating_sub(1), (version.to_string(), plus || later)));
        }
        later |= LATER.contains(&token.word);
        of |= token.word == "of";
        if !is_bridge(token.word) && !LATER.contains(&token.word) {
            return None;
        }
    }
    None
}

fn no_invariant_sections(tokens: &[Token], from: usize) -> bool {
    let near = &tokens[from.min(tokens.len())..tokens.len().min(from + 40)];
    near.windows(3).any(|words| {
        matches!(words[0].word, "no" | "without") && words.iter().skip(1).any(|token| token.word == "invariant")
    })
}

/// Whether `licence` says all that `pointer` says: the same, or `GPL-2+` for a pointer to the text of `GPL-3`.
pub(crate) fn covers(licence: &str, pointer: &str) -> bool {
    if licence == pointer {
        return true;
    }
    let parts = |name: &'static str, of: &str| of.strip_prefix(name).map(str::to_string);
    ["GPL-", "LGPL-", "AGPL-", "GFDL-", "GFDL-NIV-"].into_iter().any(|family| {
        let pointed = parts(family, pointer);
        let named = parts(family, licence).and_then(|version| version.strip_suffix('+').map(str::to_string));
        matches!((named, pointed), (Some(named), Some(pointed)) if named.as_str() <= pointed.trim_end_matches('+'))
    }) || (licence.starts_with("GFDL-NIV-") && pointer.starts_with("GFDL-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers() {
        for (word, licence) in [
            ("gpl", "GPL"),
            ("gpl-2", "GPL-2"),
            ("gplv2+", "GPL-2+"),
            ("gpl2", "GPL-2"),
            ("gpl-2.0-only", "GPL-2"),
            ("gpl-3.0-or-later", "GPL-3+"),
            ("gpl-2+-autoconf-exception", "GPL-2+"),
            ("gpl-3.0.html", "GPL-3"),
            ("lgplv2.1+", "LGPL-2.1+"),
            ("agpl-3", "AGPL-3"),
            ("gfdl-niv-1.3+", "GFDL-NIV-1.3+"),
            ("gpl-compatible", "GPL"),
        ] {
            assert_eq!(identifier(word).unwrap().licences, [licence], "{word}");
        }
        for word in ["gplot", "gpl-9", "lgpl-7.1", "gplv", "xgpl", "export_symbol_gpl"] {
            assert_eq!(identifier(word), None, "{word}");
        }
    }

    #[test]
    fn what_covers_what() {
        assert!(covers("GPL-2+", "GPL-2") && covers("GPL-2+", "GPL-3") && covers("GPL-2", "GPL-2"));
        assert!(!covers("GPL-2", "GPL-3") && !covers("GPL-3+", "GPL-2") && !covers("LGPL-2+", "GPL-2"));
        assert!(covers("LGPL-2+", "LGPL-2.1") && covers("GFDL-NIV-1.2+", "GFDL-1.2"));
    }
}
