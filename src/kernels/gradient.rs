//! Adapter gradients of several contributions into one: each is computed when it comes, and takes part with a weight that is
//! known when all have.
//!
//! | version | idea | measured |
//! |---|---|---|
//! | 1 | an invocation an element; bound by memory | not measured on a GPU yet |

use super::case::{Example, case};
use super::scalar;
use crate::compute::cpu::for_each_row;
use crate::compute::kernel::Contract;
use crate::compute::{Buffer, Cost, Recording, linear_workgroups};
use crate::{contract, params, variant};

/// Invocations in a workgroup, the default of `WORKGROUP` in the shader.
const WORKGROUP: u32 = 64;

/// Elements a CPU task takes at once.
const BLOCK: usize = 4096;

params! {
    /// Sizes for `gradient.add`.
    pub struct Params {
        pub n: u32,
    }
}

contract! {
    /// `sum += scalars[WEIGHT] · lane`.
    pub(crate) static ADD = "gradient.add", Params,
    [lane: Read f32, scalars: Read f32, sum: Write f32],
    spec: spec::add, host: add_host, variants: [ADD_ELEMENT]
}

variant! {
    /// An invocation an element.
    static ADD_ELEMENT = ADD, "element", ["gradient"], "add", Params,
    grid: |params| linear_workgroups(params.n as usize, WORKGROUP),
}

/// The contracts of this family.
pub static ALL: &[&Contract] = &[&ADD];

/// Records `sum[0..n] += scalars[WEIGHT] · lane[0..n]`.
pub fn add(recording: &mut Recording, n: usize, lane: &Buffer, scalars: &Buffer, sum: &Buffer) {
    recording.dispatch(
        &ADD,
        Params { n: n as u32 },
        &[lane, scalars, sum],
        Cost {
            flops: 2.0 * n as f64,
            bytes: 12.0 * n as f64,
        },
    );
}

/// What benches time.
pub(crate) static EXAMPLES: &[Example] = &[Example {
    name: "gradient.add",
    shape: |s| s.adapter_length().to_string(),
    build: |b, s| {
        let n = s.adapter_length();
        let lane = b.random("lane", n)?;
        let scalars = b.scalars()?;
        let sum = b.random("sum", n)?;
        Ok(case(&[(&sum.clone(), n)], false, move |recording| {
            add(recording, n, &lane, &scalars, &sum);
        }))
    },
}];

/// The mathematics in plain loops.
pub mod spec {
    use super::{Params, scalar};
    use crate::compute::real::Real;

    /// Adds a lane's gradient, by its weight, to the step's.
    pub fn add<T: Real>(
        params: &Params,
        lane: &[T],    // (n)
        scalars: &[T], // (scalar::COUNT)
        sum: &mut [T], // (n)
    ) {
        for i in 0..params.n as usize {
            sum[i] += scalars[scalar::WEIGHT] * lane[i];
        }
    }
}

/// [`spec::add`] on all cores.
fn add_host(
    params: &Params,
    lane: &[f32],    // (n)
    scalars: &[f32], // (scalar::COUNT)
    sum: &mut [f32], // (n)
) {
    let weight = scalars[scalar::WEIGHT];
    for_each_row(&mut sum[..params.n as usize], BLOCK, |block, sum| {
        for (sum, lane) in sum.iter_mut().zip(&lane[block * BLOCK..]) {
            *sum += weight * lane;
        }
    });
}
