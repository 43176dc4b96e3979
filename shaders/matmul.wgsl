// Matrix products with fused stores: x (rows, inner) by a weight stored (inner, columns) or, transposed, (columns, inner).
// weight.wgsl reads the weight.
//
// `product` and `product_vec4`, for GPUs: a workgroup of 16x16 invocations computes a 64x64 tile of `out`, 4x4 values an
// invocation, from tiles of both factors in workgroup memory, 16 inner elements at a time. `_vec4` loads x four elements at
// once and needs x_first, x_stride and inner to be multiples of 4. `_registers`, for adapters emulated on a CPU, needs no
// workgroup memory: an invocation computes 8 rows by 8 columns, and all invocations of a workgroup the same rows, so that what
// they read of x is uniform.
//
// The LoRA term is `rank` more inner elements: the same tiles, filled from `u` and `adapter`.

const W_TRANSPOSED: bool = false;

const TILE: u32 = 64u;
const DEPTH: u32 = 4u;      // inner elements in a tile, in fours
const PITCH: u32 = 5u;      // DEPTH and one more, so that rows start in different banks
const QUADS: u32 = 16u;     // TILE / 4

const REGISTER_ROWS: u32 = 8u;
const REGISTER_LANES: u32 = 8u;

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
@group(0) @binding(6) var<storage, read> residual: array<f32>;    // (rows, columns)
@group(0) @binding(7) var<storage, read> row_scale: array<f32>;   // (rows)
@group(0) @binding(8) var<storage, read_write> out: array<f32>;   // (rows, columns), from out_first on, a row every out_stride
@group(0) @binding(6) var<storage, read_write> gelu_out: array<f32>; // as out
@group(0) @binding(7) var<storage, read_write> gelu_pre: array<f32>; // (rows, columns)

var<workgroup> sh_left: array<vec4<f32>, 320>;   // (TILE, PITCH)
var<workgroup> sh_right: array<vec4<f32>, 320>;  // (4 * DEPTH, QUADS), or (TILE, PITCH) of a transposed weight

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

// Four inner elements from k on of a column, or four columns of an inner element, as the weight is stored; zero past its end.
fn w_quad_or_zero(k: u32, column: u32) -> vec4<f32> {
    if k >= params.inner || column >= params.columns {
        return vec4(0.0);
    }
    if W_TRANSPOSED {
        return weight_quad(column, k);
    }
    return weight_quad(k, column);
}

// What an invocation stages: four inner elements of a row of the left tile, and of the right tile four columns of an inner
// element, or, transposed, four inner elements of a column.
struct Place {
    left_row: u32,
    left_inner: u32,
    right_inner: u32,
    right_column: u32,
    left_slot: u32,
    right_slot: u32,
}

fn place(group: vec2<u32>, lane: u32) -> Place {
    let quad_row = lane / DEPTH;
    let quad = lane % DEPTH;
    var at: Place;
    at.left_row = group.y * TILE + quad_row;
    at.left_inner = quad * 4u;
    at.left_slot = quad_row * PITCH + quad;
    if W_TRANSPOSED {
        at.right_inner = quad * 4u;
        at.right_column = group.x * TILE + quad_row;
        at.right_slot = at.left_slot;
    } else {
        at.right_inner = lane / QUADS;
        at.right_column = group.x * TILE + (lane % QUADS) * 4u;
        at.right_slot = lane;
    }
    return at;
}

fn stage(at: Place, left: vec4<f32>, right: vec4<f32>) {
    workgroupBarrier();
    sh_left[at.left_slot] = left;
    sh_right[at.right_slot] = right;
    workgroupBarrier();
}

// Adds the product of the staged tiles. An invocation's columns are neighbours, or, transposed, QUADS apart, because then rows of
// sh_right are columns.
fn add_tiles(sums: ptr<function, array<vec4<f32>, 4>>, lane: u32) {
    let tx = lane % QUADS;
    let left = (lane / QUADS) * 4u * PITCH;
    for (var quad = 0u; quad < DEPTH; quad += 1u) {
        var right: mat4x4<f32>;
        if W_TRANSPOSED {
            right = transpose(mat4x4(
                sh_right[tx * PITCH + quad],
                sh_right[(tx + QUADS) * PITCH + quad],
                sh_right[(tx + 2u * QUADS) * PITCH + quad],
                sh_right[(tx + 3u * QUADS) * PITCH + quad],
            ));
        } else {
            right = mat4x4(
                sh_right[quad * 4u * QUADS + tx],
                sh_right[(quad * 4u + 1u) * QUADS + tx],
                sh_right[(quad * 4u + 2u) * QUADS + tx],
                sh_right[(quad * 4u + 3u) * QUADS + tx],
            );
        }
        (*sums)[0] = add_row((*sums)[0], sh_left[left + quad], right);
        (*sums)[1] = add_row((*sums)[1], sh_left[left + PITCH + quad], right);
        (*sums)[2] = add_row((*sums)[2], sh_left[left + 2u * PITCH + quad], right);
        (*sums)[3] = add_row((*sums)[3], sh_left[left + 3u * PITCH + quad], right);
    }
}

