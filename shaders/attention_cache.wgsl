// Attention of new tokens to the keys and values of a cache, which holds (kv_heads, capacity, head_size) keys, then as many
// values. `append` puts the new tokens' keys and values there. `cached` gives a workgroup a head of a new token and walks over
// blocks of 64 keys with an online softmax: 8 invocations share a key's product with the query, then each takes four values of the
// head. `cached_rows`, for adapters emulated on a CPU, gives an invocation a head of a new token.

const WORKGROUP: u32 = 64u;
const HEAD_QUADS: u32 = 16u; // ceil(head_size / 4), at most WORKGROUP
const ALIGNED: bool = false; // head_size is a multiple of 4

const KEY_LANES: u32 = 8u;   // invocations that share a key
const PITCH: u32 = 9u;       // and one of padding, against bank conflicts
const MASKED: f32 = -1e30;

struct Params {
    rows: u32,
    capacity: u32,
    heads: u32,
    kv_heads: u32,
    head_size: u32,
    scale: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> qkv: array<f32>;         // (rows, (heads + 2 * kv_heads) * head_size)
@group(0) @binding(2) var<storage, read> position: array<u32>;    // (1): of the first new row
@group(0) @binding(3) var<storage, read_write> cache: array<f32>; // (2 * kv_heads, capacity, head_size)

@group(0) @binding(2) var<storage, read> saved: array<f32>;           // (2 * kv_heads, capacity, head_size)
@group(0) @binding(3) var<storage, read> saved_position: array<u32>;  // (1)
@group(0) @binding(4) var<storage, read_write> out: array<f32>;       // (rows, heads * head_size)

@compute @workgroup_size(WORKGROUP)
fn append(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let i = id.x + id.y * groups.x * WORKGROUP;
    let width = 2u * params.kv_heads * params.head_size;
    let row = i / width;
    if row >= params.rows || position[0] >= params.capacity || row >= params.capacity - position[0] {
        return;
    }
    let slot = i % width / params.head_size;
    let d = i % params.head_size;
    let t = position[0] + row;
    cache[(slot * params.capacity + t) * params.head_size + d] =
        qkv[(row * (params.heads + 2u * params.kv_heads) + params.heads + slot) * params.head_size + d];
}

// Keys that a row attends to.
fn keys_of(row: u32) -> u32 {
    return min(min(saved_position[0], params.capacity) + row + 1u, params.capacity);
}

// Index of the first of the keys, or `part` 1 the values, that a head reads.
fn cache_start(head: u32, part: u32) -> u32 {
    let kv_head = head / (params.heads / params.kv_heads);
    return (part * params.kv_heads + kv_head) * params.capacity * params.head_size;
}

fn query_start(row: u32, head: u32) -> u32 {
    return (row * (params.heads + 2u * params.kv_heads) + head) * params.head_size;
}

fn quad_exists(d: u32) -> vec4<bool> {
    return vec4(d) + vec4(0u, 1u, 2u, 3u) < vec4(params.head_size);
}

// The columns d..d+4, those past the head's end replaced by its last.
fn quad_columns(d: u32) -> vec4<u32> {
    return min(vec4(d) + vec4(0u, 1u, 2u, 3u), vec4(params.head_size - 1u));
}

// Four values of a head from number 4 * quad on, zeros past its end.
fn query_quad(start: u32, quad: u32) -> vec4<f32> {
    let at = vec4(start) + quad_columns(4u * quad);
    return select(vec4(0.0), vec4(qkv[at.x], qkv[at.y], qkv[at.z], qkv[at.w]), quad_exists(4u * quad));
}

fn saved_quad(start: u32, quad: u32) -> vec4<f32> {
    if ALIGNED {
        let at = start + 4u * quad;
        return vec4(saved[at], saved[at + 1u], saved[at + 2u], saved[at + 3u]);
    }
    let at = vec4(start) + quad_columns(4u * quad);
    return select(vec4(0.0), vec4(saved[at.x], saved[at.y], saved[at.z], saved[at.w]), quad_exists(4u * quad));
}

fn store_out(row: u32, head: u32, quad: u32, value: vec4<f32>) {
    let start = (row * params.heads + head) * params.head_size;
    let d = 4u * quad;
    for (var i = 0u; i < min(4u, max(params.head_size, d) - d); i++) {
        out[start + d + i] = value[i];
    }
}

// ---- A workgroup a head of a row ----

var<workgroup> sh_query: array<vec4<f32>, HEAD_QUADS>;
var<workgroup> sh_products: array<f32, WORKGROUP * PITCH>; // (key, invocation)
var<workgroup> sh_scores: array<f32, WORKGROUP>;
var<workgroup> sh_probabilities: array<f32, WORKGROUP>;
var<workgroup> sh_sums: array<vec4<f32>, WORKGROUP>;

@compute @workgroup_size(WORKGROUP)
fn cached(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let head = id.x;
    let row = id.y;
    let keys = keys_of(row);
    let key_start = cache_start(head, 0u);
    let value_start = cache_start(head, 1u);
    if lane < HEAD_QUADS {
        sh_query[lane] = params.scale * query_quad(query_start(row, head), lane);
    }
    workgroupBarrier();
    let value_lanes = WORKGROUP / HEAD_QUADS; // keys whose values are read at once
    let value_lane = lane / HEAD_QUADS;
    let quad = lane % HEAD_QUADS;
    var sum = vec4(0.0);
    var row_max = MASKED;
    var row_sum = 0.0; // of this invocation's keys
    for (var first = 0u; first < keys; first += WORKGROUP) {
        for (var i = lane / KEY_LANES; i < WORKGROUP; i += WORKGROUP / KEY_LANES) {
            var product = 0.0;
            if first + i < keys {
                for (var d = lane % KEY_LANES; d < HEAD_QUADS; d += KEY_LANES) {
                    product += dot(sh_query[d], saved_quad(key_start + (first + i) * params.head_size, d));
                }
            }
            sh_products[i * PITCH + lane % KEY_LANES] = product;
        }
        workgroupBarrier();
        var score = MASKED;
        if first + lane < keys {
            score = 0.0;
            for (var i = 0u; i < KEY_LANES; i++) {
                score += sh_products[lane * PITCH + i];
            }
        }
        sh_scores[lane] = score;
        workgroupBarrier();
        var new_max = row_max;
        for (var i = 0u; i < WORKGROUP; i++) {
            new_max = max(new_max, sh_scores[i]);
        }
        let correction = exp(row_max - new_max);
        let probability = exp(score - new_max);
        row_max = new_max;
        row_sum = row_sum * correction + probability;
        sh_probabilities[lane] = probability;
        workgroupBarrier();
        sum *= correction;
        if value_lane < value_lanes {
            for (var i = value_lane; i < min(WORKGROUP, keys - first); i += value_lanes) {
                sum += sh_probabilities[i] * saved_quad(value_start + (first + i) * params.head_size, quad);
            }
        }
    }
    sh_sums[lane] = sum;
    sh_scores[lane] = row_sum;
    workgroupBarrier();
    if lane < HEAD_QUADS {
        var total = vec4(0.0);
        for (var i = 0u; i < value_lanes; i++) {
            total += sh_sums[i * HEAD_QUADS + lane];
        }
        var total_sum = 0.0;
        for (var i = 0u; i < WORKGROUP; i++) {
            total_sum += sh_scores[i];
        }
        store_out(row, head, lane, total / total_sum);
    }
}

// ---- An invocation a head of a row ----

const ROWS_WORKGROUP: u32 = 8u; // small, so that few heads still use all cores

@compute @workgroup_size(ROWS_WORKGROUP)
fn cached_rows(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let i = id.x + id.y * groups.x * ROWS_WORKGROUP;
    if i >= params.rows * params.heads {
        return;
    }
    let row = i / params.heads;
    let head = i % params.heads;
    // From the params: a bound known to the compiler unrolls the loops, which emulated adapters take seconds to compile.
    let quads = (params.head_size + 3u) / 4u;
    var query: array<vec4<f32>, HEAD_QUADS>;
    var sum: array<vec4<f32>, HEAD_QUADS>;
    for (var quad = 0u; quad < quads; quad++) {
        query[quad] = params.scale * query_quad(query_start(row, head), quad);
    }
    var key_start = cache_start(head, 0u);
    var value_start = cache_start(head, 1u);
    var row_max = MASKED;
    var row_sum = 0.0;
    for (var key = 0u; key < keys_of(row); key++) {
        var products = vec4(0.0);
        for (var quad = 0u; quad < quads; quad++) {
            products += query[quad] * saved_quad(key_start, quad);
        }
        let score = dot(products, vec4(1.0));
        let new_max = max(row_max, score);
        let correction = exp(row_max - new_max);
        let probability = exp(score - new_max);
        for (var quad = 0u; quad < quads; quad++) {
            sum[quad] = correction * sum[quad] + probability * saved_quad(value_start, quad);
        }
        row_sum = row_sum * correction + probability;
        row_max = new_max;
        key_start += params.head_size;
        value_start += params.head_size;
    }
    for (var quad = 0u; quad < quads; quad++) {
        store_out(row, head, quad, sum[quad] / row_sum);
    }
}
