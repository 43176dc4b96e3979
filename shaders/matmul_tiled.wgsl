// Products on GPUs, with matmul.wgsl's operands: a workgroup of 16x16 invocations computes a 64x64 tile of `out`, 4x4 values an
// invocation, from tiles of both factors in workgroup memory, 16 inner elements at a time. `_vec4` loads x four elements at once
// and needs x_first, x_stride and inner to be multiples of 4.

const TILE: u32 = 64u;
const DEPTH: u32 = 4u;      // inner elements in a tile, in fours
const PITCH: u32 = 5u;      // DEPTH and one more, so that rows start in different banks
const QUADS: u32 = 16u;     // TILE / 4

var<workgroup> sh_left: array<vec4<f32>, 320>;   // (TILE, PITCH)
var<workgroup> sh_right: array<vec4<f32>, 320>;  // (4 * DEPTH, QUADS), or (TILE, PITCH) of a transposed weight

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

// Adds the product of the staged tiles. An invocation's columns are neighbours, or, transposed, QUADS apart, because then rows
// of sh_right are columns.
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
