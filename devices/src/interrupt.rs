//! What a device may tell its driver: the transport's side of a running device.

/// Raises a device's notifications. The transport implements it; tests record.
///
/// Called from I/O loop threads; never blocks, holds no lock a vCPU thread waits for.
pub trait Interrupt: Send + Sync {
    /// Used buffers were published on queue `index`.
    fn queue(&self, index: u16);

    /// The device's configuration space changed.
    fn config_changed(&self);

    /// The device cannot go on: sets `DEVICE_NEEDS_RESET` and, after `DRIVER_OK`, notifies (VIRTIO 1.2 §2.1.2).
    fn needs_reset(&self);
}
