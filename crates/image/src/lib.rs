//! Images: made from recipes, imported, kept.
//!
//! A recipe names a Debian release, a kernel package and packages. From it this crate makes a
//! kernel, an initramfs with the modules a guest needs and, for recipes of kind `disk`, a raw ext4
//! disk. It needs no root: apt resolves and fetches in a private directory, packages are unpacked
//! into an ordinary directory with owners and modes kept in a table beside it, and whatever must
//! run as root in the new system (maintainer scripts, the recipe's commands) runs in a temporary VM
//! that the caller provides as a [`GuestRunner`].
//!
//! The same recipe, lock file and builder give the same bytes; see [`Image::digest`](burgeon_api::image::Image).
//!
//! ```text
//! recipe ─► lock (apt) ─► packages (cache, SHA-256) ─► tree + table ─► ext4 ─► VM: configure, run
//!                │                                                              │ tar of changes
//!                └► kernel package ─► vmlinuz, modules ─► initramfs.cpio        ▼
//!                                              images/<name>/ ◄─ ext4 ◄─ tree + changes, normalised
//! ```
//!
//! Everything here blocks; call it from a thread that may wait.
#![forbid(unsafe_code)]

mod apt;
mod build;
mod cache;
mod changes;
mod clean;
mod commit;
mod configure;
mod control;
mod deb;
mod dpkg;
mod ext4;
mod files;
mod guest;
mod hash;
mod history;
mod import;
mod initramfs;
mod kernel;
mod lock;
mod modules;
mod newc;
mod packages;
mod process;
mod qcow2;
mod room;
mod store;
mod tree;
mod work;

pub use build::{BuildRequest, build};
pub use commit::{CommitRequest, check as check_commit, commit};
pub use guest::{GuestJob, GuestOutput, GuestRunner};
pub use hash::DiskDigest;
pub use history::with_step;
#[cfg(fuzzing)]
pub use import::fuzzing;
pub use import::{ImportRequest, import};
pub use initramfs::compose_initramfs;
pub use process::Tools;
pub use qcow2::{HEAD as QCOW2_HEAD, check as check_qcow2};
pub use store::{DiskStore, KeptDisk, Stored, list, receive, remove, show};
pub use work::DataPaths;
