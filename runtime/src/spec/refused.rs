//! A field of a specification that cannot be honoured.

use crate::failure::Failure;

/// A field of a specification that cannot be honoured, and why. A field that would only be ignored at a loss the
/// container's owner counts on is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} of the specification cannot be honoured: {reason}")]
pub struct Refused {
    /// The field's path in `config.json`, such as `linux.resources.rdma`.
    pub field: String,
    /// Why, and where there is another way, which.
    pub reason: String,
}

impl Refused {
    /// Refuses `field` because of `reason`.
    pub fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { field: field.into(), reason: reason.into() }
    }
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Self {
        Failure::because("cannot make the container as specified", refused)
    }
}

/// The results of this module.
pub type Result<T> = std::result::Result<T, Refused>;
