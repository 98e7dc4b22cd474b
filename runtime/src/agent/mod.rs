//! The host's side of the agent: typed, blocking calls with deadlines over one machine's connections.
//!
//! [`AgentListener`] waits where a machine's VMM delivers what its guest dials, and gives an
//! [`AgentClient`] once the agent has said hello. The client runs one thread, which reads the control
//! connection and matches stream connections to the processes they belong to.
//!
//! **Everything the guest sends is hostile.** A frame is bounded before it is allocated; an answer must
//! match a question; text is cut and escaped; what the guest can make the host remember is bounded; every
//! call has a deadline. A guest that breaks the protocol loses its connection, and nothing else.

mod client;
mod clock;
mod containers;
mod error;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod held;
mod hello;
mod identity;
mod link;
mod listener;
mod lives;
mod processes;
mod state;
#[cfg(test)]
pub(crate) mod tests;
mod writing;

pub use client::AgentClient;
pub use error::{Error, Result};
pub use identity::fresh_identity;
pub use link::StreamSource;
pub use listener::AgentListener;
pub use processes::{Process, ProcessSpec, StdioSpec};
