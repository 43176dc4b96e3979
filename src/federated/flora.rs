//! Stacking (FLoRA, Wang et al. 2024, arXiv 2409.05976).
//!
//! ```text
//! A = [A_1; …; A_K]    B = [w_1 B_1, …, w_K B_K]    B·A = Σ_k w_k B_k A_k
//! ```
//! The stack has rank `Σ r_k`, whatever ranks the clients have, and is exact. But it is the clients' own adapters one after the other:
//! who sees it sees them. So what leaves the federated server is the same product in the coordinates that say nothing more,
//! its singular value decomposition `U Σ Vᵀ = B·A`: `B = U √Σ`, `A = √Σ Vᵀ`, in as many rows as it has singular values. That is
//! validated and saved. (PEFT takes a rank of its own for every module.)
//!
//! The paper's clients add the product to their frozen weights and begin with fresh adapters. Here the frozen weights are files named
//! by their hash, so clients go on with the largest r singular values: of all adapters of rank r the one whose product is
//! nearest (Eckart and Young), and in an order in which a client of a smaller rank gets the nearest of that rank. What they lack is
//! told. The coordinates are new in every round, so the optimisers' moments begin anew.

use super::product::{Component, Product};
use super::{Exact, ExactBuilder};
use crate::terms::adapter::AdapterShape;

/// Singular values below this share of the largest are the arithmetic's noise.
const NOISE: f64 = 1e-9;

/// The singular components of a product, the largest first.
pub(super) fn components(product: Product) -> Vec<Component> {
    let mut components = product.singular();
    let least = components.first().map_or(0.0, |first| first.value * NOISE);
    components.retain(|component| component.value > least);
    components
}

/// The exact product of every matrix, and what clients go on with. `mean` has the rows of A for components that are zero: with
/// B zero too they would never be trained again.
pub(super) fn stack(
    shape: &AdapterShape,
    blocks: usize,
    products: impl Iterator<Item = Product>,
    mean: &[f32],
) -> (Exact, Vec<f32>) {
    let mut exact = ExactBuilder::default();
    let mut start = mean.to_vec();
    for (place, product) in shape.places(blocks, shape.rank()).zip(products) {
        let components = components(product);
        exact.push(&components);
        for row in 0..place.rank {
            let component = components.get(row);
            for output in 0..place.outputs {
                start[place.b + output * place.rank + row] =
                    component.map_or(0.0, |component| component.left(output) as f32);
            }
            if let Some(component) = component {
                for input in 0..place.inputs {
                    start[place.a + row * place.inputs + input] = component.right(input) as f32;
                }
            }
        }
    }
    (exact.finish(), start)
}
