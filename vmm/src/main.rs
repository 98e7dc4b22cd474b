//! `mvm-vmm`: one machine. Started by mvm with everything open; see the library's documentation.
#![allow(unsafe_code)] // one call that sets malloc up

fn main() -> ! {
    // SAFETY: the call changes a number in the allocator, before any other thread exists.
    // One arena: a thread's own would cost each machine memory and spare it nothing.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    // `exit` rather than a return: running threads are not waited for.
    std::process::exit(mvm_vmm::process::run().into())
}
