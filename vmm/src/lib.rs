//! One machine: KVM, memory, vCPUs, boot, PCI bus; bin mvm-vmm is one VM process.
