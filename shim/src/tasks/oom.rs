//! Kills for want of memory: told when they happen, and at the latest before the exit of who was killed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use containerd_shim_protos::events::task::TaskOOM;
use mvm_runtime::sandbox::Sandbox;

use super::Tasks;
use super::machine::Machine;

/// What happens in this time after a kill is told together: a guest may claim as many as it likes.
const PAUSE: Duration = Duration::from_secs(1);

impl Tasks {
    /// From now on tells of kills in this machine.
    pub(super) fn hear_of_memory_kills(&self, sandbox: &dyn Sandbox) {
        let (me, heard) = (self.me.clone(), Arc::new(AtomicBool::new(false)));
        sandbox.on_memory_kill(Arc::new(move || {
            if !heard.swap(true, Ordering::Relaxed) {
                let heard = Arc::clone(&heard);
                me.tell(|tasks| tasks.memory_was_short(heard));
            }
        }));
    }

    fn memory_was_short(&mut self, heard: Arc<AtomicBool>) {
        self.publish_all_memory_kills();
        let me = self.me.clone();
        tokio::spawn(async move {
            tokio::time::sleep(PAUSE).await;
            me.tell(move |tasks| {
                // First: what comes while the others are told is told again.
                heard.store(false, Ordering::Relaxed);
                tasks.publish_all_memory_kills();
            });
        });
    }

    fn publish_all_memory_kills(&mut self) {
        let ids: Vec<String> = self.containers.keys().cloned().collect();
        ids.iter().for_each(|id| self.publish_memory_kills(id));
    }

    /// Tells of kills in a container that were not told yet.
    pub(super) fn publish_memory_kills(&mut self, id: &str) {
        let Machine::Up(sandbox) = &self.machine else { return };
        let kills = sandbox.memory_kills(id);
        let Some(container) = self.containers.get_mut(id) else { return };
        // One event for however many: that is what a cgroup's notification gives.
        if kills > container.memory_kills {
            container.memory_kills = kills;
            let event = TaskOOM { container_id: id.to_owned(), ..Default::default() };
            self.publisher.publish("/tasks/oom", &event);
        }
    }
}
