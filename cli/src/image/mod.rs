//! `mvm image`: the images that are kept, where they come from and how they go.

pub(crate) mod args;

use std::io::Read as _;
use std::path::Path;
use std::time::SystemTime;

use mvm_runtime::container::state_dir;
use mvm_runtime::failure::{Context, Failure};
use mvm_runtime::image::pull::{self, Credentials};
use mvm_runtime::image::{Cached, Error, Keep, Pruned, Rootfs, Source, Store, full_name};
use mvm_runtime::rootfs;
use serde::Serialize;

use self::args::{Image, Import, Prune, Pull, Rm};
use crate::life::{SOME_FAILED, json, print};
use crate::run::progress::Bar;
use crate::table::{ago, bytes, table};
use crate::words::{Format, Keys};
use crate::{complain, say};

/// Digits of a key that are shown to people.
const SHORT: usize = 12;
/// Most bytes of a password.
const MAX_PASSWORD: u64 = 64 << 10;

/// Does what one of the commands says; its exit code.
pub(crate) fn image(command: Image) -> Result<u8, Failure> {
    let state = state_dir();
    let path = state.join("images");
    let store = Store::open(&path)
        .context(|| format!("cannot use {} for images", path.display()))
        .map_err(|failure| failure.help("run as root, or name another directory in MVM_STATE"))?;
    match command {
        Image::Ls(options) => ls(&store, &options),
        Image::Pull(options) => pull(&store, options),
        Image::Import(options) => import(&store, &options),
        Image::Rm(options) => rm(&store, &options),
        Image::Prune(options) => prune(&store, &state, &options),
    }
}

/// An image as it is listed for programs.
#[derive(Serialize)]
struct Entry {
    name: Option<String>,
    digest: Option<String>,
    key: String,
    bytes: u64,
    disk_bytes: u64,
    created: String,
    last_used: String,
    origin: std::path::PathBuf,
    format: mvm_runtime::image::Format,
}

/// One entry for each name.
fn entries(cached: &Cached) -> impl Iterator<Item = Entry> {
    let time = |time: SystemTime| humantime::format_rfc3339_seconds(time).to_string();
    cached.images.iter().map(move |image| Entry {
        name: image.name.clone(),
        digest: image.digest.clone(),
        key: cached.key.clone(),
        bytes: cached.bytes,
        disk_bytes: cached.disk_bytes,
        created: time(cached.created),
        last_used: time(cached.last_used),
        origin: image.origin.clone(),
        format: image.format,
    })
}

fn ls(store: &Store, options: &Keys) -> Result<u8, Failure> {
    let list = store.list().context(|| "cannot list images".to_owned())?;
    if options.quiet {
        print(&list.iter().map(|cached| format!("{}\n", cached.key)).collect::<String>())?;
    } else if options.format == Format::Json {
        print(&json(&list.iter().flat_map(entries).collect::<Vec<_>>())?)?;
    } else {
        let since = |time: SystemTime| ago(time.elapsed().unwrap_or_default().as_secs());
        let row = |cached: &Cached, entry: Entry| {
            let origin = || entry.origin.display().to_string().replace(char::is_control, "?");
            vec![
                entry.name.clone().unwrap_or_else(|| format!("({})", origin())),
                short(&cached.key).to_owned(),
                bytes(cached.disk_bytes),
                since(cached.created),
                since(cached.last_used),
            ]
        };
        let rows: Vec<_> =
            list.iter().flat_map(|cached| entries(cached).map(move |entry| row(cached, entry))).collect();
        print(&table(&["NAME", "KEY", "SIZE", "CREATED", "USED"], &rows))?;
    }
    Ok(0)
}

fn pull(store: &Store, options: Pull) -> Result<u8, Failure> {
    let credentials = match options.username {
        Some(username) => Some(Credentials { username, password: password()? }),
        None => None,
    };
    let mut code = 0;
    for name in options.names {
        let request = pull::Pull {
            name: name.clone(),
            credentials: credentials.clone(),
            insecure_http: options.insecure_http,
            ca_file: options.ca_file.clone(),
        };
        let pulled = if options.quiet {
            pull::pull(store, &request, &mut ())
        } else {
            pull::pull(store, &request, &mut Bar::default())
        };
        match pulled {
            Ok(image) => taken_in(&image, &name, options.quiet)?,
            Err(error) => {
                complain(&failure(format!("cannot get image {name}"), error));
                code = SOME_FAILED;
            }
        }
    }
    Ok(code)
}

