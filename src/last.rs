//! Where a layer's last forward pass ran.

use crate::error::{Error, Result};

/// What a backward pass may build on. CPU and GPU keep the state between the
/// two in places of their own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Last {
    /// No forward pass yet, or none since the shape changed or one failed.
    #[default]
    None,
    /// In CPU mode.
    Cpu,
    /// In GPU mode.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    Gpu,
}

impl Last {
    /// Whether a backward pass in the mode `now` may follow.
    ///
    /// # Errors
    /// It may not, and why.
    pub(crate) fn allows(self, now: Last) -> Result<()> {
        if self == now {
            return Ok(());
        }
        Err(Error::new(match self {
            Last::None => {
                "backward without a forward pass before it, since the start or since the shape \
                 of the bottom changed"
            }
            Last::Cpu => {
                "backward in GPU mode after a forward pass in CPU mode; both need one mode"
            }
            Last::Gpu => {
                "backward in CPU mode after a forward pass in GPU mode; both need one mode"
            }
        }))
    }
}
