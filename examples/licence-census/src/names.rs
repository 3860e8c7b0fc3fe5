//! The licences that the census knows: how they are written in the report, and of which family they are.
//!
//! The GNU licences are written as Debian does (`GPL-2` is version 2, `GPL-2+` is version 2 or any later one), all
//! others by their SPDX identifier. A bare name (`GPL`, `BSD`) stands for a text that gives no version.

/// Families, the most demanding first: a file that names several licences is counted under the first of theirs.
pub(crate) const FAMILIES: [&str; 6] =
    ["copyleft", "weak copyleft", "documentation", "permissive", "public domain", "other"];

/// Licences by the names under which they are known in `License:` fields, in lower case.
/// A name that goes on after a hyphen (`bsd-3-clause-pcre`) is a variant of the same licence.
const FIELD_NAMES: &[(&str, &str)] = &[
    ("expat", "MIT"),
    ("mit", "MIT"),
    ("x11", "X11"),
    ("isc", "ISC"),
    ("zlib", "Zlib"),
    ("libpng", "Libpng"),
    ("bsd", "BSD"),
    ("bsd-1-clause", "BSD-1-Clause"),
    ("bsd-2-clause", "BSD-2-Clause"),
    ("bsd-2", "BSD-2-Clause"),
    ("bsd2", "BSD-2-Clause"),
    ("bsd-3-clause", "BSD-3-Clause"),
    ("bsd-3", "BSD-3-Clause"),
    ("bsd3", "BSD-3-Clause"),
    ("bsd-4-clause", "BSD-4-Clause"),
    ("bsd-4", "BSD-4-Clause"),
    ("bsd4", "BSD-4-Clause"),
    ("0bsd", "0BSD"),
    ("apache", "Apache"),
    ("apache-1.0", "Apache-1.0"),
    ("apache-1.1", "Apache-1.1"),
    ("apache-2", "Apache-2.0"),
    ("apache-2.0", "Apache-2.0"),
    ("apache2", "Apache-2.0"),
    ("artistic", "Artistic-1.0"),
    ("artistic-1", "Artistic-1.0"),
    ("artistic-1.0", "Artistic-1.0"),
    ("artistic-2", "Artistic-2.0"),
    ("artistic-2.0", "Artistic-2.0"),
    ("mpl", "MPL"),
    ("mpl-1.0", "MPL-1.0"),
    ("mpl-1.1", "MPL-1.1"),
    ("mpl-2", "MPL-2.0"),
    ("mpl-2.0", "MPL-2.0"),
    ("epl", "EPL"),
    ("epl-1.0", "EPL-1.0"),
    ("epl-2.0", "EPL-2.0"),
    ("edl-1.0", "BSD-3-Clause"),
    ("cddl", "CDDL"),
    ("cddl-1.0", "CDDL-1.0"),
    ("cddl-1.1", "CDDL-1.1"),
    ("psf", "PSF-2.0"),
    ("psf-2", "PSF-2.0"),
    ("psf-2.0", "PSF-2.0"),
    ("psfl", "PSF-2.0"),
    ("python", "Python-2.0"),
    ("python-2.0", "Python-2.0"),
    ("bsl", "BSL-1.0"),
    ("bsl-1.0", "BSL-1.0"),
    ("boost", "BSL-1.0"),
    ("boost-1.0", "BSL-1.0"),
    ("ofl", "OFL-1.1"),
    ("ofl-1.1", "OFL-1.1"),
    ("openssl", "OpenSSL"),
    ("ssleay", "SSLeay"),
    ("openldap-2.8", "OLDAP-2.8"),
    ("oldap-2.8", "OLDAP-2.8"),
    ("afl-2.0", "AFL-2.0"),
    ("afl-2.1", "AFL-2.1"),
    ("afl-3.0", "AFL-3.0"),
    ("curl", "curl"),
    ("ftl", "FTL"),
    ("hpnd", "HPND"),
    ("icu", "ICU"),
    ("ntp", "NTP"),
    ("postgresql", "PostgreSQL"),
    ("tcl", "TCL"),
    ("unicode", "Unicode-DFS-2016"),
    ("unicode-dfs-2016", "Unicode-DFS-2016"),
    ("unicode-3.0", "Unicode-3.0"),
    ("vim", "Vim"),
    ("bzip2-1.0.6", "bzip2-1.0.6"),
    ("beerware", "Beerware"),
    ("beer-ware", "Beerware"),
    ("wtfpl", "WTFPL"),
    ("fsfap", "FSFAP"),
    ("fsful", "FSFUL"),
    ("fsfullr", "FSFULLR"),
    ("ncsa", "NCSA"),
    ("w3c", "W3C"),
    ("ijg", "IJG"),
    ("blueoak-1.0.0", "BlueOak-1.0.0"),
    ("unlicense", "Unlicense"),
    ("cc0", "CC0-1.0"),
    ("cc0-1.0", "CC0-1.0"),
    ("public-domain", "public-domain"),
    ("pd", "public-domain"),
];

