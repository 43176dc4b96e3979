//! Matrix products of the linear layers and the tied head, in the three transpositions, with what follows a product fused
//! into its store: bias, residual, LoRA term, GELU, accumulation.
//!
//! Weights are held as stored: `array<u32>` with either two halves a word (element `i` is half `i & 1` of word `i >> 1`, over
//! the whole row-major matrix) or the bits of one `f32` a word.

use super::gelu::gelu;
use crate::compute::cpu::for_each_row;
use crate::compute::kernel::Kernel;
use crate::compute::{Buffer, Cost, DeviceClass, Recording};
use crate::{kernel, params};
use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

/// Rows and columns of `out` a workgroup of the shared-memory kernels computes, as `TILE` in the shader.
const TILE: u32 = 64;

/// Rows an invocation of the register kernels computes, as `REGISTER_ROWS` in the shader.
const REGISTER_ROWS: u32 = 8;

/// Columns a workgroup of the register kernels computes: 8 for each of its `REGISTER_LANES` invocations.
const REGISTER_COLUMNS: u32 = 64;

params! {
    /// `out (rows, columns) = x (rows, inner) · w` and what follows the product.
    pub struct ProductParams {
        pub rows: u32,
        pub columns: u32,
        pub inner: u32,
        /// First element of `w`.
        pub w_offset: u32,
        /// Non-zero: `w` holds pairs of halves.
        pub f16: u32,
        /// Non-zero: add `bias[column]`.
        pub bias: u32,
        /// Non-zero: add `residual[row, column]`.
        pub residual: u32,
        /// Non-zero: add `row_scale[row]` times what `out` held.
        pub row_scale: u32,
        /// Non-zero: add what `out` held.
        pub accumulate: u32,
        /// Rank of the LoRA term; 0 for none.
        pub rank: u32,
        /// First element of the LoRA matrix in `adapter`.
        pub lora_offset: u32,
        pub lora_scale: f32,
    }
}

params! {
    /// `d_w (inputs, outputs) = scale · xᵀ · d_y`.
    pub struct BackwardWParams {
        pub rows: u32,
        pub inputs: u32,
        pub outputs: u32,
        pub scale: f32,
    }
}

kernel! {
    /// `out = x · w`, w (inner, columns).
    pub static FORWARD = "matmul.forward", "matmul", "forward", ProductParams,
    [x: Read f32, w: Read u32, bias: Read f32, u: Read f32, adapter: Read f32, residual: Read f32, row_scale: Read f32,
     out: Write f32], forward_cpu
}

kernel! {
    /// [`FORWARD`] with four-element loads: `inner`, `columns` and `w_offset` are multiples of 4.
    pub static FORWARD_VEC4 = "matmul.forward", "matmul", "forward_vec4", ProductParams,
    [x: Read f32, w: Read u32, bias: Read f32, u: Read f32, adapter: Read f32, residual: Read f32, row_scale: Read f32,
     out: Write f32], forward_cpu
}

kernel! {
    /// [`FORWARD`] in registers only.
    pub static FORWARD_REGISTERS = "matmul.forward", "matmul", "forward_registers", ProductParams,
    [x: Read f32, w: Read u32, bias: Read f32, u: Read f32, adapter: Read f32, residual: Read f32, row_scale: Read f32,
     out: Write f32], forward_cpu
}

kernel! {
    /// `pre = x · w`, `out = gelu(pre)`.
    pub static FORWARD_GELU = "matmul.forward_gelu", "matmul", "forward_gelu", ProductParams,
    [x: Read f32, w: Read u32, bias: Read f32, u: Read f32, adapter: Read f32, out: Write f32, pre: Write f32],
    forward_gelu_cpu
}

kernel! {
    /// [`FORWARD_GELU`] with four-element loads.
    pub static FORWARD_GELU_VEC4 = "matmul.forward_gelu", "matmul", "forward_gelu_vec4", ProductParams,
    [x: Read f32, w: Read u32, bias: Read f32, u: Read f32, adapter: Read f32, out: Write f32, pre: Write f32],
    forward_gelu_cpu
}

kernel! {
    /// [`FORWARD_GELU`] in registers only.
    pub static FORWARD_GELU_REGISTERS = "matmul.forward_gelu", "matmul", "forward_gelu_registers", ProductParams,
    [x: Read f32, w: Read u32, bias: Read f32, u: Read f32, adapter: Read f32, out: Write f32, pre: Write f32],
    forward_gelu_cpu
}

