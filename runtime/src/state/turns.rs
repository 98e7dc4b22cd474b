//! How many machines start at once on this host. The others wait until one of them runs.
//!
//! A start is work for processors: of a hundred at once none is done before nearly all are, and each has long missed
//! the time it had. So it takes one of a few places before it begins: a lock on a byte of a file of the home,
//! which all processes share, and which goes with its process however that ends.
//!
//! Who finds no place stands in line for another byte of the file. The kernel gives that to those who want as many
//! places, one after the other in the order in which they came, and the first alone looks for a place again and again:
//! the kernel would wait for one lock, but not for any of several.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use super::lock::part;
use super::{Home, private};
use crate::failure::Failure;

/// How many may start at once, instead of what follows from the processors; 0 is any number.
const VARIABLE: &str = "MVM_STARTS";
/// Whose bytes are the places.
const FILE: &str = "starts";
/// Starts at once for each processor: while one waits for a file or its guest, another works.
const EACH: u32 = 2;
/// The byte that is the line for no place; that for any other number is as many bytes behind.
const LINES: i64 = 1 << 32;
/// Time after which somebody may want to know why nothing happens.
const LONG: Duration = Duration::from_secs(1);
/// How often who stands in line asks whether the start is still wanted.
const WISHES: Duration = Duration::from_millis(50);
/// How often who stands in line looks for a place all the same: the first may be stopped (SIGSTOP).
const DOUBT: Duration = Duration::from_secs(10);
/// Longest and shortest time between two looks of the first; one that has been that for longer looks more rarely.
const PAUSES: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(20)];
/// How much of the time for which it is the first a pause is.
const SHARE: u32 = 16;

/// Whether what is being made is still wanted. Clones tell the same.
#[derive(Clone)]
pub struct Wish(Arc<dyn Fn() -> bool + Send + Sync>);

impl Wish {
    /// One that `stands` tells of. It is asked many times a second.
    pub fn new(stands: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(stands))
    }

    /// Whether it is wanted now.
    pub fn stands(&self) -> bool {
        (self.0)()
    }
}

impl Default for Wish {
    /// It is wanted whatever happens.
    fn default() -> Self {
        Self::new(|| true)
    }
}

impl std::fmt::Debug for Wish {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.stands() { "wanted" } else { "unwanted" })
    }
}

/// The places for starts.
#[derive(Clone, Debug)]
pub(crate) struct Turns {
    home: PathBuf,
    places: u32,
    doubt: Duration,
}

