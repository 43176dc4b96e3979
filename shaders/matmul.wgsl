// The operands of the products: x (rows, inner) by a weight stored (inner, columns) or, transposed, (columns, inner). A part
// without an entry point: weight.wgsl reads the weight, matmul_tiled.wgsl, matmul_registers.wgsl and matmul_decode.wgsl multiply,
// and matmul_store.wgsl or matmul_store_gelu.wgsl has the `store` that takes every sum.
//
// The LoRA term is `rank` more inner elements, of `u` and `adapter`.

const W_TRANSPOSED: bool = false;

struct ProductParams {
    rows: u32,
    columns: u32,
    inner: u32,
    x_first: u32,
    x_stride: u32,
    out_first: u32,
    out_stride: u32,
    format: u32,
    transposed: u32,
    first_row: u32,
    scales_at: u32,
    bias: u32,
    residual: u32,
    row_scale: u32,
    accumulate: u32,
    rank: u32,
    lora_offset: u32,
    lora_column: u32,
    lora_rank: u32,
    lora_scale: f32,
}

@group(0) @binding(0) var<uniform> params: ProductParams;
@group(0) @binding(1) var<storage, read> x: array<f32>;           // (rows, inner), from x_first on, a row every x_stride
@group(0) @binding(1) var<storage, read> x_quads: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> w: array<u32>;           // (inner, columns) or (columns, inner)
@group(0) @binding(3) var<storage, read> bias: array<f32>;        // (columns)
@group(0) @binding(4) var<storage, read> u: array<f32>;           // (rows, rank)
@group(0) @binding(5) var<storage, read> adapter: array<f32>;     // (columns, rank) in steps of lora_column and lora_rank

fn weight_layout() -> WeightLayout {
    return WeightLayout(params.first_row, select(params.columns, params.inner, W_TRANSPOSED), params.scales_at);
}

fn x_or_zero(row: u32, k: u32) -> f32 {
    if row >= params.rows || k >= params.inner {
        return 0.0;
    }
    return x[params.x_first + row * params.x_stride + k];
}

fn u_or_zero(row: u32, r: u32) -> f32 {
    if row >= params.rows || r >= params.rank {
        return 0.0;
    }
    return u[row * params.rank + r];
}

fn adapter_or_zero(r: u32, column: u32) -> f32 {
    if r >= params.rank || column >= params.columns {
        return 0.0;
    }
    return adapter[params.lora_offset + column * params.lora_column + r * params.lora_rank];
}
