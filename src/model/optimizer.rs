//! AdamW's settings, the learning-rate schedule, the step-dependent numbers its kernel reads, and the moments it keeps.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::kernels::scalar;

/// How the learning rate goes over the run, as in `transformers`' `get_constant_schedule_with_warmup` and
/// `get_linear_schedule_with_warmup`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    #[default]
    Constant,
    /// Falls to zero at the last step.
    Linear,
}

/// AdamW with decoupled weight decay (Loshchilov and Hutter 2019), as `torch.optim.AdamW`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct OptimizerSettings {
    pub lr: f32,
    pub weight_decay: f32,
    pub schedule: Schedule,
    /// Steps over which the learning rate rises from zero.
    pub warmup: u64,
    /// Steps of the whole run, for the linear schedule.
    pub total_steps: u64,
    /// Largest global norm of the gradient; a larger one is scaled down to it.
    pub clip: Option<f32>,
}

impl Default for OptimizerSettings {
    fn default() -> Self {
        Self {
            lr: 3e-3,
            weight_decay: 0.01,
            schedule: Schedule::Constant,
            warmup: 0,
            total_steps: 0,
            clip: None,
        }
    }
}

const BETA1: f32 = 0.9;
const BETA2: f32 = 0.999;
const EPSILON: f32 = 1e-8;

impl OptimizerSettings {
    /// The learning rate of the step with index `step`, counted from 0.
    pub fn lr_at(&self, step: u64) -> f32 {
        let factor = if step < self.warmup {
            step as f64 / self.warmup as f64
        } else {
            match self.schedule {
                Schedule::Constant => 1.0,
                Schedule::Linear => {
                    let left = self.total_steps.saturating_sub(step) as f64;
                    let span = self.total_steps.saturating_sub(self.warmup).max(1) as f64;
                    left / span
                }
            }
        };
        (f64::from(self.lr) * factor) as f32
    }

    /// The numbers that `adamw.update` reads for an optimiser's step with index `step`, counted from 0 since its moments were
    /// zero, at step `run_step` of the run. `scalars[WEIGHT]` and `scalars[FACTOR]` are left as they are.
    pub fn fill_scalars(&self, step: u64, run_step: u64, scalars: &mut [f32; scalar::COUNT]) {
        scalars[scalar::LR] = self.lr_at(run_step);
        scalars[scalar::BIAS1] = bias(BETA1, step + 1) as f32;
        scalars[scalar::BIAS2] = bias(BETA2, step + 1) as f32;
        scalars[scalar::WEIGHT_DECAY] = self.weight_decay;
        scalars[scalar::CLIP] = self.clip.unwrap_or(0.0);
        scalars[scalar::GRAD_SCALE] = 1.0;
        scalars[scalar::BETA1] = BETA1;
        scalars[scalar::BETA2] = BETA2;
        scalars[scalar::EPSILON] = EPSILON;
    }
}

/// 1 - βᵗ: what the moments of `steps` steps are divided by.
fn bias(beta: f32, steps: u64) -> f64 {
    // From the rounded decay rates that the kernel uses: their rounding then cancels.
    1.0 - f64::from(beta).powi(steps.min(i32::MAX as u64) as i32)
}

/// AdamW's moments of some values, in their order, as they are after `steps` steps.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Moments {
    pub steps: u64,
    pub first: Vec<f32>,
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

    pub fn is_empty(&self) -> bool {
        self.first.is_empty()
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
    pub fn followed_by(mut self, others: Self) -> Self {
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

    #[test]
    fn linear_schedule_rises_over_warmup_and_falls_to_zero_at_the_end() {
        let settings = OptimizerSettings {
            lr: 1.0,
            schedule: Schedule::Linear,
            warmup: 2,
            total_steps: 6,
            ..OptimizerSettings::default()
        };
        let rates: Vec<f32> = (0..7).map(|step| settings.lr_at(step)).collect();
        assert_eq!(rates, [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]);
    }
}
