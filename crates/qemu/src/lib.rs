//! System VMs: QEMU's command line, its process, its monitor, and whether KVM works.
//!
//! Only this crate knows QMP and QEMU's words. It decides nothing about a VM's life; the host does.
#![deny(unsafe_op_in_unsafe_fn)]

pub mod command;
pub mod disk;
pub mod facts;
pub mod growth;
pub mod memory;
pub mod nbd;
pub mod probe;
pub mod process;
pub mod qmp;
pub mod share;
pub mod state;
