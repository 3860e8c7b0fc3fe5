//! Every decision of Burgeon, pure: which item goes to which VM, which VM is started or given up,
//! when the server leaves.
//!
//! Nothing here reads a clock, a random number, a file or a socket. Time is an argument; what should
//! happen is a value that comes back. The shells (the control and the host process) act on it.
//!
//! | module | decides | called by |
//! |---|---|---|
//! | [`pipeline`] | whether a pipeline file is sound; each move of a run | control |
//! | [`vm`] | what to ask of the host, from what is wanted and what is seen | control |
//! | [`snapshot`] | what a snapshot is called, when a VM can return to one | host, control |
//! | [`size`] | what a VM's memory and CPUs may be changed to | host, control |
//! | [`idle`] | when a server that nobody needs exits | control |
//! | [`admission`] | whether there is room for one more VM | host |
//! | [`standby`] | how many QEMUs wait for VMs of a substrate | host |
//! | [`fork`] | how what a VM has written gets to its forks | host |
//! | [`receipt`] | whether a guest has become the machine that it was made | host |
//! | [`adopt`] | whether a process found after a restart is the VM it was | host |
#![forbid(unsafe_code)]

pub mod admission;
pub mod adopt;
pub mod fork;
pub mod idle;
pub mod life;
pub mod pipeline;
pub mod receipt;
pub mod size;
pub mod snapshot;
pub mod standby;
pub mod vm;