fn add_row(sums: vec4<f32>, left: vec4<f32>, right: mat4x4<f32>) -> vec4<f32> {
    return fma(vec4(left.w), right[3], fma(vec4(left.z), right[2],
        fma(vec4(left.y), right[1], fma(vec4(left.x), right[0], sums))));
}

fn add_lora(sums: ptr<function, array<vec4<f32>, 4>>, at: Place, lane: u32) {
    for (var first = 0u; first < params.rank; first += 4u * DEPTH) {
        let row = at.left_row;
        let r = first + at.left_inner;
        let left = vec4(u_or_zero(row, r), u_or_zero(row, r + 1u), u_or_zero(row, r + 2u), u_or_zero(row, r + 3u));
        let k = first + at.right_inner;
        let column = at.right_column;
        // One of the steps is 0: a quad goes along the ranks or along the columns.
        let rank_step = select(0u, 1u, W_TRANSPOSED);
        let column_step = 1u - rank_step;
        let right = vec4(
            adapter_or_zero(k, column), adapter_or_zero(k + rank_step, column + column_step),
            adapter_or_zero(k + 2u * rank_step, column + 2u * column_step),
            adapter_or_zero(k + 3u * rank_step, column + 3u * column_step),
        );
        stage(at, params.lora_scale * left, right);
        add_tiles(sums, lane);
    }
}

fn multiply(sums: ptr<function, array<vec4<f32>, 4>>, group: vec2<u32>, lane: u32) {
    let at = place(group, lane);
    for (var first = 0u; first < params.inner; first += 4u * DEPTH) {
        let row = at.left_row;
        let i = first + at.left_inner;
        let left = vec4(x_or_zero(row, i), x_or_zero(row, i + 1u), x_or_zero(row, i + 2u), x_or_zero(row, i + 3u));
        stage(at, left, w_quad_or_zero(first + at.right_inner, at.right_column));
        add_tiles(sums, lane);
    }
    add_lora(sums, at, lane);
}

fn multiply_vec4(sums: ptr<function, array<vec4<f32>, 4>>, group: vec2<u32>, lane: u32) {
    let at = place(group, lane);
    for (var first = 0u; first < params.inner; first += 4u * DEPTH) {
        var left = vec4(0.0);
        let i = first + at.left_inner;
        if at.left_row < params.rows && i < params.inner {
            left = x_quads[(params.x_first + at.left_row * params.x_stride + i) / 4u];
        }
        stage(at, left, w_quad_or_zero(first + at.right_inner, at.right_column));
        add_tiles(sums, lane);
    }
    add_lora(sums, at, lane);
}

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

fn store_gelu(row: u32, column: u32, sum: f32) {
    if row >= params.rows || column >= params.columns {
        return;
    }
    var value = sum;
    if params.bias != 0u {
        value += bias[column];
    }
    gelu_pre[row * params.columns + column] = value;
    // tanh is 1 in f32 well before 15; some devices compute it from exponentials that overflow.
    let z = 0.7978846 * (value + 0.044715 * value * value * value);
    gelu_out[params.out_first + row * params.out_stride + column] = 0.5 * value * (1.0 + tanh(clamp(z, -15.0, 15.0)));
}

fn store_tile(sums: ptr<function, array<vec4<f32>, 4>>, group: vec2<u32>, lane: u32) {
    let step = select(1u, QUADS, W_TRANSPOSED);
    let column = group.x * TILE + (lane % QUADS) * select(4u, 1u, W_TRANSPOSED);
    let row = group.y * TILE + (lane / QUADS) * 4u;
    for (var i = 0u; i < 4u; i += 1u) {
        let row_sums = (*sums)[i];
        store(row + i, column, row_sums.x);
        store(row + i, column + step, row_sums.y);
        store(row + i, column + 2u * step, row_sums.z);
        store(row + i, column + 3u * step, row_sums.w);
    }
}

