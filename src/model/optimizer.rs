//! AdamW's settings, the learning-rate schedule, and the step-dependent numbers its kernel reads.

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
        let exponent = (step + 1).min(i32::MAX as u64) as i32;
        scalars[scalar::LR] = self.lr_at(run_step);
        // From the rounded decay rates that the kernel uses: their rounding then cancels.
        scalars[scalar::BIAS1] = (1.0 - f64::from(BETA1).powi(exponent)) as f32;
        scalars[scalar::BIAS2] = (1.0 - f64::from(BETA2).powi(exponent)) as f32;
        scalars[scalar::WEIGHT_DECAY] = self.weight_decay;
        scalars[scalar::CLIP] = self.clip.unwrap_or(0.0);
        scalars[scalar::GRAD_SCALE] = 1.0;
        scalars[scalar::BETA1] = BETA1;
        scalars[scalar::BETA2] = BETA2;
        scalars[scalar::EPSILON] = EPSILON;
    }
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
}
