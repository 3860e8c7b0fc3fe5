//! How long a VM is kept, and when it is parked.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::TimeSpan;

/// What is asked for. What is absent stays as it is, and zero means without end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SetLife {
    /// It is removed this long after the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl: Option<TimeSpan>,
    /// It is parked once nobody has used it for so long.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle_park: Option<TimeSpan>,
}

/// What holds for a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Life {
    /// When it is removed, in seconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires_s: Option<u64>,
    /// It is parked once nobody has used it for so many seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle_park_s: Option<u64>,
}

impl Life {
    pub fn is_endless(&self) -> bool {
        *self == Life::default()
    }

    /// What holds from a request on. Parts of a second count as a whole one.
    #[must_use]
    pub fn set(self, request: &SetLife, now_s: u64) -> Life {
        let seconds = |span: &TimeSpan| u64::try_from(span.0.as_millis().div_ceil(1000)).unwrap_or(u64::MAX);
        let asked = |span: &Option<TimeSpan>| span.as_ref().map(|span| Some(seconds(span)).filter(|span| *span > 0));
        Life {
            expires_s: match asked(&request.ttl) {
                Some(ttl) => ttl.map(|ttl| now_s.saturating_add(ttl)),
                None => self.expires_s,
            },
            idle_park_s: asked(&request.idle_park).unwrap_or(self.idle_park_s),
        }
    }
}
