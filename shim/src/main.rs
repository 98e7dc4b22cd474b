//! containerd's runtime io.containerd.mvm.v2.

fn main() {}
