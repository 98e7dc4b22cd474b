//! Has the memory of saved machines: `memory_source SOCKET MEMORY`, where MEMORY is the file `memory` of a snapshot.
//!
//! `mvm restore NAME --memory-source unix:SOCKET` connects to it, any number of times. It is where to start from to have
//! memory come from another host, or out of an archive.
#![allow(clippy::print_stderr)]

mod handler;

use std::fs::File;
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use handler::Machine;

fn main() -> io::Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let mut argument = || arguments.next().ok_or_else(|| io::Error::other("memory_source SOCKET MEMORY"));
    let (listener, memory) = (UnixListener::bind(argument()?)?, Arc::new(File::open(argument()?)?));
    for socket in listener.incoming() {
        let (socket, memory) = (socket?, Arc::clone(&memory));
        std::thread::spawn(move || {
            let served = Machine::meet(socket).and_then(|mut machine| {
                machine.serve(&memory)?;
                Ok((machine.brought, machine.removed.len()))
            });
            match served {
                Ok((brought, removed)) => {
                    eprintln!(
                        "a machine has ended: {brought} pages were brought to it, {removed} it gave back"
                    );
                }
                Err(error) => eprintln!("a machine is left alone: {error}"),
            }
        });
    }
    Ok(())
}
