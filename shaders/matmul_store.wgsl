// What follows a product, fused into its store: bias, residual, and what `out` had, scaled by row or whole.

@group(0) @binding(6) var<storage, read> residual: array<f32>;    // (rows, columns)
@group(0) @binding(7) var<storage, read> row_scale: array<f32>;   // (rows)
@group(0) @binding(8) var<storage, read_write> out: array<f32>;   // (rows, columns), from out_first on, a row every out_stride

fn store(row: u32, column: u32, sum: f32) {
    if row >= params.rows || column >= params.columns {
        return;
    }
    let at = params.out_first + row * params.out_stride + column;
    var value = sum;
    if params.bias != 0u {
        value += bias[column];
    }
    if params.residual != 0u {
        value += residual[row * params.columns + column];
    }
    if params.row_scale != 0u {
        value += row_scale[row] * out[at];
    } else if params.accumulate != 0u {
        value += out[at];
    }
    out[at] = value;
}
