//! Step `classify`: which licences a text names.
//!
//! A licence is named by
//! - a `License:` field (debian/copyright, package metadata) or an `SPDX-License-Identifier`;
//! - an identifier that means nothing else (`GPL-2+`, `BSD-3-Clause`, `CC0-1.0`), anywhere;
//! - its name beside the word licence ("the MIT license", "licensed under Apache 2.0"): many names are ordinary words;
//! - a path below `/usr/share/common-licenses` or the address of a licence.
//!
//! The words of a licence without its name name nothing. A version belongs to a name if only words such as "as
//! published by" lie between; "or any later version" after it, in the same sentence, makes a `+`. What only says where
//! the text of a licence can be read does not narrow that `+` again. A name without a version is dropped where the
//! same text names it with one.
//!
//! Attributes: `licences`, sorted. The route is `tally` where there is one, else `review`, with a few words around
//! the first mention of a licence as payload.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use crate::gnu;
use crate::names;
use crate::step::{Item, Outcome};
use crate::tokens::{Token, tokens};

pub(crate) const TALLY: &str = "tally";
pub(crate) const REVIEW: &str = "review";

/// Bytes of text around a mention that go to `review`.
const EXCERPT: usize = 60;

pub(crate) fn step(item: &Item) -> Outcome {
    let is_text = item.attrs.get("format").and_then(Value::as_str) == Some("text");
    let text = if is_text { String::from_utf8_lossy(item.payload) } else { "".into() };
    let found = named(&text);
    let mut attrs = Map::from_iter([("licences".to_string(), Value::from(Vec::from_iter(found.licences.clone())))]);
    if !found.licences.is_empty() {
        return Outcome { attrs, route: Some(TALLY), ..Outcome::default() };
    }
    if let Some(name) = found.unknown {
        attrs.insert("unknown_licence".to_string(), name.into());
    }
    let payload = found.mention.map(|at| excerpt(&text, at)).unwrap_or_default().into_bytes();
    Outcome { attrs, route: Some(REVIEW), payload, ..Outcome::default() }
}

