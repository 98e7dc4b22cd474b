//! What can go wrong while an image is written.

use std::io;

/// Why an EROFS image could not be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The source of a file body failed.
    #[error("cannot read a file body of {len} bytes")]
    ReadBody {
        /// Length the body was announced with.
        len: u64,
        /// What the source said.
        source: io::Error,
    },
    /// The source of a file body ended early.
    #[error("a file body ends after {got} of {len} bytes")]
    ShortBody {
        /// Length the body was announced with.
        len: u64,
        /// Bytes that came.
        got: u64,
    },
    /// The image or the spool beside it could not be written.
    #[error("cannot write the file system image")]
    Write(#[source] io::Error),
    /// Block numbers have 32 bits: 16 TiB.
    #[error("the file system image would need more than 2^32 blocks")]
    TooLarge,
    /// The extents of a sparse body overlap or leave the file.
    #[error("the extents of a sparse file of {len} bytes are not in order inside it")]
    BadExtents {
        /// Length of the file.
        len: u64,
    },
    /// A symbolic link's target is longer than a path may be.
    #[error("a symbolic link's target has {len} bytes, at most {max} are possible")]
    LongTarget {
        /// Length of the target.
        len: usize,
        /// Longest possible target.
        max: usize,
    },
}
