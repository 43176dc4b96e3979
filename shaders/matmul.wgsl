// Matrix products with fused stores. `forward` multiplies by w (inner, columns), `backward_x` by the transpose of
// w (columns, inner), `backward_w` takes the transpose of its first factor.
//
// On GPUs a workgroup of 16x16 invocations computes a 64x64 tile of `out`, 4x4 values an invocation, from tiles of both factors
// in workgroup memory, 16 inner elements at a time. The `_vec4` entry points load four elements at once and need sizes that are
// multiples of 4. The `_registers` entry points, for adapters emulated on a CPU, need no workgroup memory: an invocation computes
// 8 rows by 8 columns, and all invocations of a workgroup the same rows, so that what they read of `x` is uniform.
//
// The LoRA term is `rank` more inner elements: the same tiles, filled from `u` and `adapter`.

const F16: bool = true;       // w holds pairs of halves
const ALIGNED: bool = false;  // `_registers`: the contiguous size of w and w_offset are multiples of 4

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
    w_offset: u32,
    f16: u32,
    bias: u32,
    residual: u32,
    row_scale: u32,
    accumulate: u32,
    rank: u32,
    lora_offset: u32,
    lora_scale: f32,
}

@group(0) @binding(0) var<uniform> params: ProductParams;
@group(0) @binding(1) var<storage, read> x: array<f32>;           // (rows, inner)
@group(0) @binding(2) var<storage, read> w: array<u32>;           // (inner, columns) or (columns, inner), at w_offset
@group(0) @binding(1) var<storage, read> x_quads: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> w_pairs: array<vec2<u32>>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;        // (columns)
@group(0) @binding(4) var<storage, read> u: array<f32>;           // (rows, rank)
@group(0) @binding(5) var<storage, read> adapter: array<f32>;     // (columns, rank) or (rank, columns), at lora_offset
@group(0) @binding(6) var<storage, read> residual: array<f32>;    // (rows, columns)
@group(0) @binding(7) var<storage, read> row_scale: array<f32>;   // (rows)
@group(0) @binding(8) var<storage, read_write> out: array<f32>;   // (rows, columns)
@group(0) @binding(6) var<storage, read_write> gelu_out: array<f32>; // (rows, columns)
@group(0) @binding(7) var<storage, read_write> gelu_pre: array<f32>; // (rows, columns)

var<workgroup> sh_left: array<vec4<f32>, 320>;   // (TILE, PITCH), or (4 * DEPTH, QUADS) in backward_w
var<workgroup> sh_right: array<vec4<f32>, 320>;  // (4 * DEPTH, QUADS), or (TILE, PITCH) of a transposed factor

fn w_at(element: u32) -> f32 {
    if F16 {
        let pair = unpack2x16float(w[element / 2u]);
        return select(pair.x, pair.y, (element & 1u) == 1u);
    }
    return bitcast<f32>(w[element]);
}

// Four elements from a multiple of 4 on.
fn w_quad(element: u32) -> vec4<f32> {
    if F16 {
        let at = element / 2u;
        return vec4(unpack2x16float(w[at]), unpack2x16float(w[at + 1u]));
    }
    return bitcast<vec4<f32>>(vec4(w[element], w[element + 1u], w[element + 2u], w[element + 3u]));
}

fn w_pairs_quad(element: u32) -> vec4<f32> {
    if F16 {
        let words = w_pairs[element / 4u];
        return vec4(unpack2x16float(words.x), unpack2x16float(words.y));
    }
    return bitcast<vec4<f32>>(vec4(w_pairs[element / 2u], w_pairs[element / 2u + 1u]));
}

fn w_or_zero(k: u32, column: u32, transposed: bool) -> f32 {
    if k >= params.inner || column >= params.columns {
        return 0.0;
    }
    return w_at(params.w_offset + select(k * params.columns + column, column * params.inner + k, transposed));
}

fn x_or_zero(row: u32, k: u32) -> f32 {
    if row >= params.rows || k >= params.inner {
        return 0.0;
    }
    return x[row * params.inner + k];
}

fn u_or_zero(row: u32, r: u32) -> f32 {
    if row >= params.rows || r >= params.rank {
        return 0.0;
    }
    return u[row * params.rank + r];
}

