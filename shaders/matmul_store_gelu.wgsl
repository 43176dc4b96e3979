// What follows the MLP's first product, fused into its store: bias and GELU, with the values before it kept for the backward pass.

@group(0) @binding(6) var<storage, read_write> out: array<f32>; // (rows, columns), from out_first on, a row every out_stride
@group(0) @binding(7) var<storage, read_write> pre: array<f32>; // (rows, columns)

fn store(row: u32, column: u32, sum: f32) {
    if row >= params.rows || column >= params.columns {
        return;
    }
    var value = sum;
    if params.bias != 0u {
        value += bias[column];
    }
    pre[row * params.columns + column] = value;
    // tanh is 1 in f32 well before 15; some devices compute it from exponentials that overflow.
    let z = 0.7978846 * (value + 0.044715 * value * value * value);
    out[params.out_first + row * params.out_stride + column] = 0.5 * value * (1.0 + tanh(clamp(z, -15.0, 15.0)));
}
