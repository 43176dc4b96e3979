//! The step-dependent numbers that AdamW's kernel reads, from the run's settings (`terms::optimizer`).

use crate::kernels::scalar;
use crate::terms::optimizer::{BETA1, BETA2, EPSILON, OptimizerSettings, bias};

/// The numbers that `adamw.update` reads for an optimiser's step with index `step`, counted from 0 since its moments were zero, at
/// step `run_step` of the run. `scalars[WEIGHT]` and `scalars[FACTOR]` are left as they are.
pub(crate) fn fill_scalars(settings: &OptimizerSettings, step: u64, run_step: u64, scalars: &mut [f32; scalar::COUNT]) {
    scalars[scalar::LR] = settings.lr_at(run_step);
    scalars[scalar::BIAS1] = bias(BETA1, step + 1) as f32;
    scalars[scalar::BIAS2] = bias(BETA2, step + 1) as f32;
    scalars[scalar::WEIGHT_DECAY] = settings.weight_decay;
    scalars[scalar::CLIP] = settings.clip.unwrap_or(0.0);
    scalars[scalar::GRAD_SCALE] = 1.0;
    scalars[scalar::BETA1] = BETA1;
    scalars[scalar::BETA2] = BETA2;
    scalars[scalar::EPSILON] = EPSILON;
}