kernel! {
    /// `out = x · wᵀ`, w (columns, inner).
    pub static BACKWARD_X = "matmul.backward_x", "matmul", "backward_x", ProductParams,
    [x: Read f32, w: Read u32, bias: Read f32, u: Read f32, adapter: Read f32, residual: Read f32, row_scale: Read f32,
     out: Write f32], backward_x_cpu
}

kernel! {
    /// [`BACKWARD_X`] with four-element loads: `inner` and `w_offset` are multiples of 4.
    pub static BACKWARD_X_VEC4 = "matmul.backward_x", "matmul", "backward_x_vec4", ProductParams,
    [x: Read f32, w: Read u32, bias: Read f32, u: Read f32, adapter: Read f32, residual: Read f32, row_scale: Read f32,
     out: Write f32], backward_x_cpu
}

kernel! {
    /// [`BACKWARD_X`] in registers only.
    pub static BACKWARD_X_REGISTERS = "matmul.backward_x", "matmul", "backward_x_registers", ProductParams,
    [x: Read f32, w: Read u32, bias: Read f32, u: Read f32, adapter: Read f32, residual: Read f32, row_scale: Read f32,
     out: Write f32], backward_x_cpu
}

kernel! {
    /// `d_w = scale · xᵀ · d_y`.
    pub static BACKWARD_W = "matmul.backward_w", "matmul", "backward_w", BackwardWParams,
    [x: Read f32, d_y: Read f32, d_w: Write f32], backward_w_cpu
}

kernel! {
    /// [`BACKWARD_W`] in registers only.
    pub static BACKWARD_W_REGISTERS = "matmul.backward_w", "matmul", "backward_w_registers", BackwardWParams,
    [x: Read f32, d_y: Read f32, d_w: Write f32], backward_w_cpu
}

/// Every kernel of the family.
pub static ALL: &[&Kernel] = &[
    &FORWARD,
    &FORWARD_VEC4,
    &FORWARD_REGISTERS,
    &FORWARD_GELU,
    &FORWARD_GELU_VEC4,
    &FORWARD_GELU_REGISTERS,
    &BACKWARD_X,
    &BACKWARD_X_VEC4,
    &BACKWARD_X_REGISTERS,
    &BACKWARD_W,
    &BACKWARD_W_REGISTERS,
];

/// Sizes of a linear layer: x (m, k), w (k, n), y (m, n).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// First element of `w` in its buffer.
    pub w_offset: usize,
}

impl Shape {
    /// A product with the weights at the start of their buffer.
    pub fn new(m: usize, n: usize, k: usize) -> Self {
        Self { m, n, k, w_offset: 0 }
    }
}

/// The low-rank term of a product.
#[derive(Clone, Copy, Debug)]
pub struct Lora<'a> {
    /// (m, rank): what [`lora::forward_down`](super::lora::forward_down) or [`lora::backward_up`](super::lora::backward_up)
    /// made.
    pub u: &'a Buffer,
    pub adapter: &'a Buffer,
    /// First element in `adapter` of B (n, rank) for [`forward`], of A (rank, k) for [`backward_x`].
    pub offset: usize,
    pub rank: u32,
    pub scale: f32,
}

/// What happens to a product before it is stored: bias, LoRA term and residual are added, and what `out` held or `row_scale`
/// times that; then GELU.
#[derive(Clone, Copy, Debug, Default)]
pub struct Epilogue<'a> {
    /// (columns)
    pub bias: Option<&'a Buffer>,
    /// (m, columns)
    pub residual: Option<&'a Buffer>,
    pub lora: Option<Lora<'a>>,
    /// (m, columns): receives the value before GELU; `out` the value after it. With bias and LoRA only.
    pub gelu_pre: Option<&'a Buffer>,
    /// (m): each row of what `out` held is multiplied by it and kept.
    pub row_scale: Option<&'a Buffer>,
    /// Keep what `out` held.
    pub accumulate: bool,
}

