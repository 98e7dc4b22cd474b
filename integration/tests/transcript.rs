//! The way from a bare machine to pods and back, as the script walks it for people.

use std::path::{Path, PathBuf};
use std::time::Duration;

use mvm_integration::containerd::Installation;
use mvm_integration::lab::{self, Options};
use mvm_integration::programs::programs;

#[test]
fn a_bare_machine_comes_to_pods_and_back() {
    let fetched = std::env::var_os("MVM_TEST_CONTAINERD").expect("what was fetched: use `make transcript`");
    let newest = Installation::all(Path::new(&fetched)).unwrap().pop().unwrap();
    let prefix = programs().canonicalize().unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("containerd/transcript.sh");
    let path = std::env::join_paths(
        [newest.programs.clone(), newest.runc.clone(), "/usr/sbin".into()]
            .into_iter()
            .chain(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())),
    )
    .unwrap();
    let pod = PathBuf::from(env!("CARGO_BIN_EXE_pod"));
    let options = Options {
        timeout: Duration::from_secs(900),
        memory_mib: 8192,
        copy: vec![newest.programs, newest.runc, newest.plugins.clone(), prefix.clone(), pod.clone()],
        env: vec![("CNI_BIN".into(), newest.plugins.into()), ("PATH".into(), path)],
        ..Options::default()
    };
    let argv = [script.into_os_string(), prefix.into(), pod.into()];
    let captured = lab::run_captured(&options, &argv).unwrap();
    let stdout = String::from_utf8_lossy(&captured.stdout);
    assert_eq!(captured.outcome.status, 0, "{stdout}{}", String::from_utf8_lossy(&captured.stderr));
    assert!(stdout.contains("hello\n(exit status 42)") && stdout.ends_with("\nthe end\n"), "{stdout}");
    assert_eq!(stdout.matches("hello from a micro-VM").count(), 2, "{stdout}");
    // Shown by `make transcript`, which is for reading.
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("transcript.txt");
    std::fs::write(out, stdout.as_bytes()).unwrap();
}