fn store_gelu_tile(sums: ptr<function, array<vec4<f32>, 4>>, group: vec2<u32>, lane: u32) {
    let step = select(1u, QUADS, W_TRANSPOSED);
    let column = group.x * TILE + (lane % QUADS) * select(4u, 1u, W_TRANSPOSED);
    let row = group.y * TILE + (lane / QUADS) * 4u;
    for (var i = 0u; i < 4u; i += 1u) {
        let row_sums = (*sums)[i];
        store_gelu(row + i, column, row_sums.x);
        store_gelu(row + i, column + step, row_sums.y);
        store_gelu(row + i, column + 2u * step, row_sums.z);
        store_gelu(row + i, column + 3u * step, row_sums.w);
    }
}

@compute @workgroup_size(256)
fn product(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    var sums = array<vec4<f32>, 4>();
    multiply(&sums, group.xy, lane);
    store_tile(&sums, group.xy, lane);
}

@compute @workgroup_size(256)
fn product_vec4(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    var sums = array<vec4<f32>, 4>();
    multiply_vec4(&sums, group.xy, lane);
    store_tile(&sums, group.xy, lane);
}

@compute @workgroup_size(256)
fn product_gelu(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    var sums = array<vec4<f32>, 4>();
    multiply(&sums, group.xy, lane);
    store_gelu_tile(&sums, group.xy, lane);
}

@compute @workgroup_size(256)
fn product_gelu_vec4(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    var sums = array<vec4<f32>, 4>();
    multiply_vec4(&sums, group.xy, lane);
    store_gelu_tile(&sums, group.xy, lane);
}

// 8 rows by 8 columns in registers: two vectors a row.

fn add_registers(sums: ptr<function, array<vec4<f32>, 16>>, left: array<f32, 8>, low: vec4<f32>, high: vec4<f32>) {
    (*sums)[0] = fma(vec4(left[0]), low, (*sums)[0]);
    (*sums)[1] = fma(vec4(left[0]), high, (*sums)[1]);
    (*sums)[2] = fma(vec4(left[1]), low, (*sums)[2]);
    (*sums)[3] = fma(vec4(left[1]), high, (*sums)[3]);
    (*sums)[4] = fma(vec4(left[2]), low, (*sums)[4]);
    (*sums)[5] = fma(vec4(left[2]), high, (*sums)[5]);
    (*sums)[6] = fma(vec4(left[3]), low, (*sums)[6]);
    (*sums)[7] = fma(vec4(left[3]), high, (*sums)[7]);
    (*sums)[8] = fma(vec4(left[4]), low, (*sums)[8]);
    (*sums)[9] = fma(vec4(left[4]), high, (*sums)[9]);
    (*sums)[10] = fma(vec4(left[5]), low, (*sums)[10]);
    (*sums)[11] = fma(vec4(left[5]), high, (*sums)[11]);
    (*sums)[12] = fma(vec4(left[6]), low, (*sums)[12]);
    (*sums)[13] = fma(vec4(left[6]), high, (*sums)[13]);
    (*sums)[14] = fma(vec4(left[7]), low, (*sums)[14]);
    (*sums)[15] = fma(vec4(left[7]), high, (*sums)[15]);
}

// Rows past the end repeat the last one; they are not stored.
fn x_rows(row: u32, k: u32) -> array<f32, 8> {
    let last = params.rows - 1u;
    let stride = params.x_stride;
    let at = params.x_first + k;
    return array<f32, 8>(
        x[at + min(row, last) * stride], x[at + min(row + 1u, last) * stride],
        x[at + min(row + 2u, last) * stride], x[at + min(row + 3u, last) * stride],
        x[at + min(row + 4u, last) * stride], x[at + min(row + 5u, last) * stride],
        x[at + min(row + 6u, last) * stride], x[at + min(row + 7u, last) * stride],
    );
}

fn u_rows(row: u32, r: u32) -> array<f32, 8> {
    let last = params.rows - 1u;
    let rank = params.rank;
    let scale = params.lora_scale;
    return array<f32, 8>(
        scale * u[min(row, last) * rank + r], scale * u[min(row + 1u, last) * rank + r],
        scale * u[min(row + 2u, last) * rank + r], scale * u[min(row + 3u, last) * rank + r],
        scale * u[min(row + 4u, last) * rank + r], scale * u[min(row + 5u, last) * rank + r],
        scale * u[min(row + 6u, last) * rank + r], scale * u[min(row + 7u, last) * rank + r],
    );
}

