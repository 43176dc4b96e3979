//! Products of activations with frozen weights, in both directions of a linear layer, with what follows a product fused into its
//! store: bias, residual, LoRA term, GELU, accumulation. Separate from [`lora`](super::lora), whose products are too thin for
//! tiles, and the only family that multiplies by weights: the head's logits are a product with the token embedding.
//!
//! A weight is stored (inputs, outputs) or (outputs, inputs), in any [`Format`], and either direction
//! multiplies by it or by its transpose: both are one contract's business, told apart by params. Which variant runs is in
//! the private module `variants`; the CPU engine's functions are in `host`, the plain loops in [`spec`].
//!
//! The ladder; figures of the CPU engine are per core-second (CPU time, on a shared AMD EPYC with AVX-512):
//!
//! | version | idea | measured |
//! |---|---|---|
//! | `spec` | three loops | |
//! | `tiled` | 64×64 tiles of both factors in workgroup memory, 4×4 values an invocation | not measured on a GPU yet |
//! | `vec4` | the same, activations loaded in fours | not measured on a GPU yet |
//! | `registers` | 8×8 values in registers, no workgroup memory, for adapters emulated on a CPU | lavapipe on two busy cores: 9–11 GFLOP a second in f16, q8 and q4 |
//! | `decode` | at most 4 rows: the weight is read once, in its own order, eight values at a time | not measured on a GPU yet |
//! | `decode_registers` | the same without workgroup memory, for adapters emulated on a CPU | lavapipe likewise: 0.6–0.7 G weights a second in q4 and q8, 0.4–0.5 in f16 |
//! | host, over 4 rows | packed panels of both factors, weights decoded while packing | 512 × 576 × 1,536 and 512 × 1,536 × 576: f32 and f16 165–210 GFLOP, q8 and q4 180–225 |
//! | host, at most 4 rows | a run of a stored row is decoded into the first-level cache and multiplied there | one row by all matrices of SmolLM2-135M: q4 11 G weights, q8 7.9, f16 5.4, f32 3; in q4 on 2 cores 13 G a second, 99 times all of them |
//! | host, the same in plain loops | no intrinsics: compilers leave the loops over nibbles scalar, or vectorise them worse | q4 6.5 G weights |

mod host;
pub mod spec;
mod variants;

use super::case::{Builder, Case, Example, case};
use super::weight::{self, Columns, Weight};
use crate::compute::kernel::Contract;
use crate::compute::{Buffer, Cost, Error, Recording};
use crate::terms::format::Format;
use crate::{contract, params};

params! {
    /// `out (rows, columns) = x (rows, inner) · w` and what follows the product.
    pub struct ProductParams {
        pub rows: u32,
        pub columns: u32,
        pub inner: u32,
        /// Row `i` of `x` begins at element `x_first + i · x_stride`.
        pub x_first: u32,
        pub x_stride: u32,
        /// Row `i` of `out` begins at element `out_first + i · out_stride`.
        pub out_first: u32,
        pub out_stride: u32,
        /// Format of `w`: 0 f32, 1 f16, 2 q8, 3 q4.
        pub format: u32,
        /// Non-zero: `w` is stored (columns, inner), else (inner, columns).
        pub transposed: u32,
        /// The row of `w` that its first row is.
        pub first_row: u32,
        /// The word at which the scales of `w` begin.
        pub scales_at: u32,
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
        /// The LoRA matrix has its value for column `j` and rank `r` at element
        /// `lora_offset + j · lora_column + r · lora_rank` of `adapter`.
        pub lora_offset: u32,
        pub lora_column: u32,
        pub lora_rank: u32,
        pub lora_scale: f32,
    }
}

contract! {
    /// `out = x · W`: a linear layer's outputs.
    pub(crate) static FORWARD = "matmul.forward", ProductParams,
    [x: Read f32, w: Read u32, bias: Read f32, u: Read f32, adapter: Read f32, residual: Read f32, row_scale: Read f32,
     out: Write f32],
    spec: spec::product, host: host::product,
    variants: [FORWARD_DECODE_REGISTERS, FORWARD_REGISTERS, FORWARD_DECODE, FORWARD_VEC4, FORWARD_TILED]
}

contract! {
    /// `pre = x · W`, `out = gelu(pre)`.
    pub(crate) static FORWARD_GELU = "matmul.forward_gelu", ProductParams,
    [x: Read f32, w: Read u32, bias: Read f32, u: Read f32, adapter: Read f32, out: Write f32, pre: Write f32],
    spec: spec::product_gelu, host: host::product_gelu,
    variants: [
        FORWARD_GELU_DECODE_REGISTERS, FORWARD_GELU_REGISTERS, FORWARD_GELU_DECODE, FORWARD_GELU_VEC4, FORWARD_GELU_TILED,
    ]
}

