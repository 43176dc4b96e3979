//! The kernel families, a file each: contracts with their specifications in plain loops, the variants that run them on devices,
//! the CPU engine's functions, and the launchers that record them.

pub mod adamw;
pub mod attention;
pub mod case;
pub mod cross_entropy;
pub mod gelu;
pub mod gradient;
pub mod layernorm;
pub mod lora;
pub mod matmul;
#[doc(hidden)]
pub mod peak;
pub mod quantize;
pub mod rmsnorm;
pub mod rotary;
pub mod scalar;
pub mod swiglu;
pub mod weight;

use crate::compute::kernel::Contract;
use case::Example;

/// The contracts of every family.
pub fn all() -> impl Iterator<Item = &'static Contract> {
    [
        adamw::ALL,
        attention::ALL,
        cross_entropy::ALL,
        gelu::ALL,
        gradient::ALL,
        layernorm::ALL,
        lora::ALL,
        matmul::ALL,
        peak::ALL,
        quantize::ALL,
        rmsnorm::ALL,
        rotary::ALL,
        swiglu::ALL,
    ]
    .into_iter()
    .flatten()
    .copied()
}

/// The examples of every family.
pub fn examples() -> impl Iterator<Item = &'static Example> {
    [
        adamw::EXAMPLES,
        attention::EXAMPLES,
        cross_entropy::EXAMPLES,
        gelu::EXAMPLES,
        gradient::EXAMPLES,
        layernorm::EXAMPLES,
        lora::EXAMPLES,
        matmul::EXAMPLES,
        quantize::EXAMPLES,
        rmsnorm::EXAMPLES,
        rotary::EXAMPLES,
        swiglu::EXAMPLES,
    ]
    .into_iter()
    .flatten()
}
