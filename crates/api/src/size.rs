//! Amounts with units, as people write them: sizes in bytes and spans of time.

use std::{borrow::Cow, fmt, str::FromStr, time::Duration};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::Error;

/// A number of bytes. Written as `512M`, `2G`, `64KiB` or a plain number of bytes; units are powers of 1024.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct ByteSize(pub u64);

impl ByteSize {
    pub const fn kib(count: u64) -> Self {
        Self(count << 10)
    }
    pub const fn mib(count: u64) -> Self {
        Self(count << 20)
    }
    pub const fn gib(count: u64) -> Self {
        Self(count << 30)
    }
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for ByteSize {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = || {
            Error::invalid(format!("\"{text}\" is no size"))
                .with_hint("write a whole number and a unit: 512M, 2G, 64K (powers of 1024)")
        };
        let text = text.trim();
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let number: u64 = text[..digits].parse().map_err(|_| wrong())?;
        let shift = match text[digits..].trim() {
            "" | "B" => 0,
            "K" | "k" | "KiB" => 10,
            "M" | "MiB" => 20,
            "G" | "GiB" => 30,
            "T" | "TiB" => 40,
            _ => return Err(wrong()),
        };
        number.checked_mul(1 << shift).map(Self).ok_or_else(wrong)
    }
}

impl fmt::Display for ByteSize {
    /// The largest unit that keeps three digits: `1.4 GiB`, or exact (`512M`) with `{:#}`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(u32, &str, &str); 4] = [(40, "T", "TiB"), (30, "G", "GiB"), (20, "M", "MiB"), (10, "K", "KiB")];
        for (shift, exact, plain) in UNITS {
            let unit = 1u64 << shift;
            if f.alternate() {
                if self.0 >= unit && self.0.is_multiple_of(unit) {
                    return write!(f, "{}{exact}", self.0 >> shift);
                }
            } else if self.0 >= unit {
                let tenths = u128::from(self.0) * 10 / u128::from(unit);
                return if tenths >= 1000 {
                    write!(f, "{} {plain}", tenths / 10)
                } else {
                    write!(f, "{}.{} {plain}", tenths / 10, tenths % 10)
                };
            }
        }
        if f.alternate() { write!(f, "{}", self.0) } else { write!(f, "{} B", self.0) }
    }
}

/// A span of time. Written as `500ms`, `30s`, `5m`, `2h`, or a plain number of seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct TimeSpan(pub Duration);

impl FromStr for TimeSpan {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = || {
            Error::invalid(format!("\"{text}\" is no span of time"))
                .with_hint("write a whole number and a unit: 500ms, 30s, 5m, 2h")
        };
        let text = text.trim();
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let number: u64 = text[..digits].parse().map_err(|_| wrong())?;
        let milliseconds = match text[digits..].trim() {
            "ms" => 1,
            "" | "s" => 1000,
            "m" | "min" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(wrong()),
        };
        number.checked_mul(milliseconds).map(|ms| Self(Duration::from_millis(ms))).ok_or_else(wrong)
    }
}

impl fmt::Display for TimeSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.0.as_millis();
        match ms {
            0 => write!(f, "0s"),
            _ if ms.is_multiple_of(3_600_000) => write!(f, "{}h", ms / 3_600_000),
            _ if ms.is_multiple_of(60_000) => write!(f, "{}m", ms / 60_000),
            _ if ms.is_multiple_of(1000) => write!(f, "{}s", ms / 1000),
            _ => write!(f, "{ms}ms"),
        }
    }
}

macro_rules! text_serde {
    ($name:ident, $format:literal, $pattern:literal, $expecting:literal, $from_number:expr) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&format!($format, self))
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Visitor;
                impl de::Visitor<'_> for Visitor {
                    type Value = $name;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($expecting)
                    }
                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$name, E> {
                        text.parse().map_err(|error: Error| {
                            E::custom(format!("{}; {}", error.message, error.hint.unwrap_or_default()))
                        })
                    }
                    fn visit_u64<E: de::Error>(self, number: u64) -> Result<$name, E> {
                        Ok($from_number(number))
                    }
                    fn visit_i64<E: de::Error>(self, number: i64) -> Result<$name, E> {
                        u64::try_from(number).map($from_number).map_err(|_| E::custom("must not be negative"))
                    }
                }
                deserializer.deserialize_any(Visitor)
            }
        }

        impl JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }
            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "anyOf": [{ "type": "string", "pattern": $pattern }, { "type": "integer", "minimum": 0 }] })
            }
        }
    };
}

text_serde!(ByteSize, "{:#}", "^[0-9]+ ?(B|[kKMGT]|[KMGT]iB)?$", "a size such as \"512M\"", ByteSize);
text_serde!(TimeSpan, "{}", "^[0-9]+ ?(ms|s|m|min|h|d)?$", "a span of time such as \"30s\"", |seconds| TimeSpan(
    Duration::from_secs(seconds)
));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_and_print() {
        for (text, bytes) in [("0", 0), ("512", 512), ("64K", 65536), ("2G", 2 << 30), ("1 MiB", 1 << 20)] {
            assert_eq!(text.parse::<ByteSize>().unwrap().0, bytes, "{text}");
        }
        for text in ["", "G", "-1", "1.5G", "12X", "99999999999999999999", "18446744073709551615K"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
        assert_eq!(format!("{:#}", ByteSize::gib(2)), "2G");
        assert_eq!(ByteSize::mib(1500).to_string(), "1.4 GiB");
        assert_eq!(ByteSize(999).to_string(), "999 B");
    }

    #[test]
    fn spans_read_and_print() {
        for text in ["500ms", "30s", "5m", "2h"] {
            assert_eq!(text.parse::<TimeSpan>().unwrap().to_string(), text);
        }
        assert_eq!("90".parse::<TimeSpan>().unwrap().0.as_secs(), 90);
        assert!("soon".parse::<TimeSpan>().is_err());
    }
}
