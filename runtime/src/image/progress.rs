//! How far the building of an image is, for whoever watches.

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Another process builds the same image; its work will be used.
    Waiting,
    /// A layer comes from a registry; counted in bytes of the layer as it is stored.
    Fetch {
        /// Which layer, from 1.
        number: usize,
        /// How many there are.
        count: usize,
    },
    /// A layer is checked and unpacked; counted in bytes of the layer as it is stored.
    Layer {
        /// Which layer, from 1.
        number: usize,
        /// How many there are.
        count: usize,
    },
    /// The files of a directory are taken in; counted in bytes of their bodies.
    Files,
    /// Metadata is written and everything is made durable.
    Finishing,
}

/// Told about the building of an image. Calls come from the thread that asked for it.
pub trait Progress {
    /// A phase begins, of `total` bytes if that is known.
    fn begin(&mut self, phase: Phase, total: Option<u64>);

    /// `bytes` more of the phase are done.
    fn advance(&mut self, bytes: u64);
}

/// Nobody watches.
impl Progress for () {
    fn begin(&mut self, _: Phase, _: Option<u64>) {}

    fn advance(&mut self, _: u64) {}
}
