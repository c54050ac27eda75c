//! What a layer can refuse.

use std::fmt;

/// Why a layer refused a parameter, a shape or a label.
///
/// The message carries the field or sample and the offending value. The name
/// of the layer is not in it: the C++ layer, which knows it, puts it in front.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error(String);

/// A result whose error is [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Error(message.into())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}
