// Causal multi-head attention. The tiled entry points give a workgroup a tile of tokens of one head and walk over the tiles it
// attends to (or is attended by), the head in slices of 32 so that workgroup memory does not grow with it. The `_rows` entry
// points, for adapters emulated on a CPU, give each invocation a token and need neither workgroup memory nor barriers. Query head
// h reads key-value head h / (heads / kv_heads); gradients of keys and values sum over the heads that share them in their order.

const WORKGROUP: u32 = 64u;
const HEAD_SLICES: u32 = 2u; // ceil(head_size / 32), for the tiled entry points
const HEAD_QUADS: u32 = 16u; // ceil(head_size / 4), for the `_rows` entry points
const ALIGNED: bool = false; // head_size is a multiple of 4

const TILE: u32 = 32u;       // tokens in a tile
const LANES: u32 = 8u;       // a workgroup is 8 x 8 invocations, each of 4 rows and 4 columns of a tile of scores
const SLICE_QUADS: u32 = 8u; // vec4 in a slice of a head
const QUAD_PITCH: u32 = 9u;  // and one of padding, against bank conflicts
const SCORE_PITCH: u32 = 33u;
const ACCUMULATORS: u32 = 4u * HEAD_SLICES;
const MASKED: f32 = -1e30;

struct Params {
    batch: u32,
    seq: u32,
    heads: u32,
    kv_heads: u32,
    head_size: u32,
    scale: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> qkv: array<f32>;        // (batch * seq, slots * head_size)
@group(0) @binding(2) var<storage, read_write> out: array<f32>;  // (batch * seq, heads * head_size)
@group(0) @binding(3) var<storage, read_write> lse: array<f32>;  // (batch, heads, seq)

@group(0) @binding(1) var<storage, read> saved_out: array<f32>;  // (batch * seq, heads * head_size)
@group(0) @binding(3) var<storage, read_write> dot_out: array<f32>; // (batch, heads, seq)

@group(0) @binding(2) var<storage, read> d_out: array<f32>;      // (batch * seq, heads * head_size)
@group(0) @binding(3) var<storage, read> saved_lse: array<f32>;  // (batch, heads, seq)
@group(0) @binding(4) var<storage, read> saved_dot: array<f32>;  // (batch, heads, seq)
@group(0) @binding(5) var<storage, read_write> d_qkv: array<f32>; // (batch * seq, slots * head_size)

// A token's place: which sequence, which head.
struct Group {
    batch: u32,
    head: u32,
}

// Query heads that share a key-value head.
fn sharing() -> u32 {
    return params.heads / params.kv_heads;
}

// A row of qkv has `slots` heads: the query heads, then the key heads, then the value heads.
fn slots() -> u32 {
    return params.heads + 2u * params.kv_heads;
}

fn key_slot(kv_head: u32) -> u32 {
    return params.heads + kv_head;
}

fn value_slot(kv_head: u32) -> u32 {
    return params.heads + params.kv_heads + kv_head;
}

// Index of the first value of a slot of token t in qkv or d_qkv.
fn qkv_start(batch: u32, slot: u32, t: u32) -> u32 {
    return ((batch * params.seq + t) * slots() + slot) * params.head_size;
}

// Index of the first of a head's values of token t in out or d_out.
fn out_start(group: Group, t: u32) -> u32 {
    return ((group.batch * params.seq + t) * params.heads + group.head) * params.head_size;
}

// Index of token t in lse and dot.
fn row_index(group: Group, t: u32) -> u32 {
    return (group.batch * params.heads + group.head) * params.seq + t;
}

// Four values of a head from number 4 * quad on, zeros past its end. Without branches, of which emulated adapters take both sides.
fn qkv_quad(start: u32, quad: u32) -> vec4<f32> {
    let d = 4u * quad;
    if ALIGNED {
        let at = start + d;
        return vec4(qkv[at], qkv[at + 1u], qkv[at + 2u], qkv[at + 3u]);
    }
    let at = vec4(start) + quad_columns(d);
    return select(vec4(0.0), vec4(qkv[at.x], qkv[at.y], qkv[at.z], qkv[at.w]), quad_exists(d));
}

fn d_out_quad(start: u32, quad: u32) -> vec4<f32> {
    let d = 4u * quad;
    if ALIGNED {
        let at = start + d;
        return vec4(d_out[at], d_out[at + 1u], d_out[at + 2u], d_out[at + 3u]);
    }
    let at = vec4(start) + quad_columns(d);
    return select(vec4(0.0), vec4(d_out[at.x], d_out[at.y], d_out[at.z], d_out[at.w]), quad_exists(d));
}

fn quad_exists(d: u32) -> vec4<bool> {
    return vec4(d) + vec4(0u, 1u, 2u, 3u) < vec4(params.head_size);
}

// The columns d..d+4, those past the head's end replaced by its last.
fn quad_columns(d: u32) -> vec4<u32> {
    return min(vec4(d) + vec4(0u, 1u, 2u, 3u), vec4(params.head_size - 1u));
}

fn store_d_qkv(start: u32, quad: u32, value: vec4<f32>) {
    let d = 4u * quad;
    for (var i = 0u; i < min(4u, max(params.head_size, d) - d); i++) {
        d_qkv[start + d + i] = value[i];
    }
}

fn store_out(start: u32, quad: u32, value: vec4<f32>) {
    let d = 4u * quad;
    for (var i = 0u; i < min(4u, max(params.head_size, d) - d); i++) {
        out[start + d + i] = value[i];
    }
}

// ---- Tiled ----

var<workgroup> sh_rows: array<vec4<f32>, TILE * QUAD_PITCH>;  // a slice of the tile of the workgroup's own tokens
var<workgroup> sh_cols: array<vec4<f32>, TILE * QUAD_PITCH>;  // a slice of the tile it walks over
var<workgroup> sh_scores: array<f32, TILE * SCORE_PITCH>;     // (row, column)
var<workgroup> sh_reduce: array<f32, TILE * LANES>;

alias Scores = array<vec4<f32>, 4>;                  // of rows 4y..4y+4 and columns x, x+8, x+16, x+24
alias Accumulator = array<vec4<f32>, ACCUMULATORS>;  // [4 * slice + row], values 4x..4x+4 of the slice

fn qkv_tile_quad(batch: u32, slot: u32, t: u32, quad: u32) -> vec4<f32> {
    if t >= params.seq || 4u * quad >= params.head_size {
        return vec4(0.0);
    }
    return qkv_quad(qkv_start(batch, slot, t), quad);
}

fn d_out_tile_quad(group: Group, t: u32, quad: u32) -> vec4<f32> {
    if t >= params.seq || 4u * quad >= params.head_size {
        return vec4(0.0);
    }
    return d_out_quad(out_start(group, t), quad);
}

// Puts a slice of a slot of the tokens from `row` on into sh_rows.
fn stage_qkv_rows(lane: u32, batch: u32, slot: u32, row: u32, slice: u32) {
    for (var i = lane; i < TILE * SLICE_QUADS; i += WORKGROUP) {
        let t = i / SLICE_QUADS;
        let quad = i % SLICE_QUADS;
        sh_rows[t * QUAD_PITCH + quad] = qkv_tile_quad(batch, slot, row + t, slice * SLICE_QUADS + quad);
    }
}

fn stage_qkv_cols(lane: u32, batch: u32, slot: u32, column: u32, slice: u32) {
    for (var i = lane; i < TILE * SLICE_QUADS; i += WORKGROUP) {
        let t = i / SLICE_QUADS;
        let quad = i % SLICE_QUADS;
        sh_cols[t * QUAD_PITCH + quad] = qkv_tile_quad(batch, slot, column + t, slice * SLICE_QUADS + quad);
    }
}

fn stage_d_out_rows(lane: u32, group: Group, row: u32, slice: u32) {
    for (var i = lane; i < TILE * SLICE_QUADS; i += WORKGROUP) {
        let t = i / SLICE_QUADS;
        let quad = i % SLICE_QUADS;
        sh_rows[t * QUAD_PITCH + quad] = d_out_tile_quad(group, row + t, slice * SLICE_QUADS + quad);
    }
}

fn stage_d_out_cols(lane: u32, group: Group, column: u32, slice: u32) {
    for (var i = lane; i < TILE * SLICE_QUADS; i += WORKGROUP) {
        let t = i / SLICE_QUADS;
        let quad = i % SLICE_QUADS;
        sh_cols[t * QUAD_PITCH + quad] = d_out_tile_quad(group, column + t, slice * SLICE_QUADS + quad);
    }
}

// scores += rows · colsᵀ over the staged slices
fn add_products(x: u32, y: u32, scores: ptr<function, Scores>) {
    for (var d = 0u; d < SLICE_QUADS; d++) {
        let c0 = sh_cols[x * QUAD_PITCH + d];
        let c1 = sh_cols[(x + LANES) * QUAD_PITCH + d];
        let c2 = sh_cols[(x + 2u * LANES) * QUAD_PITCH + d];
        let c3 = sh_cols[(x + 3u * LANES) * QUAD_PITCH + d];
        for (var i = 0u; i < 4u; i++) {
            let r = sh_rows[(4u * y + i) * QUAD_PITCH + d];
            (*scores)[i] += vec4(dot(r, c0), dot(r, c1), dot(r, c2), dot(r, c3));
        }
    }
}

// accumulator += scores · cols over the staged slice
fn add_weighted(x: u32, y: u32, slice: u32, accumulator: ptr<function, Accumulator>) {
    var sums: array<vec4<f32>, 4>;
    for (var t = 0u; t < TILE; t++) {
        let value = sh_cols[t * QUAD_PITCH + x];
        for (var i = 0u; i < 4u; i++) {
            sums[i] += sh_scores[(4u * y + i) * SCORE_PITCH + t] * value;
        }
    }
    for (var i = 0u; i < 4u; i++) {
        (*accumulator)[4u * slice + i] += sums[i];
    }
}

fn share_scores(x: u32, y: u32, scores: ptr<function, Scores>) {
    for (var i = 0u; i < 4u; i++) {
        for (var j = 0u; j < 4u; j++) {
            sh_scores[(4u * y + i) * SCORE_PITCH + x + LANES * j] = (*scores)[i][j];
        }
    }
}


// Whether queries `query` may attend to keys `key`; false beyond the sequence.
fn attends(query: vec4<u32>, key: vec4<u32>) -> vec4<bool> {
    return (key <= query) & (query < vec4(params.seq));
}

fn columns(first: u32, x: u32) -> vec4<u32> {
    return vec4(first + x) + vec4(0u, LANES, 2u * LANES, 3u * LANES);
}

@compute @workgroup_size(WORKGROUP)
fn forward(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = Group(id.z, id.y);
    let kv_head = id.y / sharing();
    let x = lane % LANES;
    let y = lane / LANES;
    let tile = groups.x - 1u - id.x; // the longest walks first
    let first_query = tile * TILE;
    var accumulator: Accumulator;
    var row_max = vec4(MASKED);
    var row_sum = vec4(0.0); // of this invocation's columns
    for (var key_tile = 0u; key_tile <= tile; key_tile++) {
        let first_key = key_tile * TILE;
        var scores: Scores;
        for (var slice = 0u; slice < HEAD_SLICES; slice++) {
            workgroupBarrier();
            stage_qkv_rows(lane, id.z, id.y, first_query, slice);
            stage_qkv_cols(lane, id.z, key_slot(kv_head), first_key, slice);
            workgroupBarrier();
            add_products(x, y, &scores);
        }
        let key = columns(first_key, x);
        for (var i = 0u; i < 4u; i++) {
            let query = vec4(first_query + 4u * y + i);
            scores[i] = select(vec4(MASKED), scores[i] * params.scale, attends(query, key));
            let pair = max(scores[i].xy, scores[i].zw);
            sh_reduce[(4u * y + i) * LANES + x] = max(pair.x, pair.y);
        }
        workgroupBarrier();
        var new_max = row_max;
        for (var i = 0u; i < 4u; i++) {
            for (var j = 0u; j < LANES; j++) {
                new_max[i] = max(new_max[i], sh_reduce[(4u * y + i) * LANES + j]);
            }
        }
        let correction = exp(row_max - new_max);
        row_max = new_max;
        for (var i = 0u; i < 4u; i++) {
            scores[i] = exp(scores[i] - vec4(new_max[i]));
            row_sum[i] = row_sum[i] * correction[i] + dot(scores[i], vec4(1.0));
            for (var slice = 0u; slice < HEAD_SLICES; slice++) {
                accumulator[4u * slice + i] *= correction[i];
            }
        }
        share_scores(x, y, &scores);
        for (var slice = 0u; slice < HEAD_SLICES; slice++) {
            workgroupBarrier();
            stage_qkv_cols(lane, id.z, value_slot(kv_head), first_key, slice);
            workgroupBarrier();
            add_weighted(x, y, slice, &accumulator);
        }
    }
    for (var i = 0u; i < 4u; i++) {
        sh_reduce[(4u * y + i) * LANES + x] = row_sum[i];
    }
    workgroupBarrier();
    for (var i = 0u; i < 4u; i++) {
        let query = first_query + 4u * y + i;
        if query < params.seq {
            var sum = 0.0;
            for (var j = 0u; j < LANES; j++) {
                sum += sh_reduce[(4u * y + i) * LANES + j];
            }
            for (var slice = 0u; slice < HEAD_SLICES; slice++) {
                store_out(out_start(group, query), slice * SLICE_QUADS + x, accumulator[4u * slice + i] / sum);
            }
            if x == 0u {
                lse[row_index(group, query)] = row_max[i] + log(sum);
            }
        }
    }
}

@compute @workgroup_size(WORKGROUP)
fn backward_q(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = Group(id.z, id.y);
    let kv_head = id.y / sharing();
    let x = lane % LANES;
    let y = lane / LANES;
    let tile = groups.x - 1u - id.x;
    let first_query = tile * TILE;
    var row_lse = vec4(0.0);
    var row_dot = vec4(0.0);
    for (var i = 0u; i < 4u; i++) {
        let query = first_query + 4u * y + i;
        if query < params.seq {
            row_lse[i] = saved_lse[row_index(group, query)];
            row_dot[i] = saved_dot[row_index(group, query)];
        }
    }
    var d_q: Accumulator;
    for (var key_tile = 0u; key_tile <= tile; key_tile++) {
        let first_key = key_tile * TILE;
        var scores: Scores;
        for (var slice = 0u; slice < HEAD_SLICES; slice++) {
            workgroupBarrier();
            stage_qkv_rows(lane, id.z, id.y, first_query, slice);
            stage_qkv_cols(lane, id.z, key_slot(kv_head), first_key, slice);
            workgroupBarrier();
            add_products(x, y, &scores);
        }
        var d_probabilities: Scores;
        for (var slice = 0u; slice < HEAD_SLICES; slice++) {
            workgroupBarrier();
            stage_d_out_rows(lane, group, first_query, slice);
            stage_qkv_cols(lane, id.z, value_slot(kv_head), first_key, slice);
            workgroupBarrier();
            add_products(x, y, &d_probabilities);
        }
        let key = columns(first_key, x);
        for (var i = 0u; i < 4u; i++) {
            let query = vec4(first_query + 4u * y + i);
            let probability = exp(params.scale * scores[i] - vec4(row_lse[i]));
            let d_score = params.scale * probability * (d_probabilities[i] - vec4(row_dot[i]));
            scores[i] = select(vec4(0.0), d_score, attends(query, key));
        }
        share_scores(x, y, &scores);
        for (var slice = 0u; slice < HEAD_SLICES; slice++) {
            workgroupBarrier();
            stage_qkv_cols(lane, id.z, key_slot(kv_head), first_key, slice);
            workgroupBarrier();
            add_weighted(x, y, slice, &d_q);
        }
    }
    for (var i = 0u; i < 4u; i++) {
        let query = first_query + 4u * y + i;
        if query < params.seq {
            for (var slice = 0u; slice < HEAD_SLICES; slice++) {
                store_d_qkv(qkv_start(id.z, id.y, query), slice * SLICE_QUADS + x, d_q[4u * slice + i]);
            }
        }
    }
}

// Rows are keys here and columns queries, of one head after the other of those that share the keys.
@compute @workgroup_size(WORKGROUP)
fn backward_kv(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let batch = id.z;
    let k_slot = key_slot(id.y);
    let v_slot = value_slot(id.y);
    let x = lane % LANES;
    let y = lane / LANES;
    let first_key = id.x * TILE;
    var d_k: Accumulator;
    var d_v: Accumulator;
    for (var head = id.y * sharing(); head < (id.y + 1u) * sharing(); head++) {
        let group = Group(batch, head);
        for (var query_tile = id.x; query_tile < groups.x; query_tile++) {
            let first_query = query_tile * TILE;
            var scores: Scores;
            for (var slice = 0u; slice < HEAD_SLICES; slice++) {
                workgroupBarrier();
                stage_qkv_rows(lane, batch, k_slot, first_key, slice);
                stage_qkv_cols(lane, batch, head, first_query, slice);
                workgroupBarrier();
                add_products(x, y, &scores);
            }
            var d_probabilities: Scores;
            for (var slice = 0u; slice < HEAD_SLICES; slice++) {
                workgroupBarrier();
                stage_qkv_rows(lane, batch, v_slot, first_key, slice);
                stage_d_out_cols(lane, group, first_query, slice);
                workgroupBarrier();
                add_products(x, y, &d_probabilities);
            }
            let query = columns(first_query, x);
            var column_lse = vec4(0.0);
            var column_dot = vec4(0.0);
            for (var j = 0u; j < 4u; j++) {
                if query[j] < params.seq {
                    column_lse[j] = saved_lse[row_index(group, query[j])];
                    column_dot[j] = saved_dot[row_index(group, query[j])];
                }
            }
            var d_scores: Scores;
            for (var i = 0u; i < 4u; i++) {
                let key = vec4(first_key + 4u * y + i);
                let probability = exp(params.scale * scores[i] - column_lse);
                scores[i] = select(vec4(0.0), probability, attends(query, key));
                d_scores[i] = params.scale * scores[i] * (d_probabilities[i] - column_dot);
            }
            share_scores(x, y, &scores);
            for (var slice = 0u; slice < HEAD_SLICES; slice++) {
                workgroupBarrier();
                stage_d_out_cols(lane, group, first_query, slice);
                workgroupBarrier();
                add_weighted(x, y, slice, &d_v);
            }
            workgroupBarrier();
            share_scores(x, y, &d_scores);
            for (var slice = 0u; slice < HEAD_SLICES; slice++) {
                workgroupBarrier();
                stage_qkv_cols(lane, batch, head, first_query, slice);
                workgroupBarrier();
                add_weighted(x, y, slice, &d_k);
            }
        }
    }
    for (var i = 0u; i < 4u; i++) {
        let key = first_key + 4u * y + i;
        if key < params.seq {
            for (var slice = 0u; slice < HEAD_SLICES; slice++) {
                store_d_qkv(qkv_start(batch, k_slot, key), slice * SLICE_QUADS + x, d_k[4u * slice + i]);
                store_d_qkv(qkv_start(batch, v_slot, key), slice * SLICE_QUADS + x, d_v[4u * slice + i]);
            }
        }
    }
}

@compute @workgroup_size(WORKGROUP)
fn backward_dot(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let i = id.x + id.y * groups.x * WORKGROUP;
    if i >= params.batch * params.heads * params.seq {
        return;
    }
    let group = i / params.seq;
    let start = out_start(Group(group / params.heads, group % params.heads), i % params.seq);
    var sum = 0.0;
    for (var d = start; d < start + params.head_size; d++) {
        sum += saved_out[d] * d_out[d];
    }
    dot_out[i] = sum;
}

// ---- An invocation a token ----

const ROWS_WORKGROUP: u32 = 8u; // small, so that few tokens still use all cores

alias Token = array<vec4<f32>, HEAD_QUADS>; // the values of a head

// vec4 of a head: from the params, because a bound known to the compiler unrolls the loops, which emulated adapters take
// seconds to compile.
fn quads() -> u32 {
    return (params.head_size + 3u) / 4u;
}

// The group of an index into lse and dot.
fn group_of(i: u32) -> Group {
    let group = i / params.seq;
    return Group(group / params.heads, group % params.heads);
}

fn load_qkv(batch: u32, slot: u32, t: u32, token: ptr<function, Token>) {
    for (var quad = 0u; quad < quads(); quad++) {
        (*token)[quad] = qkv_quad(qkv_start(batch, slot, t), quad);
    }
}

fn load_d_out(group: Group, t: u32, token: ptr<function, Token>) {
    for (var quad = 0u; quad < quads(); quad++) {
        (*token)[quad] = d_out_quad(out_start(group, t), quad);
    }
}

fn token_dot(a: ptr<function, Token>, b: ptr<function, Token>) -> f32 {
    var sum = vec4(0.0);
    for (var quad = 0u; quad < quads(); quad++) {
        sum += (*a)[quad] * (*b)[quad];
    }
    return dot(sum, vec4(1.0));
}

fn token_add(sum: ptr<function, Token>, keep: f32, weight: f32, value: ptr<function, Token>) {
    for (var quad = 0u; quad < quads(); quad++) {
        (*sum)[quad] = keep * (*sum)[quad] + weight * (*value)[quad];
    }
}

fn store_d_token(batch: u32, slot: u32, t: u32, token: ptr<function, Token>) {
    for (var quad = 0u; quad < quads(); quad++) {
        store_d_qkv(qkv_start(batch, slot, t), quad, (*token)[quad]);
    }
}

@compute @workgroup_size(ROWS_WORKGROUP)
fn forward_rows(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let i = id.x + id.y * groups.x * ROWS_WORKGROUP;
    if i >= params.batch * params.heads * params.seq {
        return;
    }
    let group = group_of(i);
    let k_slot = key_slot(group.head / sharing());
    let v_slot = value_slot(group.head / sharing());
    let query = i % params.seq;
    var q: Token;
    load_qkv(group.batch, group.head, query, &q);
    var sum: Token;
    var row_max = MASKED;
    var row_sum = 0.0;
    var other: Token;
    for (var key = 0u; key <= query; key++) {
        load_qkv(group.batch, k_slot, key, &other);
        let score = params.scale * token_dot(&q, &other);
        let new_max = max(row_max, score);
        let correction = exp(row_max - new_max);
        let probability = exp(score - new_max);
        load_qkv(group.batch, v_slot, key, &other);
        token_add(&sum, correction, probability, &other);
        row_sum = row_sum * correction + probability;
        row_max = new_max;
    }
    for (var quad = 0u; quad < quads(); quad++) {
        store_out(out_start(group, query), quad, sum[quad] / row_sum);
    }
    lse[i] = row_max + log(row_sum);
}

@compute @workgroup_size(ROWS_WORKGROUP)
fn backward_q_rows(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let i = id.x + id.y * groups.x * ROWS_WORKGROUP;
    if i >= params.batch * params.heads * params.seq {
        return;
    }
    let group = group_of(i);
    let k_slot = key_slot(group.head / sharing());
    let v_slot = value_slot(group.head / sharing());
    let query = i % params.seq;
    var q: Token;
    var d_o: Token;
    load_qkv(group.batch, group.head, query, &q);
    load_d_out(group, query, &d_o);
    var d_q: Token;
    var other: Token;
    for (var key = 0u; key <= query; key++) {
        load_qkv(group.batch, v_slot, key, &other);
        let d_probability = token_dot(&d_o, &other);
        load_qkv(group.batch, k_slot, key, &other);
        let probability = exp(params.scale * token_dot(&q, &other) - saved_lse[i]);
        token_add(&d_q, 1.0, params.scale * probability * (d_probability - saved_dot[i]), &other);
    }
    store_d_token(group.batch, group.head, query, &d_q);
}

@compute @workgroup_size(ROWS_WORKGROUP)
fn backward_kv_rows(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let i = id.x + id.y * groups.x * ROWS_WORKGROUP;
    if i >= params.batch * params.kv_heads * params.seq {
        return;
    }
    let key = i % params.seq;
    let batch = i / params.seq / params.kv_heads;
    let kv_head = i / params.seq % params.kv_heads;
    var k: Token;
    var v: Token;
    load_qkv(batch, key_slot(kv_head), key, &k);
    load_qkv(batch, value_slot(kv_head), key, &v);
    var d_k: Token;
    var d_v: Token;
    var q: Token;
    var d_o: Token;
    for (var head = kv_head * sharing(); head < (kv_head + 1u) * sharing(); head++) {
        let group = Group(batch, head);
        for (var query = key; query < params.seq; query++) {
            let row = row_index(group, query);
            load_qkv(batch, head, query, &q);
            load_d_out(group, query, &d_o);
            let probability = exp(params.scale * token_dot(&k, &q) - saved_lse[row]);
            token_add(&d_v, 1.0, probability, &d_o);
            token_add(&d_k, 1.0, params.scale * probability * (token_dot(&v, &d_o) - saved_dot[row]), &q);
        }
    }
    store_d_token(batch, key_slot(kv_head), key, &d_k);
    store_d_token(batch, value_slot(kv_head), key, &d_v);
}
