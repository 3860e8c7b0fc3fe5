//! What reads files of strangers, without the programs and the VMs around it; for fuzz/.

use std::path::Path;

use super::*;
use crate::qcow2::Shape;

/// Unpacks a tar below `work`, a directory of its own, as an import does.
///
/// # Errors
/// As an import.
pub fn unpack(bytes: &[u8], work: &Path) -> Result<()> {
    let at = |name: &str| work.join(name);
    let request = ImportRequest {
        file: at("file"),
        name: "fuzzed".into(),
        description: String::new(),
        kernel_of: None,
        size: None,
        max_size: ByteSize::mib(1),
        platform: None,
        data: DataPaths { images: at("images"), cache: at("cache"), temporary: at("tmp") },
        now_s: 0,
    };
    let tools = Tools::find(std::ffi::OsStr::new(""));
    let limits = Limits { deadline: CONVERT_DEADLINE, cancelled: &|| false };
    let import = Import { request: &request, tools: &tools, limits, work, out: work, progress: &|_| {} };
    let mut tree = Tree::create(&at("tree"))?;
    import.unpack(&mut tree, bytes, &mut Contents { bytes: 0, newest: 0 }, None)
}

/// What an import looks at before qemu-img sees a qcow2 file: bytes of the disk and of a cluster.
///
/// # Errors
/// As an import.
pub fn qcow2(head: &[u8]) -> Result<(u64, u64)> {
    qcow2::check(head)?;
    Shape::of(head).map(|shape| (shape.size, shape.cluster))
}
