//! The median of each value (Yin et al. 2018, arXiv 1803.01498, definition 1).
//!
//! Every client counts once, whatever number of examples it claims: a weight is a claim like any other. For an even number it is the
//! mean of the two in the middle. While fewer than half of the adapters are arbitrary, each value lies between the smallest and the
//! largest of the honest ones.

use super::column::Column;

pub(super) fn of_column(column: &mut Column) -> Option<f64> {
    let sorted = sorted(column);
    let middle = sorted.len() / 2;
    match (sorted.get(middle)?, sorted.len() % 2) {
        (value, 1) => Some(f64::from(*value)),
        (value, _) => Some((f64::from(sorted[middle - 1]) + f64::from(*value)) / 2.0),
    }
}

/// The values in order, the main server's copy as often as the clients it stands for.
pub(super) fn sorted(column: &Column) -> Vec<f32> {
    let mut values: Vec<f32> = column.entries.iter().map(|entry| entry.value).collect();
    if let (Some(&copy), further @ 1..) = (values.last(), column.copy_stands_for.saturating_sub(1)) {
        values.extend(std::iter::repeat_n(copy, further));
    }
    values.sort_unstable_by(f32::total_cmp);
    values
}
