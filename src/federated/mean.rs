//! The weighted mean, `Δ = Σ_k (D_k / D) Δ_k` with `D = Σ_k D_k` (FedAvg, McMahan et al. 2017, eq. 3 on adapters as in SflLLM,
//! arXiv 2504.14667).
//!
//! Each value is averaged over those who trained it: the clients that have it, and the main server's copy for the clients that do
//! not hold its block. Where ranks differ, a row of A is averaged over the clients that have it, and a column of B over all, with
//! zero for those that do not: the product of a client of a smaller rank has nothing there. (With zeros in A as well, as in
//! HetLoRA, arXiv 2401.06432, rows of A would shrink from round to round; with B averaged over those who have it, the product was 84 %
//! off the mean product in `docs/measured.md`'s run with ranks 8, 4 and 2.) What nobody has stays what it is.
//!
//! On the factors of a product this is not the mean of what the adapters do: `mean(B)·mean(A) ≠ mean(B·A)`.

use super::column::Column;
use super::{AverageError, total_weight};

/// The mean of one value; `None` where nobody has it.
pub(super) fn of_column(column: &mut Column) -> Option<f64> {
    let absent = if column.is_b { column.narrower } else { 0 };
    let own: u64 = column.entries.iter().map(|entry| entry.weight).sum();
    let sum: f64 = (column.entries.iter())
        .map(|entry| entry.weight as f64 * f64::from(entry.value))
        .sum();
    (own > 0).then(|| sum / (own + absent) as f64)
}

/// The mean of flat adapters, each weighted by its number of examples. Sums run in f64 in the order given, so the
/// result does not depend on anything but the arguments.
///
/// # Errors
/// When the list is empty, lengths differ, a value is not finite, or the weights add up to zero or past 2^64.
pub fn weighted_mean(adapters: &[(u64, &[f32])]) -> Result<Vec<f32>, AverageError> {
    let expected = adapters.first().ok_or(AverageError::Empty)?.1.len();
    if let Some((index, (_, values))) = (adapters.iter().enumerate()).find(|(_, (_, values))| values.len() != expected)
    {
        return Err(AverageError::WrongLength {
            index,
            length: values.len(),
            expected,
        });
    }
    mean_of_prefixes(adapters, expected, &[])
}

/// The same for adapters of which each is the beginning of `whole` values. `copy` is what the main server has of the last of
/// them; for a value it weighs as much as the adapters that end before it, nothing where there is none.
///
/// # Errors
/// As [`weighted_mean`]; an adapter may be shorter by what `copy` has, and no longer than `whole`.
pub fn mean_of_prefixes(adapters: &[(u64, &[f32])], whole: usize, copy: &[f32]) -> Result<Vec<f32>, AverageError> {
    if adapters.is_empty() {
        return Err(AverageError::Empty);
    }
    let Some(least) = whole.checked_sub(copy.len()) else {
        return Err(AverageError::LongCopy {
            length: copy.len(),
            whole,
        });
    };
    if let Some(position) = copy.iter().position(|value| !value.is_finite()) {
        return Err(AverageError::CopyNotFinite { position });
    }
    for (index, (_, values)) in adapters.iter().enumerate() {
        if !(least..=whole).contains(&values.len()) {
            return Err(AverageError::OutOfRange {
                index,
                length: values.len(),
                least,
                most: whole,
            });
        }
        if let Some(position) = values.iter().position(|value| !value.is_finite()) {
            return Err(AverageError::NotFinite { index, position });
        }
    }
    let total = total_weight(adapters.iter().map(|(weight, _)| *weight))?;
    let mut sums = vec![0.0_f64; whole];
    for (weight, values) in adapters {
        for (sum, value) in sums.iter_mut().zip(*values) {
            *sum += *weight as f64 * f64::from(*value);
        }
    }
    let mut ends: Vec<(usize, u64)> = adapters
        .iter()
        .map(|(weight, values)| (values.len(), *weight))
        .collect();
    ends.sort_unstable();
    let mut ends = ends.into_iter().peekable();
    let mut ended = 0_u64;
    for (position, (sum, value)) in sums[least..].iter_mut().zip(copy).enumerate() {
        while let Some((_, weight)) = ends.next_if(|(end, _)| *end <= least + position) {
            ended += weight;
        }
        if ended > 0 {
            *sum += ended as f64 * f64::from(*value);
        }
    }
    Ok(sums.into_iter().map(|sum| (sum / total as f64) as f32).collect())
}