/// Names that mean one thing wherever they stand, also with more behind a hyphen. Each holds a trigger of `passages`.
const UNMISTAKABLE: &[&str] = &[
    "apache-1.0",
    "apache-1.1",
    "apache-2.0",
    "mpl-1.0",
    "mpl-1.1",
    "mpl-2.0",
    "cc0",
    "bsd-1-clause",
    "bsd-2-clause",
    "bsd-3-clause",
    "bsd-4-clause",
];

/// The licence that a name in a `License:` field stands for.
pub(crate) fn in_field(name: &str) -> Option<String> {
    if let Some(licence) = creative_commons(name) {
        return Some(licence);
    }
    let mut name = name.trim_end_matches('+');
    loop {
        if let Some((_, licence)) = FIELD_NAMES.iter().find(|(known, _)| *known == name) {
            return Some((*licence).to_string());
        }
        name = &name[..name.rfind('-')?];
    }
}

/// The licence that a name stands for in any text.
pub(crate) fn anywhere(name: &str) -> Option<String> {
    if !name.starts_with(['a', 'b', 'c', 'm']) {
        return None;
    }
    if name.starts_with("cc-by") {
        return creative_commons(name);
    }
    let is_known =
        |known: &&str| name.strip_prefix(*known).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'));
    UNMISTAKABLE.iter().any(is_known).then(|| in_field(name))?
}

/// `cc-by-sa-3.0`, also with a country or `unported` behind it, as `CC-BY-SA-3.0`.
pub(crate) fn creative_commons(name: &str) -> Option<String> {
    let parts = name.strip_prefix("cc-by")?;
    let mut licence = "CC-BY".to_string();
    for part in parts.split('-').skip(1) {
        match part {
            "sa" | "nc" | "nd" => licence += &format!("-{}", part.to_uppercase()),
            _ => {
                let version = part.trim_start_matches('v');
                if matches!(version.as_bytes(), [b'1'..=b'4', b'.', b'0'..=b'9']) {
                    licence += &format!("-{version}");
                }
                break;
            }
        }
    }
    (parts.is_empty() || parts.starts_with('-')).then_some(licence)
}

/// The family of a licence as `classify` writes it.
pub(crate) fn family(licence: &str) -> &'static str {
    let starts = |all: &[&str]| all.iter().any(|start| licence.starts_with(start));
    if starts(&["LGPL", "MPL", "EPL", "CDDL", "OFL"]) {
        "weak copyleft"
    } else if starts(&["GPL", "AGPL", "CC-BY-SA", "CC-BY-NC-SA"]) {
        "copyleft"
    } else if licence.starts_with("GFDL") {
        "documentation"
    } else if starts(&["CC0", "Unlicense", "public-domain"]) {
        "public domain"
    } else if starts(&["Artistic", "CC-BY-NC", "CC-BY-ND"]) {
        "other"
    } else if licence.starts_with("CC-BY") || FIELD_NAMES.iter().any(|(_, known)| *known == licence) {
        "permissive"
    } else {
        "other"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_fields() {
        for (name, licence) in [
            ("expat", "MIT"),
            ("mit-cmu", "MIT"),
            ("bsd-3-clause-pcre", "BSD-3-Clause"),
            ("bsd-mit", "BSD"),
            ("apache-2.0", "Apache-2.0"),
            ("apache-2-llvm-exceptions", "Apache-2.0"),
            ("cc-by-sa-3.0", "CC-BY-SA-3.0"),
            ("cc-by-sa-3.0-us", "CC-BY-SA-3.0"),
            ("cc-by-4.0", "CC-BY-4.0"),
            ("cc-by-nc-nd-v2.5", "CC-BY-NC-ND-2.5"),
            ("cc-by", "CC-BY"),
            ("cc0-1.0", "CC0-1.0"),
            ("mpl-2.0+", "MPL-2.0"),
        ] {
            assert_eq!(in_field(name).as_deref(), Some(licence), "{name}");
        }
        for name in ["mitx", "submit", "kazlib", "", "cc-byte", "the"] {
            assert_eq!(in_field(name), None, "{name}");
        }
    }

    #[test]
    fn few_names_are_unmistakable() {
        assert_eq!(anywhere("apache-2.0").as_deref(), Some("Apache-2.0"));
        assert_eq!(anywhere("cc-by-sa-4.0").as_deref(), Some("CC-BY-SA-4.0"));
        for name in ["apache", "mit", "zlib", "x11", "expat", "bsd", "python", "apache-commons", "apache-2.0.63"] {
            assert_eq!(anywhere(name), None, "{name}");
        }
    }

    #[test]
    fn families() {
        for (licence, want) in [
            ("GPL-2+", "copyleft"),
            ("AGPL-3+", "copyleft"),
            ("LGPL-2.1+", "weak copyleft"),
            ("MPL-2.0", "weak copyleft"),
            ("GFDL-NIV-1.3+", "documentation"),
            ("MIT", "permissive"),
            ("CC-BY-4.0", "permissive"),
            ("CC-BY-SA-4.0", "copyleft"),
            ("CC0-1.0", "public domain"),
            ("Artistic-1.0", "other"),
        ] {
            assert_eq!(family(licence), want, "{licence}");
            assert!(FAMILIES.contains(&want));
        }
    }
}
