//! What goes into a statement and comes out of one, the same on both engines.

use burgeon_api::{Error, Result};

/// A parameter or a column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    Null,
    /// SQLite has no booleans: there it is the integer 0 or 1.
    Boolean(bool),
    Integer(i64),
    Text(String),
    Blob(Vec<u8>),
}

impl From<bool> for Value {
    fn from(value: bool) -> Value {
        Value::Boolean(value)
    }
}

impl From<i64> for Value {
    fn from(value: i64) -> Value {
        Value::Integer(value)
    }
}

impl From<u32> for Value {
    fn from(value: u32) -> Value {
        Value::Integer(value.into())
    }
}

impl From<u64> for Value {
    /// Both engines' integers are signed; our counters and times never come near the sign.
    fn from(value: u64) -> Value {
        Value::Integer(i64::try_from(value).unwrap_or(i64::MAX))
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Value {
        Value::Text(value.into())
    }
}

impl From<String> for Value {
    fn from(value: String) -> Value {
        Value::Text(value)
    }
}

impl From<&[u8]> for Value {
    fn from(value: &[u8]) -> Value {
        Value::Blob(value.into())
    }
}

impl From<Vec<u8>> for Value {
    fn from(value: Vec<u8>) -> Value {
        Value::Blob(value)
    }
}

impl<T: Into<Value>> From<Option<T>> for Value {
    fn from(value: Option<T>) -> Value {
        value.map_or(Value::Null, Into::into)
    }
}

impl Value {
    fn name(&self) -> &'static str {
        match self {
            Value::Null => "null",
            Value::Boolean(_) => "a boolean",
            Value::Integer(_) => "an integer",
            Value::Text(_) => "text",
            Value::Blob(_) => "bytes",
        }
    }
}

/// One row of an answer. Columns count from 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row(pub(super) Vec<Value>);

impl Row {
    fn column(&self, index: usize) -> &Value {
        self.0.get(index).unwrap_or(&Value::Null)
    }

    fn wrong<T>(&self, index: usize, wanted: &str) -> Result<T> {
        let found = self.column(index).name();
        Err(Error::damaged(format!("column {index} of a stored row holds {found}, not {wanted}")))
    }

    /// # Errors
    /// `Damaged` where the column holds something else; so for all of these.
    pub fn integer(&self, index: usize) -> Result<i64> {
        match self.column(index) {
            Value::Integer(value) => Ok(*value),
            _ => self.wrong(index, "an integer"),
        }
    }

    /// A counter, length or time.
    ///
    /// # Errors
    /// `Damaged`, for a negative number too.
    pub fn unsigned(&self, index: usize) -> Result<u64> {
        u64::try_from(self.integer(index)?).or_else(|_| self.wrong(index, "a number from 0"))
    }

    /// # Errors
    /// `Damaged`.
    pub fn boolean(&self, index: usize) -> Result<bool> {
        match self.column(index) {
            Value::Boolean(value) => Ok(*value),
            Value::Integer(0) => Ok(false),
            Value::Integer(1) => Ok(true),
            _ => self.wrong(index, "a boolean"),
        }
    }

    /// # Errors
    /// `Damaged`.
    pub fn text(&self, index: usize) -> Result<&str> {
        match self.column(index) {
            Value::Text(value) => Ok(value),
            _ => self.wrong(index, "text"),
        }
    }

    /// # Errors
    /// `Damaged`.
    pub fn blob(&self, index: usize) -> Result<&[u8]> {
        match self.column(index) {
            Value::Blob(value) => Ok(value),
            _ => self.wrong(index, "bytes"),
        }
    }

    /// Bytes of a fixed length, such as an id.
    ///
    /// # Errors
    /// `Damaged`, for another length too.
    pub fn bytes<const LENGTH: usize>(&self, index: usize) -> Result<[u8; LENGTH]> {
        self.blob(index)?.try_into().or_else(|_| self.wrong(index, "bytes of that length"))
    }

    #[must_use]
    pub fn is_null(&self, index: usize) -> bool {
        *self.column(index) == Value::Null
    }

    /// # Errors
    /// `Damaged`.
    pub fn optional_text(&self, index: usize) -> Result<Option<&str>> {
        if self.is_null(index) { Ok(None) } else { self.text(index).map(Some) }
    }

    /// # Errors
    /// `Damaged`.
    pub fn optional_unsigned(&self, index: usize) -> Result<Option<u64>> {
        if self.is_null(index) { Ok(None) } else { self.unsigned(index).map(Some) }
    }
}

#[cfg(test)]
mod tests {
    use burgeon_api::ErrorKind;

    use super::*;

    #[test]
    fn a_column_of_another_type_is_damage_and_says_so() {
        let row = Row(vec![7i64.into(), "seven".into(), vec![7u8].into(), Value::Null, true.into()]);
        assert_eq!(row.integer(0).unwrap(), 7);
        assert_eq!(row.text(1).unwrap(), "seven");
        assert_eq!(row.bytes::<1>(2).unwrap(), [7]);
        assert_eq!(row.optional_text(3).unwrap(), None);
        assert!(row.boolean(4).unwrap());
        let error = row.text(0).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Damaged);
        assert_eq!(error.message, "column 0 of a stored row holds an integer, not text");
        assert!(row.bytes::<2>(2).is_err());
        assert!(row.boolean(0).is_err(), "7 is no boolean");
        assert!(Row(vec![(-1i64).into()]).unsigned(0).is_err());
        assert!(row.integer(9).is_err(), "there is no column 9");
    }
}
