#!/bin/bash
# Checks the configuration of every variant without compiling: seconds, against minutes for a build.
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly here
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0

check() {
    local name=$1
    shift
    if "$@"; then echo "ok      $name"; else echo "FAILED  $name"; failures=$((failures + 1)); fi
}

# The driver of every device of the machine, with the bus it sits on.
readonly DEVICES='pci:PCI pci-ecam:PCI_MMCONFIG msi-x:PCI_MSI virtio-pci:VIRTIO_PCI virtio-mmio:VIRTIO_MMIO_CMDLINE_DEVICES
    block:VIRTIO_BLK net:VIRTIO_NET vsock:VIRTIO_VSOCKETS rng:HW_RANDOM_VIRTIO balloon:VIRTIO_BALLOON mem:VIRTIO_MEM
    free-page-reporting:PAGE_REPORTING console:VIRTIO_CONSOLE panic:PVPANIC_PCI interrupts:X86_X2APIC clock:KVM_GUEST entry:PVH'
# What the agent mounts, joins or calls.
readonly FEATURES='erofs:EROFS_FS overlay:OVERLAY_FS ext4:EXT4_FS tmpfs:TMPFS devtmpfs:DEVTMPFS ptys:UNIX98_PTYS
    memory:MEMCG io:BLK_DEV_THROTTLING cpu:CFS_BANDWIDTH pids:CGROUP_PIDS devices:CGROUP_BPF seccomp:SECCOMP_FILTER
    user:USER_NS pid:PID_NS net:NET_NS ipc:IPC_NS uts:UTS_NS time:TIME_NS verity:DM_VERITY bbr:TCP_CONG_BBR fq:NET_SCH_FQ
    nft:NF_TABLES nat:NFT_NAT ipv6:IPV6 uring:IO_URING'
# What must never come back: each was measured, or is a way into the guest that nothing uses.
readonly ABSENT='MODULES LEGACY_PTYS INPUT VT SERIO VIRTIO_PCI_LEGACY RELOCATABLE FTRACE PARAVIRT_SPINLOCKS
    BASE_SMALL DUMMY MEMCG_V1 DEVMEM'

has() { grep -qx "CONFIG_$2=y" "$work/$1"; }
lacks() { ! grep -q "^CONFIG_$2=" "$work/$1"; }

configuration_of() {
    "$here/build.sh" --variant "$1" --print-config >"$work/$1" 2>"$work/error" || { cat "$work/error" >&2; return 1; }
}

key_of() { "$here/build.sh" --variant "$1" --print-key; }

keys_differ() { [ "$(for v in smp up hardened debug; do key_of $v; done | sort -u | wc -l)" -eq 4 ]; }

# A copy of this directory with a comment more must have the same key, with an option more another one.
key_ignores_comments() {
    cp -r "$here" "$work/copy" && echo '# a remark' >>"$work/copy/base.config" &&
        [ "$("$work/copy/build.sh" --print-key)" = "$(key_of smp)" ]
}
key_follows_options() {
    echo 'CONFIG_FUSE_FS=y' >>"$work/copy/base.config" && [ "$("$work/copy/build.sh" --print-key)" != "$(key_of smp)" ]
}

refused_request_is_named() {
    echo 'CONFIG_NO_SUCH_OPTION=y' >>"$work/copy/base.config"
    ! "$work/copy/build.sh" --print-config >/dev/null 2>"$work/error" && grep -q 'CONFIG_NO_SUCH_OPTION: wanted y, is n' "$work/error"
}

# A search path with everything but flex and bc.
missing_tools_are_named_together() {
    mkdir "$work/bin"
    local tool
    for tool in bash cat gcc ld make bison xz awk cmp flock nproc dirname; do ln -s "$(command -v $tool)" "$work/bin/"; done
    ! PATH=$work/bin "$here/build.sh" --print-key 2>"$work/error" && grep -q 'apt-get install flex bc' "$work/error"
}

for variant in smp up hardened debug; do
    check "$variant: Kconfig grants every request" configuration_of $variant
    for pair in $DEVICES $FEATURES; do
        check "$variant: ${pair%%:*} has CONFIG_${pair#*:}" has $variant "${pair#*:}"
    done
    for symbol in $ABSENT; do check "$variant: no CONFIG_$symbol" lacks $variant "$symbol"; done
done
check 'up: no SMP' lacks up SMP
check 'smp: cpuset controller' has smp CPUSETS
check 'smp: no unwind tables' lacks smp UNWINDER_ORC
check 'smp: no serial driver' lacks smp SERIAL_8250
check 'debug: serial console' has debug SERIAL_8250_CONSOLE
check 'smp: no return thunks' lacks smp MITIGATION_RETHUNK
check 'hardened: return thunks' has hardened MITIGATION_RETHUNK
check 'every variant has a key of its own' keys_differ
check 'a comment does not change the key' key_ignores_comments
check 'an option changes the key' key_follows_options
check 'a request that Kconfig refuses is named' refused_request_is_named
check 'missing tools are named together' missing_tools_are_named_together

[ $failures -eq 0 ] || { echo "$failures failed"; exit 1; }
