//! Networks in name spaces of the tests' own. They need root.

mod bridges;
mod forwarding;
mod guest;
mod many;
mod pod;
mod scanning;
mod twins;
mod watching;
