//! What is left when a process of ours is killed, or a call of it fails, at each change it makes to the host.
//!
//! A run happens in name spaces of its own ([`world`]): process numbers, mounts and links are all ours, so whatever is
//! left is seen ([`Picture`]), and goes with the last process. Machines are stand-ins there (`fake_machine`).

mod calls;
mod matrix;
mod picture;
mod scenario;
pub mod tracer;
pub mod world;

pub use matrix::{Matrix, Totals, faults};
pub use picture::Picture;
pub use scenario::{SCENARIOS, Scenario};
