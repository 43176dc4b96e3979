//! The low-rank products of LoRA (Hu et al., arXiv 2106.09685): `y += scale · (x·Aᵀ)·Bᵀ` with A (rank, inputs) and
//! B (outputs, rank). The second products are epilogues of [`matmul`](super::matmul); here are the first ones, which are tall and
//! thin, and the gradients of A and B, which sum over all rows.

use super::matmul::{Matrix, Term, add_products};
use super::scalar;
use crate::compute::cpu::for_each_row;
use crate::compute::kernel::Kernel;
use crate::compute::{Buffer, Cost, DeviceClass, Recording, linear_workgroups};
use crate::{kernel, params};

/// Rows a workgroup of `forward_down` and `backward_up` reduces, and ranks it reduces them to: the `BLOCK` of the shader.
const BLOCK: u32 = 4;

/// Invocations in a workgroup, the default of `WORKGROUP` in the shader.
const WORKGROUP: u32 = 64;

/// Rows summed by one invocation before the partial sums are added, and the most partial sums there are.
const SPLIT_ROWS: usize = 64;
const MAX_SPLITS: usize = 32;

params! {
    pub struct ForwardDownParams {
        pub rows: u32,
        pub inputs: u32,
        pub rank: u32,
        /// First element of A (rank, inputs) in `adapter`.
        pub offset: u32,
    }
}

params! {
    pub struct BackwardUpParams {
        pub rows: u32,
        pub outputs: u32,
        pub rank: u32,
        /// First element of B (outputs, rank) in `adapter`.
        pub offset: u32,
    }
}

params! {
    pub struct BackwardBParams {
        pub rows: u32,
        pub outputs: u32,
        pub rank: u32,
        /// First element of the gradient of B (outputs, rank) in `gradient`.
        pub offset: u32,
        pub scale: f32,
    }
}

params! {
    pub struct BackwardAParams {
        pub rows: u32,
        pub inputs: u32,
        pub rank: u32,
        /// First element of the gradient of A (rank, inputs) in `gradient`.
        pub offset: u32,
        pub scale: f32,
    }
}

params! {
    /// Partial sums over the rows of each split.
    pub struct PartialParams {
        pub rows: u32,
        pub columns: u32,
        pub rank: u32,
        /// Rows of every split but the last.
        pub split_rows: u32,
    }
}

params! {
    /// Adds the partial sums to a gradient.
    pub struct SumParams {
        pub columns: u32,
        pub rank: u32,
        pub splits: u32,
        pub offset: u32,
        pub scale: f32,
    }
}

kernel! {
    /// `u = x · Aᵀ`, a workgroup a block of rows and ranks.
    pub static FORWARD_DOWN = "lora.forward_down", "lora", "forward_down", ForwardDownParams,
    [x: Read f32, adapter: Read f32, u: Write f32], forward_down_cpu
}

kernel! {
    /// [`FORWARD_DOWN`], an invocation a block.
    pub static FORWARD_DOWN_REGISTERS = "lora.forward_down", "lora", "forward_down_registers", ForwardDownParams,
    [x: Read f32, adapter: Read f32, u: Write f32], forward_down_cpu
}

kernel! {
    /// `v = d_y · B`, a workgroup a block of rows and ranks.
    pub static BACKWARD_UP = "lora.backward_up", "lora", "backward_up", BackwardUpParams,
    [d_y: Read f32, adapter: Read f32, v: Write f32], backward_up_cpu
}

kernel! {
    /// [`BACKWARD_UP`], an invocation a block.
    pub static BACKWARD_UP_REGISTERS = "lora.backward_up", "lora", "backward_up_registers", BackwardUpParams,
    [d_y: Read f32, adapter: Read f32, v: Write f32], backward_up_cpu
}

kernel! {
    /// `partial[split] = thinᵀ · wide` over the rows of each split.
    pub static BACKWARD_PARTIAL = "lora.backward_partial", "lora", "backward_partial", PartialParams,
    [thin: Read f32, wide: Read f32, partial: Write f32], backward_partial_cpu
}

kernel! {
    /// Adds the partial sums of `uᵀ · d_y` to the gradient of B.
    pub static BACKWARD_B = "lora.backward_b", "lora", "backward_b", SumParams,
    [partial: Read f32, scalars: Read f32, gradient: Write f32], backward_b_cpu
}

kernel! {
    /// Adds the partial sums of `vᵀ · x` to the gradient of A.
    pub static BACKWARD_A = "lora.backward_a", "lora", "backward_a", SumParams,
    [partial: Read f32, scalars: Read f32, gradient: Write f32], backward_a_cpu
}

/// Every kernel of the family.
pub static ALL: &[&Kernel] = &[
    &FORWARD_DOWN,
    &FORWARD_DOWN_REGISTERS,
    &BACKWARD_UP,
    &BACKWARD_UP_REGISTERS,
    &BACKWARD_PARTIAL,
    &BACKWARD_B,
    &BACKWARD_A,
];

