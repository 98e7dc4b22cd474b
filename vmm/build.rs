//! How `mvm-vmm` is linked.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // The program is position-independent, so some thousand words are relocated at every start: packed, they take
    // a bit each instead of 24 bytes to be read.
    println!("cargo::rustc-link-arg-bin=mvm-vmm=-Wl,-z,pack-relative-relocs");
}
