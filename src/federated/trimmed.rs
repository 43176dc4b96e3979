//! The mean of each value without the largest and the smallest (Yin et al. 2018, arXiv 1803.01498, definition 2).
//!
//! Of n adapters ⌊(n + 1) / 4⌋ are left out at each end: one of three to six, two of seven to ten; none of two, for nobody can tell
//! which of two is right. The others count equally, whatever number of examples they claim. While no more are arbitrary than are
//! left out at one end, each value lies between the smallest and the largest of the honest ones.

use super::column::Column;
use super::median::sorted;

/// How many of `clients` are left out at each end.
pub fn trimmed_at_each_end(clients: usize) -> usize {
    (clients + 1) / 4
}

pub(super) fn of_column(column: &mut Column) -> Option<f64> {
    let sorted = sorted(column);
    let out = trimmed_at_each_end(sorted.len());
    let kept = &sorted[out..sorted.len() - out];
    let sum: f64 = kept.iter().map(|value| f64::from(*value)).sum();
    (!kept.is_empty()).then(|| sum / kept.len() as f64)
}
