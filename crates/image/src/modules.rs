//! Kernel modules: what they say about themselves, and the order in which they load.
//!
//! A Debian kernel package holds no `modules.dep`, so dependencies are read from the `.modinfo`
//! section of the modules: strings `key=value`, each ended by NUL.

use std::collections::{BTreeMap, BTreeSet};

use burgeon_api::{Error, Result};

/// Modules of one kernel by name, with underscores for hyphens as the kernel has them.
#[derive(Debug, Default)]
pub(crate) struct Modules {
    pub(crate) files: BTreeMap<String, Module>,
    /// Names of what is part of the kernel itself.
    pub(crate) builtin: BTreeSet<String>,
}

#[derive(Debug)]
pub(crate) struct Module {
    /// Below the directory of the kernel's release, such as `kernel/fs/ext4/ext4.ko`.
    pub(crate) path: String,
    pub(crate) bytes: Vec<u8>,
}

/// The name of a module from its path: `kernel/fs/nls/nls-x.ko` is `nls_x`.
pub(crate) fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

impl Modules {
    /// Names that must be loaded, in order, so that all of `wanted` work. What is built in needs
    /// no loading.
    ///
    /// # Errors
    /// `NotFound` where a wanted module or one it depends on is neither a file nor built in.
    pub(crate) fn order(&self, wanted: &[&str]) -> Result<Vec<String>> {
        let mut order = Vec::new();
        for name in wanted {
            self.visit(&name.replace('-', "_"), &mut order, &mut Vec::new())?;
        }
        Ok(order)
    }

    fn visit(&self, name: &str, order: &mut Vec<String>, path: &mut Vec<String>) -> Result<()> {
        if order.iter().any(|done| done == name) || path.iter().any(|above| above == name) {
            return Ok(());
        }
        let Some(module) = self.files.get(name) else {
            if self.builtin.contains(name) {
                return Ok(());
            }
            let by = path.last().map(|above| format!(", which module {above} needs")).unwrap_or_default();
            return Err(Error::not_found(format!("the kernel has no module {name}{by}")));
        };
        path.push(name.to_string());
        let info = information(&module.bytes).map_err(|error| error.context(format!("module {name}")))?;
        for needed in info.depends {
            self.visit(&needed, order, path)?;
        }
        for needed in info.wishes {
            // A wish may be an alias such as `crypto-crc32c`, which the kernel asks for by itself.
            if self.files.contains_key(&needed) {
                self.visit(&needed, order, path)?;
            }
        }
        path.pop();
        order.push(name.to_string());
        Ok(())
    }
}

/// What a module says that it needs.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Information {
    pub(crate) depends: Vec<String>,
    /// What should be there before it (`softdep=pre:`).
    pub(crate) wishes: Vec<String>,
}

pub(crate) fn information(module: &[u8]) -> Result<Information> {
    let section = modinfo(module).ok_or_else(|| Error::damaged("it is no kernel module for this processor"))?;
    let mut information = Information::default();
    for line in section.split(|byte| *byte == 0) {
        let line = String::from_utf8_lossy(line);
        match line.split_once('=') {
            Some(("depends", list)) => {
                let names = list.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_"));
                information.depends.extend(names);
            }
            Some(("softdep", list)) => {
                let before = list.split_whitespace().skip_while(|word| *word != "pre:").skip(1);
                let names = before.take_while(|word| !word.ends_with(':')).map(|name| name.replace('-', "_"));
                information.wishes.extend(names);
            }
            _ => {}
        }
    }
    Ok(information)
}

