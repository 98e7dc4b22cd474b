//! `mvm-vmm`: one machine. Started by mvm with everything open; see the library's documentation.
//!
//! The C runtime calls `main` directly: what Rust's own start does first (look through `/proc/self/maps`, make
//! signal stacks) costs a tenth of the time a machine takes to start, and opens files.
#![no_main]
#![allow(unsafe_code)] // the entry point, and two calls before anything else runs

/// Entry point of the C runtime, which has set up the arguments.
// SAFETY: no other object of the program defines `main`, and the signature is the one C promises.
#[unsafe(no_mangle)]
extern "C" fn main(_count: libc::c_int, _arguments: *const *const libc::c_char) -> libc::c_int {
    // SAFETY: the call changes a number in the allocator, before any other thread exists.
    // One arena: a thread's own would cost each machine memory and spare it nothing.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    // SAFETY: ignoring a signal installs no code. A reader that goes away must not end the machine.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    // `exit` rather than a return: running threads are not waited for.
    std::process::exit(mvm_vmm::process::run().into())
}
