//! One file per shader: params, kernels, launchers that record them, and the CPU references that specify them.

pub mod layernorm;