fn excerpt(text: &str, at: usize) -> String {
    let floor = |mut at: usize| {
        while !text.is_char_boundary(at) {
            at -= 1;
        }
        at
    };
    let around = &text[floor(at.saturating_sub(EXCERPT))..floor((at + EXCERPT).min(text.len()))];
    around.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// What a text names.
#[derive(Debug, Default)]
pub(crate) struct Named {
    pub(crate) licences: BTreeSet<String>,
    /// A name in a `License:` field that is not known.
    pub(crate) unknown: Option<String>,
    /// Where the word licence stands first.
    pub(crate) mention: Option<usize>,
}

/// Finds the licences named in normalised text.
pub(crate) fn named(text: &str) -> Named {
    let tokens = tokens(text);
    let mut search =
        Search { tokens: &tokens, found: BTreeSet::new(), pointers: BTreeSet::new(), unknown: None, mention: None };
    for at in 0..tokens.len() {
        search.look(at);
    }
    search.finish()
}

/// Whether a word is "licence" in one of its forms.
pub(crate) fn is_licence(word: &str) -> bool {
    matches!(word, "license" | "licence" | "licenses" | "licences" | "licensed" | "licenced" | "licensing")
}

/// Names of several words, or with their usual additions; what they need beside them is told by the rules.
/// The longest that fits is taken, so longer ones stand first.
const PHRASES: &[(&[&str], &str)] = &[
    (&["python", "software", "foundation"], "PSF-2.0"),
    (&["bsd", "3", "clause"], "BSD-3-Clause"),
    (&["bsd", "2", "clause"], "BSD-2-Clause"),
    (&["3", "clause", "bsd"], "BSD-3-Clause"),
    (&["2", "clause", "bsd"], "BSD-2-Clause"),
    (&["4", "clause", "bsd"], "BSD-4-Clause"),
    (&["three", "clause", "bsd"], "BSD-3-Clause"),
    (&["two", "clause", "bsd"], "BSD-2-Clause"),
    (&["bsd", "3-clause"], "BSD-3-Clause"),
    (&["bsd", "2-clause"], "BSD-2-Clause"),
    (&["3-clause", "bsd"], "BSD-3-Clause"),
    (&["2-clause", "bsd"], "BSD-2-Clause"),
    (&["4-clause", "bsd"], "BSD-4-Clause"),
    (&["three-clause", "bsd"], "BSD-3-Clause"),
    (&["two-clause", "bsd"], "BSD-2-Clause"),
    (&["four-clause", "bsd"], "BSD-4-Clause"),
    (&["new", "bsd"], "BSD-3-Clause"),
    (&["modified", "bsd"], "BSD-3-Clause"),
    (&["revised", "bsd"], "BSD-3-Clause"),
    (&["simplified", "bsd"], "BSD-2-Clause"),
    (&["original", "bsd"], "BSD-4-Clause"),
    (&["bsd", "style"], "BSD"),
    (&["mit", "style"], "MIT"),
    (&["mit", "x11"], "MIT"),
    (&["mit", "expat"], "MIT"),
    (&["x11", "mit"], "MIT"),
    (&["zlib", "libpng"], "Zlib"),
    (&["apache", "software"], "Apache"),
    (&["mozilla", "public"], "MPL"),
    (&["eclipse", "public"], "EPL"),
    (&["eclipse", "distribution"], "BSD-3-Clause"),
    (&["boost", "software"], "BSL-1.0"),
    (&["academic", "free"], "AFL"),
    (&["open", "font"], "OFL-1.1"),
    (&["openldap", "public"], "OLDAP-2.8"),
    (&["mit-style"], "MIT"),
    (&["bsd-style"], "BSD"),
    (&["bsd-like"], "BSD"),
    (&["freebsd"], "BSD-2-Clause"),
    (&["freetype"], "FTL"),
    (&["mit"], "MIT"),
    (&["expat"], "MIT"),
    (&["x11"], "X11"),
    (&["isc"], "ISC"),
    (&["zlib"], "Zlib"),
    (&["libpng"], "Libpng"),
    (&["bsd"], "BSD"),
    (&["apache"], "Apache"),
    (&["artistic"], "Artistic-1.0"),
    (&["python"], "Python-2.0"),
    (&["psf"], "PSF-2.0"),
    (&["mpl"], "MPL"),
    (&["epl"], "EPL"),
    (&["boost"], "BSL-1.0"),
    (&["ofl"], "OFL-1.1"),
    (&["openssl"], "OpenSSL"),
    (&["ssleay"], "SSLeay"),
    (&["curl"], "curl"),
    (&["postgresql"], "PostgreSQL"),
];

struct Search<'a> {
    tokens: &'a [Token<'a>],
    found: BTreeSet<String>,
    /// Named only as a text to be read elsewhere.
    pointers: BTreeSet<String>,
    unknown: Option<String>,
    mention: Option<usize>,
}

