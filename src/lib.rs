//! The math of two Caffe layers, `LargeMarginInnerProduct` (L-Softmax, Liu et
//! al., ICML 2016, arXiv 1612.02295) and `BN`, behind a cxx bridge.
//!
//! ```text
//! Caffe net ── src/caffe/layers/*.cpp ── bridge ─┬─ large_margin ── gemm
//!              (C++: registers the layers,       │   (margin, schedule, vector)
//!               hands over blobs)                └─ batch_norm
//! ```
//!
//! - `bridge`: the functions that the C++ layers call; errors and panics
//!   become C++ exceptions here.
//! - [`param`]: the layer parameters, decoded from Caffe's protobuf messages.
//! - [`large_margin`]: the margin layer; [`margin`] is psi of the paper,
//!   [`schedule`] the descent of lambda, [`gemm`] the BLAS that Caffe lends,
//!   [`vector`] the loops over one sample's features.
//! - [`batch_norm`]: the batch normalisation layer.
//! - `cuda` (feature `cuda`): devices, kernels and launches.
//! - [`pool`]: the threads of the CPU layers.
//! - [`dtype`], [`error`]: Caffe's two element types, and what a layer refuses.

pub mod batch_norm;
mod bridge;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod dtype;
pub mod error;
pub mod gemm;
pub mod large_margin;
pub mod margin;
pub mod param;
pub mod pool;
pub mod schedule;
pub mod vector;
