//! One value after the other, with all who have it: what averages that look at each value by itself are made from.
//!
//! Separate because where a value lies differs from client to client, by cut and by rank, and each average needs to know only who
//! has it.

use super::{ClientAdapter, Copied};
use crate::terms::adapter::{AdapterShape, Trained};

/// Somebody's value.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub weight: u64,
    pub value: f32,
}

/// All that there is of one value.
#[derive(Debug, Default)]
pub(super) struct Column {
    /// In the order of the adapters, the main server's copy last.
    pub entries: Vec<Entry>,
    /// For how many clients the last entry stands, if it is the main server's copy.
    pub copy_stands_for: usize,
    /// Weight of the clients that hold the block, but at a smaller rank.
    pub narrower: u64,
    /// Whether it is a value of B.
    pub is_b: bool,
}

/// Makes each value of an adapter of `blocks` blocks at the shape's rank from those who have it. Where `reduce` gives nothing it
/// stays what it is in `base`, or zero.
pub(super) fn reduce(
    shape: &AdapterShape,
    blocks: usize,
    base: &[f32],
    adapters: &[ClientAdapter<'_>],
    copy: Copied<'_>,
    reduce: impl Fn(&mut Column) -> Option<f64>,
) -> Vec<f32> {
    let mut values = vec![0.0_f32; shape.len(blocks, shape.rank())];
    let kept = values.len().min(base.len());
    values[..kept].copy_from_slice(&base[..kept]);
    let own: Vec<Vec<_>> = (adapters.iter())
        .map(|adapter| shape.places(adapter.blocks, adapter.rank).collect())
        .collect();
    let mut column = Column::default();
    for (index, place) in shape.places(blocks, shape.rank()).enumerate() {
        let copied = copy.of(place.block, adapters);
        let parts = [(false, place.inputs), (true, place.outputs)];
        let parts = match shape.trained() {
            Trained::Both => &parts[..],
            Trained::B => &parts[1..],
        };
        for &(is_b, side) in parts {
            for (component, other) in (0..place.rank).flat_map(|row| (0..side).map(move |other| (row, other))) {
                // B has the component in its columns.
                let at = |place: &crate::terms::adapter::MatrixPlace| match is_b {
                    false => place.a + component * place.inputs + other,
                    true => place.b + other * place.rank + component,
                };
                column.entries.clear();
                (column.copy_stands_for, column.narrower, column.is_b) = (0, 0, is_b);
                for (adapter, places) in adapters.iter().zip(&own) {
                    match places.get(index) {
                        Some(place) if component < place.rank => column.entries.push(Entry {
                            weight: adapter.weight,
                            value: adapter.values[at(place)],
                        }),
                        Some(_) => column.narrower += adapter.weight,
                        None => {}
                    }
                }
                if let Some(copied) = &copied {
                    column.copy_stands_for = copied.clients;
                    column.entries.push(Entry {
                        weight: copied.weight,
                        value: copied.values[at(&place) - copied.start],
                    });
                }
                if let Some(value) = reduce(&mut column) {
                    values[at(&place)] = value as f32;
                }
            }
        }
    }
    values
}
