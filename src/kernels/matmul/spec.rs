//! The products in plain loops.

use super::ProductParams;
use crate::compute::real::Real;
use crate::kernels::weight;

/// `x · w` and the LoRA term, for one element of the product.
fn sum<T: Real>(params: &ProductParams, x: &[T], w: &[u32], u: &[T], adapter: &[T], row: usize, column: usize) -> T {
    let (inner, rank) = (params.inner as usize, params.rank as usize);
    let first_row = params.first_row as usize;
    let w_columns = if params.transposed != 0 {
        params.inner
    } else {
        params.columns
    };
    let w = weight::stored(w, params.format, w_columns, params.scales_at);
    let mut sum = T::ZERO;
    for i in 0..inner {
        let weight = if params.transposed != 0 {
            w.at(first_row + column, i)
        } else {
            w.at(first_row + i, column)
        };
        sum += x[params.x_first as usize + row * params.x_stride as usize + i] * T::from(weight);
    }
    let mut low_rank = T::ZERO;
    for r in 0..rank {
        let at = params.lora_offset as usize + column * params.lora_column as usize + r * params.lora_rank as usize;
        low_rank += u[row * rank + r] * adapter[at];
    }
    sum + T::from(params.lora_scale) * low_rank
}

/// `matmul.forward` and `matmul.backward_x`.
#[allow(clippy::too_many_arguments)] // one for each binding
pub fn product<T: Real>(
    params: &ProductParams,
    x: &[T],         // (rows, inner), strided
    w: &[u32],       // (columns, inner) if transposed, else (inner, columns)
    bias: &[T],      // (columns)
    u: &[T],         // (rows, rank)
    adapter: &[T],   // (columns, rank), strided
    residual: &[T],  // (rows, columns)
    row_scale: &[T], // (rows)
    out: &mut [T],   // (rows, columns), strided
) {
    let (rows, columns) = (params.rows as usize, params.columns as usize);
    for row in 0..rows {
        for column in 0..columns {
            let mut value = sum(params, x, w, u, adapter, row, column);
            if params.bias != 0 {
                value += bias[column];
            }
            if params.residual != 0 {
                value += residual[row * columns + column];
            }
            let at = params.out_first as usize + row * params.out_stride as usize + column;
            if params.row_scale != 0 {
                value += row_scale[row] * out[at];
            } else if params.accumulate != 0 {
                value += out[at];
            }
            out[at] = value;
        }
    }
}

/// `matmul.forward_gelu`.
#[allow(clippy::too_many_arguments)] // one for each binding
pub fn product_gelu<T: Real>(
    params: &ProductParams,
    x: &[T],       // (rows, inner), strided
    w: &[u32],     // (columns, inner) if transposed, else (inner, columns)
    bias: &[T],    // (columns)
    u: &[T],       // (rows, rank)
    adapter: &[T], // (columns, rank), strided
    out: &mut [T], // (rows, columns), strided
    pre: &mut [T], // (rows, columns)
) {
    let (rows, columns) = (params.rows as usize, params.columns as usize);
    for row in 0..rows {
        for column in 0..columns {
            let mut value = sum(params, x, w, u, adapter, row, column);
            if params.bias != 0 {
                value += bias[column];
            }
            pre[row * columns + column] = value;
            let cubic = value + T::from(0.044_715) * value * value * value;
            let tanh = (T::from(0.797_884_6) * cubic).tanh();
            out[params.out_first as usize + row * params.out_stride as usize + column] =
                T::from(0.5) * value * (T::ONE + tanh);
        }
    }
}
