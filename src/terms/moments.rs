//! What AdamW keeps of each value, and what becomes of it when averaged values replace a client's own.

use std::ops::Range;

use super::optimizer::{BETA1, BETA2, bias};
use super::words;

/// What becomes of a client's optimiser moments when the averaged adapter replaces its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MomentPolicy {
    /// They stay, whatever was averaged.
    Keep,
    /// They begin anew with every round.
    Reset,
}

words!(MomentPolicy {
    Keep = "keep",
    Reset = "reset",
});

/// AdamW's moments of some values, in their order, as they are after `steps` steps. Who keeps another count brings them to it, so
/// that what the bias correction makes of them stays the same.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Moments {
    /// Steps that led to them.
    pub steps: u64,
    /// Decaying means of the gradient, one for each value.
    pub first: Vec<f32>,
    /// Decaying means of its square, one for each value.
    pub second: Vec<f32>,
}

impl Moments {
    /// Of `len` values that no step was taken on.
    pub fn zero(len: usize) -> Self {
        Self {
            steps: 0,
            first: vec![0.0; len],
            second: vec![0.0; len],
        }
    }

    /// Values whose moments these are.
    pub fn len(&self) -> usize {
        self.first.len()
    }

    /// Whether they are of no value.
    pub fn is_empty(&self) -> bool {
        self.first.is_empty()
    }

    /// Whether these are moments of `len` values after `steps` steps.
    pub(crate) fn are_of(&self, len: usize, steps: u64) -> bool {
        (self.steps, self.first.len(), self.second.len()) == (steps, len, len)
    }

    /// Whether all are finite, and the second ones no less than zero.
    pub(crate) fn are_possible(&self) -> bool {
        self.first.iter().all(|value| value.is_finite())
            && self.second.iter().all(|value| value.is_finite() && *value >= 0.0)
    }

    /// The moments for an optimiser that has taken `steps` steps, such that its bias correction makes the same of them.
    pub fn at(mut self, steps: u64) -> Self {
        if steps != self.steps {
            let scale = |beta| match self.steps {
                0 => 0.0,
                own => (bias(beta, steps) / bias(beta, own)) as f32,
            };
            let (first, second) = (scale(BETA1), scale(BETA2));
            self.first.iter_mut().for_each(|value| *value *= first);
            self.second.iter_mut().for_each(|value| *value *= second);
            self.steps = steps;
        }
        self
    }

    /// Those of some of the values.
    ///
    /// # Panics
    /// If the range is not within them.
    pub fn slice(&self, range: Range<usize>) -> Self {
        Self {
            steps: self.steps,
            first: self.first[range.clone()].to_vec(),
            second: self.second[range].to_vec(),
        }
    }

    /// These, then those of `others`, brought to this number of steps.
    pub(crate) fn followed_by(mut self, others: Self) -> Self {
        let others = others.at(self.steps);
        self.first.extend(others.first);
        self.second.extend(others.second);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_of_another_count_are_corrected_to_the_same() {
        let moments = Moments {
            steps: 3,
            first: vec![0.5, -1.0],
            second: vec![0.25, 4.0],
        };
        assert_eq!(moments.clone().at(3), moments, "bit by bit");
        let moved = moments.clone().at(40);
        for index in 0..2 {
            let corrected = |m: &Moments| {
                let first = f64::from(m.first[index]) / bias(BETA1, m.steps);
                (first, f64::from(m.second[index]) / bias(BETA2, m.steps))
            };
            let ((first, second), (other_first, other_second)) = (corrected(&moments), corrected(&moved));
            assert!((first - other_first).abs() < 1e-6 * first.abs());
            assert!((second - other_second).abs() < 1e-6 * second);
        }
        assert_eq!(Moments::zero(1).at(7).first, [0.0]);
        assert_eq!(
            moments.clone().at(0),
            Moments::zero(2),
            "whoever has taken no step has no moments"
        );
        let joined = moments.slice(0..1).followed_by(moments.slice(1..2).at(9));
        assert_eq!((joined.len(), joined.steps), (2, 3));
    }
}
