//! Disks served to the tools of others.

mod nbd;
