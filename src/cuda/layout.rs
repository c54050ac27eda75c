//! What launches and kernels agree on. build.rs compiles the kernels with each
//! of these numbers as a macro of its name; sizes of structs are asserted there.

/// Of src/large_margin/kernels.cu.
pub mod large_margin {
    /// Threads of a block.
    pub const THREADS: u32 = 128;
    /// Threads of a warp.
    pub const WARP: usize = 32;
    /// Samples that are sorted apart from the others.
    pub const TILE: usize = 1024;
    /// Sorted samples that a block adds to dW at most.
    pub const PLACES: usize = 256;
    /// Sorted runs that one launch merges into one.
    pub const WAYS: usize = 8;
    /// Bytes of the widest load.
    pub const LOAD: usize = 16;
    /// Loads of a row that a thread has under way at once.
    pub const LOADS: usize = 4;
    /// Bytes of a sample's `Coefficients`.
    pub const COEFFICIENTS: usize = 32;
    /// Bytes of a `Team`.
    pub const TEAM: usize = 8;
    /// Bytes of a `Cut`.
    pub const CUT: usize = 16;

    /// The macros of the kernels.
    pub const MACROS: &[(&str, usize)] = &[
        ("THREADS", THREADS as usize),
        ("WARP", WARP),
        ("TILE", TILE),
        ("PLACES", PLACES),
        ("WAYS", WAYS),
        ("LOAD", LOAD),
        ("LOADS", LOADS),
        ("COEFFICIENTS", COEFFICIENTS),
        ("TEAM", TEAM),
        ("CUT", CUT),
    ];
}

/// Of src/batch_norm/kernels.cu.
pub mod batch_norm {
    /// Threads of a block.
    pub const THREADS: u32 = 256;
    /// Threads of a warp.
    pub const WARP: usize = 32;
    /// Bytes of the widest load.
    pub const LOAD: usize = 16;
    /// Bytes that a thread has of each blob in a pass over all values.
    pub const PASS: usize = 32;
    /// Values of a channel, or rows of a column, that a block of a reduction
    /// reads at once: its parts are multiples of it.
    pub const SEGMENT_ROUND: usize = GROUP * THREADS as usize;
    /// The same of a column.
    pub const COLUMN_ROUND: usize = GROUP * THREADS as usize / WARP;
    /// Values that a thread of a reduction has in its registers.
    pub const GROUP: usize = 8;
    /// Bytes of a `Pair`, what a part leaves to the join.
    pub const PAIR: usize = 16;
    /// Values of a channel's `Statistics`.
    pub const STATISTICS: usize = 4;
    /// Values of a channel's `Means`.
    pub const MEANS: usize = 2;
    /// Bytes of a `Shape`.
    pub const SHAPE: usize = 52;

    /// The macros of the kernels.
    pub const MACROS: &[(&str, usize)] = &[
        ("THREADS", THREADS as usize),
        ("WARP", WARP),
        ("LOAD", LOAD),
        ("PASS", PASS),
        ("GROUP", GROUP),
        ("PAIR", PAIR),
        ("STATISTICS", STATISTICS),
        ("MEANS", MEANS),
        ("SHAPE", SHAPE),
    ];
}
