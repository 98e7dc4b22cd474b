//! `mvm density`: many containers on one host, and what each of them costs.

pub(crate) mod args;
mod herd;
mod plot;
mod report;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use mvm_runtime::failure::{Context, Failure};
use mvm_runtime::state::Home;

use crate::words::Format;
use args::Density;
use herd::Herd;

/// The program of which a root is made when no image is named.
const BUSYBOX: &str = "/bin/busybox";
/// It runs for thirty years.
const IDLE: [&str; 2] = ["sleep", "1000000000"];
/// Not all went well.
const SOME_FAILED: u8 = 1;

pub(crate) fn density(options: Density) -> Result<u8, Failure> {
    let scratch = tempfile::tempdir().context(|| "cannot make a temporary directory".to_owned())?;
    let (image, command) = match options.image {
        Some(image) => (image, options.command),
        None => {
            busybox_root(scratch.path())?;
            let idle = || IDLE.map(str::to_owned).to_vec();
            let command = if options.command.is_empty() { idle() } else { options.command };
            (scratch.path().display().to_string(), command)
        }
    };
    let herd = Herd {
        count: options.count,
        parallel: options.parallel.min(options.count),
        image,
        command,
        memory_mib: options.memory.mib(),
        template: options.template,
        hold: Duration::from_secs(options.hold.into()),
        home: Home::default_place(),
    };
    let report = herd.measure()?;
    if let Some(path) = &options.plot {
        fs::write(path, plot::svg(&report)).context(|| format!("cannot write {}", path.display()))?;
    }
    let text = match options.format {
        Format::Json => crate::life::json(&report)?,
        Format::Text => report.text(),
    };
    crate::life::print(&text)?;
    Ok(if report.is_flawless() { 0 } else { SOME_FAILED })
}

/// A root directory with nothing but a shell's tools.
fn busybox_root(root: &Path) -> Result<(), Failure> {
    let bin = root.join("bin");
    let made = fs::create_dir(&bin)
        .and_then(|()| fs::copy(BUSYBOX, bin.join("busybox")))
        .and_then(|_| symlink("busybox", bin.join("sleep")));
    made.context(|| format!("cannot make a root of {BUSYBOX}"))
        .map_err(|failure| failure.help("name an image (--image), or install busybox-static"))
}
