//! Virtual hardware: rings, virtio devices, PCI functions, serial.
