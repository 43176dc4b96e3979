//! AdamW's settings and the learning-rate schedule: what both sides of the cut must agree on to take the same steps.
//!
//! The numbers a step's kernel reads are made from them by the model; here is only what is said of a run.

use serde::{Deserialize, Serialize};

use super::words;

/// How the learning rate goes over the run, as in `transformers`' `get_constant_schedule_with_warmup` and
/// `get_linear_schedule_with_warmup`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Schedule {
    /// The rate stays where the warm-up led.
    #[default]
    Constant,
    /// Falls to zero at the last step.
    Linear,
}

words!(Schedule {
    Constant = "constant",
    Linear = "linear",
});

/// AdamW with decoupled weight decay (Loshchilov and Hutter 2019), as `torch.optim.AdamW`. The rate of a step follows from this
/// and the step's number in the run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct OptimizerSettings {
    /// The highest learning rate.
    pub lr: f32,
    /// What a value loses in a step, over the learning rate.
    pub weight_decay: f32,
    /// What becomes of the rate after the warm-up.
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

/// Decay rate of the first moment.
pub const BETA1: f32 = 0.9;
/// Decay rate of the second moment.
pub const BETA2: f32 = 0.999;
/// Added to the root of the second moment.
pub const EPSILON: f32 = 1e-8;

impl OptimizerSettings {
    /// The learning rate of the step with index `step`, counted from 0.
    pub(crate) fn lr_at(&self, step: u64) -> f32 {
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

    /// A number that no optimiser can have, by its name: one that is not finite or below zero.
    pub fn impossible(&self) -> Option<(&'static str, f32)> {
        let numbers = [
            ("learning rate", Some(self.lr)),
            ("weight decay", Some(self.weight_decay)),
            ("clip", self.clip),
        ];
        numbers
            .into_iter()
            .filter_map(|(name, number)| Some((name, number?)))
            .find(|(_, number)| !number.is_finite() || *number < 0.0)
    }
}

/// 1 - βᵗ: what the moments of `steps` steps are divided by.
pub fn bias(beta: f32, steps: u64) -> f64 {
    // From the rounded decay rates that the kernel uses: their rounding then cancels.
    1.0 - f64::from(beta).powi(steps.min(i32::MAX as u64) as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn impossible_numbers_are_named() {
        let settings = OptimizerSettings::default();
        assert_eq!(settings.impossible(), None);
        let clipped = OptimizerSettings {
            clip: Some(-1.0),
            ..settings
        };
        assert_eq!(clipped.impossible(), Some(("clip", -1.0)));
        let wild = OptimizerSettings {
            lr: f32::INFINITY,
            ..settings
        };
        assert_eq!(wild.impossible(), Some(("learning rate", f32::INFINITY)));
    }
}
