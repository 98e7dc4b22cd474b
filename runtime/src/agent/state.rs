//! What calls and the reading thread share, and how the guest's messages change it.

use std::{
    collections::{BTreeMap, HashMap},
    os::unix::net::UnixStream,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use mvm_protocol::{Event, ExitStatus, Failure, GuestMessage, Reply, Token, limits};

use super::{
    error::{Error, Result},
    lives::Lives,
};

/// Behind one lock, held only for look-ups, never while anything is read or written.
#[derive(Default)]
pub(super) struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// What is known of the guest.
#[derive(Default)]
pub(super) struct State {
    /// Requests without an answer that was fetched.
    calls: BTreeMap<u64, Call>,
    /// Its processes.
    lives: Lives,
    /// Streams the guest was asked to open.
    streams: HashMap<Token, Option<UnixStream>>,
    /// Kills for want of memory, by container root.
    kills: HashMap<String, u64>,
    /// Who is told of them.
    heard: Option<MemoryKill>,
    /// Why the connection is gone.
    lost: Option<String>,
}

/// Is told of a root in which the kernel has killed for want of memory, and how often so far.
pub(super) type MemoryKill = Arc<dyn Fn(&str, u64) + Send + Sync>;

enum Call {
    Waiting,
    /// Nobody waits for the answer.
    Ignored,
    Answered(Result<Reply, Failure>),
}

impl Shared {
    /// The state; a thread that panicked cannot have left it half changed.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a request is about to be sent.
    pub(super) fn begin_call(&self, id: u64, ignored: bool) -> Result<()> {
        let mut state = self.lock();
        state.check()?;
        if state.calls.len() >= limits::MAX_IN_FLIGHT {
            return Err(Error::Busy);
        }
        state.calls.insert(id, if ignored { Call::Ignored } else { Call::Waiting });
        Ok(())
    }

    /// The answer to a request. After a deadline the answer, should it still come, is dropped.
    pub(super) fn await_answer(&self, id: u64, timeout: Duration) -> Result<Reply> {
        let answered = self.wait(Some(timeout), "answer", |state| {
            let answer = state.calls.remove(&id)?;
            match answer {
                Call::Answered(result) => Some(result),
                waiting => {
                    state.calls.insert(id, waiting);
                    None
                }
            }
        });
        match answered {
            Err(error @ Error::Deadline { .. }) => Ok(self.give_up(id).ok_or(error)??),
            answered => Ok(answered??),
        }
    }

    /// No longer waits for the answer to a request, unless it has come by now: its place would stay taken.
    fn give_up(&self, id: u64) -> Option<Result<Reply, Failure>> {
        let mut state = self.lock();
        match state.calls.remove(&id)? {
            Call::Answered(answer) => Some(answer),
            Call::Waiting | Call::Ignored => {
                state.calls.insert(id, Call::Ignored);
                None
            }
        }
    }

    /// Expects streams with these tokens.
    pub(super) fn expect_streams(&self, tokens: &[Token]) {
        let mut state = self.lock();
        tokens.iter().for_each(|token| drop(state.streams.insert(*token, None)));
    }

    /// No longer expects them.
    pub(super) fn forget_streams(&self, tokens: &[Token]) {
        let mut state = self.lock();
        tokens.iter().for_each(|token| drop(state.streams.remove(token)));
    }

    /// The stream with this token, once the guest has opened it.
    pub(super) fn await_stream(&self, token: Token, timeout: Duration) -> Result<UnixStream> {
        self.wait(Some(timeout), "open a stream", |state| {
            state.streams.get(&token)?.as_ref()?;
            state.streams.remove(&token)?
        })
    }

    /// How a process ended.
    pub(super) fn await_exit(&self, process: u64, timeout: Option<Duration>) -> Result<ExitStatus> {
        self.wait(timeout, "report an exit", |state| state.lives.fetch(process))?
    }

    /// A process is about to be started, or another host has started it.
    pub(super) fn begin_process(&self, process: u64) -> Result<()> {
        self.lock().lives.begin(process)
    }

    /// The guest has no record of a process, or drops it.
    pub(super) fn forget_process(&self, process: u64) {
        self.lock().lives.forget(process);
    }

    /// Whoever waits for a process's end does so no more.
    pub(super) fn abandon_process(&self, process: u64) {
        self.lock().lives.abandon(process);
        self.changed.notify_all();
    }

    /// Processes that were given up and have ended since.
    pub(super) fn over(&self) -> Vec<u64> {
        self.lock().lives.over()
    }

    /// Kills for want of memory in a container root so far.
    pub(super) fn memory_kills(&self, root: &str) -> u64 {
        self.lock().kills.get(root).copied().unwrap_or(0)
    }

    /// From now on tells of kills for want of memory.
    pub(super) fn on_memory_kill(&self, heard: MemoryKill) {
        self.lock().heard = Some(heard);
    }

    /// A root is gone; another one may get its id.
    pub(super) fn forget_kills(&self, root: &str) {
        self.lock().kills.remove(root);
    }

    /// Waits until `find` finds something, the connection is lost or time is up.
    fn wait<T>(
        &self,
        timeout: Option<Duration>,
        what: &'static str,
        mut find: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut state = self.lock();
        loop {
            if let Some(found) = find(&mut state) {
                return Ok(found);
            }
            state.check()?;
            state = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => return Err(Error::Deadline { what }),
                Some(left) => {
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// The connection is gone; every call that waits or will wait says why.
    pub(super) fn lose(&self, reason: String) {
        self.lock().lost.get_or_insert(reason);
        self.changed.notify_all();
    }

    /// A stream has opened with this token; one that nobody asked for is closed.
    pub(super) fn stream_opened(&self, token: Token, stream: UnixStream) {
        if let Some(slot @ None) = self.lock().streams.get_mut(&token) {
            *slot = Some(stream);
        }
        self.changed.notify_all();
    }

    /// Takes a message of the guest's; an error is a breach of the protocol.
    pub(super) fn take(&self, message: GuestMessage) -> Result<(), &'static str> {
        let killed = match &message {
            GuestMessage::Event(Event::OutOfMemory { root, kills }) => Some((root.clone(), *kills)),
            _ => None,
        };
        let mut state = self.lock();
        state.take(message)?;
        let heard = state.heard.clone();
        drop(state);
        self.changed.notify_all();
        if let Some(((root, kills), heard)) = killed.zip(heard) {
            heard(&root, kills);
        }
        Ok(())
    }
}

impl State {
    fn check(&self) -> Result<()> {
        match &self.lost {
            Some(reason) => Err(Error::Lost { reason: reason.clone() }),
            None => Ok(()),
        }
    }

    fn take(&mut self, message: GuestMessage) -> Result<(), &'static str> {
        match message {
            GuestMessage::Hello(_) => return Err("it said hello twice"),
            GuestMessage::Response { id, result } => match self.calls.remove(&id) {
                Some(Call::Ignored) => {}
                Some(Call::Waiting) => {
                    self.calls.insert(id, Call::Answered(result));
                }
                Some(Call::Answered(_)) => return Err("it answered twice"),
                None => return Err("it answered a request that was not made"),
            },
            GuestMessage::Event(Event::Exited { process, status, .. }) => {
                self.lives.exited(process, status)?;
            }
            GuestMessage::Event(Event::OutOfMemory { root, kills }) => {
                if root.len() > limits::MAX_ID
                    || (self.kills.len() >= limits::MAX_ROOTS && !self.kills.contains_key(&root))
                {
                    return Err("it reported a root that cannot exist");
                }
                self.kills.insert(root, kills);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(20);

    fn answer(id: u64) -> GuestMessage {
        GuestMessage::Response { id, result: Ok(Reply::Done) }
    }

    fn exited(process: u64) -> GuestMessage {
        let status = ExitStatus::Code(1);
        GuestMessage::Event(Event::Exited { process, status, at: mvm_protocol::Stamp::default() })
    }

    #[test]
    fn an_answer_reaches_its_call_whatever_the_order() {
        let shared = Shared::default();
        shared.begin_call(1, false).unwrap();
        shared.begin_call(2, false).unwrap();
        shared.take(answer(2)).unwrap();
        shared.take(answer(1)).unwrap();
        assert!(shared.await_answer(1, SOON).is_ok());
        assert!(shared.await_answer(2, SOON).is_ok());
    }

    #[test]
    fn answers_without_a_question_or_given_twice_break_the_protocol() {
        let shared = Shared::default();
        assert!(shared.take(answer(7)).is_err());
        shared.begin_call(1, false).unwrap();
        shared.take(answer(1)).unwrap();
        assert!(shared.take(answer(1)).is_err());
    }

    #[test]
    fn a_late_answer_is_dropped_and_frees_its_place() {
        let shared = Shared::default();
        shared.begin_call(1, false).unwrap();
        assert!(matches!(shared.await_answer(1, SOON), Err(Error::Deadline { .. })));
        shared.take(answer(1)).unwrap();
        assert!(shared.lock().calls.is_empty());
    }

    #[test]
    fn an_answer_that_comes_with_the_deadline_counts_and_frees_its_place() {
        let shared = Shared::default();
        shared.begin_call(1, false).unwrap();
        shared.take(answer(1)).unwrap();
        assert!(matches!(shared.give_up(1), Some(Ok(Reply::Done))));
        assert!(shared.lock().calls.is_empty());
    }

    #[test]
    fn more_calls_than_may_be_in_flight_are_refused() {
        let shared = Shared::default();
        for id in 0..limits::MAX_IN_FLIGHT as u64 {
            shared.begin_call(id, false).unwrap();
        }
        assert!(matches!(shared.begin_call(9999, false), Err(Error::Busy)));
    }

    #[test]
    fn a_lost_connection_ends_every_wait_but_keeps_what_was_known() {
        let shared = Shared::default();
        shared.take(exited(3)).unwrap();
        shared.lose("gone".into());
        assert_eq!(shared.await_exit(3, None).unwrap(), ExitStatus::Code(1));
        assert!(matches!(shared.await_exit(4, None), Err(Error::Lost { reason }) if reason == "gone"));
        assert!(matches!(shared.begin_call(1, false), Err(Error::Lost { .. })));
    }

    #[test]
    fn a_stream_nobody_asked_for_is_closed() {
        use std::io::Read;
        let shared = Shared::default();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        shared.stream_opened(Token(5), ours);
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
    }
}
