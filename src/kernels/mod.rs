//! One file per shader: params, kernels, launchers that record them, and the CPU references that specify them.

pub mod adamw;
pub mod aggregate;
pub mod attention;
pub mod case;
pub mod cross_entropy;
pub mod embedding;
pub mod gelu;
pub mod layernorm;
pub mod lora;
pub mod matmul;
pub mod peak;
pub mod quantize;
pub mod residual;
pub mod scalar;

use crate::compute::kernel::Kernel;

/// The kernels of every family.
pub fn all() -> impl Iterator<Item = &'static Kernel> {
    [
        adamw::ALL,
        aggregate::ALL,
        attention::ALL,
        cross_entropy::ALL,
        embedding::ALL,
        gelu::ALL,
        layernorm::ALL,
        lora::ALL,
        matmul::ALL,
        peak::ALL,
        quantize::ALL,
        residual::ALL,
    ]
    .into_iter()
    .flatten()
    .copied()
}
