//! Whose adapter has moved much further than is usual in the run.
//!
//! Separate because it compares members with each other and with the past, where `round` looks at each update by itself.

use std::collections::{BTreeMap, VecDeque};

use super::round::{OpenRound, Part};
use crate::protocol::message::Digest;
use crate::terms::ids::{ClientId, RoundKey};

/// An adapter that has moved more than so many times as far as is usual is an outlier. Honest clients differ by their data and by
/// how long their batches are, which is a factor of two or three.
const FACTOR: f64 = 10.0;
/// From so many members on a round is compared with itself.
const COMPARABLE: usize = 3;
/// Distances of earlier rounds that are remembered.
const REMEMBERED: usize = 64;

/// How far adapters usually move in a round, as the root mean square of the change of their values: of adapters of other lengths it
/// is comparable.
#[derive(Default)]
pub(super) struct Usual {
    /// What rounds start from, whole.
    base: Vec<f32>,
    past: VecDeque<f64>,
    /// Of the round that was closed last, and counts when the next one begins.
    last: Option<(RoundKey, Vec<f64>)>,
    /// The main server has begun the last round again, although it had an average: that was of no use.
    rejected: bool,
}

impl Usual {
    /// Rounds start from this.
    pub(crate) fn start_from(&mut self, values: Vec<f32>) {
        self.base = values;
    }

    /// What rounds start from, as far as it is known.
    pub(crate) fn base(&self) -> &[f32] {
        &self.base
    }

    /// A round is opened.
    pub(crate) fn open(&mut self, round: RoundKey) {
        if let Some((last, distances)) = self.last.take_if(|(last, _)| *last != round) {
            self.rejected = last.round == round.round;
            if !self.rejected {
                self.past.extend(distances);
                let surplus = self.past.len().saturating_sub(REMEMBERED);
                self.past.drain(..surplus);
            }
        }
    }

    /// Who has moved too far, of a round that is to be closed.
    pub(crate) fn outliers(&self, open: &OpenRound) -> Vec<ClientId> {
        let distances = self.distances(open);
        let own = || distances.values().copied();
        let usual = match distances.len() {
            COMPARABLE.. => lower_median(own()),
            // With two there is no telling which is right, but by what was usual before, or where their average was of no use.
            2 if self.rejected && self.past.is_empty() => own().min_by(f64::total_cmp),
            _ => lower_median(self.past.iter().copied()),
        };
        let Some(usual) = usual.filter(|usual| *usual > 0.0) else {
            return Vec::new();
        };
        let far = distances.iter().filter(|(_, distance)| **distance > FACTOR * usual);
        far.map(|(client, _)| *client).collect()
    }

    /// A round is closed, whose members have moved so far, with this average.
    pub(crate) fn close(&mut self, round: RoundKey, distances: BTreeMap<ClientId, f64>, average: Option<&[f32]>) {
        if let Some(average) = average {
            self.last = Some((round, distances.into_values().collect()));
            self.base = average.to_vec();
        }
    }

    /// How far members have moved who started from what is known here.
    pub(crate) fn distances(&self, open: &OpenRound) -> BTreeMap<ClientId, f64> {
        let mut bases: BTreeMap<Part, (Vec<f32>, Digest)> = BTreeMap::new();
        let mut distances = BTreeMap::new();
        for (client, member) in &open.members {
            let Some(update) = &member.update else { continue };
            let (base, digest) = bases.entry(member.part()).or_insert_with(|| {
                let base = member.part().of(open.rule.as_ref(), &self.base);
                let digest = Digest::of_values(&base);
                (base, digest)
            });
            if !base.is_empty() && base.len() == update.values.len() && *digest == member.base {
                distances.insert(*client, distance(&update.values, base));
            }
        }
        distances
    }
}

/// The root mean square of the differences.
fn distance(values: &[f32], base: &[f32]) -> f64 {
    let squares = values
        .iter()
        .zip(base)
        .map(|(value, base)| (f64::from(*value) - f64::from(*base)).powi(2));
    (squares.sum::<f64>() / base.len() as f64).sqrt()
}

/// Of two in the middle the smaller: who lies far out is not to move it.
fn lower_median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len().checked_sub(1)? / 2).copied()
}
