//! The low-rank products of LoRA (Hu et al., arXiv 2106.09685): `y += scale · (x·Aᵀ)·Bᵀ` with A (rank, inputs) and
//! B (outputs, rank). The second products are epilogues of [`matmul`](super::matmul); here are the first ones, which are tall and
//! thin, and the gradients of A and B, which sum over all rows.
//!
//! | version | idea | measured |
//! |---|---|---|
//! | `block` | a workgroup reduces 4 rows to 4 ranks; gradients in two deterministic passes over splits of the rows | not measured on a GPU yet |
//! | `registers` | an invocation a block, for adapters emulated on a CPU | |
//! | host | packed panels, as all products of the CPU engine; at most 4 rows: A is read once and in its own order | |

use super::case::{Example, case};
use super::scalar;
use super::weight::Columns;
use crate::compute::cpu::for_each_row;
use crate::compute::host::product::{Matrix, Term, add_products};
use crate::compute::host::vector::{FewRows, MOST_ROWS};
use crate::compute::host::weight::Stored;
use crate::compute::kernel::Contract;
use crate::compute::{Buffer, Cost, DeviceClass, Recording, linear_workgroups};
use crate::terms::format::Format;
use crate::{contract, params, variant};

/// Rows a workgroup of `forward_down` and `backward_up` reduces, and ranks it reduces them to: the `BLOCK` of the shader.
const BLOCK: u32 = 4;

/// Invocations in a workgroup, the default of `WORKGROUP` in the shader.
const WORKGROUP: u32 = 64;

/// Rows summed by one invocation before the partial sums are added, and the most partial sums there are.
const SPLIT_ROWS: usize = 64;
const MAX_SPLITS: usize = 32;

params! {
    /// `thin (rows, rank) = wide (rows, columns) · m`.
    pub struct ThinParams {
        pub rows: u32,
        pub columns: u32,
        pub rank: u32,
        /// Row `i` of the wide factor begins at element `first + i · stride`.
        pub first: u32,
        pub stride: u32,
        /// First element of A (rank, columns) or B (columns, rank) in `adapter`.
        pub offset: u32,
    }
}

/// Sizes of [`forward_down`].
#[derive(Clone, Copy, Debug)]
pub struct DownParams {
    pub rows: usize,
    pub inputs: usize,
    pub rank: usize,
    /// First element of A (rank, inputs) in the adapter.
    pub offset: usize,
}

/// Sizes of [`backward_up`].
#[derive(Clone, Copy, Debug)]
pub struct UpParams {
    pub rows: usize,
    pub outputs: usize,
    pub rank: usize,
    /// First element of B (outputs, rank) in the adapter.
    pub offset: usize,
}

/// Sizes of [`backward_b`].
#[derive(Clone, Copy, Debug)]
pub struct BackwardBParams {
    pub rows: usize,
    pub outputs: usize,
    pub rank: usize,
    /// First element of the gradient of B (outputs, rank).
    pub offset: usize,
    pub scale: f32,
}

/// Sizes of [`backward_a`].
#[derive(Clone, Copy, Debug)]
pub struct BackwardAParams {
    pub rows: usize,
    pub inputs: usize,
    pub rank: usize,
    /// First element of the gradient of A (rank, inputs).
    pub offset: usize,
    pub scale: f32,
}