/// The password on standard input, without the end of its line.
fn password() -> Result<String, Failure> {
    let mut text = String::new();
    let read = std::io::stdin().lock().take(MAX_PASSWORD).read_to_string(&mut text);
    read.context(|| "cannot read the password".to_owned())?;
    let password = text.trim_end_matches(['\n', '\r']);
    if password.is_empty() {
        return Err(Failure::new("there is no password on standard input"));
    }
    Ok(password.to_owned())
}

fn import(store: &Store, options: &Import) -> Result<u8, Failure> {
    let what = || format!("cannot import {}", options.path);
    let source = Source::open(&options.path).map_err(|error| failure(what(), error))?;
    let name = match (&options.name, source.name()) {
        (Some(name), _) => full_name(name),
        (None, Some(name)) => full_name(name),
        (None, None) => {
            let help = format!("name it: mvm image import {} NAME", options.path);
            return Err(Failure::because(what(), Failure::new("it has no name of its own")).help(help));
        }
    };
    let name = name.map_err(|error| failure(what(), error))?;
    let source = source.named(name.clone());
    let built = if options.quiet {
        store.rootfs(&source, &mut ())
    } else {
        store.rootfs(&source, &mut Bar::default())
    };
    let image = built.map_err(|error| failure(what(), error))?;
    taken_in(&image, &name, options.quiet)?;
    Ok(0)
}

fn taken_in(image: &Rootfs, name: &str, quiet: bool) -> Result<(), Failure> {
    if quiet {
        return print(&format!("{}\n", image.key));
    }
    let verb = if image.built { "added" } else { "is there already" };
    print(&format!("{name} {} {verb}\n", short(&image.key)))
}

fn rm(store: &Store, options: &Rm) -> Result<u8, Failure> {
    let mut code = 0;
    for wanted in &options.images {
        match store.remove(wanted) {
            Ok(removed) if removed.whole => {
                let freed = bytes(removed.cached.disk_bytes);
                print(&format!("{wanted} {} removed, {freed}\n", short(&removed.cached.key)))?;
            }
            Ok(removed) => {
                print(&format!("{wanted} removed, {} has other names\n", short(&removed.cached.key)))?;
            }
            Err(error) => {
                complain(&failure(format!("cannot remove image {wanted}"), error));
                code = SOME_FAILED;
            }
        }
    }
    Ok(code)
}

/// What was pruned, for programs.
#[derive(Serialize)]
struct Report {
    images: Pruned,
    layers: Pruned,
}

fn prune(store: &Store, state: &Path, options: &Prune) -> Result<u8, Failure> {
    let by_use = options.unused_for.is_some() || options.max_size.is_some();
    let unused = options.unused_for.or(options.all.then_some(std::time::Duration::ZERO));
    let keep =
        Keep { bytes: options.max_size, unused, named: !by_use && !options.all, only_with_origin: false };
    let images = store.prune(&keep).context(|| "cannot prune images".to_owned())?;
    let keep = Keep { named: false, only_with_origin: true, ..keep };
    let layers = rootfs::cache(state)?.prune(&keep).context(|| "cannot prune layers".to_owned())?;
    let report = Report { images, layers };
    if options.format == Format::Json {
        return print(&json(&report)?).map(|()| 0);
    }
    for (what, pruned) in [("image", &report.images), ("layer", &report.layers)] {
        for cached in &pruned.removed {
            let name = cached
                .images
                .first()
                .map(|image| image.name.clone().unwrap_or_else(|| image.origin.display().to_string()));
            let name = name.unwrap_or_default().replace(char::is_control, "?");
            print(&format!("{what} {} {name} {}\n", short(&cached.key), bytes(cached.disk_bytes)))?;
        }
    }
    let freed = report.images.freed_bytes.saturating_add(report.layers.freed_bytes);
    say(&format!("freed {}, {} in use", bytes(freed), report.images.in_use + report.layers.in_use));
    Ok(0)
}

fn short(key: &str) -> &str {
    key.get(..SHORT).unwrap_or(key)
}

fn failure(what: String, error: Error) -> Failure {
    let help = error.help();
    let failure = Failure::because(what, error);
    match help {
        Some(help) => failure.help(help),
        None => failure,
    }
}