/// A place, until this is dropped; none where they are not counted.
#[derive(Debug)]
pub(crate) struct Turn(#[expect(dead_code, reason = "it is held")] Option<Held>);

/// A byte of the file, locked until this is dropped.
#[derive(Debug)]
struct Held {
    file: File,
    byte: i64,
}

impl Drop for Held {
    fn drop(&mut self) {
        // Closing alone would leave it to a process that is just being started, as long as that has a copy.
        let _ = fcntl(&self.file, FcntlArg::F_OFD_SETLK(&part(libc::F_UNLCK, self.byte, 1)));
    }
}

impl Turns {
    /// Those of a home on a host of so many processors: two for each, or what [`VARIABLE`] says.
    ///
    /// # Errors
    /// It says no number.
    pub(crate) fn of(home: &Home, processors: u32) -> Result<Self, Failure> {
        let places = said(std::env::var_os(VARIABLE).as_deref())?;
        let places = places.unwrap_or_else(|| processors.max(1).saturating_mul(EACH));
        Ok(Self { home: home.path().to_owned(), places, doubt: DOUBT })
    }

    /// How many there are.
    pub(crate) fn places(&self) -> u32 {
        self.places
    }

    /// A place, if one is free and nobody waits for it. There is one for everybody where none can be kept.
    pub(crate) fn take(&self) -> Option<Turn> {
        if self.places == 0 {
            return Some(Turn(None));
        }
        self.turn(self.open().and_then(|file| match is_held(&file, self.line())? {
            true => Ok(None),
            false => self.free(file),
        }))
    }

    /// A place when it is this one's turn, for as long as `wanted` says so. Calls `long` once if that takes long.
    ///
    /// # Errors
    /// It is not wanted any more.
    pub(crate) fn wait(&self, wanted: impl Fn() -> bool, long: impl FnOnce()) -> Result<Turn, Failure> {
        let begun = Instant::now();
        let (mut long, mut doubted) = (Some(long), begun);
        let [shortest, longest] = PAUSES;
        let line = self.line_up();
        // Since when it is the first, and what shows that to the others.
        let mut first: Option<(Instant, Held)> = None;
        while wanted() {
            if let Some(long) = long.take_if(|_| begun.elapsed() >= LONG) {
                long();
            }
            if let Some((since, _)) = &first {
                sleep((since.elapsed() / SHARE).clamp(shortest, longest));
            } else {
                match line.recv_timeout(WISHES) {
                    Ok(Ok(held)) => first = Some((Instant::now(), held)),
                    Err(RecvTimeoutError::Timeout) if doubted.elapsed() < self.doubt => continue,
                    Err(RecvTimeoutError::Timeout) => doubted = Instant::now(),
                    Ok(Err(error)) => return Ok(self.uncounted(&error)),
                    Err(error) => return Ok(self.uncounted(&io::Error::other(error))),
                }
            }
            if let Some(turn) = self.turn(self.open().and_then(|file| self.free(file))) {
                return Ok(turn);
            }
        }
        Err(Failure::new("it was given up while it waited for others to start"))
    }

    /// The byte for which those stand in line who want as many places.
    fn line(&self) -> i64 {
        LINES + i64::from(self.places)
    }

    /// Stands in line: what it gives tells once, when this is the first. If nobody listens then, another is.
    fn line_up(&self) -> Receiver<io::Result<Held>> {
        let (tell, told) = mpsc::sync_channel(1);
        let turns = self.clone();
        let stand = move || {
            let first = turns.open().and_then(|file| wait_for(file, turns.line()));
            let _ = tell.send(first);
        };
        // Without the thread there is nobody to tell, and that is heard.
        let _ = thread::Builder::new().name("turn".to_owned()).spawn(stand);
        told
    }

    /// The file, locked at a place that was free.
    fn free(&self, file: File) -> io::Result<Option<Held>> {
        for place in 0..i64::from(self.places) {
            if lock(&file, place)? {
                return Ok(Some(Held { file, byte: place }));
            }
        }
        Ok(None)
    }

    fn turn(&self, taken: io::Result<Option<Held>>) -> Option<Turn> {
        match taken {
            Ok(held) => held.map(|held| Turn(Some(held))),
            Err(error) => Some(self.uncounted(&error)),
        }
    }

    fn uncounted(&self, why: &io::Error) -> Turn {
        log::debug!("starts are not counted in {}: {why}", self.home.display());
        Turn(None)
    }

    fn open(&self) -> io::Result<File> {
        let open = || File::options().create(true).truncate(false).write(true).open(self.home.join(FILE));
        match open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                private(true).create(&self.home)?;
                open()
            }
            file => file,
        }
    }
}

/// How many places [`VARIABLE`] says there are, if it says anything.
fn said(text: Option<&OsStr>) -> Result<Option<u32>, Failure> {
    let Some(text) = text.filter(|text| !text.is_empty()) else { return Ok(None) };
    match text.to_str().and_then(|text| text.parse().ok()) {
        Some(places) => Ok(Some(places)),
        None => Err(Failure::new(format!(
            "{VARIABLE} does not say how many machines may start at once: {text:?}"
        ))
        .help("give a number, or 0 for any number")
        .refused()),
    }
}

