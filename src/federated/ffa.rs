//! Frozen A (FFA-LoRA, Sun et al. 2024, arXiv 2403.12313).
//!
//! Only B is trained and sent, and `Σ_k w_k (B_k A) = (Σ_k w_k B_k) A`: the mean of the factors is the mean of what the adapters do.
//! A client of rank r has the first r rows of A. What its product lacks is zero, and so are the columns of B that it does not
//! have: `Σ_k w_k B_k A[..r_k] = (Σ_k w_k [B_k 0]) A`.

use super::column::Column;

/// The mean over all who hold the block, zero where they have no such column.
pub(super) fn of_column(column: &mut Column) -> Option<f64> {
    let total: u64 = column.entries.iter().map(|entry| entry.weight).sum::<u64>() + column.narrower;
    let sum: f64 = (column.entries.iter())
        .map(|entry| entry.weight as f64 * f64::from(entry.value))
        .sum();
    (total > 0).then(|| sum / total as f64)
}
