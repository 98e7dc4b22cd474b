//! What happens to containers, for whoever wants to follow: one file a home, a JSON object a line, capped.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Home;

/// Bytes the file may have before it is put aside.
const MAX_EVENTS: u64 = 1 << 20;

/// Something that happened to a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When, in seconds since 1970.
    pub at: u64,
    /// The container's id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// What.
    pub kind: Kind,
    /// How its process ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<u8>,
}

/// Kinds of events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// It was made.
    Create,
    /// Its process was started.
    Start,
    /// Its processes are held.
    Pause,
    /// They go on.
    Resume,
    /// The kernel killed one of its processes for memory.
    Oom,
    /// Its process has ended.
    Exit,
    /// It was removed.
    Remove,
}

/// Where a home's events are.
pub fn file(home: &Home) -> PathBuf {
    home.path().join("events")
}

/// Tells of an event. One that cannot be written is lost: no container waits for its listeners.
pub fn emit(home: &Home, id: &str, name: &str, kind: Kind, code: Option<u8>) {
    let event = Event { at: super::now(), id: id.to_owned(), name: name.to_owned(), kind, code };
    if let Err(error) = append(home, &event) {
        log::warn!("an event of container {id} is lost: {error}");
    }
}

fn append(home: &Home, event: &Event) -> io::Result<()> {
    let path = file(home);
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    let mut file = File::options().create(true).append(true).mode(0o600).open(&path)?;
    // One write, so that lines of several writers do not mix.
    file.write_all(&line)?;
    if file.metadata()?.len() > MAX_EVENTS {
        fs::rename(&path, path.with_extension("1"))?;
    }
    Ok(())
}

/// The events there are, oldest first, from byte `from` of the file; and where the next begins.
///
/// # Errors
/// The host's reason; no file is no events.
pub fn read(home: &Home, from: u64) -> io::Result<(Vec<Event>, u64)> {
    let text = match fs::read(file(home)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((Vec::new(), 0)),
        other => other?,
    };
    // A file that is shorter than before is a new one.
    let start = usize::try_from(from).ok().filter(|&from| from <= text.len()).unwrap_or(0);
    let rest = text.get(start..).unwrap_or_default();
    let whole = rest.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
    let lines = rest.get(..whole).unwrap_or_default().split(|&byte| byte == b'\n');
    let events = lines.filter_map(|line| serde_json::from_slice(line).ok()).collect();
    Ok((events, u64::try_from(start.saturating_add(whole)).unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_on_from_where_one_was() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        assert_eq!(read(&home, 7).unwrap(), (vec![], 0));
        emit(&home, "a", "web", Kind::Create, None);
        let (events, next) = read(&home, 0).unwrap();
        assert_eq!((events[0].kind, events[0].name.as_str()), (Kind::Create, "web"));
        emit(&home, "a", "web", Kind::Exit, Some(3));
        let (events, next) = read(&home, next).unwrap();
        assert_eq!((events.len(), events[0].code), (1, Some(3)));
        assert_eq!(read(&home, next).unwrap().0, []);
    }
}