/// Rows of every split but the last, and how many splits there are.
fn splits(rows: usize) -> (usize, usize) {
    let split_rows = rows.div_ceil(MAX_SPLITS).max(SPLIT_ROWS);
    (split_rows, rows.div_ceil(split_rows).max(1))
}

/// Words of the `partial` buffer that [`backward_b`] and [`backward_a`] need for `columns` outputs or inputs.
pub fn partial_words(rows: usize, columns: usize, rank: usize) -> usize {
    splits(rows).1 * columns * rank
}

/// Records `u (rows, rank) = x (rows, inputs) · Aᵀ`.
pub fn forward_down(recording: &mut Recording, params: ForwardDownParams, x: &Buffer, adapter: &Buffer, u: &Buffer) {
    let (kernel, workgroups) = match recording.class() {
        DeviceClass::CpuAdapter => (&FORWARD_DOWN_REGISTERS, register_workgroups(params.rows, params.rank)),
        _ => (&FORWARD_DOWN, block_workgroups(params.rows, params.rank)),
    };
    let cost = thin_cost(params.rows, params.inputs, params.rank);
    recording.dispatch(kernel, vec![], params, &[x, adapter, u], workgroups, cost);
}

/// Records `v (rows, rank) = d_y (rows, outputs) · B`.
pub fn backward_up(recording: &mut Recording, params: BackwardUpParams, d_y: &Buffer, adapter: &Buffer, v: &Buffer) {
    let (kernel, workgroups) = match recording.class() {
        DeviceClass::CpuAdapter => (&BACKWARD_UP_REGISTERS, register_workgroups(params.rows, params.rank)),
        _ => (&BACKWARD_UP, block_workgroups(params.rows, params.rank)),
    };
    let cost = thin_cost(params.rows, params.outputs, params.rank);
    recording.dispatch(kernel, vec![], params, &[d_y, adapter, v], workgroups, cost);
}

/// Records `gradient[offset..] += scalars[WEIGHT] · scale · d_yᵀ · u`, (outputs, rank): d_y (rows, outputs), u (rows, rank).
/// `partial` is scratch of [`partial_words`] words.
pub fn backward_b(
    recording: &mut Recording,
    params: BackwardBParams,
    d_y: &Buffer,
    u: &Buffer,
    scalars: &Buffer,
    partial: &Buffer,
    gradient: &Buffer,
) {
    let sum = record_partial(
        recording,
        (params.rows, params.outputs, params.rank),
        (u, d_y),
        partial,
        (params.offset, params.scale),
    );
    record_sum(recording, &BACKWARD_B, sum, scalars, partial, gradient);
}

/// Records `gradient[offset..] += scalars[WEIGHT] · scale · vᵀ · x`, (rank, inputs): v (rows, rank), x (rows, inputs).
/// `partial` is scratch of [`partial_words`] words.
pub fn backward_a(
    recording: &mut Recording,
    params: BackwardAParams,
    v: &Buffer,
    x: &Buffer,
    scalars: &Buffer,
    partial: &Buffer,
    gradient: &Buffer,
) {
    let sum = record_partial(
        recording,
        (params.rows, params.inputs, params.rank),
        (v, x),
        partial,
        (params.offset, params.scale),
    );
    record_sum(recording, &BACKWARD_A, sum, scalars, partial, gradient);
}

fn record_partial(
    recording: &mut Recording,
    (rows, columns, rank): (u32, u32, u32),
    (thin, wide): (&Buffer, &Buffer),
    partial: &Buffer,
    (offset, scale): (u32, f32),
) -> SumParams {
    let (split_rows, splits) = splits(rows as usize);
    let params = PartialParams {
        rows,
        columns,
        rank,
        split_rows: split_rows as u32,
    };
    let workgroups = [columns.div_ceil(WORKGROUP), rank.div_ceil(BLOCK), splits as u32];
    let mut cost = thin_cost(rows, columns, rank);
    cost.bytes += 4.0 * splits as f64 * f64::from(columns) * f64::from(rank);
    recording.dispatch(
        &BACKWARD_PARTIAL,
        vec![],
        params,
        &[thin, wide, partial],
        workgroups,
        cost,
    );
    SumParams {
        columns,
        rank,
        splits: splits as u32,
        offset,
        scale,
    }
}

fn record_sum(
    recording: &mut Recording,
    kernel: &'static Kernel,
    params: SumParams,
    scalars: &Buffer,
    partial: &Buffer,
    gradient: &Buffer,
) {
    let elements = params.columns as usize * params.rank as usize;
    recording.dispatch(
        kernel,
        vec![],
        params,
        &[partial, scalars, gradient],
        linear_workgroups(elements, WORKGROUP),
        Cost {
            flops: elements as f64 * (f64::from(params.splits) + 2.0),
            bytes: 4.0 * elements as f64 * (f64::from(params.splits) + 2.0),
        },
    );
}