/// Records `out (m, n) = x (m, k) · w (k, n)` with `epilogue`.
///
/// # Panics
/// If GELU is asked for together with residual, row scale or accumulation.
pub fn forward(
    recording: &mut Recording,
    shape: Shape,
    f16: bool,
    x: &Buffer,
    w: &Buffer,
    out: &Buffer,
    epilogue: Epilogue<'_>,
) {
    let params = product_params(shape.m, shape.n, shape.k, shape.w_offset, f16, &epilogue);
    let aligned = shape.n.is_multiple_of(4) && shape.w_offset.is_multiple_of(4);
    let kernel = match (recording.class(), epilogue.gelu_pre.is_some()) {
        (DeviceClass::CpuAdapter, false) => &FORWARD_REGISTERS,
        (DeviceClass::CpuAdapter, true) => &FORWARD_GELU_REGISTERS,
        (_, false) if aligned && shape.k.is_multiple_of(4) => &FORWARD_VEC4,
        (_, true) if aligned && shape.k.is_multiple_of(4) => &FORWARD_GELU_VEC4,
        (_, false) => &FORWARD,
        (_, true) => &FORWARD_GELU,
    };
    product(recording, (kernel, aligned), params, x, w, out, &epilogue);
}

/// Records `d_x (m, k) = d_y (m, n) · wᵀ` with `epilogue`; w is (k, n). With `d_y` for hidden states (m, width) and `w` for
/// rows of the token embedding (vocab, width) the same product gives the tied head's logits (m, vocab).
///
/// # Panics
/// If GELU is asked for.
pub fn backward_x(
    recording: &mut Recording,
    shape: Shape,
    f16: bool,
    d_y: &Buffer,
    w: &Buffer,
    d_x: &Buffer,
    epilogue: Epilogue<'_>,
) {
    assert!(epilogue.gelu_pre.is_none(), "matmul.backward_x has no GELU epilogue");
    let params = product_params(shape.m, shape.k, shape.n, shape.w_offset, f16, &epilogue);
    let aligned = shape.n.is_multiple_of(4) && shape.w_offset.is_multiple_of(4);
    let kernel = match recording.class() {
        DeviceClass::CpuAdapter => &BACKWARD_X_REGISTERS,
        _ if aligned => &BACKWARD_X_VEC4,
        _ => &BACKWARD_X,
    };
    product(recording, (kernel, aligned), params, d_y, w, d_x, &epilogue);
}

/// Records `d_w (k, n) = scale · xᵀ · d_y`, the rows summed in order.
pub fn backward_w(recording: &mut Recording, shape: Shape, x: &Buffer, d_y: &Buffer, d_w: &Buffer, scale: f32) {
    assert_eq!(shape.w_offset, 0, "matmul.backward_w writes whole matrices");
    let params = BackwardWParams {
        rows: shape.m as u32,
        inputs: shape.k as u32,
        outputs: shape.n as u32,
        scale,
    };
    let kernel = match recording.class() {
        DeviceClass::CpuAdapter => &BACKWARD_W_REGISTERS,
        _ => &BACKWARD_W,
    };
    let (m, n, k) = (shape.m as f64, shape.n as f64, shape.k as f64);
    recording.dispatch(
        kernel,
        vec![],
        params,
        &[x, d_y, d_w],
        workgroups(recording.class(), shape.k, shape.n),
        Cost {
            flops: 2.0 * m * n * k,
            bytes: 4.0 * (m * n + m * k + k * n),
        },
    );
}

fn product_params(
    rows: usize,
    columns: usize,
    inner: usize,
    w_offset: usize,
    f16: bool,
    epilogue: &Epilogue<'_>,
) -> ProductParams {
    let lora = epilogue.lora;
    ProductParams {
        rows: rows as u32,
        columns: columns as u32,
        inner: inner as u32,
        w_offset: w_offset as u32,
        f16: f16.into(),
        bias: epilogue.bias.is_some().into(),
        residual: epilogue.residual.is_some().into(),
        row_scale: epilogue.row_scale.is_some().into(),
        accumulate: epilogue.accumulate.into(),
        rank: lora.map_or(0, |lora| lora.rank),
        lora_offset: lora.map_or(0, |lora| lora.offset as u32),
        lora_scale: lora.map_or(0.0, |lora| lora.scale),
    }
}