fn adapter_columns(r: u32, column: u32) -> vec4<f32> {
    return vec4(
        adapter_or_zero(r, column), adapter_or_zero(r, column + 1u),
        adapter_or_zero(r, column + 2u), adapter_or_zero(r, column + 3u),
    );
}

// An inner element of four columns of a transposed weight; columns past the end repeat the last one.
fn w_columns(k: u32, column: u32) -> vec4<f32> {
    let last = params.columns - 1u;
    return vec4(
        weight_at(min(column, last), k), weight_at(min(column + 1u, last), k),
        weight_at(min(column + 2u, last), k), weight_at(min(column + 3u, last), k),
    );
}

// Four inner elements likewise.
fn w_block(k: u32, column: u32) -> mat4x4<f32> {
    let last = params.columns - 1u;
    return transpose(mat4x4(
        weight_quad(min(column, last), k), weight_quad(min(column + 1u, last), k),
        weight_quad(min(column + 2u, last), k), weight_quad(min(column + 3u, last), k),
    ));
}

fn multiply_registers(sums: ptr<function, array<vec4<f32>, 16>>, row: u32, column: u32) {
    let inner = params.inner;
    if W_TRANSPOSED {
        var k = 0u;
        if W_ALIGNED || W_FORMAT >= 2u {
            for (; k + 4u <= inner; k += 4u) {
                let low = w_block(k, column);
                let high = w_block(k, column + 4u);
                add_registers(sums, x_rows(row, k), low[0], high[0]);
                add_registers(sums, x_rows(row, k + 1u), low[1], high[1]);
                add_registers(sums, x_rows(row, k + 2u), low[2], high[2]);
                add_registers(sums, x_rows(row, k + 3u), low[3], high[3]);
            }
        }
        if !W_ALIGNED {
            for (; k < inner; k += 1u) {
                add_registers(sums, x_rows(row, k), w_columns(k, column), w_columns(k, column + 4u));
            }
        }
    } else {
        let last = (params.columns - 1u) / 4u * 4u;
        let low = min(column, last);
        let high = min(column + 4u, last);
        for (var k = 0u; k < inner; k += 1u) {
            add_registers(sums, x_rows(row, k), weight_quad(k, low), weight_quad(k, high));
        }
    }
    for (var r = 0u; r < params.rank; r += 1u) {
        add_registers(sums, u_rows(row, r), adapter_columns(r, column), adapter_columns(r, column + 4u));
    }
}

// Loops that a compiler cannot unroll, over a copy: unrolled, the stores would take most of the time to compile a kernel, and
// indexing `sums` itself would keep it out of registers.

fn store_registers(sums: ptr<function, array<vec4<f32>, 16>>, row: u32, column: u32) {
    var kept = *sums;
    let rows = min(REGISTER_ROWS, params.rows - row);
    let columns = min(8u, params.columns - min(column, params.columns));
    for (var i = 0u; i < rows; i += 1u) {
        for (var j = 0u; j < columns; j += 1u) {
            store(row + i, column + j, kept[2u * i + j / 4u][j % 4u]);
        }
    }
}

fn store_gelu_registers(sums: ptr<function, array<vec4<f32>, 16>>, row: u32, column: u32) {
    var kept = *sums;
    let rows = min(REGISTER_ROWS, params.rows - row);
    let columns = min(8u, params.columns - min(column, params.columns));
    for (var i = 0u; i < rows; i += 1u) {
        for (var j = 0u; j < columns; j += 1u) {
            store_gelu(row + i, column + j, kept[2u * i + j / 4u][j % 4u]);
        }
    }
}

@compute @workgroup_size(REGISTER_LANES)
fn product_registers(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.y * REGISTER_ROWS;
    let column = (group.x * REGISTER_LANES + lane) * 8u;
    var sums = array<vec4<f32>, 16>();
    multiply_registers(&sums, row, column);
    store_registers(&sums, row, column);
}

@compute @workgroup_size(REGISTER_LANES)
fn product_gelu_registers(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.y * REGISTER_ROWS;
    let column = (group.x * REGISTER_LANES + lane) * 8u;
    var sums = array<vec4<f32>, 16>();
    multiply_registers(&sums, row, column);
    store_gelu_registers(&sums, row, column);
}