contract! {
    /// `out = x · Wᵀ`, where `x` is the gradient of a linear layer's outputs: the gradient of its inputs.
    pub(crate) static BACKWARD_X = "matmul.backward_x", ProductParams,
    [x: Read f32, w: Read u32, bias: Read f32, u: Read f32, adapter: Read f32, residual: Read f32, row_scale: Read f32,
     out: Write f32],
    spec: spec::product, host: host::product,
    variants: [BACKWARD_X_DECODE_REGISTERS, BACKWARD_X_REGISTERS, BACKWARD_X_DECODE, BACKWARD_X_VEC4, BACKWARD_X_TILED]
}

use variants::*;

/// The contracts of this family.
pub static ALL: &[&Contract] = &[&FORWARD, &FORWARD_GELU, &BACKWARD_X];

/// The low-rank term of a product.
#[derive(Clone, Copy, Debug)]
pub struct Lora<'a> {
    /// (rows, rank): what [`lora::forward_down`](super::lora::forward_down) or [`lora::backward_up`](super::lora::backward_up)
    /// made.
    pub u: &'a Buffer,
    pub adapter: &'a Buffer,
    /// First element in `adapter` of B (outputs, rank) for [`forward`], of A (rank, inputs) for [`backward_x`].
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
    /// (rows, columns)
    pub residual: Option<&'a Buffer>,
    pub lora: Option<Lora<'a>>,
    /// (rows, columns): receives the value before GELU; `out` the value after it. With bias and LoRA only.
    pub gelu_pre: Option<&'a Buffer>,
    /// (rows): each row of what `out` held is multiplied by it and kept.
    pub row_scale: Option<&'a Buffer>,
    /// Keep what `out` held.
    pub accumulate: bool,
}

/// Records `out (rows, outputs) = x (rows, inputs) · W` with `epilogue`. With a token embedding for a transposed weight, its
/// outputs are the logits.
///
/// # Panics
/// If a row of `x` or `out` is shorter than the weight's, or GELU is asked for together with residual, row scale or accumulation.
pub fn forward(
    recording: &mut Recording,
    rows: usize,
    weight: &Weight,
    x: Columns<'_>,
    out: Columns<'_>,
    epilogue: Epilogue<'_>,
) {
    let direction = Direction {
        contract: if epilogue.gelu_pre.is_some() {
            &FORWARD_GELU
        } else {
            &FORWARD
        },
        columns: weight.outputs(),
        inner: weight.inputs(),
        transposed: weight.transposed,
        lora_column: epilogue.lora.map_or(0, |lora| lora.rank),
        lora_rank: 1,
    };
    product(recording, direction, rows, weight, x, out, epilogue);
}

/// Records `d_x (rows, inputs) = d_y (rows, outputs) · Wᵀ` with `epilogue`.
///
/// # Panics
/// If a row of `d_y` or `d_x` is shorter than the weight's, or GELU is asked for.
pub fn backward_x(
    recording: &mut Recording,
    rows: usize,
    weight: &Weight,
    d_y: Columns<'_>,
    d_x: Columns<'_>,
    epilogue: Epilogue<'_>,
) {
    assert!(epilogue.gelu_pre.is_none(), "matmul.backward_x has no GELU epilogue");
    let direction = Direction {
        contract: &BACKWARD_X,
        columns: weight.inputs(),
        inner: weight.outputs(),
        transposed: !weight.transposed,
        lora_column: 1,
        lora_rank: weight.inputs() as u32,
    };
    product(recording, direction, rows, weight, d_y, d_x, epilogue);
}

/// Which way a weight is multiplied by.
struct Direction {
    contract: &'static Contract,
    columns: usize,
    inner: usize,
    transposed: bool,
    /// Steps in the second LoRA matrix from a column to the next and from a rank to the next.
    lora_column: u32,
    lora_rank: u32,
}