fn workgroups(class: DeviceClass, rows: usize, columns: usize) -> [u32; 3] {
    let (tile_rows, tile_columns) = match class {
        DeviceClass::CpuAdapter => (REGISTER_ROWS, REGISTER_COLUMNS),
        _ => (TILE, TILE),
    };
    [
        (columns as u32).div_ceil(tile_columns),
        (rows as u32).div_ceil(tile_rows),
        1,
    ]
}

fn product(
    recording: &mut Recording,
    (kernel, aligned): (&'static Kernel, bool),
    params: ProductParams,
    x: &Buffer,
    w: &Buffer,
    out: &Buffer,
    epilogue: &Epilogue<'_>,
) {
    let (rows, columns, inner) = (
        f64::from(params.rows),
        f64::from(params.columns),
        f64::from(params.inner),
    );
    let rank = f64::from(params.rank);
    let outputs = 1
        + usize::from(epilogue.residual.is_some())
        + usize::from(epilogue.gelu_pre.is_some())
        + usize::from(epilogue.accumulate || epilogue.row_scale.is_some());
    let cost = Cost {
        flops: 2.0 * rows * columns * (inner + rank),
        bytes: 4.0 * (rows * inner + rows * columns * outputs as f64 + rank * (rows + columns))
            + inner * columns * if params.f16 != 0 { 2.0 } else { 4.0 },
    };
    let groups = workgroups(recording.class(), params.rows as usize, params.columns as usize);
    let mut constants = vec![("F16", (params.f16 != 0).into())];
    if recording.class() == DeviceClass::CpuAdapter {
        constants.push(("ALIGNED", aligned.into()));
    }
    // What an epilogue does not use is bound to `x`: the params say that it is not read.
    let bias = epilogue.bias.unwrap_or(x);
    let (u, adapter) = epilogue.lora.map_or((x, x), |lora| (lora.u, lora.adapter));
    if let Some(pre) = epilogue.gelu_pre {
        assert!(
            epilogue.residual.is_none() && epilogue.row_scale.is_none() && !epilogue.accumulate,
            "matmul.forward_gelu takes bias and LoRA only"
        );
        let buffers = [x, w, bias, u, adapter, out, pre];
        recording.dispatch(kernel, constants, params, &buffers, groups, cost);
    } else {
        let residual = epilogue.residual.unwrap_or(x);
        let row_scale = epilogue.row_scale.unwrap_or(x);
        let buffers = [x, w, bias, u, adapter, residual, row_scale, out];
        recording.dispatch(kernel, constants, params, &buffers, groups, cost);
    }
}

/// The specification of `matmul.forward`.
#[allow(clippy::too_many_arguments)] // one for each binding
pub fn forward_cpu(
    params: &ProductParams,
    x: &[f32],         // (rows, inner)
    w: &[u32],         // (inner, columns)
    bias: &[f32],      // (columns)
    u: &[f32],         // (rows, rank)
    adapter: &[f32],   // (columns, rank) at lora_offset
    residual: &[f32],  // (rows, columns)
    row_scale: &[f32], // (rows)
    out: &mut [f32],   // (rows, columns)
) {
    let (inner, rank) = (params.inner as usize, params.rank as usize);
    let terms = [
        Term {
            inner,
            left: Matrix::rows(x, 0, inner),
            right: weights(params, w, params.columns as usize, false),
            scale: 1.0,
        },
        Term {
            inner: rank,
            left: Matrix::rows(u, 0, rank),
            right: Matrix::rows(adapter, params.lora_offset as usize, rank),
            scale: params.lora_scale,
        },
    ];
    product_cpu(params, &terms, bias, residual, row_scale, out);
}

/// The specification of `matmul.forward_gelu`.
#[allow(clippy::too_many_arguments)] // one for each binding
pub fn forward_gelu_cpu(
    params: &ProductParams,
    x: &[f32],       // (rows, inner)
    w: &[u32],       // (inner, columns)
    bias: &[f32],    // (columns)
    u: &[f32],       // (rows, rank)
    adapter: &[f32], // (columns, rank) at lora_offset
    out: &mut [f32], // (rows, columns)
    pre: &mut [f32], // (rows, columns)
) {
    forward_cpu(params, x, w, bias, u, adapter, &[], &[], pre);
    let columns = params.columns as usize;
    let elements = params.rows as usize * columns;
    for_each_row(&mut out[..elements], columns, |row, out| {
        for (out, &pre) in out.iter_mut().zip(&pre[row * columns..]) {
            *out = gelu(pre);
        }
    });
}

/// The specification of `matmul.backward_x`.
#[allow(clippy::too_many_arguments)] // one for each binding
pub fn backward_x_cpu(
    params: &ProductParams,
    x: &[f32],         // (rows, inner)
    w: &[u32],         // (columns, inner)
    bias: &[f32],      // (columns)
    u: &[f32],         // (rows, rank)
    adapter: &[f32],   // (rank, columns) at lora_offset
    residual: &[f32],  // (rows, columns)
    row_scale: &[f32], // (rows)
    out: &mut [f32],   // (rows, columns)
) {
    let (columns, inner, rank) = (params.columns as usize, params.inner as usize, params.rank as usize);
    let terms = [
        Term {
            inner,
            left: Matrix::rows(x, 0, inner),
            right: weights(params, w, inner, true),
            scale: 1.0,
        },
        Term {
            inner: rank,
            left: Matrix::rows(u, 0, rank),
            right: Matrix::columns(adapter, params.lora_offset as usize, columns),
            scale: params.lora_scale,
        },
    ];
    product_cpu(params, &terms, bias, residual, row_scale, out);
}

/// The specification of `matmul.backward_w`.
pub fn backward_w_cpu(
    params: &BackwardWParams,
    x: &[f32],       // (rows, inputs)
    d_y: &[f32],     // (rows, outputs)
    d_w: &mut [f32], // (inputs, outputs)
) {
    let (inputs, outputs) = (params.inputs as usize, params.outputs as usize);
    let term = Term {
        inner: params.rows as usize,
        left: Matrix::columns(x, 0, inputs),
        right: Matrix::columns(d_y, 0, outputs),
        scale: params.scale,
    };
    add_products(inputs, outputs, &[term], d_w, |_, row| row.fill(0.0), |_, _| {});
}

fn weights<'a>(params: &ProductParams, w: &'a [u32], stride: usize, rows: bool) -> Matrix<'a> {
    Matrix {
        values: if params.f16 != 0 {
            Values::F16(bytemuck::cast_slice::<u32, u16>(w).reinterpret_cast())
        } else {
            Values::F32(bytemuck::cast_slice(w))
        },
        offset: params.w_offset as usize,
        stride,
        inner_contiguous: rows,
    }
}

