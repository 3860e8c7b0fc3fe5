//! What crosses a boundary: typed ids, specifications, states, the types of HTTP v1 and of the
//! host's socket, and the kinds of error.
//!
//! This crate has no input or output and no runtime; everything here is data and its validation.
#![forbid(unsafe_code)]

pub mod bundle;
pub mod differences;
pub mod disk;
pub mod document;
pub mod error;
pub mod exec;
pub mod history;
pub mod host;
pub mod http;
pub mod id;
pub mod image;
pub mod life;
pub mod login;
pub mod name;
pub mod path_text;
pub mod pipeline;
pub mod profile;
pub mod provisions;
pub mod receipt;
pub mod recipe;
pub mod remote;
pub mod size;
pub mod snapshot;
pub mod store;
pub mod substrate;
pub mod vm;

pub use error::{Error, ErrorKind, Location, Result};
pub use id::{ExecId, PipelineId, RequestId, VmId};
pub use size::{ByteSize, TimeSpan};