/// Locks a byte, unless somebody else has it.
fn lock(file: &File, byte: i64) -> io::Result<bool> {
    match fcntl(file, FcntlArg::F_OFD_SETLK(&part(libc::F_WRLCK, byte, 1))) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Locks a byte as soon as nobody else has it.
fn wait_for(file: File, byte: i64) -> io::Result<Held> {
    loop {
        match fcntl(&file, FcntlArg::F_OFD_SETLKW(&part(libc::F_WRLCK, byte, 1))) {
            Ok(_) => return Ok(Held { file, byte }),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Whether somebody else has a byte locked.
fn is_held(file: &File, byte: i64) -> io::Result<bool> {
    let mut lock = part(libc::F_WRLCK, byte, 1);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use super::*;

    fn turns(places: u32) -> (tempfile::TempDir, Turns) {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("not/yet");
        (dir, Turns { home, places, doubt: DOUBT })
    }

    /// A process that has this file.
    fn holder(file: File) -> Child {
        Command::new("sleep").arg("infinity").stdin(file).spawn().unwrap()
    }

    fn end(mut process: Child) {
        process.kill().unwrap();
        process.wait().unwrap();
    }

    #[test]
    fn no_more_start_than_there_are_places_and_all_do() {
        let (_dir, turns) = turns(3);
        let (now, most, done) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
        thread::scope(|scope| {
            for _ in 0..20 {
                scope.spawn(|| {
                    let turn = turns.wait(|| true, || ()).unwrap();
                    most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    thread::yield_now();
                    now.fetch_sub(1, Ordering::SeqCst);
                    drop(turn);
                    done.fetch_add(1, Ordering::SeqCst);
                });
            }
        });
        assert_eq!(done.into_inner(), 20);
        assert!(most.into_inner() <= 3);
    }

    #[test]
    fn a_place_is_free_again_when_its_holder_is_killed() {
        let (_dir, turns) = turns(1);
        let file = turns.open().unwrap();
        assert!(lock(&file, 0).unwrap());
        // The lock is the open file's, which is another process's alone now.
        let process = holder(file);
        assert!(turns.take().is_none());
        end(process);
        turns.wait(|| true, || ()).unwrap();
    }

    #[test]
    fn a_place_is_given_back_though_a_process_that_was_started_meanwhile_has_a_copy() {
        let (_dir, turns) = turns(1);
        let held = turns.free(turns.open().unwrap()).unwrap().unwrap();
        let process = holder(held.file.try_clone().unwrap());
        assert!(turns.take().is_none());
        drop(held);
        assert!(turns.take().is_some());
        end(process);
    }

    #[test]
    fn who_comes_later_is_not_before_who_waits_for_as_many_places() {
        let (_dir, turns) = turns(1);
        let first = wait_for(turns.open().unwrap(), turns.line()).unwrap();
        assert!(turns.take().is_none(), "the place is the first one's");
        assert!(Turns { places: 2, ..turns.clone() }.take().is_some());
        drop(first);
        assert!(turns.take().is_some());
    }

    #[test]
    fn who_waits_starts_though_the_first_of_those_who_wait_does_nothing() {
        let (_dir, turns) = turns(1);
        let _first = wait_for(turns.open().unwrap(), turns.line()).unwrap();
        let turns = Turns { doubt: Duration::ZERO, ..turns };
        turns.wait(|| true, || ()).unwrap();
    }

    #[test]
    fn who_is_not_wanted_any_more_waits_no_longer_and_who_waits_long_says_so() {
        let (_dir, turns) = turns(1);
        let _held = turns.take().unwrap();
        let gives_up = || {
            let told = AtomicBool::new(false);
            let wanted = || !told.load(Ordering::SeqCst);
            let failure = turns.wait(wanted, || told.store(true, Ordering::SeqCst)).unwrap_err();
            assert_eq!(failure.to_string(), "it was given up while it waited for others to start");
            assert!(told.into_inner());
        };
        gives_up();
        let _first = wait_for(turns.open().unwrap(), turns.line()).unwrap();
        gives_up();
    }

    #[test]
    fn without_a_bound_or_a_home_nobody_waits() {
        let (_dir, none) = turns(0);
        let nowhere = Turns { home: "/dev/null".into(), places: 1, doubt: DOUBT };
        for turns in [none, nowhere.clone()] {
            let both = [turns.take(), turns.take()];
            assert!(both.iter().all(Option::is_some));
        }
        nowhere.wait(|| true, || ()).unwrap();
    }

    #[test]
    fn what_is_no_number_of_starts_is_refused() {
        let of = |text: &str| said(Some(OsStr::new(text)));
        assert_eq!((said(None).unwrap(), of("").unwrap()), (None, None));
        assert_eq!((of("0").unwrap(), of("7").unwrap()), (Some(0), Some(7)));
        for text in ["many", "-1", "1.5", " 2", "4294967296"] {
            let failure = of(text).unwrap_err();
            assert!(
                failure.is_refusal() && failure.report().contains(&format!("at once: {text:?}")),
                "{failure}"
            );
        }
    }
}