fn product_cpu(
    params: &ProductParams,
    terms: &[Term<'_>],
    bias: &[f32],
    residual: &[f32],
    row_scale: &[f32],
    out: &mut [f32],
) {
    let columns = params.columns as usize;
    add_products(
        params.rows as usize,
        columns,
        terms,
        out,
        |row, out| {
            if params.row_scale != 0 {
                out.iter_mut().for_each(|out| *out *= row_scale[row]);
            } else if params.accumulate == 0 {
                out.fill(0.0);
            }
        },
        |row, out| {
            if params.bias != 0 {
                out.iter_mut().zip(bias).for_each(|(out, b)| *out += b);
            }
            if params.residual != 0 {
                let residual = &residual[row * columns..];
                out.iter_mut().zip(residual).for_each(|(out, r)| *out += r);
            }
        },
    );
}

/// Elements of a matrix as they are stored.
#[derive(Clone, Copy)]
enum Values<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
}

/// One factor of a product. Its *lanes* are the product's rows (left factor) or columns (right factor); along its other axis,
/// the *inner* one, the product sums.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    values: Values<'a>,
    offset: usize,
    stride: usize,
    inner_contiguous: bool,
}

impl<'a> Matrix<'a> {
    /// A factor (lanes, inner), row-major from `offset` on.
    pub(super) fn rows(values: &'a [f32], offset: usize, inner: usize) -> Self {
        Self {
            values: Values::F32(values),
            offset,
            stride: inner,
            inner_contiguous: true,
        }
    }

    /// A factor (inner, lanes), row-major from `offset` on.
    pub(super) fn columns(values: &'a [f32], offset: usize, lanes: usize) -> Self {
        Self {
            values: Values::F32(values),
            offset,
            stride: lanes,
            inner_contiguous: false,
        }
    }

    /// Copies consecutive elements from `start` on.
    fn read(&self, start: usize, out: &mut [f32]) {
        match self.values {
            Values::F32(values) => out.copy_from_slice(&values[start..start + out.len()]),
            Values::F16(values) => {
                values[start..start + out.len()].convert_to_f32_slice(out);
            }
        }
    }