params! {
    /// Partial sums over the rows of each split.
    pub struct PartialParams {
        pub rows: u32,
        pub columns: u32,
        pub rank: u32,
        /// Rows of every split but the last.
        pub split_rows: u32,
        /// Row `i` of the wide factor begins at element `first + i · stride`.
        pub first: u32,
        pub stride: u32,
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

contract! {
    /// `u = x · Aᵀ`.
    pub(crate) static FORWARD_DOWN = "lora.forward_down", ThinParams,
    [x: Read f32, adapter: Read f32, u: Write f32],
    spec: spec::forward_down, host: forward_down_host, variants: [FORWARD_DOWN_REGISTERS, FORWARD_DOWN_BLOCK]
}

variant! {
    /// An invocation a block of rows and ranks, for adapters emulated on a CPU.
    static FORWARD_DOWN_REGISTERS = FORWARD_DOWN, "registers", ["lora"], "forward_down_registers", ThinParams,
    fits: |profile, _| profile.class == DeviceClass::CpuAdapter,
    grid: |params| register_workgroups(params.rows, params.rank),
}

variant! {
    /// A workgroup a block of rows and ranks.
    static FORWARD_DOWN_BLOCK = FORWARD_DOWN, "block", ["lora"], "forward_down", ThinParams,
    grid: |params| block_workgroups(params.rows, params.rank),
}

contract! {
    /// `v = d_y · B`.
    pub(crate) static BACKWARD_UP = "lora.backward_up", ThinParams,
    [d_y: Read f32, adapter: Read f32, v: Write f32],
    spec: spec::backward_up, host: backward_up_host, variants: [BACKWARD_UP_REGISTERS, BACKWARD_UP_BLOCK]
}

variant! {
    /// An invocation a block of rows and ranks, for adapters emulated on a CPU.
    static BACKWARD_UP_REGISTERS = BACKWARD_UP, "registers", ["lora"], "backward_up_registers", ThinParams,
    fits: |profile, _| profile.class == DeviceClass::CpuAdapter,
    grid: |params| register_workgroups(params.rows, params.rank),
}

variant! {
    /// A workgroup a block of rows and ranks.
    static BACKWARD_UP_BLOCK = BACKWARD_UP, "block", ["lora"], "backward_up", ThinParams,
    grid: |params| block_workgroups(params.rows, params.rank),
}

contract! {
    /// `partial[split] = thinᵀ · wide` over the rows of each split.
    pub(crate) static BACKWARD_PARTIAL = "lora.backward_partial", PartialParams,
    [thin: Read f32, wide: Read f32, partial: Write f32],
    spec: spec::backward_partial, host: backward_partial_host, variants: [BACKWARD_PARTIAL_COLUMN]
}

variant! {
    /// An invocation a column and a block of ranks of one split.
    static BACKWARD_PARTIAL_COLUMN = BACKWARD_PARTIAL, "column", ["lora"], "backward_partial", PartialParams,
    grid: |params| [
        params.columns.div_ceil(WORKGROUP),
        params.rank.div_ceil(BLOCK),
        params.rows.div_ceil(params.split_rows).max(1),
    ],
}

contract! {
    /// Adds the partial sums of `uᵀ · d_y` to the gradient of B.
    pub(crate) static BACKWARD_B = "lora.backward_b", SumParams,
    [partial: Read f32, scalars: Read f32, gradient: Write f32],
    spec: spec::backward_b, host: spec::backward_b, variants: [BACKWARD_B_ELEMENT]
}

variant! {
    /// An invocation a value.
    static BACKWARD_B_ELEMENT = BACKWARD_B, "element", ["lora"], "backward_b", SumParams,
    grid: |params| linear_workgroups(params.columns as usize * params.rank as usize, WORKGROUP),
}

contract! {
    /// Adds the partial sums of `vᵀ · x` to the gradient of A.
    pub(crate) static BACKWARD_A = "lora.backward_a", SumParams,
    [partial: Read f32, scalars: Read f32, gradient: Write f32],
    spec: spec::backward_a, host: spec::backward_a, variants: [BACKWARD_A_ELEMENT]
}

variant! {
    /// An invocation a value.
    static BACKWARD_A_ELEMENT = BACKWARD_A, "element", ["lora"], "backward_a", SumParams,
    grid: |params| linear_workgroups(params.columns as usize * params.rank as usize, WORKGROUP),
}

/// The contracts of this family.
pub static ALL: &[&Contract] = &[&FORWARD_DOWN, &BACKWARD_UP, &BACKWARD_PARTIAL, &BACKWARD_B, &BACKWARD_A];

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
pub fn forward_down(recording: &mut Recording, params: DownParams, x: Columns<'_>, adapter: &Buffer, u: &Buffer) {
    let DownParams {
        rows,
        inputs,
        rank,
        offset,
    } = params;
    thin(recording, &FORWARD_DOWN, (rows, inputs, rank), x, (adapter, offset), u);
}

/// Records `v (rows, rank) = d_y (rows, outputs) · B`.
pub fn backward_up(recording: &mut Recording, params: UpParams, d_y: Columns<'_>, adapter: &Buffer, v: &Buffer) {
    let UpParams {
        rows,
        outputs,
        rank,
        offset,
    } = params;
    thin(
        recording,
        &BACKWARD_UP,
        (rows, outputs, rank),
        d_y,
        (adapter, offset),
        v,
    );
}

fn thin(
    recording: &mut Recording,
    contract: &'static Contract,
    (rows, columns, rank): (usize, usize, usize),
    wide: Columns<'_>,
    (adapter, offset): (&Buffer, usize),
    out: &Buffer,
) {
    let params = ThinParams {
        rows: rows as u32,
        columns: columns as u32,
        rank: rank as u32,
        first: wide.first as u32,
        stride: wide.stride as u32,
        offset: offset as u32,
    };
    let cost = thin_cost(params.rows, params.columns, params.rank);
    recording.dispatch(contract, params, &[wide.buffer, adapter, out], cost);
}

/// Records `gradient[offset..] += scalars[WEIGHT] · scale · d_yᵀ · u`, (outputs, rank): d_y (rows, outputs), u (rows, rank).
/// `partial` is scratch of [`partial_words`] words.
pub fn backward_b(
    recording: &mut Recording,
    params: BackwardBParams,
    d_y: Columns<'_>,
    u: &Buffer,
    scalars: &Buffer,
    partial: &Buffer,
    gradient: &Buffer,
) {
    let sizes = (params.rows, params.outputs, params.rank);
    let sum = record_partial(recording, sizes, (u, d_y), partial, (params.offset, params.scale));
    record_sum(recording, &BACKWARD_B, sum, scalars, partial, gradient);
}

/// Records `gradient[offset..] += scalars[WEIGHT] · scale · vᵀ · x`, (rank, inputs): v (rows, rank), x (rows, inputs).
/// `partial` is scratch of [`partial_words`] words.
pub fn backward_a(
    recording: &mut Recording,
    params: BackwardAParams,
    v: &Buffer,
    x: Columns<'_>,
    scalars: &Buffer,
    partial: &Buffer,
    gradient: &Buffer,
) {
    let sizes = (params.rows, params.inputs, params.rank);
    let sum = record_partial(recording, sizes, (v, x), partial, (params.offset, params.scale));
    record_sum(recording, &BACKWARD_A, sum, scalars, partial, gradient);
}

fn record_partial(
    recording: &mut Recording,
    (rows, columns, rank): (usize, usize, usize),
    (thin, wide): (&Buffer, Columns<'_>),
    partial: &Buffer,
    (offset, scale): (usize, f32),
) -> SumParams {
    let (split_rows, splits) = splits(rows);
    let params = PartialParams {
        rows: rows as u32,
        columns: columns as u32,
        rank: rank as u32,
        split_rows: split_rows as u32,
        first: wide.first as u32,
        stride: wide.stride as u32,
    };
    let mut cost = thin_cost(params.rows, params.columns, params.rank);
    cost.bytes += 4.0 * splits as f64 * columns as f64 * rank as f64;
    recording.dispatch(&BACKWARD_PARTIAL, params, &[thin, wide.buffer, partial], cost);
    SumParams {
        columns: columns as u32,
        rank: rank as u32,
        splits: splits as u32,
        offset: offset as u32,
        scale,
    }
}

fn record_sum(
    recording: &mut Recording,
    contract: &'static Contract,
    params: SumParams,
    scalars: &Buffer,
    partial: &Buffer,
    gradient: &Buffer,
) {
    let elements = f64::from(params.columns) * f64::from(params.rank);
    recording.dispatch(
        contract,
        params,
        &[partial, scalars, gradient],
        Cost {
            flops: elements * (f64::from(params.splits) + 2.0),
            bytes: 4.0 * elements * (f64::from(params.splits) + 2.0),
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

/// What benches time.
pub(crate) static EXAMPLES: &[Example] = &[
    Example {
        name: "lora.forward_down",
        shape: |s| format!("{}x{}r{}", s.rows(), s.width, s.rank),
        build: |b, s| {
            let x = b.random("x", s.rows() * s.width)?;
            let adapter = b.random("adapter", s.rank * s.width)?;
            let u = b.zeros("u", s.rows() * s.rank)?;
            Ok(case(&[(&u.clone(), s.rows() * s.rank)], false, move |recording| {
                let params = DownParams {
                    rows: s.rows(),
                    inputs: s.width,
                    rank: s.rank,
                    offset: 0,
                };
                forward_down(recording, params, Columns::all(&x, s.width), &adapter, &u);
            }))
        },
    },
    Example {
        name: "lora.backward_up",
        shape: |s| format!("{}x{}r{}", s.rows(), s.width, s.rank),
        build: |b, s| {
            let d_y = b.random("d_y", s.rows() * s.width)?;
            let adapter = b.random("adapter", s.rank * s.width)?;
            let v = b.zeros("v", s.rows() * s.rank)?;
            Ok(case(&[(&v.clone(), s.rows() * s.rank)], false, move |recording| {
                let params = UpParams {
                    rows: s.rows(),
                    outputs: s.width,
                    rank: s.rank,
                    offset: 0,
                };
                backward_up(recording, params, Columns::all(&d_y, s.width), &adapter, &v);
            }))
        },
    },
    Example {
        name: "lora.backward_b",
        shape: |s| format!("{}x{}r{}", s.rows(), s.width, s.rank),
        build: |b, s| {
            let d_y = b.random("d_y", s.rows() * s.width)?;
            let u = b.random("u", s.rows() * s.rank)?;
            let scalars = b.scalars()?;
            let partial = b.zeros("partial", partial_words(s.rows(), s.width, s.rank))?;
            let gradient = b.zeros("gradient", s.width * s.rank)?;
            let outputs = [(&gradient.clone(), s.width * s.rank)];
            Ok(case(&outputs, false, move |recording| {
                recording.clear(&gradient);
                let params = BackwardBParams {
                    rows: s.rows(),
                    outputs: s.width,
                    rank: s.rank,
                    offset: 0,
                    scale: 2.0,
                };
                let d_y = Columns::all(&d_y, s.width);
                backward_b(recording, params, d_y, &u, &scalars, &partial, &gradient);
            }))
        },
    },
    Example {
        name: "lora.backward_a",
        shape: |s| format!("{}x{}r{}", s.rows(), s.width, s.rank),
        build: |b, s| {
            let x = b.random("x", s.rows() * s.width)?;
            let v = b.random("v", s.rows() * s.rank)?;
            let scalars = b.scalars()?;
            let partial = b.zeros("partial", partial_words(s.rows(), s.width, s.rank))?;
            let gradient = b.zeros("gradient", s.width * s.rank)?;
            let outputs = [(&gradient.clone(), s.width * s.rank)];
            Ok(case(&outputs, false, move |recording| {
                recording.clear(&gradient);
                let params = BackwardAParams {
                    rows: s.rows(),
                    inputs: s.width,
                    rank: s.rank,
                    offset: 0,
                    scale: 2.0,
                };
                let x = Columns::all(&x, s.width);
                backward_a(recording, params, &v, x, &scalars, &partial, &gradient);
            }))
        },
    },
];

/// The mathematics in plain loops.
pub mod spec {
    use super::{PartialParams, SumParams, ThinParams, scalar};
    use crate::compute::real::Real;

    /// The low-rank activations: input times A, transposed.
    pub fn forward_down<T: Real>(
        params: &ThinParams,
        x: &[T],       // (rows, columns), at first and stride
        adapter: &[T], // A (rank, columns) at offset
        u: &mut [T],   // (rows, rank)
    ) {
        let (columns, rank) = (params.columns as usize, params.rank as usize);
        for row in 0..params.rows as usize {
            for r in 0..rank {
                let mut sum = T::ZERO;
                for i in 0..columns {
                    let x = x[params.first as usize + row * params.stride as usize + i];
                    sum += x * adapter[params.offset as usize + r * columns + i];
                }
                u[row * rank + r] = sum;
            }
        }
    }

    /// The gradient of the low-rank activations: that of the output times B.
    pub fn backward_up<T: Real>(
        params: &ThinParams,
        d_y: &[T],     // (rows, columns), at first and stride
        adapter: &[T], // B (columns, rank) at offset
        v: &mut [T],   // (rows, rank)
    ) {
        let (columns, rank) = (params.columns as usize, params.rank as usize);
        for row in 0..params.rows as usize {
            for r in 0..rank {
                let mut sum = T::ZERO;
                for i in 0..columns {
                    let d_y = d_y[params.first as usize + row * params.stride as usize + i];
                    sum += d_y * adapter[params.offset as usize + i * rank + r];
                }
                v[row * rank + r] = sum;
            }
        }
    }

    /// The products of a part of the rows, for one matrix's gradient.
    pub fn backward_partial<T: Real>(
        params: &PartialParams,
        thin: &[T],        // (rows, rank)
        wide: &[T],        // (rows, columns), at first and stride
        partial: &mut [T], // (splits, rank, columns)
    ) {
        let (rows, columns, rank) = (params.rows as usize, params.columns as usize, params.rank as usize);
        let split_rows = params.split_rows as usize;
        for split in 0..rows.div_ceil(split_rows).max(1) {
            for r in 0..rank {
                for column in 0..columns {
                    let mut sum = T::ZERO;
                    for row in split * split_rows..((split + 1) * split_rows).min(rows) {
                        let wide = wide[params.first as usize + row * params.stride as usize + column];
                        sum += thin[row * rank + r] * wide;
                    }
                    partial[(split * rank + r) * columns + column] = sum;
                }
            }
        }
    }

    /// Adds the gradient of B.
    pub fn backward_b<T: Real>(
        params: &SumParams,
        partial: &[T],      // (splits, rank, columns)
        scalars: &[T],      // see `scalar`
        gradient: &mut [T], // of B (columns, rank) at offset
    ) {
        let (columns, rank) = (params.columns as usize, params.rank as usize);
        for r in 0..rank {
            for column in 0..columns {
                let sum = split_sum(params, partial, r * columns + column);
                gradient[params.offset as usize + column * rank + r] +=
                    scalars[scalar::WEIGHT] * T::from(params.scale) * sum;
            }
        }
    }

    /// Adds the gradient of A.
    pub fn backward_a<T: Real>(
        params: &SumParams,
        partial: &[T],      // (splits, rank, columns)
        scalars: &[T],      // see `scalar`
        gradient: &mut [T], // of A (rank, columns) at offset
    ) {
        for i in 0..params.columns as usize * params.rank as usize {
            let sum = split_sum(params, partial, i);
            gradient[params.offset as usize + i] += scalars[scalar::WEIGHT] * T::from(params.scale) * sum;
        }
    }

    fn split_sum<T: Real>(params: &SumParams, partial: &[T], element: usize) -> T {
        let split = params.columns as usize * params.rank as usize;
        (0..params.splits as usize).map(|i| partial[i * split + element]).sum()
    }
}

/// [`spec::forward_down`] on all cores; for few rows, A is read once and in its own order.
fn forward_down_host(params: &ThinParams, x: &[f32], adapter: &[f32], u: &mut [f32]) {
    let (rows, columns, rank) = (params.rows as usize, params.columns as usize, params.rank as usize);
    let (first, stride) = (params.first as usize, params.stride as usize);
    if rows <= MOST_ROWS {
        let product = FewRows {
            rows,
            columns: rank,
            inner: columns,
            x,
            first,
            stride,
            matrix: Stored {
                words: bytemuck::cast_slice(&adapter[params.offset as usize..]),
                format: Format::F32,
                columns,
                scales_at: 0,
            },
            first_row: 0,
            transposed: true,
        };
        return product.compute(|row, r, value| u[row * rank + r] = value);
    }
    let term = Term {
        inner: columns,
        left: Matrix::rows(x, first, stride),
        right: Matrix::rows(adapter, params.offset as usize, columns),
        scale: 1.0,
    };
    set_product(rows, rank, term, u);
}

fn backward_up_host(params: &ThinParams, d_y: &[f32], adapter: &[f32], v: &mut [f32]) {
    let rank = params.rank as usize;
    let term = Term {
        inner: params.columns as usize,
        left: Matrix::rows(d_y, params.first as usize, params.stride as usize),
        right: Matrix::columns(adapter, params.offset as usize, rank),
        scale: 1.0,
    };
    set_product(params.rows as usize, rank, term, v);
}

fn backward_partial_host(params: &PartialParams, thin: &[f32], wide: &[f32], partial: &mut [f32]) {
    let (rows, columns, rank) = (params.rows as usize, params.columns as usize, params.rank as usize);
    let (split_rows, stride) = (params.split_rows as usize, params.stride as usize);
    let splits = rows.div_ceil(split_rows).max(1);
    let elements = rank * columns;
    for_each_row(&mut partial[..splits * elements], elements, |split, partial| {
        let first = split * split_rows;
        let term = Term {
            inner: split_rows.min(rows - first),
            left: Matrix::columns(thin, first * rank, rank),
            right: Matrix::columns(wide, params.first as usize + first * stride, stride),
            scale: 1.0,
        };
        set_product(rank, columns, term, partial);
    });
}

fn set_product(rows: usize, columns: usize, term: Term<'_>, out: &mut [f32]) {
    add_products(rows, columns, &[term], out, |_, row| row.fill(0.0), |_, _| {});
}