fn product(
    recording: &mut Recording,
    direction: Direction,
    rows: usize,
    weight: &Weight,
    x: Columns<'_>,
    out: Columns<'_>,
    epilogue: Epilogue<'_>,
) {
    let Direction {
        contract,
        columns,
        inner,
        transposed,
        ..
    } = direction;
    assert!(x.stride >= inner, "{contract:?}: rows of {x:?} for {inner} values");
    assert!(
        out.stride >= columns,
        "{contract:?}: rows of {out:?} for {columns} values"
    );
    let lora = epilogue.lora;
    let rank = lora.map_or(0, |lora| lora.rank);
    let params = ProductParams {
        rows: rows as u32,
        columns: columns as u32,
        inner: inner as u32,
        x_first: x.first as u32,
        x_stride: x.stride as u32,
        out_first: out.first as u32,
        out_stride: out.stride as u32,
        format: weight::code(weight.format),
        transposed: transposed.into(),
        first_row: weight.first_row as u32,
        scales_at: weight.scales_at() as u32,
        bias: epilogue.bias.is_some().into(),
        residual: epilogue.residual.is_some().into(),
        row_scale: epilogue.row_scale.is_some().into(),
        accumulate: epilogue.accumulate.into(),
        rank,
        lora_offset: lora.map_or(0, |lora| lora.offset as u32),
        lora_column: direction.lora_column,
        lora_rank: direction.lora_rank,
        lora_scale: lora.map_or(0.0, |lora| lora.scale),
    };
    let outputs = 1
        + usize::from(epilogue.residual.is_some())
        + usize::from(epilogue.gelu_pre.is_some())
        + usize::from(epilogue.accumulate || epilogue.row_scale.is_some());
    let (rows, columns, inner, rank) = (rows as f64, columns as f64, inner as f64, f64::from(rank));
    let cost = Cost {
        flops: 2.0 * rows * columns * (inner + rank),
        bytes: 4.0 * (rows * inner + rows * columns * outputs as f64 + rank * (rows + columns)) + weight.bytes(),
    };
    // What an epilogue does not use is bound to `x`: the params say that it is not read.
    let bias = epilogue.bias.unwrap_or(x.buffer);
    let (u, adapter) = lora.map_or((x.buffer, x.buffer), |lora| (lora.u, lora.adapter));
    if let Some(pre) = epilogue.gelu_pre {
        assert!(
            epilogue.residual.is_none() && epilogue.row_scale.is_none() && !epilogue.accumulate,
            "matmul.forward_gelu takes bias and LoRA only"
        );
        let buffers = [x.buffer, &weight.buffer, bias, u, adapter, out.buffer, pre];
        recording.dispatch(contract, params, &buffers, cost);
    } else {
        let residual = epilogue.residual.unwrap_or(x.buffer);
        let row_scale = epilogue.row_scale.unwrap_or(x.buffer);
        let buffers = [
            x.buffer,
            &weight.buffer,
            bias,
            u,
            adapter,
            residual,
            row_scale,
            out.buffer,
        ];
        recording.dispatch(contract, params, &buffers, cost);
    }
}

/// Which product an example has, and what follows it.
#[derive(Clone, Copy)]
struct Options {
    format: Format,
    transposed: bool,
    gelu: bool,
    residual: bool,
    rank: usize,
}

/// GPT-2's weights.
const CONV1D: Options = Options {
    format: Format::F16,
    transposed: false,
    gelu: false,
    residual: false,
    rank: 0,
};

/// Most models' weights, in a quantised format.
const fn linear(format: Format) -> Options {
    Options {
        format,
        transposed: true,
        ..CONV1D
    }
}

fn example_weight(b: &mut Builder<'_>, (inputs, outputs): (usize, usize), options: Options) -> Result<Weight, Error> {
    let stored = if options.transposed {
        (outputs, inputs)
    } else {
        (inputs, outputs)
    };
    b.weight_in("w", options.format, stored, options.transposed)
}

fn forward_example(
    b: &mut Builder<'_>,
    (rows, inputs, outputs): (usize, usize, usize),
    options: Options,
) -> Result<Case, Error> {
    let x = b.random("x", rows * inputs)?;
    let weight = example_weight(b, (inputs, outputs), options)?;
    let bias = b.random("bias", outputs)?;
    let residual = b.random("residual", rows * outputs)?;
    let rank = options.rank;
    let u = b.random("u", (rows * rank).max(1))?;
    let adapter = b.random("adapter", (outputs * rank).max(1))?;
    let pre = b.zeros("pre", rows * outputs)?;
    let out = b.zeros("out", rows * outputs)?;
    let mut results = vec![(&out, rows * outputs)];
    if options.gelu {
        results.push((&pre, rows * outputs));
    }
    Ok(case(&results, false, {
        let (out, pre) = (out.clone(), pre.clone());
        move |recording| {
            let epilogue = Epilogue {
                bias: Some(&bias),
                residual: options.residual.then_some(&residual),
                gelu_pre: options.gelu.then_some(&pre),
                lora: example_lora(rank, &u, &adapter),
                ..Epilogue::default()
            };
            let (x, out) = (Columns::all(&x, inputs), Columns::all(&out, outputs));
            forward(recording, rows, &weight, x, out, epilogue);
        }
    }))
}

