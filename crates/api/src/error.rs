//! The one error that leaves Burgeon: a kind (what the caller should do), a message, and, where
//! they are known, a hint and the place in the file that caused it.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the caller should do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The request is wrong as written: correct it.
    Invalid,
    /// The thing named does not exist.
    NotFound,
    /// The name or the state is taken: choose another, or wait.
    Conflict,
    /// The request is well formed, and this machine or its policy does not allow it.
    Refused,
    /// Something needed is not there at the moment: try again.
    Unavailable,
    /// The other side did not answer in time.
    Deadline,
    /// Something stored or received is damaged.
    Damaged,
    /// The work was cancelled by its user.
    Cancelled,
    /// A fault of Burgeon or of the machine.
    Internal,
}

impl ErrorKind {
    /// The HTTP status that carries this kind.
    pub fn http_status(self) -> u16 {
        match self {
            ErrorKind::Invalid => 400,
            ErrorKind::NotFound => 404,
            ErrorKind::Conflict | ErrorKind::Cancelled => 409,
            ErrorKind::Refused => 422,
            ErrorKind::Unavailable => 503,
            ErrorKind::Deadline => 504,
            ErrorKind::Damaged | ErrorKind::Internal => 500,
        }
    }
}

/// A place in a file that a user wrote. Lines and columns count from 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Location {
    pub file: String,
    pub line: u32,
    pub column: u32,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.file, self.line, self.column)
    }
}

/// A refusal or a failure, as users and clients see it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize, JsonSchema)]
#[error("{}{message}", location.as_ref().map(|at| format!("{at}: ")).unwrap_or_default())]
pub struct Error {
    pub kind: ErrorKind,
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub location: Option<Location>,
}

impl Error {
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None, location: None }
    }

    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::NotFound, message)
    }

    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Conflict, message)
    }

    pub fn refused(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Refused, message)
    }

    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unavailable, message)
    }

    pub fn deadline(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Deadline, message)
    }

    pub fn damaged(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Damaged, message)
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Internal, message)
    }

    /// Adds what the user can do next.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    #[must_use]
    pub fn with_location(mut self, location: Location) -> Self {
        self.location = Some(location);
        self
    }

    /// Says which action failed, in front of the message.
    #[must_use]
    pub fn context(mut self, action: impl fmt::Display) -> Self {
        self.message = format!("{action}: {}", self.message);
        self
    }

    /// An input or output error of the operating system, told with the action that met it.
    pub fn io(action: impl fmt::Display, error: &std::io::Error) -> Self {
        use std::io::ErrorKind as Io;
        let kind = match error.kind() {
            Io::NotFound => ErrorKind::NotFound,
            Io::PermissionDenied | Io::StorageFull | Io::QuotaExceeded => ErrorKind::Refused,
            Io::TimedOut => ErrorKind::Deadline,
            Io::ConnectionRefused | Io::ConnectionReset | Io::BrokenPipe => ErrorKind::Unavailable,
            _ => ErrorKind::Internal,
        };
        let new = Self::new(kind, format!("{action}: {error}"));
        if error.kind() == Io::StorageFull {
            new.with_hint("free some space, or put the data directory elsewhere with --data DIR")
        } else {
            new
        }
    }
}
