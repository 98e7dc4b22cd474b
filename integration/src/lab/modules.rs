//! The emulated host's modules: which, in what order, in what form.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::Error;
use super::kernel::{Kernel, run};

/// Inserted at boot, in this order, dependencies first. KVM's comes before Linux has measured its TSC a second time,
/// which is the harder case for who uses it. `veth` is asked for by several at once, and the one that comes
/// while it is being inserted is told that there is no such device.
const AT_BOOT: [&str; 9] =
    ["kvm_amd", "virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_console", "tun", "loop", "veth"];
/// At hand for whoever asks: the kernel itself, `modprobe`, or `ip link add type …`. An extra one costs 20 ms of boot,
/// so nothing else is inserted.
const ON_DEMAND: [&str; 48] = [
    "crc32c_generic",
    "virtio_rng",
    "virtio_blk",
    "virtio_net",
    "vhost_net",
    "vhost_vsock",
    "vsock_loopback",
    "bridge",
    "br_netfilter",
    "vxlan",
    "macvlan",
    "macvtap",
    "ipvlan",
    "dummy",
    "erofs",
    "squashfs",
    "ext4",
    "dm_mod",
    "dm_verity",
    "dm_snapshot",
    "dm_thin_pool",
    "nf_tables",
    "nft_chain_nat",
    "nft_masq",
    "nft_ct",
    "nft_nat",
    "nft_redir",
    "nft_fib_ipv4",
    "nft_fib_ipv6",
    "nft_fib_inet",
    "nft_reject_inet",
    "nft_compat",
    "xt_MASQUERADE",
    "xt_conntrack",
    "xt_addrtype",
    "xt_comment",
    "xt_multiport",
    "xt_nat",
    "xt_mark",
    "xt_tcpudp",
    "iptable_nat",
    "iptable_filter",
    "ip6table_nat",
    "sch_ingress",
    "cls_u32",
    "act_mirred",
    "fuse",
    "nbd",
];
/// What signing appends to a module (scripts/sign-file.c): data, a 12-byte descriptor that ends in the data's length,
/// and this.
const SIGNATURE: &[u8] = b"~Module signature appended~\n";

/// One module, unpacked and without its signature: checking those takes a third of the boot under emulation.
#[derive(Debug)]
pub(super) struct Module {
    pub(super) file: String,
    pub(super) bytes: Vec<u8>,
    pub(super) at_boot: bool,
}

/// Reads the modules and all they depend on, in insertion order.
pub(super) fn load(kernel: &Kernel) -> Result<Vec<Module>, Error> {
    let dir = kernel.tree.join("lib/modules").join(&kernel.release);
    let index = dir.join("modules.dep");
    let text = fs::read_to_string(&index).map_err(Error::file("read", &index))?;
    let dependencies = Dependencies::parse(&text);
    let mut modules: Vec<Module> = Vec::new();
    for (names, at_boot) in [(&AT_BOOT[..], true), (&ON_DEMAND[..], false)] {
        for path in names.iter().flat_map(|name| dependencies.closure(name)) {
            let file = file_name(path);
            if modules.iter().all(|module| module.file != file) {
                let bytes = read(&dir.join(path))?;
                modules.push(Module { file, bytes, at_boot });
            }
        }
    }
    Ok(modules)
}

/// `kernel/fs/9p/9p.ko.xz` as `9p.ko`.
fn file_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.strip_suffix(".xz").unwrap_or(file).to_owned()
}

/// depmod's `modules.dep`: each module's path with the paths it needs, the deepest last.
struct Dependencies<'a> {
    by_name: HashMap<String, Vec<&'a str>>,
}

impl<'a> Dependencies<'a> {
    fn parse(text: &'a str) -> Self {
        let by_name = text.lines().filter_map(|line| {
            let (path, needs) = line.split_once(':')?;
            let mut order: Vec<&str> = needs.split_whitespace().rev().collect();
            order.push(path);
            Some((module_name(path), order))
        });
        Self { by_name: by_name.collect() }
    }

    /// The module's path after all it needs; nothing when it is built in or unknown to this kernel.
    fn closure(&self, name: &str) -> Vec<&'a str> {
        self.by_name.get(name).cloned().unwrap_or_default()
    }
}

/// `kernel/net/9p/9pnet_virtio.ko.xz` as `9pnet_virtio`; file names mix `-` and `_`, module names do not.
fn module_name(path: &str) -> String {
    let file = file_name(path);
    file.strip_suffix(".ko").unwrap_or(&file).replace('-', "_")
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let mut bytes = if path.extension().is_some_and(|extension| extension == "xz") {
        run("xz", [Path::new("-dc"), path], Path::new("/"))?.stdout
    } else {
        fs::read(path).map_err(Error::file("read", PathBuf::from(path)))?
    };
    strip_signature(&mut bytes);
    hide_tracing(&mut bytes);
    Ok(bytes)
}

/// Sections the kernel works through at length when it inserts a module and that serve only tracers: of the second of
/// virtual time that kvm.ko took, looking up a symbol for each of its functions was 85 %.
const HIDDEN: [&[u8]; 2] = [b"__mcount_loc\0", b".BTF\0"];

/// Renames the [`HIDDEN`] sections in the section name table, which is last in the file.
fn hide_tracing(module: &mut [u8]) {
    for name in HIDDEN {
        if let Some(at) = module.windows(name.len()).rposition(|window| window == name)
            && let Some(first) = module.get_mut(at + 1)
        {
            *first = b'-';
        }
    }
}

fn strip_signature(module: &mut Vec<u8>) {
    let Some(body) = module.strip_suffix(SIGNATURE) else { return };
    let Some(descriptor) = body.last_chunk::<12>() else { return };
    let [.., a, b, c, d] = *descriptor;
    let signature = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
    if let Some(length) = (body.len() - descriptor.len()).checked_sub(signature) {
        module.truncate(length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_comes_after_all_it_needs() {
        let text = "kernel/a.ko.xz: kernel/b-c.ko.xz kernel/d.ko.xz\nkernel/b-c.ko.xz: kernel/d.ko.xz\nkernel/d.ko.xz:\n";
        let dependencies = Dependencies::parse(text);
        assert_eq!(dependencies.closure("a"), ["kernel/d.ko.xz", "kernel/b-c.ko.xz", "kernel/a.ko.xz"]);
        assert_eq!(dependencies.closure("b_c"), ["kernel/d.ko.xz", "kernel/b-c.ko.xz"]);
        assert!(dependencies.closure("built_in").is_empty());
    }

    #[test]
    fn a_signature_is_cut_off() {
        let mut module = b"ELF body".to_vec();
        module.extend_from_slice(b"signed");
        module.extend_from_slice(&[0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 6]);
        module.extend_from_slice(SIGNATURE);
        strip_signature(&mut module);
        assert_eq!(module, b"ELF body");
    }

    #[test]
    fn an_unsigned_module_stays_as_it_is() {
        let mut module = b"ELF body".to_vec();
        strip_signature(&mut module);
        assert_eq!(module, b"ELF body");
    }
}
