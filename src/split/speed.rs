//! How fast a device computes its side of the cut: the time of its own recordings against their own count of the arithmetic.

use std::time::Duration;

use crate::compute;
use crate::model::stack::Stack;

/// The time since any fixed moment.
pub type Clock = fn() -> Duration;

/// Sequences of the first, short runs.
const PROBE_SEQ: usize = 8;
/// The longest a repetition should take, in seconds: slow devices are measured on shorter sequences.
const LONGEST_RUN_S: f64 = 0.08;
/// No further repetition starts after this long.
const LONGEST: Duration = Duration::from_millis(400);
const REPETITIONS: usize = 5;

/// FLOP/s of the recording called `name`, which `run` runs for the sequences it is given: at `seq`, or at the part of it that a
/// slow device manages in its time. The median of some repetitions, after runs that compile and warm up.
pub(super) async fn rate(
    stack: &mut Stack,
    clock: Clock,
    (name, seq): (&'static str, usize),
    mut run: impl FnMut(&mut Stack, usize) -> Result<(), compute::Error>,
) -> Result<f64, compute::Error> {
    let mut time = async |stack: &mut Stack, seq: usize| {
        let start = clock();
        run(stack, seq)?;
        stack.engine().wait().await?;
        Ok::<_, compute::Error>(clock().saturating_sub(start).as_secs_f64())
    };
    let probe = seq.min(PROBE_SEQ);
    time(stack, probe).await?;
    let expected_s = time(stack, probe).await? * seq as f64 / probe as f64;
    let part = (LONGEST_RUN_S / expected_s).min(1.0);
    let seq = ((seq as f64 * part) as usize).clamp(probe, seq);
    time(stack, seq).await?;
    let begin = clock();
    let mut times = Vec::with_capacity(REPETITIONS);
    while times.len() < REPETITIONS && (times.is_empty() || clock().saturating_sub(begin) < LONGEST) {
        times.push(time(stack, seq).await?);
    }
    times.sort_by(f64::total_cmp);
    Ok(stack.cost(name, seq).unwrap_or_default().flops / times[times.len() / 2])
}
