//! What launches and kernels agree on. build.rs compiles the kernels with each
//! of these numbers as a macro of its name; sizes of structs are asserted there.

/// Of src/large_margin/kernels.cu.
pub mod large_margin {
    /// Threads of a block.
    pub const THREADS: u32 = 128;
    /// Samples that one block folds and sorts.
    pub const TILE: usize = 1024;
    /// Bytes of a sample's `Coefficients`.
    pub const COEFFICIENTS: usize = 32;

    /// The macros of the kernels.
    pub const MACROS: &[(&str, usize)] = &[
        ("THREADS", THREADS as usize),
        ("TILE", TILE),
        ("COEFFICIENTS", COEFFICIENTS),
    ];
}

/// Of src/batch_norm/kernels.cu.
pub mod batch_norm {
    /// Threads of a block.
    pub const THREADS: u32 = 256;
    /// Threads of a warp.
    pub const WARP: usize = 32;
    /// Bytes of the widest load, and what a thread has of each blob in a pass
    /// over all values.
    pub const LOAD: usize = 16;
    /// Bytes of a `Partial`.
    pub const PARTIAL: usize = 24;
    /// Values of a `Channel`.
    pub const CHANNEL: usize = 5;
    /// Bytes of a `Shape`.
    pub const SHAPE: usize = 16;

    /// The macros of the kernels.
    pub const MACROS: &[(&str, usize)] = &[
        ("THREADS", THREADS as usize),
        ("WARP", WARP),
        ("LOAD", LOAD),
        ("PARTIAL", PARTIAL),
        ("CHANNEL", CHANNEL),
        ("SHAPE", SHAPE),
    ];
}