    /// Copies `panel.len() / LANES` inner elements from `first_inner` on of `lanes <= LANES` lanes from `first_lane` on to
    /// `panel` (inner, LANES), the lanes that do not exist as zeros.
    #[inline(always)]
    fn pack<const LANES: usize>(&self, first_lane: usize, lanes: usize, first_inner: usize, panel: &mut [f32]) {
        let inner = panel.len() / LANES;
        if self.inner_contiguous {
            let mut run = [0.0; INNER_BLOCK];
            if lanes < LANES {
                panel.fill(0.0);
            }
            for lane in 0..lanes {
                let start = self.offset + (first_lane + lane) * self.stride + first_inner;
                self.read(start, &mut run[..inner]);
                for (row, &value) in panel.chunks_exact_mut(LANES).zip(&run) {
                    row[lane] = value;
                }
            }
        } else {
            for (i, row) in panel.chunks_exact_mut(LANES).enumerate() {
                let start = self.offset + (first_inner + i) * self.stride + first_lane;
                let (filled, rest) = row.split_at_mut(lanes);
                self.read(start, filled);
                rest.fill(0.0);
            }
        }
    }
}

/// One product of a sum of products: `scale · left · right`.
pub(super) struct Term<'a> {
    pub(super) inner: usize,
    pub(super) left: Matrix<'a>,
    pub(super) right: Matrix<'a>,
    pub(super) scale: f32,
}

/// Inner elements that a panel holds: a panel of the right factor then stays in the first-level cache.
const INNER_BLOCK: usize = 256;

/// `out (rows, columns) += Σ terms`, where `before` runs on every row of `out` first and `after` last. Every element is summed
/// in the same order whatever the number of threads.
///
/// The factors are copied into panels (Goto & van de Geijn, "Anatomy of high-performance matrix multiplication", 2008), which
/// makes the three transpositions and the weight formats one loop.
pub(super) fn add_products(
    rows: usize,
    columns: usize,
    terms: &[Term<'_>],
    out: &mut [f32],
    before: impl Fn(usize, &mut [f32]) + Sync,
    after: impl Fn(usize, &mut [f32]) + Sync,
) {
    if rows == 0 || columns == 0 {
        return;
    }
    #[cfg(not(target_arch = "wasm32"))]
    let threads = rayon::current_num_threads();
    #[cfg(target_arch = "wasm32")]
    let threads = 1;
    let simd = Simd::detect();
    // A thread's block of rows: large, because every block packs the right factor again.
    let block_rows = rows.div_ceil(threads).next_multiple_of(simd.lanes().0).min(512);
    for_each_row(&mut out[..rows * columns], block_rows * columns, |block, out| {
        let first_row = block * block_rows;
        for (i, row) in out.chunks_exact_mut(columns).enumerate() {
            before(first_row + i, row);
        }
        for term in terms {
            simd.add_product(term, first_row, columns, out);
        }
        for (i, row) in out.chunks_exact_mut(columns).enumerate() {
            after(first_row + i, row);
        }
    });
}

/// The vector instructions the machine has.
#[derive(Clone, Copy, Debug)]
enum Simd {
    /// What every machine of the target has.
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Simd {
    fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("fma") {
                return Simd::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Simd::Avx2;
            }
        }
        Simd::Baseline
    }

    /// Lanes of a left and a right panel, so that the sums of a tile fit the vector registers.
    fn lanes(self) -> (usize, usize) {
        match self {
            Simd::Baseline => (4, 8),
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2 => (6, 16),
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 => (12, 32),
        }
    }

    fn add_product(self, term: &Term<'_>, first_row: usize, columns: usize, out: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx2,fma")]
            fn avx2(term: &Term<'_>, first_row: usize, columns: usize, out: &mut [f32]) {
                add_product::<6, 16, true>(term, first_row, columns, out);
            }
            #[target_feature(enable = "avx512f,fma")]
            fn avx512(term: &Term<'_>, first_row: usize, columns: usize, out: &mut [f32]) {
                add_product::<12, 32, true>(term, first_row, columns, out);
            }
            match self {
                // SAFETY: `detect` found these instructions.
                Simd::Avx512 => return unsafe { avx512(term, first_row, columns, out) },
                // SAFETY: `detect` found these instructions.
                Simd::Avx2 => return unsafe { avx2(term, first_row, columns, out) },
                Simd::Baseline => {}
            }
        }
        const FUSED: bool = cfg!(any(target_arch = "aarch64", target_feature = "fma"));
        add_product::<4, 8, FUSED>(term, first_row, columns, out);
    }
}

