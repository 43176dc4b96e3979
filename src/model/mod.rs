//! Language models with LoRA adapters: architecture, files, and the recording of their passes as kernels.
//!
//! `architecture` is a model's shape as data. `weights` (over `archive`) reads Hugging Face files, in `unit`s, which are `encoded` for others; `adapter` has the
//! order of LoRA's values and `peft` their files; `export` writes both for other programs. `linear`, `part` and `ends` record the
//! pieces, `block` joins two parts, `stack` joins blocks and ends into one side of the cut or the whole model, on a `workspace`. `optimizer` sets AdamW's numbers, `central` is the
//! unsplit model that trains and evaluates, `generation` writes text. `cost` says what a split step takes before it runs, `rounds`
//! holds how many rounds a rank was measured to need.

pub mod adapter;
pub mod architecture;
#[doc(hidden)]
pub mod archive;
pub(crate) mod block;
pub mod central;
pub mod cost;
pub(crate) mod encoded;
pub mod ends;
#[cfg(not(target_arch = "wasm32"))]
pub mod export;
pub mod generation;
#[cfg(not(target_arch = "wasm32"))]
pub mod gguf;
pub(crate) mod linear;
pub(crate) mod optimizer;
pub(crate) mod part;
#[cfg(not(target_arch = "wasm32"))]
pub(crate) mod peft;
mod random;
#[doc(hidden)]
pub mod rounds;
pub mod stack;
pub(crate) mod thread;
pub mod unit;
pub mod weights;
pub mod workspace;

/// What running a model may run into.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error(transparent)]
    Compute(#[from] crate::compute::Error),
    #[error(transparent)]
    Weights(#[from] weights::WeightsError),
}