fn backward_example(
    b: &mut Builder<'_>,
    (rows, inputs, outputs): (usize, usize, usize),
    options: Options,
) -> Result<Case, Error> {
    let d_y = b.random("d_y", rows * outputs)?;
    let weight = example_weight(b, (inputs, outputs), options)?;
    let rank = options.rank;
    let v = b.random("v", (rows * rank).max(1))?;
    let adapter = b.random("adapter", (inputs * rank).max(1))?;
    let d_x = b.zeros("d_x", rows * inputs)?;
    Ok(case(&[(&d_x.clone(), rows * inputs)], false, move |recording| {
        let epilogue = Epilogue {
            lora: example_lora(rank, &v, &adapter),
            ..Epilogue::default()
        };
        let (d_y, d_x) = (Columns::all(&d_y, outputs), Columns::all(&d_x, inputs));
        backward_x(recording, rows, &weight, d_y, d_x, epilogue);
    }))
}

fn example_lora<'a>(rank: usize, u: &'a Buffer, adapter: &'a Buffer) -> Option<Lora<'a>> {
    (rank > 0).then_some(Lora {
        u,
        adapter,
        offset: 0,
        rank: rank as u32,
        scale: 0.5,
    })
}

/// What `bench` and the criterion benches run.
pub(crate) static EXAMPLES: &[Example] = &[
    Example {
        name: "matmul.forward",
        shape: |s| format!("{}x{}x{}", s.rows(), s.width, 3 * s.width),
        build: |b, s| forward_example(b, (s.rows(), s.width, 3 * s.width), CONV1D),
    },
    Example {
        name: "matmul.forward+lora",
        shape: |s| format!("{}x{}x{}r{}", s.rows(), s.width, 3 * s.width, s.rank),
        build: |b, s| {
            let options = Options { rank: s.rank, ..CONV1D };
            forward_example(b, (s.rows(), s.width, 3 * s.width), options)
        },
    },
    Example {
        name: "matmul.forward+gelu",
        shape: |s| format!("{}x{}x{}", s.rows(), s.width, s.ffn),
        build: |b, s| {
            let options = Options { gelu: true, ..CONV1D };
            forward_example(b, (s.rows(), s.width, s.ffn), options)
        },
    },
    Example {
        name: "matmul.forward+residual",
        shape: |s| format!("{}x{}x{}", s.rows(), s.ffn, s.width),
        build: |b, s| {
            let options = Options {
                residual: true,
                ..CONV1D
            };
            forward_example(b, (s.rows(), s.ffn, s.width), options)
        },
    },
    Example {
        name: "matmul.forward+q8",
        shape: |s| format!("{}x{}x{}", s.rows(), s.width, s.ffn),
        build: |b, s| forward_example(b, (s.rows(), s.width, s.ffn), linear(Format::Q8)),
    },
    Example {
        name: "matmul.forward+q4",
        shape: |s| format!("{}x{}x{}", s.rows(), s.width, s.ffn),
        build: |b, s| forward_example(b, (s.rows(), s.width, s.ffn), linear(Format::Q4)),
    },
    Example {
        name: "matmul.forward+f16+row",
        shape: |s| format!("1x{}x{}", s.width, s.ffn),
        build: |b, s| forward_example(b, (1, s.width, s.ffn), linear(Format::F16)),
    },
    Example {
        name: "matmul.forward+q8+row",
        shape: |s| format!("1x{}x{}", s.width, s.ffn),
        build: |b, s| forward_example(b, (1, s.width, s.ffn), linear(Format::Q8)),
    },
    Example {
        name: "matmul.forward+q4+row",
        shape: |s| format!("1x{}x{}", s.width, s.ffn),
        build: |b, s| forward_example(b, (1, s.width, s.ffn), linear(Format::Q4)),
    },
    Example {
        name: "matmul.backward_x",
        shape: |s| format!("{}x{}x{}", s.rows(), s.ffn, s.width),
        build: |b, s| backward_example(b, (s.rows(), s.width, s.ffn), CONV1D),
    },
    Example {
        name: "matmul.backward_x+lora",
        shape: |s| format!("{}x{}x{}r{}", s.rows(), 3 * s.width, s.width, s.rank),
        build: |b, s| {
            let options = Options { rank: s.rank, ..CONV1D };
            backward_example(b, (s.rows(), s.width, 3 * s.width), options)
        },
    },
    Example {
        name: "matmul.backward_x+q4",
        shape: |s| format!("{}x{}x{}", s.rows(), s.ffn, s.width),
        build: |b, s| backward_example(b, (s.rows(), s.width, s.ffn), linear(Format::Q4)),
    },
];
