//! What containerd publishes, as `ctr events` prints it.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::Ctr;

/// Bound of a wait for an event.
const PATIENCE: Duration = Duration::from_secs(120);

/// One event.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// containerd's namespace.
    pub namespace: String,
    /// Such as `/tasks/exit`.
    pub topic: String,
    /// The message.
    pub body: Value,
}

impl Event {
    /// Reads a line of `ctr events`: date, time, offset, zone, namespace, topic, JSON.
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.splitn(7, ' ').skip(4);
        let (namespace, topic) = (fields.next()?.to_owned(), fields.next()?.to_owned());
        Some(Self { namespace, topic, body: serde_json::from_str(fields.next()?).ok()? })
    }

    /// Whether it is about this container.
    #[must_use]
    pub fn concerns(&self, container: &str) -> bool {
        self.text("container_id") == Some(container)
    }

    /// The process it is about, if that is one besides the container's own.
    #[must_use]
    pub fn process(&self) -> Option<&str> {
        let process = self.text("id").or_else(|| self.text("exec_id"))?;
        (!process.is_empty() && !self.concerns(process)).then_some(process)
    }

    /// The exit status it tells; a zero is left out.
    #[must_use]
    pub fn exit_status(&self) -> u64 {
        self.body.get("exit_status").and_then(Value::as_u64).unwrap_or(0)
    }

    /// A field that is text.
    #[must_use]
    pub fn text(&self, field: &str) -> Option<&str> {
        self.body.get(field)?.as_str()
    }
}

/// All events since the follower began.
#[derive(Clone, Debug)]
pub struct Events(Arc<Follower>);

#[derive(Debug)]
struct Follower {
    child: Mutex<Child>,
    seen: Mutex<Vec<Event>>,
    more: Condvar,
}

impl Events {
    /// Begins to follow; returns when nothing can be missed any more.
    ///
    /// # Panics
    /// The daemon publishes nothing.
    #[must_use]
    pub fn follow(ctr: &Ctr) -> Self {
        let words = ctr.words(&["events"]);
        let mut child = std::process::Command::new(&words[0])
            .args(&words[1..])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("ctr runs");
        let lines = BufReader::new(child.stdout.take().expect("asked for")).lines();
        let follower = Follower { child: Mutex::new(child), seen: Mutex::default(), more: Condvar::new() };
        let this = Self(Arc::new(follower));
        let weak = Arc::downgrade(&this.0);
        thread::spawn(move || {
            for event in lines.map_while(Result::ok).filter_map(|line| Event::parse(&line)) {
                let Some(follower) = weak.upgrade() else { return };
                follower.seen.lock().expect("no panic").push(event);
                follower.more.notify_all();
            }
        });
        // The daemon does not say when a subscription has begun: it is asked to publish something until that arrives.
        let began = Instant::now();
        while this.wait(Duration::from_millis(200), |event| event.topic == "/namespaces/update").is_none() {
            assert!(began.elapsed() < PATIENCE, "no event arrives");
            ctr.must(&["namespaces", "label", "default", "io.mvm.test=follow"]);
        }
        this
    }

    /// The events so far that concern a container.
    ///
    /// # Panics
    /// Another thread did.
    #[must_use]
    pub fn of(&self, container: &str) -> Vec<Event> {
        let seen = self.0.seen.lock().expect("no panic");
        seen.iter().filter(|event| event.concerns(container)).cloned().collect()
    }

    /// Waits for an event about a container's own process.
    ///
    /// # Panics
    /// It does not come.
    pub fn expect(&self, container: &str, topic: &str) -> Event {
        let own = |event: &Event| event.concerns(container) && event.process().is_none();
        let found = self.wait(PATIENCE, |event| own(event) && event.topic == topic);
        found.unwrap_or_else(|| panic!("no {topic} of {container}; there were: {:?}", self.of(container)))
    }

    fn wait(&self, bound: Duration, wanted: impl Fn(&Event) -> bool) -> Option<Event> {
        let find = |seen: &mut Vec<Event>| !seen.iter().any(&wanted);
        let seen = self.0.seen.lock().expect("no panic");
        let (seen, _) = self.0.more.wait_timeout_while(seen, bound, find).expect("no panic");
        seen.iter().find(|event| wanted(event)).cloned()
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let child = self.child.get_mut().expect("no panic");
        // It may have ended with the daemon.
        let _ = child.kill();
        let _ = child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_namespace_topic_and_message() {
        let line =
            r#"2026-11-22 01:20:31.28 +0000 UTC default /tasks/exit {"container_id":"c1","exit_status":7}"#;
        let event = Event::parse(line).unwrap();
        assert_eq!((event.namespace.as_str(), event.topic.as_str()), ("default", "/tasks/exit"));
        assert!(event.concerns("c1") && !event.concerns("c"));
        assert_eq!((event.exit_status(), event.process()), (7, None));
        assert_eq!(Event::parse("not an event"), None);
    }
}