// The second LoRA matrix, indexed as w is: B (columns, rank) after w, A (rank, columns) after its transpose.
fn adapter_or_zero(r: u32, column: u32, transposed: bool) -> f32 {
    if r >= params.rank || column >= params.columns {
        return 0.0;
    }
    return adapter[params.lora_offset + select(column * params.rank + r, r * params.columns + column, transposed)];
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

fn place(group: vec2<u32>, lane: u32, transposed: bool) -> Place {
    let quad_row = lane / DEPTH;
    let quad = lane % DEPTH;
    var at: Place;
    at.left_row = group.y * TILE + quad_row;
    at.left_inner = quad * 4u;
    at.left_slot = quad_row * PITCH + quad;
    if transposed {
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
fn add_tiles(sums: ptr<function, array<vec4<f32>, 4>>, lane: u32, transposed: bool) {
    let tx = lane % QUADS;
    let left = (lane / QUADS) * 4u * PITCH;
    for (var quad = 0u; quad < DEPTH; quad += 1u) {
        var right: mat4x4<f32>;
        if transposed {
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

fn add_lora(sums: ptr<function, array<vec4<f32>, 4>>, at: Place, lane: u32, transposed: bool) {
    for (var first = 0u; first < params.rank; first += 4u * DEPTH) {
        let row = at.left_row;
        let r = first + at.left_inner;
        let left = vec4(u_or_zero(row, r), u_or_zero(row, r + 1u), u_or_zero(row, r + 2u), u_or_zero(row, r + 3u));
        let k = first + at.right_inner;
        let column = at.right_column;
        var right: vec4<f32>;
        if transposed {
            right = vec4(
                adapter_or_zero(k, column, true), adapter_or_zero(k + 1u, column, true),
                adapter_or_zero(k + 2u, column, true), adapter_or_zero(k + 3u, column, true),
            );
        } else {
            right = vec4(
                adapter_or_zero(k, column, false), adapter_or_zero(k, column + 1u, false),
                adapter_or_zero(k, column + 2u, false), adapter_or_zero(k, column + 3u, false),
            );
        }
        stage(at, params.lora_scale * left, right);
        add_tiles(sums, lane, transposed);
    }
}

fn multiply(sums: ptr<function, array<vec4<f32>, 4>>, group: vec2<u32>, lane: u32, transposed: bool) {
    let at = place(group, lane, transposed);
    for (var first = 0u; first < params.inner; first += 4u * DEPTH) {
        let row = at.left_row;
        let i = first + at.left_inner;
        let left = vec4(x_or_zero(row, i), x_or_zero(row, i + 1u), x_or_zero(row, i + 2u), x_or_zero(row, i + 3u));
        let k = first + at.right_inner;
        let column = at.right_column;
        var right: vec4<f32>;
        if transposed {
            right = vec4(
                w_or_zero(k, column, true), w_or_zero(k + 1u, column, true),
                w_or_zero(k + 2u, column, true), w_or_zero(k + 3u, column, true),
            );
        } else {
            right = vec4(
                w_or_zero(k, column, false), w_or_zero(k, column + 1u, false),
                w_or_zero(k, column + 2u, false), w_or_zero(k, column + 3u, false),
            );
        }
        stage(at, left, right);
        add_tiles(sums, lane, transposed);
    }
    add_lora(sums, at, lane, transposed);
}

fn multiply_vec4(sums: ptr<function, array<vec4<f32>, 4>>, group: vec2<u32>, lane: u32, transposed: bool) {
    let at = place(group, lane, transposed);
    for (var first = 0u; first < params.inner; first += 4u * DEPTH) {
        var left = vec4(0.0);
        let i = first + at.left_inner;
        if at.left_row < params.rows && i < params.inner {
            left = x_quads[(at.left_row * params.inner + i) / 4u];
        }
        var right = vec4(0.0);
        let k = first + at.right_inner;
        if k < params.inner && at.right_column < params.columns {
            right = w_pairs_quad(params.w_offset
                + select(k * params.columns + at.right_column, at.right_column * params.inner + k, transposed));
        }
        stage(at, left, right);
        add_tiles(sums, lane, transposed);
    }
    add_lora(sums, at, lane, transposed);
}

fn store(row: u32, column: u32, sum: f32) {
    if row >= params.rows || column >= params.columns {
        return;
    }
    let at = row * params.columns + column;
    var value = sum;
    if params.bias != 0u {
        value += bias[column];
    }
    if params.residual != 0u {
        value += residual[at];
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
    let at = row * params.columns + column;
    gelu_pre[at] = value;
    // tanh is 1 in f32 well before 15; some devices compute it from exponentials that overflow.
    let z = 0.7978846 * (value + 0.044715 * value * value * value);
    gelu_out[at] = 0.5 * value * (1.0 + tanh(clamp(z, -15.0, 15.0)));
}

fn store_tile(sums: ptr<function, array<vec4<f32>, 4>>, group: vec2<u32>, lane: u32, transposed: bool) {
    let step = select(1u, QUADS, transposed);
    let column = group.x * TILE + (lane % QUADS) * select(4u, 1u, transposed);
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
    let column = group.x * TILE + (lane % QUADS) * 4u;
    let row = group.y * TILE + (lane / QUADS) * 4u;
    for (var i = 0u; i < 4u; i += 1u) {
        let row_sums = (*sums)[i];
        store_gelu(row + i, column, row_sums.x);
        store_gelu(row + i, column + 1u, row_sums.y);
        store_gelu(row + i, column + 2u, row_sums.z);
        store_gelu(row + i, column + 3u, row_sums.w);
    }
}

@compute @workgroup_size(256)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    var sums = array<vec4<f32>, 4>();
    multiply(&sums, group.xy, lane, false);
    store_tile(&sums, group.xy, lane, false);
}

@compute @workgroup_size(256)
fn forward_vec4(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    var sums = array<vec4<f32>, 4>();
    multiply_vec4(&sums, group.xy, lane, false);
    store_tile(&sums, group.xy, lane, false);
}

@compute @workgroup_size(256)
fn forward_gelu(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    var sums = array<vec4<f32>, 4>();
    multiply(&sums, group.xy, lane, false);
    store_gelu_tile(&sums, group.xy, lane);
}

@compute @workgroup_size(256)
fn forward_gelu_vec4(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    var sums = array<vec4<f32>, 4>();
    multiply_vec4(&sums, group.xy, lane, false);
    store_gelu_tile(&sums, group.xy, lane);
}

@compute @workgroup_size(256)
fn backward_x(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    var sums = array<vec4<f32>, 4>();
    multiply(&sums, group.xy, lane, true);
    store_tile(&sums, group.xy, lane, true);
}

@compute @workgroup_size(256)
fn backward_x_vec4(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    var sums = array<vec4<f32>, 4>();
    multiply_vec4(&sums, group.xy, lane, true);
    store_tile(&sums, group.xy, lane, true);
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
    let inner = params.inner;
    return array<f32, 8>(
        x[min(row, last) * inner + k], x[min(row + 1u, last) * inner + k],
        x[min(row + 2u, last) * inner + k], x[min(row + 3u, last) * inner + k],
        x[min(row + 4u, last) * inner + k], x[min(row + 5u, last) * inner + k],
        x[min(row + 6u, last) * inner + k], x[min(row + 7u, last) * inner + k],
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

fn w_columns(k: u32, column: u32, transposed: bool) -> vec4<f32> {
    return vec4(
        w_or_zero(k, column, transposed), w_or_zero(k, column + 1u, transposed),
        w_or_zero(k, column + 2u, transposed), w_or_zero(k, column + 3u, transposed),
    );
}

fn adapter_columns(r: u32, column: u32, transposed: bool) -> vec4<f32> {
    return vec4(
        adapter_or_zero(r, column, transposed), adapter_or_zero(r, column + 1u, transposed),
        adapter_or_zero(r, column + 2u, transposed), adapter_or_zero(r, column + 3u, transposed),
    );
}

// Four inner elements from k on of four columns of a transposed w; columns past the end repeat the last one.
fn w_block(k: u32, column: u32) -> mat4x4<f32> {
    let last = params.columns - 1u;
    let start = params.w_offset + k;
    return transpose(mat4x4(
        w_quad(start + min(column, last) * params.inner), w_quad(start + min(column + 1u, last) * params.inner),
        w_quad(start + min(column + 2u, last) * params.inner), w_quad(start + min(column + 3u, last) * params.inner),
    ));
}

fn multiply_registers(sums: ptr<function, array<vec4<f32>, 16>>, row: u32, column: u32, transposed: bool) {
    let inner = params.inner;
    if ALIGNED && transposed {
        for (var k = 0u; k < inner; k += 4u) {
            let low = w_block(k, column);
            let high = w_block(k, column + 4u);
            add_registers(sums, x_rows(row, k), low[0], high[0]);
            add_registers(sums, x_rows(row, k + 1u), low[1], high[1]);
            add_registers(sums, x_rows(row, k + 2u), low[2], high[2]);
            add_registers(sums, x_rows(row, k + 3u), low[3], high[3]);
        }
    } else if ALIGNED {
        let low = params.w_offset + min(column, params.columns - 4u);
        let high = params.w_offset + min(column + 4u, params.columns - 4u);
        for (var k = 0u; k < inner; k += 1u) {
            add_registers(sums, x_rows(row, k), w_quad(low + k * params.columns), w_quad(high + k * params.columns));
        }
    } else {
        for (var k = 0u; k < inner; k += 1u) {
            add_registers(sums, x_rows(row, k), w_columns(k, column, transposed), w_columns(k, column + 4u, transposed));
        }
    }
    for (var r = 0u; r < params.rank; r += 1u) {
        add_registers(
            sums, u_rows(row, r), adapter_columns(r, column, transposed), adapter_columns(r, column + 4u, transposed),
        );
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
fn forward_registers(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.y * REGISTER_ROWS;
    let column = (group.x * REGISTER_LANES + lane) * 8u;
    var sums = array<vec4<f32>, 16>();
    multiply_registers(&sums, row, column, false);
    store_registers(&sums, row, column);
}

@compute @workgroup_size(REGISTER_LANES)
fn forward_gelu_registers(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.y * REGISTER_ROWS;
    let column = (group.x * REGISTER_LANES + lane) * 8u;
    var sums = array<vec4<f32>, 16>();
    multiply_registers(&sums, row, column, false);
    store_gelu_registers(&sums, row, column);
}

@compute @workgroup_size(REGISTER_LANES)
fn backward_x_registers(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.y * REGISTER_ROWS;
    let column = (group.x * REGISTER_LANES + lane) * 8u;
    var sums = array<vec4<f32>, 16>();
    multiply_registers(&sums, row, column, true);
    store_registers(&sums, row, column);
}

struct BackwardWParams {
    rows: u32,
    inputs: u32,
    outputs: u32,
    scale: f32,
}

@group(0) @binding(0) var<uniform> w_params: BackwardWParams;
@group(0) @binding(1) var<storage, read> saved_x: array<f32>;     // (rows, inputs)
@group(0) @binding(2) var<storage, read> d_y: array<f32>;         // (rows, outputs)
@group(0) @binding(3) var<storage, read_write> d_w: array<f32>;   // (inputs, outputs)

fn saved_x_or_zero(row: u32, input: u32) -> f32 {
    if row >= w_params.rows || input >= w_params.inputs {
        return 0.0;
    }
    return saved_x[row * w_params.inputs + input];
}

fn d_y_or_zero(row: u32, output: u32) -> f32 {
    if row >= w_params.rows || output >= w_params.outputs {
        return 0.0;
    }
    return d_y[row * w_params.outputs + output];
}

fn d_y_quad(row: u32, output: u32) -> vec4<f32> {
    return vec4(
        d_y_or_zero(row, output), d_y_or_zero(row, output + 1u), d_y_or_zero(row, output + 2u), d_y_or_zero(row, output + 3u),
    );
}

fn saved_x_quad(row: u32, input: u32) -> vec4<f32> {
    return vec4(
        saved_x_or_zero(row, input), saved_x_or_zero(row, input + 1u),
        saved_x_or_zero(row, input + 2u), saved_x_or_zero(row, input + 3u),
    );
}

fn store_d_w(input: u32, output: u32, sums: vec4<f32>) {
    if input >= w_params.inputs {
        return;
    }
    let at = input * w_params.outputs + output;
    let left = w_params.outputs - min(output, w_params.outputs);
    let value = w_params.scale * sums;
    if left > 0u { d_w[at] = value.x; }
    if left > 1u { d_w[at + 1u] = value.y; }
    if left > 2u { d_w[at + 2u] = value.z; }
    if left > 3u { d_w[at + 3u] = value.w; }
}

@compute @workgroup_size(256)
fn backward_w(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let tx = lane % QUADS;
    let ty = lane / QUADS;
    let input = group.y * TILE;
    let output = group.x * TILE;
    var sums = array<vec4<f32>, 4>();
    for (var first = 0u; first < w_params.rows; first += 4u * DEPTH) {
        let left = saved_x_quad(first + ty, input + tx * 4u);
        let right = d_y_quad(first + ty, output + tx * 4u);
        workgroupBarrier();
        sh_left[lane] = left;
        sh_right[lane] = right;
        workgroupBarrier();
        for (var i = 0u; i < 4u * DEPTH; i += 1u) {
            let column = sh_left[i * QUADS + ty];
            let row = sh_right[i * QUADS + tx];
            sums[0] = fma(vec4(column.x), row, sums[0]);
            sums[1] = fma(vec4(column.y), row, sums[1]);
            sums[2] = fma(vec4(column.z), row, sums[2]);
            sums[3] = fma(vec4(column.w), row, sums[3]);
        }
    }
    for (var i = 0u; i < 4u; i += 1u) {
        store_d_w(input + ty * 4u + i, output + tx * 4u, sums[i]);
    }
}

@compute @workgroup_size(REGISTER_LANES)
fn backward_w_registers(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let input = group.y * REGISTER_ROWS;
    let output = (group.x * REGISTER_LANES + lane) * 8u;
    var sums = array<vec4<f32>, 16>();
    for (var row = 0u; row < w_params.rows; row += 1u) {
        let first = saved_x_quad(row, input);
        let second = saved_x_quad(row, input + 4u);
        let left = array<f32, 8>(first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w);
        add_registers(&sums, left, d_y_quad(row, output), d_y_quad(row, output + 4u));
    }
    var kept = sums;
    let count = min(REGISTER_ROWS, w_params.inputs - input);
    for (var i = 0u; i < count; i += 1u) {
        store_d_w(input + i, output, kept[2u * i]);
        store_d_w(input + i, output + 4u, kept[2u * i + 1u]);
    }
}
