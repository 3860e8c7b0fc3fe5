//! Typed ids: UUIDs that cannot be mixed up. On the wire they are plain UUID text; `Debug` shows the kind.

use std::{fmt, str::FromStr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::Error;

macro_rules! typed_id {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
        #[serde(transparent)]
        pub struct $name(Uuid);

        impl $name {
            /// No id at all: where one must be told and there is none.
            pub const NONE: $name = $name(Uuid::nil());

            /// A new id, ordered by time of creation. Called at the edge that first wants the thing,
            /// so that a retry carries the same id.
            pub fn generate() -> Self {
                Self(Uuid::now_v7())
            }

            pub const fn from_uuid(uuid: Uuid) -> Self {
                Self(uuid)
            }

            pub const fn uuid(self) -> Uuid {
                self.0
            }

            /// The last eight hexadecimal digits: enough to tell things apart in a table.
            pub fn short(self) -> String {
                let text = self.0.simple().to_string();
                text[24..].to_string()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($kind, ":{}"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = Error;
            fn from_str(text: &str) -> Result<Self, Error> {
                Uuid::parse_str(text)
                    .map(Self)
                    .map_err(|_| Error::invalid(format!(concat!("\"{}\" is no ", $kind, " id"), text)))
            }
        }
    };
}

typed_id!(
    /// One virtual machine.
    VmId, "vm"
);
typed_id!(
    /// One run of a pipeline.
    PipelineId, "pipeline"
);
typed_id!(
    /// One command running in a VM.
    ExecId, "exec"
);
typed_id!(
    /// One request of a client, which may reach the server more than once.
    RequestId, "request"
);