impl Search<'_> {
    fn word(&self, at: usize) -> &str {
        self.tokens.get(at).map_or("", |token| token.word)
    }

    fn before(&self, at: usize, distance: usize) -> &str {
        at.checked_sub(distance).map_or("", |at| self.word(at))
    }

    fn add(&mut self, licence: impl Into<String>) {
        self.found.insert(licence.into());
    }

    fn look(&mut self, at: usize) {
        let word = self.tokens[at].word;
        if word.contains("licen") {
            self.mention = self.mention.or(Some(self.tokens[at].at));
            self.field(at);
            self.address(at);
            self.beside_licence(at);
        }
        if self.before(at, 1) == "common-licenses" {
            let name = word.to_string();
            self.pointer(&name);
        } else if let Some(names) = gnu::named_at(self.tokens, at) {
            let all = if names.is_pointer { &mut self.pointers } else { &mut self.found };
            all.extend(names.licences);
        } else if let Some(licence) = names::anywhere(word) {
            self.add(licence);
        }
        match word {
            "domain" if self.before(at, 1) == "public" && !self.is_denied(at) => self.add("public-domain"),
            "public-domain" if !self.is_denied(at) => self.add("public-domain"),
            "publicdomain" if self.word(at + 1) == "zero" => self.add("CC0-1.0"),
            "perl" if self.before(at, 1) == "as" && self.before(at, 2) == "terms" => {
                // Perl's own terms: either of these two.
                self.add("Artistic-1.0");
                self.add("GPL-1+");
            }
            _ => {}
        }
    }

    fn is_denied(&self, at: usize) -> bool {
        (1..=5).any(|distance| matches!(self.before(at, distance), "not" | "isn" | "never" | "nor"))
    }

    fn pointer(&mut self, name: &str) {
        match gnu::identifier(name) {
            Some(names) => self.pointers.extend(names.licences),
            None => self.pointers.extend(names::in_field(name)),
        }
    }

    /// `License: …` at the start of a line, and `SPDX-License-Identifier: …`.
    fn field(&mut self, at: usize) {
        let key = &self.tokens[at];
        let is_field = key.is_key
            && (key.word == "spdx-license-identifier"
                || (matches!(key.word, "license" | "licence" | "licenses") && key.starts_line));
        if !is_field {
            return;
        }
        let start = at + 1;
        let end = (start..self.tokens.len())
            .find(|at| self.tokens[*at].starts_line && !matches!(self.before(*at, 1), "or" | "and"))
            .unwrap_or(self.tokens.len());
        let mut at = start;
        let mut strangers = 0;
        let mut known = false;
        // After two unknown words in a row it is prose, not a list of names.
        while at < end && strangers < 2 {
            let word = self.tokens[at].word;
            if matches!(word, "or" | "and") {
                strangers = 0;
            } else if word == "with" {
                // An exception: its name is no licence.
                at = (at..end).find(|at| matches!(self.word(*at), "or" | "and")).unwrap_or(end);
                continue;
            } else if let Some((licence, length)) = self.phrase_from(at).filter(|(_, length)| *length > 1) {
                self.versioned(licence, at + length);
                at += length;
                known = true;
                continue;
            } else if let Some(licence) = names::in_field(word) {
                self.add(licence);
                (strangers, known) = (0, true);
            } else if gnu::identifier(word).is_some() {
                // Found by its own rule.
                (strangers, known) = (0, true);
            } else {
                strangers += 1;
            }
            at += 1;
        }
        if !known && end == start + 1 && self.unknown.is_none() {
            self.unknown = Some(self.tokens[start].word.chars().take(40).collect());
        }
    }

    /// `opensource.org/licenses/MIT`, `www.apache.org/licenses/LICENSE-2.0`, `creativecommons.org/licenses/by-sa/3.0`.
    fn address(&mut self, at: usize) {
        let next = self.tokens.get(at + 1).filter(|token| token.after_slash).map_or("", |token| token.word);
        if self.tokens[at].word != "licenses" || next.is_empty() {
            return;
        }
        let site = self.before(at, 1);
        let name = [".html", ".txt", ".php"].iter().find_map(|end| next.strip_suffix(end)).unwrap_or(next);
        let licence = if site.ends_with("apache.org") {
            name.strip_prefix("license-").and_then(|version| names::anywhere(&format!("apache-{version}")))
        } else if site.ends_with("creativecommons.org") {
            names::creative_commons(&format!("cc-{name}-{}", self.word(at + 2)))
        } else if site.ends_with("opensource.org") || site.ends_with("spdx.org") {
            names::in_field(name.trim_end_matches("-license"))
        } else {
            None
        };
        self.found.extend(licence);
    }

    /// "the MIT license", "MIT or Apache 2.0 licensed", "licensed under the MIT", "Artistic License 2.0".
    fn beside_licence(&mut self, at: usize) {
        let word = self.tokens[at].word;
        if word == "unlicense" {
            self.add("Unlicense");
        }
        if !is_licence(word) {
            return;
        }
        self.creative_commons_before(at);
        let mut end = at;
        while end > 0 && !self.tokens[end - 1].ends_sentence {
            // The version may stand between: "Apache 2.0 license".
            let version = gnu::number(self.before(end, 1)).map(|(version, _)| version.to_string());
            let name_end = if version.is_some() { end - 1 } else { end };
            let Some((licence, length)) = self.phrase_to(name_end) else { break };
            match version {
                Some(version) => self.add_version(licence, &version),
                None if end == at => self.versioned(licence, at + 1),
                None => self.add(licence),
            }
            end = name_end - length;
            if end > 0 && matches!(self.before(end, 1), "or" | "and") {
                end -= 1;
            } else if !self.tokens[end].after_slash {
                break;
            }
        }
        if self.word(at + 1) == "under" || (self.word(at + 1) == "is" && word != "licensed") {
            self.after_under(at + 2);
        }
    }

    fn after_under(&mut self, mut at: usize) {
        while matches!(self.word(at), "the" | "a" | "an" | "terms" | "of" | "either" | "both") {
            at += 1;
        }
        while let Some((licence, length)) = self.phrase_from(at) {
            // "under the Python tree" names no licence: the sentence, or a list of names, goes on after a name.
            at += length;
            let next = self.word(at);
            let ends = self.tokens[at - 1].ends_sentence || next.is_empty();
            if ends || is_licence(next) || gnu::number(next).is_some() || matches!(next, "or" | "and" | "version") {
                self.versioned(licence, at);
            }
            at += usize::from(gnu::number(self.word(at)).is_some()) + usize::from(is_licence(self.word(at)));
            if !matches!(self.word(at), "or" | "and") {
                return;
            }
            at += 1;
            at += usize::from(self.word(at) == "the");
        }
    }

    /// "Creative Commons Attribution-ShareAlike 3.0 Unported License".
    fn creative_commons_before(&mut self, at: usize) {
        let Some(start) = (1..=9)
            .find(|distance| self.before(at, *distance) == "commons" && self.before(at, *distance + 1) == "creative")
        else {
            return;
        };
        let mut licence = String::new();
        let mut version = gnu::versions_after(self.tokens, at + 1).first().map(|(version, _)| version.clone());
        for token in &self.tokens[at - start..at] {
            for part in token.word.split('-') {
                match part {
                    "attribution" => licence += "cc-by",
                    "sharealike" | "share" => licence += "-sa",
                    "noncommercial" | "commercial" => licence += "-nc",
                    "noderivs" | "noderivatives" => licence += "-nd",
                    "zero" | "cc0" => return self.add("CC0-1.0"),
                    _ => version = gnu::number(part).map(|(number, _)| number.to_string()).or(version),
                }
            }
        }
        if let Some(version) = version {
            licence += &format!("-{version}");
        }
        self.found.extend(names::creative_commons(&licence));
    }

    /// Adds `licence` with the version that follows, if one does.
    fn versioned(&mut self, licence: &str, after: usize) {
        match gnu::versions_after(self.tokens, after).first() {
            Some((version, _)) => self.add_version(licence, &version.clone()),
            None => self.add(licence),
        }
    }

    fn add_version(&mut self, licence: &str, version: &str) {
        let base = licence.split_once("-1.").map_or(licence, |(base, _)| base).to_lowercase();
        let version = if version.contains('.') { version.to_string() } else { format!("{version}.0") };
        let known = names::in_field(&format!("{base}-{version}"));
        self.add(known.unwrap_or_else(|| licence.to_string()));
    }

    /// The longest phrase that begins at `at`.
    fn phrase_from(&self, at: usize) -> Option<(&'static str, usize)> {
        self.phrase(|length| Some(at).filter(|at| at + length <= self.tokens.len()))
    }

    /// The longest phrase that ends before `end`.
    fn phrase_to(&self, end: usize) -> Option<(&'static str, usize)> {
        self.phrase(|length| end.checked_sub(length))
    }

    fn phrase(&self, start: impl Fn(usize) -> Option<usize>) -> Option<(&'static str, usize)> {
        PHRASES.iter().find_map(|(words, licence)| {
            let tokens = &self.tokens[start(words.len())?..][..words.len()];
            let same = tokens.iter().zip(*words).all(|(token, word)| token.word == *word);
            (same && tokens[..tokens.len() - 1].iter().all(|token| !token.ends_sentence))
                .then_some((*licence, words.len()))
        })
    }

    fn finish(self) -> Named {
        let mut licences = self.found;
        for pointer in self.pointers {
            if !licences.iter().any(|licence| gnu::covers(licence, &pointer)) {
                licences.insert(pointer);
            }
        }
        let is_vague = |name: &String| {
            licences.iter().any(|other| {
                other.strip_prefix(name.as_str()).is_some_and(|rest| {
                    matches!(rest.as_bytes(), [b'-', b'0'..=b'9', ..]) || (name == "GFDL" && !rest.is_empty())
                })
            })
        };
        let vague: Vec<_> = licences.iter().filter(|name| is_vague(name)).cloned().collect();
        for name in vague {
            licences.remove(&name);
        }
        Named { licences, unknown: self.unknown, mention: self.mention }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::passages::Finder;

    /// Through the finder, as in the pipeline: what it skips must not be needed.
    fn find(text: &str) -> Vec<String> {
        let kept = named(&Finder::new().passages(text.as_bytes()));
        let whole = named(&text.to_lowercase());
        assert_eq!(kept.licences, whole.licences, "cut differs from whole: {text}");
        kept.licences.into_iter().collect()
    }

    fn check(cases: &[(&str, &[&str])]) {
        for (text, want) in cases {
            assert_eq!(find(text), *want, "{text}");
        }
    }

    #[test]
    fn gnu_licences_in_prose() {
        check(&[
            (
                "under the terms of the GNU General Public License as published by\n# the Free Software Foundation; \
                 either version 2 of the License, or (at your option) any later version.",
                &["GPL-2+"],
            ),
            ("GNU General Public License version 2 as published by the Free Software Foundation.", &["GPL-2"]),
            ("under version 2 or later of the GNU General Public License", &["GPL-2+"]),
            ("under version 2.1 of the GNU Lesser General Public License", &["LGPL-2.1"]),
            ("GNU Library General Public License, version 2 or newer", &["LGPL-2+"]),
            ("the GNU Affero General Public License, version 3 only", &["AGPL-3"]),
            ("See the GNU General Public License for details.", &["GPL"]),
            ("GPL version 2, but not any later version", &["GPL-2"]),
            ("GPL version 2. Any later version of this program", &["GPL-2"]),
            ("GPL version 2 or version 3", &["GPL-2", "GPL-3"]),
            ("GPL v2 or later, LGPLv2.1+, GPL3", &["GPL-2+", "GPL-3", "LGPL-2.1+"]),
            ("GPL-2.0-only, GPL-3.0-or-later, LGPL-2.0+", &["GPL-2", "GPL-3+", "LGPL-2+"]),
            ("the NetHack General Public License", &[]),
            ("EXPORT_SYMBOL_GPL and gplot", &[]),
            ("LGPL", &["LGPL"]),
        ]);
    }

    #[test]
    fn a_pointer_to_the_text_does_not_narrow() {
        let boilerplate = "the GNU General Public License as published by the Free Software Foundation; either version \
                           2 of the License, or (at your option) any later version.\nOn Debian systems, the complete \
                           text of the GNU General Public License version 2 can be found in \
                           `/usr/share/common-licenses/GPL-2'.";
        check(&[
            (boilerplate, &["GPL-2+"]),
            ("see /usr/share/common-licenses/GPL-3", &["GPL-3"]),
            ("see /usr/share/common-licenses/Artistic.", &["Artistic-1.0"]),
            ("License: GPL-2\n see /usr/share/common-licenses/GPL-2", &["GPL-2"]),
            ("License: LGPL-2+\n see /usr/share/common-licenses/LGPL-2.1", &["LGPL-2+"]),
            ("License: GPL-3+\n see /usr/share/common-licenses/GPL-2", &["GPL-2", "GPL-3+"]),
        ]);
    }

    #[test]
    fn fields() {
        check(&[
            ("License: GPL-1+ or Artistic, and Expat\n", &["Artistic-1.0", "GPL-1+", "MIT"]),
            ("License: GPL-2+ with OpenSSL exception\n", &["GPL-2+"]),
            ("License: GPL-3+ with Autoconf exception or ISC\n", &["GPL-3+", "ISC"]),
            ("License: LGPLv3+_or_GPLv2+\n", &["GPL-2+", "LGPL-3+"]),
            ("License: MIT/X11\n", &["MIT"]),
            ("License: BSD-3-clause-pcre\n", &["BSD-3-Clause"]),
            ("License: BSD (3 clause)\n", &["BSD-3-Clause"]),
            ("License: GFDL-NIV-1.3+\n", &["GFDL-NIV-1.3+"]),
            ("License: CC-BY-SA-3.0\n", &["CC-BY-SA-3.0"]),
            ("License: public-domain\n", &["public-domain"]),
            ("License: PD\nFiles: *\n", &["public-domain"]),
            ("License: Python Software Foundation License\n", &["PSF-2.0"]),
            ("License: Apache License 2.0\n", &["Apache-2.0"]),
            ("License: Kazlib\nFiles: mit.c isc.c\n", &[]),
            ("License: The main boost library is in python\n", &[]),
            (
                "// SPDX-License-Identifier: (GPL-2.0 WITH Linux-syscall-note) OR BSD-2-Clause\n",
                &["BSD-2-Clause", "GPL-2"],
            ),
            ("{\n  \"license\": \"ISC\",\n  \"name\": \"python\"\n}", &["ISC"]),
            ("license = \"MIT OR Apache-2.0\"\n", &["Apache-2.0", "MIT"]),
        ]);
        assert_eq!(named("license: kazlib\n").unknown.as_deref(), Some("kazlib"));
    }

    #[test]
    fn names_beside_the_word_licence() {
        check(&[
            ("released under the MIT license", &["MIT"]),
            ("MIT/X11 licence", &["MIT"]),
            ("dual MIT or Apache 2.0 licensed", &["Apache-2.0", "MIT"]),
            ("licensed under either of Apache License, Version 2.0 or MIT license", &["Apache-2.0", "MIT"]),
            ("licensed under the MIT.", &["MIT"]),
            ("licensed under the python tree", &[]),
            ("a 3-clause BSD-style license", &["BSD"]),
            ("the 3-clause BSD license", &["BSD-3-Clause"]),
            ("the simplified BSD license", &["BSD-2-Clause"]),
            ("the BSD license, and BSD-4-Clause", &["BSD-4-Clause"]),
            ("Mozilla Public License Version 1.1", &["MPL-1.1"]),
            ("the Mozilla Public License, v. 2.0.", &["MPL-2.0"]),
            ("Eclipse Public License - v 1.0", &["EPL-1.0"]),
            ("the Artistic License 2.0", &["Artistic-2.0"]),
            ("the Artistic License", &["Artistic-1.0"]),
            ("the Boost Software License, Version 1.0", &["BSL-1.0"]),
            ("SIL Open Font License, Version 1.1", &["OFL-1.1"]),
            ("the PSF license and the OpenSSL licence", &["OpenSSL", "PSF-2.0"]),
            ("the zlib/libpng license", &["Zlib"]),
            ("This is free and unencumbered: the Unlicense", &["Unlicense"]),
            ("under the same terms as Perl itself", &["Artistic-1.0", "GPL-1+"]),
            ("Creative Commons Attribution-ShareAlike 3.0 Unported License", &["CC-BY-SA-3.0"]),
            ("Creative Commons Attribution 4.0 International License", &["CC-BY-4.0"]),
            ("the Creative Commons Zero license", &["CC0-1.0"]),
            (
                "the GNU Free Documentation License, Version 1.2 or any later version published by the Free Software \
                 Foundation; with no Invariant Sections, no Front-Cover Texts",
                &["GFDL-NIV-1.2+"],
            ),
            ("GNU Free Documentation License, Version 1.3", &["GFDL-1.3"]),
        ]);
    }

    #[test]
    fn ordinary_words_name_nothing() {
        check(&[
            ("submit a permit; commit it with the licence fee", &[]),
            ("mit freundlichen Grüßen", &[]),
            ("Python and zlib are linked; see the license file", &[]),
            ("apache-2.4.57 runs on x11 with expat and isc-dhcp", &[]),
            ("This license is not the one you think", &[]),
            ("it is not in the public domain", &[]),
            ("this public-domain code", &["public-domain"]),
            ("Permission is hereby granted, free of charge, to any person", &[]),
        ]);
    }

    #[test]
    fn addresses() {
        check(&[
            ("http://www.apache.org/licenses/LICENSE-2.0", &["Apache-2.0"]),
            ("https://opensource.org/licenses/MIT.", &["MIT"]),
            ("http://www.opensource.org/licenses/mit-license.php", &["MIT"]),
            ("https://creativecommons.org/licenses/by-sa/3.0/", &["CC-BY-SA-3.0"]),
            ("https://creativecommons.org/publicdomain/zero/1.0/", &["CC0-1.0"]),
            ("https://www.gnu.org/licenses/gpl-2.0.html", &["GPL-2"]),
            ("https://www.gnu.org/licenses/", &[]),
        ]);
    }

    #[test]
    fn results_are_routed() {
        let run = |text: &str, format: &str| {
            let attrs = Map::from_iter([("format".to_string(), Value::from(format))]);
            step(&Item { name: "a", attrs: &attrs, payload: text.as_bytes() })
        };
        let tallied = run("isc license, gpl-2+", "text");
        assert_eq!((tallied.route, tallied.payload.len()), (Some(TALLY), 0));
        assert_eq!(tallied.attrs["licences"], serde_json::json!(["GPL-2+", "ISC"]));
        let reviewed = run("see\nthe licence of ümlaut", "text");
        assert_eq!(reviewed.route, Some(REVIEW));
        assert_eq!(reviewed.payload, "see the licence of ümlaut".as_bytes());
        assert_eq!(reviewed.attrs["licences"], serde_json::json!([]));
        assert_eq!(run("", "png").route, Some(REVIEW));
    }
}
