//! How fast a device computes its side of the cut: the time of its own recordings against their own count of the arithmetic.

use std::time::Duration;

use crate::compute;
use crate::model::stack::Stack;

/// The time since any fixed moment.
pub type Clock = fn() -> Duration;

/// No further repetition starts after this long.
const LONGEST: Duration = Duration::from_millis(400);
const REPETITIONS: usize = 5;

/// A side's speed in FLOP/s.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speed {
    pub forward_flops_per_s: f64,
    pub backward_flops_per_s: f64,
}

impl Speed {
    /// `None` unless both are finite and above zero.
    pub(super) fn new(forward_flops_per_s: f64, backward_flops_per_s: f64) -> Option<Self> {
        let possible = |speed: f64| speed.is_finite() && speed > 0.0;
        (possible(forward_flops_per_s) && possible(backward_flops_per_s)).then_some(Self {
            forward_flops_per_s,
            backward_flops_per_s,
        })
    }
}

/// The median time of `run`, in seconds, after a first run that compiles and warms up; where that alone takes long, its time.
pub(super) async fn seconds(
    stack: &mut Stack,
    clock: Clock,
    mut run: impl FnMut(&mut Stack) -> Result<(), compute::Error>,
) -> Result<f64, compute::Error> {
    let begin = clock();
    let mut times = Vec::with_capacity(REPETITIONS + 1);
    while times.len() <= REPETITIONS && (times.is_empty() || clock().saturating_sub(begin) < LONGEST) {
        let start = clock();
        run(stack)?;
        stack.engine().wait().await?;
        times.push(clock().saturating_sub(start).as_secs_f64());
    }
    if times.len() > 1 {
        times.remove(0);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// FLOP/s of the recording called `name`, which takes so long.
pub(super) fn rate(stack: &Stack, name: &'static str, seq: usize, seconds: f64) -> f64 {
    stack.cost(name, seq).unwrap_or_default().flops / seconds
}
