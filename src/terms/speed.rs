//! What a device computes in a second.

/// Speed of a device on its part of the model, measured with the run's own kernels and shapes, in FLOP/s.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speed {
    /// Of the forward pass.
    pub forward_flops_per_s: f64,
    /// Of the backward pass, with the optimiser step.
    pub backward_flops_per_s: f64,
}

impl Speed {
    /// The fastest that is believed.
    const MOST: f64 = 1e18;

    /// `None` for numbers that no device has: not finite, less than 1, or more than 10^18.
    pub fn new(forward_flops_per_s: f64, backward_flops_per_s: f64) -> Option<Speed> {
        let possible = |speed: f64| (1.0..=Speed::MOST).contains(&speed);
        (possible(forward_flops_per_s) && possible(backward_flops_per_s)).then_some(Speed {
            forward_flops_per_s,
            backward_flops_per_s,
        })
    }
}