/// `out += term` on the rows of the product that `out` holds.
#[inline(always)]
fn add_product<const ROWS: usize, const COLUMNS: usize, const FUSED: bool>(
    term: &Term<'_>,
    first_row: usize,
    columns: usize,
    out: &mut [f32],
) {
    let rows = out.len() / columns;
    let panels = rows.div_ceil(ROWS);
    let mut left = vec![0.0; panels * ROWS * INNER_BLOCK.min(term.inner)];
    let mut right = vec![0.0; COLUMNS * INNER_BLOCK.min(term.inner)];
    for first_inner in (0..term.inner).step_by(INNER_BLOCK) {
        let inner = INNER_BLOCK.min(term.inner - first_inner);
        let left = &mut left[..panels * ROWS * inner];
        let right = &mut right[..COLUMNS * inner];
        for (i, panel) in left.chunks_exact_mut(ROWS * inner).enumerate() {
            let lanes = ROWS.min(rows - i * ROWS);
            term.left.pack::<ROWS>(first_row + i * ROWS, lanes, first_inner, panel);
        }
        if term.scale != 1.0 {
            left.iter_mut().for_each(|value| *value *= term.scale);
        }
        for column in (0..columns).step_by(COLUMNS) {
            let lanes = COLUMNS.min(columns - column);
            term.right.pack::<COLUMNS>(column, lanes, first_inner, right);
            for (i, panel) in left.chunks_exact(ROWS * inner).enumerate() {
                let sums = tile::<ROWS, COLUMNS, FUSED>(panel, right);
                let out = out[i * ROWS * columns..].chunks_mut(columns);
                for (out, sums) in out.zip(&sums) {
                    let out = &mut out[column..column + lanes];
                    out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
                }
            }
        }
    }
}

#[inline(always)]
fn tile<const ROWS: usize, const COLUMNS: usize, const FUSED: bool>(
    left: &[f32],  // (inner, ROWS)
    right: &[f32], // (inner, COLUMNS)
) -> [[f32; COLUMNS]; ROWS] {
    let mut sums = [[0.0f32; COLUMNS]; ROWS];
    for (left, right) in left.chunks_exact(ROWS).zip(right.chunks_exact(COLUMNS)) {
        for (sums, &left) in sums.iter_mut().zip(left) {
            for (sum, &right) in sums.iter_mut().zip(right) {
                *sum = if FUSED {
                    left.mul_add(right, *sum)
                } else {
                    *sum + left * right
                };
            }
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;

    fn available() -> Vec<Simd> {
        let mut available = vec![Simd::Baseline];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                available.push(Simd::Avx2);
            }
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("fma") {
                available.push(Simd::Avx512);
            }
        }
        available
    }

    #[test]
    fn product_is_exact_on_small_integers_with_every_instruction_set() {
        for (rows, columns, inner) in [(1, 1, 1), (13, 33, 257), (25, 70, 45)] {
            // Sums of products of integers up to 3 are exact in any order.
            let value = |i: usize| (i * 5 % 7) as f32 - 3.0;
            let left: Vec<f32> = (0..rows * inner).map(value).collect();
            let right: Vec<f32> = (0..columns * inner).map(value).collect();
            let mut expected = vec![1.0; rows * columns];
            for (i, expected) in expected.iter_mut().enumerate() {
                let (row, column) = (i / columns, i % columns);
                *expected += (0..inner)
                    .map(|k| 2.0 * left[row * inner + k] * right[column * inner + k])
                    .sum::<f32>();
            }
            for simd in available() {
                let term = Term {
                    inner,
                    left: Matrix::rows(&left, 0, inner),
                    right: Matrix::rows(&right, 0, inner),
                    scale: 2.0,
                };
                let mut out = vec![1.0; rows * columns];
                simd.add_product(&term, 0, columns, &mut out);
                assert_eq!(out, expected, "{simd:?}, {rows}x{columns}x{inner}");
            }
        }
    }
}