fn thin_cost(rows: u32, columns: u32, rank: u32) -> Cost {
    let (rows, columns, rank) = (f64::from(rows), f64::from(columns), f64::from(rank));
    Cost {
        flops: 2.0 * rows * columns * rank,
        bytes: 4.0 * (rows * columns + rows * rank + columns * rank),
    }
}

fn block_workgroups(rows: u32, rank: u32) -> [u32; 3] {
    let blocks = rows.div_ceil(BLOCK) as usize;
    let [x, y, _] = linear_workgroups(blocks, 1);
    [x, y, rank.div_ceil(BLOCK)]
}

fn register_workgroups(rows: u32, rank: u32) -> [u32; 3] {
    let blocks = rows.div_ceil(BLOCK) as usize;
    let [x, y, _] = linear_workgroups(blocks, WORKGROUP);
    [x, y, rank.div_ceil(BLOCK)]
}

/// The specification of `lora.forward_down`.
pub fn forward_down_cpu(
    params: &ForwardDownParams,
    x: &[f32],       // (rows, inputs)
    adapter: &[f32], // A (rank, inputs) at offset
    u: &mut [f32],   // (rows, rank)
) {
    let inputs = params.inputs as usize;
    let term = Term {
        inner: inputs,
        left: Matrix::rows(x, 0, inputs),
        right: Matrix::rows(adapter, params.offset as usize, inputs),
        scale: 1.0,
    };
    set_product(params.rows as usize, params.rank as usize, term, u);
}

/// The specification of `lora.backward_up`.
pub fn backward_up_cpu(
    params: &BackwardUpParams,
    d_y: &[f32],     // (rows, outputs)
    adapter: &[f32], // B (outputs, rank) at offset
    v: &mut [f32],   // (rows, rank)
) {
    let (outputs, rank) = (params.outputs as usize, params.rank as usize);
    let term = Term {
        inner: outputs,
        left: Matrix::rows(d_y, 0, outputs),
        right: Matrix::columns(adapter, params.offset as usize, rank),
        scale: 1.0,
    };
    set_product(params.rows as usize, rank, term, v);
}

/// The specification of `lora.backward_partial`.
pub fn backward_partial_cpu(
    params: &PartialParams,
    thin: &[f32],        // (rows, rank)
    wide: &[f32],        // (rows, columns)
    partial: &mut [f32], // (splits, rank, columns)
) {
    let (rows, columns, rank) = (params.rows as usize, params.columns as usize, params.rank as usize);
    let split_rows = params.split_rows as usize;
    let splits = rows.div_ceil(split_rows).max(1);
    let elements = rank * columns;
    for_each_row(&mut partial[..splits * elements], elements, |split, partial| {
        let first = split * split_rows;
        let term = Term {
            inner: split_rows.min(rows - first),
            left: Matrix::columns(thin, first * rank, rank),
            right: Matrix::columns(wide, first * columns, columns),
            scale: 1.0,
        };
        set_product(rank, columns, term, partial);
    });
}

/// The specification of `lora.backward_b`.
pub fn backward_b_cpu(
    params: &SumParams,
    partial: &[f32],      // (splits, rank, columns)
    scalars: &[f32],      // see `scalar`
    gradient: &mut [f32], // of B (columns, rank) at offset
) {
    let (columns, rank) = (params.columns as usize, params.rank as usize);
    let factor = scalars[scalar::WEIGHT] * params.scale;
    for r in 0..rank {
        for column in 0..columns {
            gradient[params.offset as usize + column * rank + r] +=
                factor * partial_sum(params, partial, r * columns + column);
        }
    }
}

/// The specification of `lora.backward_a`.
pub fn backward_a_cpu(
    params: &SumParams,
    partial: &[f32],      // (splits, rank, columns)
    scalars: &[f32],      // see `scalar`
    gradient: &mut [f32], // of A (rank, columns) at offset
) {
    let factor = scalars[scalar::WEIGHT] * params.scale;
    let elements = params.columns as usize * params.rank as usize;
    let gradient = &mut gradient[params.offset as usize..][..elements];
    for (i, gradient) in gradient.iter_mut().enumerate() {
        *gradient += factor * partial_sum(params, partial, i);
    }
}

fn partial_sum(params: &SumParams, partial: &[f32], element: usize) -> f32 {
    let split = params.columns as usize * params.rank as usize;
    (0..params.splits as usize).map(|i| partial[i * split + element]).sum()
}

fn set_product(rows: usize, columns: usize, term: Term<'_>, out: &mut [f32]) {
    add_products(rows, columns, &[term], out, |_, row| row.fill(0.0), |_, _| {});
}
