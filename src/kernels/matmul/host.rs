//! The products on the CPU: many rows through packed panels, few rows by reading the weight once in its own order.

use super::ProductParams;
use crate::compute::cpu::for_each_row;
use crate::compute::host::product::{Matrix, Target, Term, add_products_to};
use crate::compute::host::vector::{FewRows, MOST_ROWS};
use crate::compute::host::weight::Stored;
use crate::kernels::gelu::gelu;
use crate::kernels::weight;

/// The operands that the epilogue of a product reads.
#[derive(Clone, Copy)]
struct Reads<'a> {
    x: &'a [f32],
    w: &'a [u32],
    bias: &'a [f32],
    u: &'a [f32],
    adapter: &'a [f32],
    residual: &'a [f32],
    row_scale: &'a [f32],
}

/// [`spec::product`](super::spec::product) on all cores.
#[allow(clippy::too_many_arguments)] // one for each binding
pub(super) fn product(
    params: &ProductParams,
    x: &[f32],         // (rows, inner), strided
    w: &[u32],         // (columns, inner) if transposed, else (inner, columns)
    bias: &[f32],      // (columns)
    u: &[f32],         // (rows, rank)
    adapter: &[f32],   // (columns, rank), strided
    residual: &[f32],  // (rows, columns)
    row_scale: &[f32], // (rows)
    out: &mut [f32],   // (rows, columns), strided
) {
    let reads = Reads {
        x,
        w,
        bias,
        u,
        adapter,
        residual,
        row_scale,
    };
    let out = Target {
        values: out,
        first: params.out_first as usize,
        stride: params.out_stride as usize,
    };
    compute(params, reads, out);
}

/// [`spec::product_gelu`](super::spec::product_gelu) on all cores.
#[allow(clippy::too_many_arguments)] // one for each binding
pub(super) fn product_gelu(
    params: &ProductParams,
    x: &[f32],       // (rows, inner), strided
    w: &[u32],       // (columns, inner) if transposed, else (inner, columns)
    bias: &[f32],    // (columns)
    u: &[f32],       // (rows, rank)
    adapter: &[f32], // (columns, rank), strided
    out: &mut [f32], // (rows, columns), strided
    pre: &mut [f32], // (rows, columns)
) {
    let (rows, columns) = (params.rows as usize, params.columns as usize);
    if rows == 0 || columns == 0 {
        return;
    }
    let reads = Reads {
        x,
        w,
        bias,
        u,
        adapter,
        residual: &[],
        row_scale: &[],
    };
    let target = Target {
        values: &mut *pre,
        first: 0,
        stride: columns,
    };
    compute(params, reads, target);
    let stride = params.out_stride as usize;
    let out = &mut out[params.out_first as usize..][..(rows - 1) * stride + columns];
    for_each_row(out, stride, |row, out| {
        for (out, &pre) in out[..columns].iter_mut().zip(&pre[row * columns..]) {
            *out = gelu(pre);
        }
    });
}

fn compute(params: &ProductParams, reads: Reads<'_>, out: Target<'_>) {
    if params.rows as usize <= MOST_ROWS {
        few_rows(params, reads, out);
    } else {
        many_rows(params, reads, out);
    }
}

fn matrix<'a>(params: &ProductParams, w: &'a [u32]) -> Stored<'a> {
    let columns = if params.transposed != 0 {
        params.inner
    } else {
        params.columns
    };
    weight::stored(w, params.format, columns, params.scales_at)
}

fn few_rows(params: &ProductParams, reads: Reads<'_>, out: Target<'_>) {
    let (columns, rank) = (params.columns as usize, params.rank as usize);
    let product = FewRows {
        rows: params.rows as usize,
        columns,
        inner: params.inner as usize,
        x: reads.x,
        first: params.x_first as usize,
        stride: params.x_stride as usize,
        matrix: matrix(params, reads.w),
        first_row: params.first_row as usize,
        transposed: params.transposed != 0,
    };
    let (lora_column, lora_rank) = (params.lora_column as usize, params.lora_rank as usize);
    product.compute(|row, column, mut value| {
        if rank > 0 {
            let adapter = &reads.adapter[params.lora_offset as usize + column * lora_column..];
            let u = &reads.u[row * rank..][..rank];
            let pairs = u.iter().zip(adapter.iter().step_by(lora_rank));
            value += params.lora_scale * pairs.map(|(u, a)| u * a).sum::<f32>();
        }
        if params.bias != 0 {
            value += reads.bias[column];
        }
        if params.residual != 0 {
            value += reads.residual[row * columns + column];
        }
        let out = &mut out.values[out.first + row * out.stride + column];
        if params.row_scale != 0 {
            value += reads.row_scale[row] * *out;
        } else if params.accumulate != 0 {
            value += *out;
        }
        *out = value;
    });
}

fn many_rows(params: &ProductParams, reads: Reads<'_>, out: Target<'_>) {
    let columns = params.columns as usize;
    let offset = params.lora_offset as usize;
    let terms = [
        Term {
            inner: params.inner as usize,
            left: Matrix::rows(reads.x, params.x_first as usize, params.x_stride as usize),
            right: Matrix::stored(
                matrix(params, reads.w),
                params.first_row as usize,
                params.transposed != 0,
            ),
            scale: 1.0,
        },
        Term {
            inner: params.rank as usize,
            left: Matrix::rows(reads.u, 0, params.rank as usize),
            right: if params.lora_rank == 1 {
                Matrix::rows(reads.adapter, offset, params.lora_column as usize)
            } else {
                Matrix::columns(reads.adapter, offset, params.lora_rank as usize)
            },
            scale: params.lora_scale,
        },
    ];
    add_products_to(
        params.rows as usize,
        columns,
        &terms,
        out,
        |row, _, out| {
            if params.row_scale != 0 {
                out.iter_mut().for_each(|out| *out *= reads.row_scale[row]);
            } else if params.accumulate == 0 {
                out.fill(0.0);
            }
        },
        |row, column, out| {
            if params.bias != 0 {
                out.iter_mut().zip(&reads.bias[column..]).for_each(|(out, b)| *out += b);
            }
            if params.residual != 0 {
                let residual = &reads.residual[row * columns + column..];
                out.iter_mut().zip(residual).for_each(|(out, r)| *out += r);
            }
        },
    );
}
