//! Follows a command and all it starts (ptrace(2)), counts the changes one of its processes makes, and at the k-th kills
//! the process or has the call fail.
#![allow(unsafe_code)] // ptrace and waitpid for threads are not in `nix` as it is built here

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use libc::{c_int, c_long, c_void, pid_t};

use super::calls::{Call, name};

/// Which of the processes is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// The command itself.
    Command,
    /// The process that owns a container that was left running.
    Owner,
    /// The machine's.
    Machine,
}

/// What is done at a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// The process is killed before the change.
    Kill,
    /// The change is not made and fails with this error number.
    Fail(i32),
}

/// What is watched and done.
#[derive(Clone, Copy, Debug)]
pub struct Order {
    /// In which process.
    pub victim: Victim,
    /// At which change, counted from one, and what; never unless given.
    pub act: Option<(usize, Act)>,
}

/// A command under watch.
#[derive(Debug)]
pub struct Traced {
    told: Receiver<Told>,
    follower: thread::JoinHandle<Vec<String>>,
}

enum Told {
    /// How the command itself ended, as a shell shows it.
    Exited(i32),
    Failed(io::Error),
}

impl Traced {
    /// Starts it.
    #[must_use]
    pub fn start(command: Command, order: Order) -> Self {
        let (tell, told) = channel();
        // Tracing is a matter between threads: all of it is done by one.
        let follower = thread::spawn(move || match Follower::start(command, order, tell.clone()) {
            Ok(follower) => follower.follow(),
            Err(error) => {
                let _ = tell.send(Told::Failed(error));
                Vec::new()
            }
        });
        Self { told, follower }
    }

    /// Waits for the command itself; its exit code, or `None` if it takes longer than `patience`.
    ///
    /// # Errors
    /// It cannot be started or followed.
    pub fn wait(&self, patience: Duration) -> io::Result<Option<i32>> {
        match self.told.recv_timeout(patience) {
            Ok(Told::Exited(code)) => Ok(Some(code)),
            Ok(Told::Failed(error)) => Err(error),
            Err(_) => Ok(None),
        }
    }

    /// Waits for all it started; the changes the victim made, the last of which is the one it did not survive.
    #[must_use]
    pub fn changes(self) -> Vec<String> {
        self.follower.join().unwrap_or_default()
    }
}

struct Follower {
    order: Order,
    command: pid_t,
    /// The process of each thread that is followed.
    threads: HashMap<pid_t, pid_t>,
    /// The process that is watched, once it runs its program.
    victim: Option<pid_t>,
    changes: Vec<String>,
    /// Calls that are on their way to fail.
    failing: HashMap<pid_t, i32>,
    acted: bool,
    tell: Sender<Told>,
}

/// Has the parent trace this process.
fn be_traced() -> io::Result<()> {
    // SAFETY: the request has no argument.
    match unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Follower {
    fn start(mut command: Command, order: Order, tell: Sender<Told>) -> io::Result<Self> {
        // SAFETY: the function makes one system call, which is all that is allowed between fork and exec.
        unsafe { command.pre_exec(be_traced) };
        let child = command.spawn()?;
        let pid = pid_t::try_from(child.id()).map_err(io::Error::other)?;
        let mut status = 0;
        // SAFETY: the status is a number of ours.
        unsafe { libc::waitpid(pid, &raw mut status, 0) };
        let options = libc::PTRACE_O_TRACESYSGOOD
            | libc::PTRACE_O_TRACEFORK
            | libc::PTRACE_O_TRACEVFORK
            | libc::PTRACE_O_TRACECLONE
            | libc::PTRACE_O_TRACEEXEC
            | libc::PTRACE_O_EXITKILL;
        request(libc::PTRACE_SETOPTIONS, pid, 0, u64::try_from(options).unwrap_or_default());
        let victim = (order.victim == Victim::Command).then_some(pid);
        let follower = Self {
            order,
            command: pid,
            threads: HashMap::from([(pid, pid)]),
            victim,
            changes: Vec::new(),
            failing: HashMap::new(),
            acted: false,
            tell,
        };
        follower.go_on(pid, 0);
        Ok(follower)
    }

    fn follow(mut self) -> Vec<String> {
        loop {
            let mut status = 0;
            // Of this thread's children only: others of this process have children of their own.
            // SAFETY: the status is a number of ours.
            let tid = unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL | libc::__WNOTHREAD) };
            if tid < 0 {
                match io::Error::last_os_error().raw_os_error() {
                    Some(libc::EINTR) => continue,
                    _ => return self.changes, // all are gone
                }
            }
            if libc::WIFSTOPPED(status) {
                self.stopped(tid, status);
            } else {
                self.threads.remove(&tid);
                if tid == self.command {
                    let code = match libc::WIFSIGNALED(status) {
                        true => 128 + libc::WTERMSIG(status),
                        false => libc::WEXITSTATUS(status),
                    };
                    let _ = self.tell.send(Told::Exited(code));
                }
            }
        }
    }

    fn stopped(&mut self, tid: pid_t, status: c_int) {
        let known = self.threads.contains_key(&tid);
        let process = *self.threads.entry(tid).or_insert_with(|| process_of(tid));
        let signal = libc::WSTOPSIG(status);
        if signal == libc::SIGTRAP | 0x80 {
            if Some(process) == self.victim && !self.acted || self.failing.contains_key(&tid) {
                self.system_call(tid, process);
            }
            return self.go_on(tid, 0);
        }
        let event = status >> 16;
        if event == libc::PTRACE_EVENT_EXEC {
            self.threads.insert(tid, tid);
            if self.victim.is_none() && role(tid) == Some(self.order.victim) {
                self.victim = Some(tid);
            }
        }
        // A new thread begins with a stop that is not its own, and so does what an event tells.
        let passed = if event != 0 || !known && signal == libc::SIGSTOP { 0 } else { signal };
        self.go_on(tid, passed);
    }

    /// Lets it go on: the victim to its next call, others to their next process.
    fn go_on(&self, tid: pid_t, signal: c_int) {
        let process = self.threads.get(&tid).copied();
        let watched =
            process.is_some() && process == self.victim && !self.acted || self.failing.contains_key(&tid);
        let how = if watched { libc::PTRACE_SYSCALL } else { libc::PTRACE_CONT };
        request(how, tid, 0, u64::try_from(signal).unwrap_or_default());
    }

    /// A machine changes nothing but what it tells, so of its calls all are tried by which it could be heard.
    fn name(&self, tid: pid_t, call: &Call) -> Option<String> {
        let heard = [libc::SYS_sendmsg, libc::SYS_sendto, libc::SYS_write, libc::SYS_poll, libc::SYS_read];
        if self.order.victim == Victim::Machine && heard.contains(&call.number) {
            return Some(format!("talk by {}", call.number));
        }
        name(tid, call)
    }

    fn system_call(&mut self, tid: pid_t, process: pid_t) {
        match state(tid) {
            Some(State::Entry(call)) if !self.acted => {
                let Some(name) = self.name(tid, &call) else { return };
                self.changes.push(name);
                match self.order.act {
                    Some((at, Act::Kill)) if at == self.changes.len() => {
                        self.acted = true;
                        // SAFETY: a system call on numbers. The process is stopped, so its number is its own.
                        unsafe { libc::kill(process, libc::SIGKILL) };
                    }
                    Some((at, Act::Fail(errno))) if at == self.changes.len() => {
                        self.acted = true;
                        self.failing.insert(tid, errno);
                        poke(tid, ORIG_RAX, u64::MAX);
                    }
                    _ => {}
                }
            }
            Some(State::Exit) => {
                if let Some(errno) = self.failing.remove(&tid) {
                    poke(tid, RAX, i64::from(-errno).cast_unsigned());
                }
            }
            _ => {}
        }
    }
}

