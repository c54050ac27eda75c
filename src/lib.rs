//! The math of two Caffe layers, `LargeMarginInnerProduct` (L-Softmax, Liu et
//! al., ICML 2016, arXiv 1612.02295) and `BN`, behind a cxx bridge. README.md
//! beside this file tells how a pass goes through it.
//!
//! A module uses those below it, never one above; `tests/arrows.rs` sees to it.
//!
//! | module | what it holds |
//! |---|---|
//! | `bridge` | what C++ calls; Caffe's BLAS behind the traits of [`blas`] |
//! | [`large_margin`] | the margin layer: psi, lambda, a sample's correction, what a pass tells; CPU and GPU side by side |
//! | [`batch_norm`] | the batch normalisation layer, likewise |
//! | [`param`] | the layer parameters, decoded from Caffe's protobuf messages |
//! | `cuda` (feature `cuda`) | devices, launches, news of kernels |
//! | [`blas`] | the matrix product that Caffe lends |
//! | [`pool`], `simd` | the CPU's threads and vector registers |
//! | `last` | where the last forward pass ran |
//! | [`dtype`], [`error`] | Caffe's two element types, and what a layer refuses |

pub mod batch_norm;
pub mod blas;
mod bridge;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod dtype;
pub mod error;
pub mod large_margin;
mod last;
pub mod param;
pub mod pool;
mod simd;
