//! The virtio devices. One file each; this list is all that names them.

use serde::{Deserialize, Serialize};

use crate::device::{Kind, VirtioDevice};
use crate::fd::FdSource;

/// A device's configuration: plain data from which the device is built.
pub trait Spec {
    /// Builds the device, taking the files it names.
    ///
    /// # Errors
    /// What is wrong with the configuration or with a file, for a person to read.
    fn build(&self, files: &mut dyn FdSource) -> Result<Box<dyn VirtioDevice>, BuildError>;
}

/// Why a device could not be built from its configuration.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A file it names is not there, or cannot be used.
    #[error("cannot use the file given for {what}")]
    File {
        /// What the file is for.
        what: &'static str,
        /// The host's reason.
        #[source]
        source: std::io::Error,
    },
    /// A value is out of bounds.
    #[error("{what} {value} is not possible: {expected}")]
    Value {
        /// Name of the setting.
        what: &'static str,
        /// What was given.
        value: String,
        /// What would do.
        expected: &'static str,
    },
}

/// Declares the device modules and the two enums over them: configurations and saved states.
macro_rules! devices {
    ($($(#[$doc:meta])* $module:ident $Name:ident;)*) => {
        $(pub mod $module;)*

        /// The configuration of one device, as `{"type": "…", …}`.
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(tag = "type", rename_all = "snake_case")]
        pub enum DeviceSpec {
            $($(#[$doc])* $Name($module::Config),)*
        }

        impl Spec for DeviceSpec {
            fn build(&self, files: &mut dyn FdSource) -> Result<Box<dyn VirtioDevice>, BuildError> {
                match self {
                    $(Self::$Name(config) => config.build(files),)*
                }
            }
        }

        /// The names devices go by in configurations.
        pub const NAMES: &[&str] = &[$(stringify!($module)),*];

        /// Who the devices are, in the same order.
        pub const KINDS: &[Kind] = &[$($module::KIND),*];

        /// The saved state of one device. Tagged from outside, so that compact formats can read it.
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum DeviceState {
            $($(#[$doc])* $Name($module::State),)*
        }
    };
}

devices! {
    /// A disk.
    block Block;
    /// A terminal.
    console Console;
    /// A network card.
    net Net;
    /// Host entropy.
    rng Rng;
    /// Takes memory back from the guest.
    balloon Balloon;
    /// Memory beyond what the machine booted with.
    mem Mem;
    /// Sockets between host and guest.
    vsock Vsock;
}