/// Offsets of registers in `struct user` (sys/user.h).
const ORIG_RAX: u64 = 15 * 8;
const RAX: u64 = 10 * 8;

enum State {
    Entry(Call),
    Exit,
}

fn request(what: libc::c_uint, tid: pid_t, address: u64, data: u64) -> c_long {
    // SAFETY: what is asked for reads or writes the other process only, or a buffer its caller has given.
    unsafe { libc::ptrace(what, tid, address as *mut c_void, data as *mut c_void) }
}

fn poke(tid: pid_t, register: u64, value: u64) {
    request(libc::PTRACE_POKEUSER, tid, register, value);
}

fn state(tid: pid_t) -> Option<State> {
    // SAFETY: it is plain numbers, for which zero is a value.
    let mut info: libc::ptrace_syscall_info = unsafe { std::mem::zeroed() };
    let size = std::mem::size_of_val(&info) as u64;
    if request(libc::PTRACE_GET_SYSCALL_INFO, tid, size, &raw mut info as u64) <= 0 {
        return None;
    }
    match info.op {
        libc::PTRACE_SYSCALL_INFO_ENTRY => {
            // SAFETY: the kernel says which of them it filled.
            let entry = unsafe { info.u.entry };
            Some(State::Entry(Call {
                number: c_long::try_from(entry.nr).unwrap_or(-1),
                arguments: entry.args,
            }))
        }
        libc::PTRACE_SYSCALL_INFO_EXIT => Some(State::Exit),
        _ => None,
    }
}

/// The text at an address of a process, as far as it is on one page or two; empty if it is none.
pub(super) fn text_at(tid: pid_t, address: u64) -> String {
    let bytes = bytes_at(tid, address, 256);
    let text = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}

pub(super) fn word_at(tid: pid_t, address: u64) -> Option<u64> {
    bytes_at(tid, address, 8).try_into().ok().map(u64::from_le_bytes)
}

fn bytes_at(tid: pid_t, address: u64, count: usize) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; count];
    let read = fs::File::open(format!("/proc/{tid}/mem")).and_then(|file| file.read_at(&mut bytes, address));
    bytes.truncate(read.unwrap_or(0));
    bytes
}

/// The process a thread belongs to.
fn process_of(tid: pid_t) -> pid_t {
    let status = fs::read_to_string(format!("/proc/{tid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("Tgid:"));
    line.and_then(|number| number.trim().parse().ok()).unwrap_or(tid)
}

/// What a process that has just begun its program is to us.
fn role(pid: pid_t) -> Option<Victim> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mut words = line.split(|&byte| byte == 0).map(String::from_utf8_lossy);
    let program = words.next()?;
    match program.rsplit('/').next()? {
        "mvm" => (words.next()? == "own").then_some(Victim::Owner),
        "mvm-vmm" | "fake_machine" => Some(Victim::Machine),
        _ => None,
    }
}
