//! containerd's runtime io.containerd.mvm.v2: reserved, and not there yet.

use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let text =
        "containerd-shim-mvm-v2: this version of mvm is no containerd runtime yet\n  help:    use `mvm run`";
    let _ = writeln!(std::io::stderr(), "{text}");
    ExitCode::FAILURE
}
