//! The mean with its residual (FedEx-LoRA, Singhal et al. 2024, arXiv 2410.09432).
//!
//! ```text
//! A = Σ_k w_k A_k    B = Σ_k w_k B_k    ΔW_res = Σ_k w_k B_k A_k − B·A    B·A + ΔW_res = Σ_k w_k B_k A_k
//! ```
//! Clients go on with A and B, in the coordinates in which their optimiser's moments are. The paper adds ΔW_res to the frozen weights
//! of all clients. Here those are files named by their hash, on devices that hold them in 4 bits, so that the residual stays at the
//! servers: the adapter that is validated and saved is `B·A + ΔW_res`, in the fewest rows that hold it exactly, and each round's
//! replaces that of the round before, because a client's model is the frozen weights and its own adapter and nothing else.

use super::flora;
use super::product::Product;
use super::{Exact, ExactBuilder};

/// The exact product of every matrix.
pub(super) fn exact(products: impl Iterator<Item = Product>) -> Exact {
    let mut exact = ExactBuilder::default();
    for product in products {
        exact.push(&flora::components(product));
    }
    exact.finish()
}
