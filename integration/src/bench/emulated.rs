//! Figures of Linux guests: each part in one run of the lab, on virtual time unless its part says otherwise.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mvm_runtime::guest::GuestFiles;
use serde_json::json;

use super::{FETCHED, Figure, Report, Wanted, beside};
use crate::containerd::Installation;
use crate::lab::{self, Options};

/// Bound of one try, by the wall clock.
const TIME: Duration = Duration::from_secs(1800);
/// Programs of this host that are used inside, where its files are slow to read.
const BORROWED: [&str; 2] = ["/usr/bin/qemu-system-x86_64", "/bin/busybox"];

/// Measures what is wanted of machines without an engine.
///
/// # Errors
/// The lab cannot run, or its answer is nonsense.
pub fn figures(wanted: &Wanted) -> io::Result<Vec<Figure>> {
    measure(wanted, BORROWED.iter().map(PathBuf::from).filter(|path| path.is_file()).collect(), true)
}

/// Measures what is wanted under containerd: the newest that was fetched.
///
/// # Errors
/// It was not fetched, the lab cannot run, or its answer is nonsense.
pub fn engine_figures(wanted: &Wanted) -> io::Result<Vec<Figure>> {
    under_engine(wanted, true)
}

/// [`engine_figures`] by the wall clock.
///
/// # Errors
/// As there.
pub fn wall_figures(wanted: &Wanted) -> io::Result<Vec<Figure>> {
    under_engine(wanted, false)
}

fn under_engine(wanted: &Wanted, deterministic: bool) -> io::Result<Vec<Figure>> {
    let fetched = std::env::var_os(FETCHED)
        .ok_or_else(|| io::Error::other(format!("{FETCHED} names no containerd: use `make bench`")))?;
    let newest = Installation::all(fetched.as_ref())?.pop().ok_or(io::ErrorKind::NotFound)?;
    measure(wanted, vec!["/bin/busybox".into(), newest.programs, newest.runc, newest.plugins], deterministic)
}

fn measure(wanted: &Wanted, mut copy: Vec<PathBuf>, deterministic: bool) -> io::Result<Vec<Figure>> {
    let dir = tempfile::tempdir()?;
    let bench = lay_out(dir.path())?;
    copy.push(dir.path().to_path_buf());
    let options = Options {
        deterministic,
        timeout: TIME,
        copy,
        env: vec![
            ("MVM_PREFIX".into(), dir.path().into()),
            ("MVM_VMM".into(), dir.path().join("bin/mvm-vmm").into()),
            // Who measures templates says so.
            ("MVM_TEMPLATE".into(), "never".into()),
        ],
        ..Options::default()
    };
    let argv: Vec<OsString> = vec![bench.into(), "--inside".into(), "--only".into(), wanted.list().into()];
    let mut stdout = Vec::new();
    let outcome = lab::run(&options, &argv, &mut stdout, &mut io::stderr()).map_err(io::Error::other)?;
    let mut report: Report = serde_json::from_slice(&stdout)
        .map_err(|error| io::Error::other(format!("the lab's run ended with {}: {error}", outcome.status)))?;
    for figure in &mut report.0 {
        figure.method.push_str(&format!(
            "; the lab's run was repeated {} times after its host hung or died",
            outcome.reruns
        ));
        figure.raw.push(json!({"reruns": outcome.reruns, "lab_seconds": outcome.command.as_secs_f64()}));
    }
    Ok(report.0)
}

/// Puts everything the run needs into one directory, as installed. Returns this program's place in it.
fn lay_out(dir: &Path) -> io::Result<PathBuf> {
    let guest = GuestFiles::find().map_err(|failure| io::Error::other(failure.report()))?;
    let vmm = mvm_vmm::launch::find_program().map_err(io::Error::other)?;
    let bench = std::env::current_exe()?;
    for (from, to) in [
        (bench.clone(), "bin/bench"),
        (beside("floor")?, "bin/floor"),
        (beside("guest_bench")?, "bin/guest_bench"),
        (vmm.with_file_name("containerd-shim-mvm-v2"), "bin/containerd-shim-mvm-v2"),
        (vmm.with_file_name("mvm"), "bin/mvm"),
        (vmm, "bin/mvm-vmm"),
        (guest.kernel, "share/mvm/vmlinux"),
        (guest.agent, "share/mvm/mvm-agent"),
    ] {
        let to = dir.join(to);
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::copy(&from, &to)?;
        fs::set_permissions(&to, fs::Permissions::from_mode(0o755))?;
    }
    Ok(dir.join("bin/bench"))
}
