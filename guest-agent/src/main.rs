//! PID 1 in the guest: mounts, reaps, dials the host, runs processes.
//!
//! One thread and one epoll loop. The loop reads requests from the control connection, starts and reaps
//! processes, and pumps their standard streams, each of which is a connection of its own to the host.
//!
//! Without a guest it can be tried out as an ordinary program: with `MVM_AGENT_DIAL=unix:<base>` it dials
//! `<base>_1024` and `<base>_1025`, and keeps to name spaces of its own.
#![cfg_attr(not(test), no_main)]

mod agent;
mod boot;
mod bus;
mod cgroup;
mod clock;
mod confinement;
mod containers;
mod control;
mod device_rules;
mod dial;
mod disks;
mod error;
mod files;
mod flow;
mod forward;
mod hold;
mod identity;
mod kmsg;
mod netlink;
mod network;
mod pending;
mod process;
mod requests;
mod root;
mod shutdown;
mod spawn;
mod stats;
mod step;
mod storage;
mod streams;
mod surroundings;
mod sys;
mod table;
mod uevent;
mod user;

/// The C entry point. Rust's own would insist on descriptors 0 to 2, or on a /dev/null to open in their
/// place, before this program has had a chance to mount /dev.
#[cfg(not(test))]
#[allow(unsafe_code)]
// SAFETY: nothing else in this program defines `main`.
#[unsafe(no_mangle)]
pub extern "C" fn main() -> i32 {
    run()
}

// The tests' harness has a `main` of its own.
#[cfg(test)]
const _: fn() -> i32 = run;

/// Boots, dials, serves; never returns in a guest.
fn run() -> i32 {
    let agent_start = clock::now();
    std::panic::set_hook(Box::new(|info| kmsg::say(&info.to_string())));
    let role = boot::Role::of_this_process();
    boot::early(role);
    let mounts_done = clock::now();
    let choice = std::env::var("MVM_AGENT_DIAL").ok();
    let dialer = dial::dialer(choice.as_deref());
    match agent::Agent::new(role, dialer) {
        Ok(agent) => agent.run(agent_start, mounts_done),
        Err(error) => boot::give_up(&format!("cannot start: {error}")),
    }
}
