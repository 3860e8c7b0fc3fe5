//! Names that users give to things.

use crate::Error;

/// Checks a name of a VM, an image, a pipeline or a step: 1 to 63 of `a-z 0-9 - .`, beginning and
/// ending with a letter or a digit. A VM's name is its host name too, hence the rule of RFC 1123.
///
/// # Errors
/// `Invalid`, naming `what` and the character at fault.
pub fn check(what: &str, name: &str) -> Result<(), Error> {
    let hint = "use 1 to 63 of a-z, 0-9, \"-\" and \".\", beginning and ending with a letter or digit";
    let shown = crate::path_text::printable(name);
    if name.is_empty() || name.len() > 63 {
        return Err(Error::invalid(format!("{what} name \"{shown}\" has {} characters", name.len())).with_hint(hint));
    }
    if let Some(c) = name.chars().find(|c| !matches!(c, 'a'..='z' | '0'..='9' | '-' | '.')) {
        return Err(Error::invalid(format!("{what} name \"{shown}\" holds {c:?}")).with_hint(hint));
    }
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    if !edge(name.chars().next()) || !edge(name.chars().last()) || name.contains("..") {
        return Err(Error::invalid(format!("{what} name \"{shown}\" begins, ends or doubles badly")).with_hint(hint));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::check;

    #[test]
    fn names() {
        for good in ["a", "web-1", "debian-12.5", "0"] {
            assert!(check("vm", good).is_ok(), "{good}");
        }
        let long = "x".repeat(64);
        for bad in ["", "-a", "a-", "A", "a b", "a/b", "..", "a..b", "é", "a\n", long.as_str()] {
            assert!(check("vm", bad).is_err(), "{bad}");
        }
    }
}
