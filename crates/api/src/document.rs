//! TOML files that users write, and errors that point into them.

use serde::de::DeserializeOwned;
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use crate::{Error, Location, Result};

/// The text of a TOML file with the name under which its user knows it.
#[derive(Clone, Debug)]
pub struct Document {
    pub file: String,
    pub text: String,
}

/// One step of the way to a value: a key of a table, or an index of an array.
#[derive(Clone, Copy, Debug)]
pub enum Part<'a> {
    Key(&'a str),
    Index(usize),
}

impl<'a> From<&'a str> for Part<'a> {
    fn from(key: &'a str) -> Self {
        Part::Key(key)
    }
}

impl From<usize> for Part<'_> {
    fn from(index: usize) -> Self {
        Part::Index(index)
    }
}

impl Document {
    pub fn new(file: impl Into<String>, text: impl Into<String>) -> Self {
        Self { file: file.into(), text: text.into() }
    }

    /// Reads the document as `T`. Unknown keys are errors where `T` denies them.
    ///
    /// # Errors
    /// `Invalid`, with file, line and column.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T> {
        toml::from_str(&self.text).map_err(|error| {
            let mut message = error.message().to_string();
            if let Some(nearest) = nearest_key(&message) {
                message = format!("{message} (did you mean `{nearest}`?)");
            }
            Error::invalid(message).with_location(self.location(error.span().map_or(0, |span| span.start)))
        })
    }

    /// An `Invalid` error that points at the value found by `path`, or as near as the document goes.
    pub fn error_at(&self, path: &[Part<'_>], message: impl Into<String>) -> Error {
        Error::invalid(message).with_location(self.location(self.offset_of(path)))
    }

    /// Adds the place found by `path` to an error that has none.
    pub fn locate(&self, path: &[Part<'_>], error: Error) -> Error {
        if error.location.is_some() { error } else { error.with_location(self.location(self.offset_of(path))) }
    }

    /// Whether the document itself gives this key of its top level, as against a default.
    pub fn has(&self, key: &str) -> bool {
        DeTable::parse(&self.text).is_ok_and(|table| table.get_ref().iter().any(|(name, _)| name.get_ref() == key))
    }

    fn location(&self, offset: usize) -> Location {
        let before = self.text.get(..offset).unwrap_or(&self.text);
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().map_or(0, |last| last.chars().count()) + 1;
        Location {
            file: self.file.clone(),
            line: u32::try_from(line).unwrap_or(u32::MAX),
            column: u32::try_from(column).unwrap_or(u32::MAX),
        }
    }

    fn offset_of(&self, path: &[Part<'_>]) -> usize {
        let Ok(table) = DeTable::parse(&self.text) else {
            return 0;
        };
        let mut offset = 0;
        let mut value = Spanned::new(table.span(), DeValue::Table(table.into_inner()));
        for part in path {
            let next = match (part, value.into_inner()) {
                (Part::Key(key), DeValue::Table(table)) => {
                    table.into_iter().find(|(name, _)| name.get_ref() == key).map(|(name, value)| (name.span(), value))
                }
                (Part::Index(index), DeValue::Array(array)) => {
                    array.into_iter().nth(*index).map(|value| (value.span(), value))
                }
                _ => None,
            };
            let Some((span, next)) = next else { break };
            offset = span.start;
            value = next;
        }
        offset
    }
}

/// From "unknown field `x`, expected one of `a`, `b`": the expected key nearest to the unknown one.
fn nearest_key(message: &str) -> Option<String> {
    let rest = message.strip_prefix("unknown field `")?;
    let (unknown, rest) = rest.split_once('`')?;
    rest.split('`')
        .skip(1)
        .step_by(2)
        .map(|key| (edit_distance(unknown, key), key))
        .filter(|(distance, key)| *distance <= key.len().max(3) / 2)
        .min()
        .map(|(_, key)| key.to_string())
}

fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Example {
        #[allow(dead_code, reason = "only its presence matters here")]
        memory: u64,
    }

    #[test]
    fn errors_point_at_the_line_and_suggest() {
        let error = Document::new("a.toml", "\n\nmemroy = 3\n").parse::<Example>().unwrap_err();
        assert_eq!(error.to_string(), "a.toml:3:1: unknown field `memroy`, expected `memory` (did you mean `memory`?)");
    }

    #[test]
    fn a_path_finds_its_line() {
        let document = Document::new("a.toml", "x = 1\n[[step]]\nname = 'a'\n[[step]]\nname = 'b'\n");
        let error = document.error_at(&["step".into(), 1.into(), "name".into()], "bad");
        assert_eq!(error.location.unwrap().line, 5);
    }
}