/// The bytes of the section `.modinfo` of a 64-bit little-endian ELF file.
fn modinfo(elf: &[u8]) -> Option<&[u8]> {
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let number = |offset: usize, size: usize| -> Option<usize> {
        let bytes = elf.get(offset..offset.checked_add(size)?)?;
        let value =
            bytes.iter().rev().try_fold(0u64, |value, byte| value.checked_mul(256)?.checked_add((*byte).into()));
        usize::try_from(value?).ok()
    };
    // e_shoff, e_shentsize, e_shnum, e_shstrndx of the header; sh_name, sh_offset, sh_size of a section.
    let (table, entry, count, names) = (number(40, 8)?, number(58, 2)?, number(60, 2)?, number(62, 2)?);
    let section = |index: usize| -> Option<(usize, usize, usize)> {
        let at = table.checked_add(index.checked_mul(entry)?)?;
        Some((number(at, 4)?, number(at.checked_add(24)?, 8)?, number(at.checked_add(32)?, 8)?))
    };
    let (_, names_at, _) = section(names)?;
    for index in 0..count {
        let (name, at, size) = section(index)?;
        let name_at = names_at.checked_add(name)?;
        if elf.get(name_at..)?.starts_with(b".modinfo\0") {
            return elf.get(at..at.checked_add(size)?);
        }
    }
    None
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The smallest ELF file with a `.modinfo` section.
    pub(crate) fn module(modinfo: &[u8]) -> Vec<u8> {
        let names = b"\0.modinfo\0.shstrtab\0";
        let mut elf = vec![0; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        let modinfo_at = elf.len();
        elf.extend_from_slice(modinfo);
        let names_at = elf.len();
        elf.extend_from_slice(names);
        let table = elf.len();
        for (name, at, size) in [(0, 0, 0), (1, modinfo_at, modinfo.len()), (10, names_at, names.len())] {
            let mut section = [0u8; 64];
            section[..4].copy_from_slice(&u32::try_from(name).unwrap().to_le_bytes());
            section[24..32].copy_from_slice(&(at as u64).to_le_bytes());
            section[32..40].copy_from_slice(&(size as u64).to_le_bytes());
            elf.extend_from_slice(&section);
        }
        elf[40..48].copy_from_slice(&(table as u64).to_le_bytes());
        elf[58..64].copy_from_slice(&[64, 0, 3, 0, 2, 0]);
        elf
    }

    fn modules(list: &[(&str, &str)]) -> Modules {
        let file = |(name, info): &(&str, &str)| {
            let info = info.replace(' ', "\0").replace('_', " ");
            (name_of(name), Module { path: format!("kernel/{name}.ko"), bytes: module(info.as_bytes()) })
        };
        Modules { files: list.iter().map(file).collect(), builtin: ["ext4".to_string()].into() }
    }

    #[test]
    fn modinfo_reads() {
        let information = information(&module(b"license=GPL\0softdep=pre: a-b c post: d\0depends=x,y-z\0")).unwrap();
        assert_eq!(information.depends, ["x", "y_z"]);
        assert_eq!(information.wishes, ["a_b", "c"]);
        assert!(super::information(b"\x7fELF\x02\x01").is_err());
        assert!(super::information(b"").is_err());
        let mut wild = module(b"depends=\0");
        wild[40..48].fill(0xff);
        assert!(super::information(&wild).is_err());
    }

    #[test]
    fn what_is_needed_comes_first_and_once() {
        let modules = modules(&[
            ("virtio-net", "depends=virtio,failover,ext4"),
            ("failover", "depends="),
            ("virtio", "depends=ring"),
            ("ring", "depends="),
            ("wishful", "softdep=pre:_failover_crypto-x"),
            ("a", "depends=b"),
            ("b", "depends=a"),
            ("broken", "depends=gone"),
        ]);
        assert_eq!(
            modules.order(&["virtio_net", "virtio", "ext4"]).unwrap(),
            ["ring", "virtio", "failover", "virtio_net"]
        );
        assert_eq!(modules.order(&["wishful"]).unwrap(), ["failover", "wishful"]);
        assert_eq!(modules.order(&["a"]).unwrap(), ["b", "a"]);
        let error = modules.order(&["broken"]).unwrap_err();
        assert_eq!(error.message, "the kernel has no module gone, which module broken needs");
    }
}
