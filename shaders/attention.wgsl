// Causal multi-head attention. The tiled entry points give a workgroup a tile of tokens of one head and walk over the tiles it
// attends to (or is attended by), the head in slices of 32 so that workgroup memory does not grow with it. The `_registers`
// entry points, for adapters emulated on a CPU, give each invocation four tokens and need neither workgroup memory nor barriers.

const WORKGROUP: u32 = 64u;
const HEAD_SLICES: u32 = 2u; // ceil(head_size / 32), for the tiled entry points
const HEAD_QUADS: u32 = 16u; // ceil(head_size / 4), for the `_registers` entry points
const ALIGNED: bool = false; // head_size is a multiple of 4

const TILE: u32 = 32u;       // tokens in a tile
const LANES: u32 = 8u;       // a workgroup is 8 x 8 invocations, each of 4 rows and 4 columns of a tile of scores
const SLICE_QUADS: u32 = 8u; // vec4 in a slice of a head
const QUAD_PITCH: u32 = 9u;  // and one of padding, against bank conflicts
const SCORE_PITCH: u32 = 33u;
const ACCUMULATORS: u32 = 4u * HEAD_SLICES;
const MASKED: f32 = -1e30;

const QUERY: u32 = 0u;
const KEY: u32 = 1u;
const VALUE: u32 = 2u;

struct Params {
    batch: u32,
    seq: u32,
    heads: u32,
    head_size: u32,
    scale: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> qkv: array<f32>;        // (batch * seq, 3 * width)
@group(0) @binding(2) var<storage, read_write> out: array<f32>;  // (batch * seq, width)
@group(0) @binding(3) var<storage, read_write> lse: array<f32>;  // (batch, heads, seq)

@group(0) @binding(1) var<storage, read> saved_out: array<f32>;  // (batch * seq, width)
@group(0) @binding(3) var<storage, read_write> dot_out: array<f32>; // (batch, heads, seq)

@group(0) @binding(2) var<storage, read> d_out: array<f32>;      // (batch * seq, width)
@group(0) @binding(3) var<storage, read> saved_lse: array<f32>;  // (batch, heads, seq)
@group(0) @binding(4) var<storage, read> saved_dot: array<f32>;  // (batch, heads, seq)
@group(0) @binding(5) var<storage, read_write> d_qkv: array<f32>; // (batch * seq, 3 * width)

// A token's place: which sequence, which head.
struct Group {
    batch: u32,
    head: u32,
}

fn width() -> u32 {
    return params.heads * params.head_size;
}

// Index of the first of a head's values of token t in qkv (part 0, 1, 2) or d_qkv.
fn qkv_start(group: Group, part: u32, t: u32) -> u32 {
    return ((group.batch * params.seq + t) * 3u + part) * width() + group.head * params.head_size;
}

// The same in out and d_out.
fn out_start(group: Group, t: u32) -> u32 {
    return (group.batch * params.seq + t) * width() + group.head * params.head_size;
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

fn qkv_tile_quad(group: Group, part: u32, t: u32, quad: u32) -> vec4<f32> {
    if t >= params.seq || 4u * quad >= params.head_size {
        return vec4(0.0);
    }
    return qkv_quad(qkv_start(group, part, t), quad);
}

fn d_out_tile_quad(group: Group, t: u32, quad: u32) -> vec4<f32> {
    if t >= params.seq || 4u * quad >= params.head_size {
        return vec4(0.0);
    }
    return d_out_quad(out_start(group, t), quad);
}

// Puts a slice of a part of the tokens from `row` on into sh_rows.
fn stage_qkv_rows(lane: u32, group: Group, part: u32, row: u32, slice: u32) {
    for (var i = lane; i < TILE * SLICE_QUADS; i += WORKGROUP) {
        let t = i / SLICE_QUADS;
        let quad = i % SLICE_QUADS;
        sh_rows[t * QUAD_PITCH + quad] = qkv_tile_quad(group, part, row + t, slice * SLICE_QUADS + quad);
    }
}

fn stage_qkv_cols(lane: u32, group: Group, part: u32, column: u32, slice: u32) {
    for (var i = lane; i < TILE * SLICE_QUADS; i += WORKGROUP) {
        let t = i / SLICE_QUADS;
        let quad = i % SLICE_QUADS;
        sh_cols[t * QUAD_PITCH + quad] = qkv_tile_quad(group, part, column + t, slice * SLICE_QUADS + quad);
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
            stage_qkv_rows(lane, group, QUERY, first_query, slice);
            stage_qkv_cols(lane, group, KEY, first_key, slice);
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
            stage_qkv_cols(lane, group, VALUE, first_key, slice);
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
            stage_qkv_rows(lane, group, QUERY, first_query, slice);
            stage_qkv_cols(lane, group, KEY, first_key, slice);
            workgroupBarrier();
            add_products(x, y, &scores);
        }
        var d_probabilities: Scores;
        for (var slice = 0u; slice < HEAD_SLICES; slice++) {
            workgroupBarrier();
            stage_d_out_rows(lane, group, first_query, slice);
            stage_qkv_cols(lane, group, VALUE, first_key, slice);
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
            stage_qkv_cols(lane, group, KEY, first_key, slice);
            workgroupBarrier();
            add_weighted(x, y, slice, &d_q);
        }
    }
    for (var i = 0u; i < 4u; i++) {
        let query = first_query + 4u * y + i;
        if query < params.seq {
            for (var slice = 0u; slice < HEAD_SLICES; slice++) {
                store_d_qkv(qkv_start(group, QUERY, query), slice * SLICE_QUADS + x, d_q[4u * slice + i]);
            }
        }
    }
}

// Rows are keys here and columns queries.
@compute @workgroup_size(WORKGROUP)
fn backward_kv(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = Group(id.z, id.y);
    let x = lane % LANES;
    let y = lane / LANES;
    let first_key = id.x * TILE;
    var d_k: Accumulator;
    var d_v: Accumulator;
    for (var query_tile = id.x; query_tile < groups.x; query_tile++) {
        let first_query = query_tile * TILE;
        var scores: Scores;
        for (var slice = 0u; slice < HEAD_SLICES; slice++) {
            workgroupBarrier();
            stage_qkv_rows(lane, group, KEY, first_key, slice);
            stage_qkv_cols(lane, group, QUERY, first_query, slice);
            workgroupBarrier();
            add_products(x, y, &scores);
        }
        var d_probabilities: Scores;
        for (var slice = 0u; slice < HEAD_SLICES; slice++) {
            workgroupBarrier();
            stage_qkv_rows(lane, group, VALUE, first_key, slice);
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
            stage_qkv_cols(lane, group, QUERY, first_query, slice);
            workgroupBarrier();
            add_weighted(x, y, slice, &d_k);
        }
    }
    for (var i = 0u; i < 4u; i++) {
        let key = first_key + 4u * y + i;
        if key < params.seq {
            for (var slice = 0u; slice < HEAD_SLICES; slice++) {
                store_d_qkv(qkv_start(group, KEY, key), slice * SLICE_QUADS + x, d_k[4u * slice + i]);
                store_d_qkv(qkv_start(group, VALUE, key), slice * SLICE_QUADS + x, d_v[4u * slice + i]);
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

// ---- Registers ----

const REGISTER_WORKGROUP: u32 = 8u; // small, so that few tokens still use all cores
const COUNT: u32 = 4u;              // tokens of an invocation, and those it takes at a time

alias Tokens = array<vec4<f32>, COUNT * HEAD_QUADS>; // [COUNT * quad + token], the values of a head

// An invocation's group and first token; the last is true where there is none.
struct Place {
    group: Group,
    first: u32,
    outside: bool,
}

fn place(id: vec3<u32>, groups: vec3<u32>) -> Place {
    let i = id.x + id.y * groups.x * REGISTER_WORKGROUP;
    let blocks = (params.seq + COUNT - 1u) / COUNT;
    let group = i / blocks;
    return Place(
        Group(group / params.heads, group % params.heads),
        i % blocks * COUNT,
        i >= params.batch * params.heads * blocks,
    );
}

// The tokens from `first` on; past the sequence its last one, so that loads stay inside.
fn tokens(first: u32) -> vec4<u32> {
    return min(vec4(first) + vec4(0u, 1u, 2u, 3u), vec4(params.seq - 1u));
}

fn qkv_starts(group: Group, part: u32, t: vec4<u32>) -> vec4<u32> {
    return ((group.batch * params.seq + t) * 3u + part) * width() + group.head * params.head_size;
}

fn out_starts(group: Group, t: vec4<u32>) -> vec4<u32> {
    return (group.batch * params.seq + t) * width() + group.head * params.head_size;
}

// vec4 of a head. From the params, so that compilers do not unroll loops over it.
fn quads() -> u32 {
    return (params.head_size + 3u) / 4u;
}

fn store_d_tokens(group: Group, part: u32, first: u32, values: ptr<function, Tokens>) {
    for (var i = 0u; i < min(COUNT, params.seq - first); i++) {
        for (var quad = 0u; quad < quads(); quad++) {
            store_d_qkv(qkv_start(group, part, first + i), quad, (*values)[COUNT * quad + i]);
        }
    }
}

// Products of four values of each of four tokens with those of another.
fn quad_products(rows: mat4x4<f32>, column: vec4<f32>) -> vec4<f32> {
    return vec4(dot(rows[0], column), dot(rows[1], column), dot(rows[2], column), dot(rows[3], column));
}

fn qkv_quads(start: vec4<u32>, quad: u32) -> mat4x4<f32> {
    return mat4x4(qkv_quad(start.x, quad), qkv_quad(start.y, quad), qkv_quad(start.z, quad), qkv_quad(start.w, quad));
}

fn d_out_quads(start: vec4<u32>, quad: u32) -> mat4x4<f32> {
    return mat4x4(d_out_quad(start.x, quad), d_out_quad(start.y, quad), d_out_quad(start.z, quad), d_out_quad(start.w, quad));
}

// Products of four tokens (rows of the result) with four others (columns).
fn qkv_products(rows: vec4<u32>, columns: vec4<u32>) -> mat4x4<f32> {
    var products = mat4x4<f32>();
    for (var quad = 0u; quad < quads(); quad++) {
        let row = qkv_quads(rows, quad);
        for (var j = 0u; j < COUNT; j++) {
            products[j] += quad_products(row, qkv_quad(columns[j], quad));
        }
    }
    return products;
}

// The same of tokens in d_out (rows) and in qkv (columns).
fn d_out_products(rows: vec4<u32>, columns: vec4<u32>) -> mat4x4<f32> {
    var products = mat4x4<f32>();
    for (var quad = 0u; quad < quads(); quad++) {
        let row = d_out_quads(rows, quad);
        for (var j = 0u; j < COUNT; j++) {
            products[j] += quad_products(row, qkv_quad(columns[j], quad));
        }
    }
    return products;
}

// sums = keep * sums + the values of four tokens from `start` on, weighted; a column of weights belongs to one of the four.
fn add_qkv(sums: ptr<function, Tokens>, keep: vec4<f32>, weights: mat4x4<f32>, start: vec4<u32>) {
    let rows = transpose(weights);
    for (var quad = 0u; quad < quads(); quad++) {
        let values = qkv_quads(start, quad);
        for (var i = 0u; i < COUNT; i++) {
            (*sums)[COUNT * quad + i] = keep[i] * (*sums)[COUNT * quad + i] + values * rows[i];
        }
    }
}

fn add_d_out(sums: ptr<function, Tokens>, weights: mat4x4<f32>, start: vec4<u32>) {
    let rows = transpose(weights);
    for (var quad = 0u; quad < quads(); quad++) {
        let values = d_out_quads(start, quad);
        for (var i = 0u; i < COUNT; i++) {
            (*sums)[COUNT * quad + i] += values * rows[i];
        }
    }
}

@compute @workgroup_size(REGISTER_WORKGROUP)
fn forward_registers(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let own = place(id, groups);
    if own.outside {
        return;
    }
    let group = own.group;
    let query = vec4(own.first) + vec4(0u, 1u, 2u, 3u);
    let q = qkv_starts(group, QUERY, tokens(own.first));
    var sums: Tokens;
    var row_max = vec4(MASKED);
    var row_sum = vec4(0.0);
    for (var key = 0u; key < min(own.first + COUNT, params.seq); key += COUNT) {
        let key_tokens = tokens(key);
        var scores = qkv_products(q, qkv_starts(group, KEY, key_tokens));
        var new_max = row_max;
        for (var j = 0u; j < COUNT; j++) {
            scores[j] = select(vec4(MASKED), params.scale * scores[j], vec4(key + j) <= query);
            new_max = max(new_max, scores[j]);
        }
        let correction = exp(row_max - new_max);
        row_max = new_max;
        row_sum *= correction;
        for (var j = 0u; j < COUNT; j++) {
            scores[j] = exp(scores[j] - new_max);
            row_sum += scores[j];
        }
        add_qkv(&sums, correction, scores, qkv_starts(group, VALUE, key_tokens));
    }
    for (var i = 0u; i < min(COUNT, params.seq - own.first); i++) {
        for (var quad = 0u; quad < quads(); quad++) {
            store_out(out_start(group, query[i]), quad, sums[COUNT * quad + i] / row_sum[i]);
        }
        lse[row_index(group, query[i])] = row_max[i] + log(row_sum[i]);
    }
}

// saved_lse and saved_dot of four tokens.
fn lse_quad(group: Group, t: vec4<u32>) -> vec4<f32> {
    let at = row_index(group, 0u) + t;
    return vec4(saved_lse[at.x], saved_lse[at.y], saved_lse[at.z], saved_lse[at.w]);
}

fn dot_quad(group: Group, t: vec4<u32>) -> vec4<f32> {
    let at = row_index(group, 0u) + t;
    return vec4(saved_dot[at.x], saved_dot[at.y], saved_dot[at.z], saved_dot[at.w]);
}

@compute @workgroup_size(REGISTER_WORKGROUP)
fn backward_q_registers(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let own = place(id, groups);
    if own.outside {
        return;
    }
    let group = own.group;
    let query = vec4(own.first) + vec4(0u, 1u, 2u, 3u);
    let query_tokens = tokens(own.first);
    let row_lse = lse_quad(group, query_tokens);
    let row_dot = dot_quad(group, query_tokens);
    let q = qkv_starts(group, QUERY, query_tokens);
    let d_o = out_starts(group, query_tokens);
    var d_q: Tokens;
    for (var key = 0u; key < min(own.first + COUNT, params.seq); key += COUNT) {
        let key_tokens = tokens(key);
        var scores = qkv_products(q, qkv_starts(group, KEY, key_tokens));
        let d_probabilities = d_out_products(d_o, qkv_starts(group, VALUE, key_tokens));
        for (var j = 0u; j < COUNT; j++) {
            let probability = exp(params.scale * scores[j] - row_lse);
            let d_score = params.scale * probability * (d_probabilities[j] - row_dot);
            scores[j] = select(vec4(0.0), d_score, vec4(key + j) <= query);
        }
        add_qkv(&d_q, vec4(1.0), scores, qkv_starts(group, KEY, key_tokens));
    }
    store_d_tokens(group, QUERY, own.first, &d_q);
}

@compute @workgroup_size(REGISTER_WORKGROUP)
fn backward_kv_registers(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let own = place(id, groups);
    if own.outside {
        return;
    }
    let group = own.group;
    let key = vec4(own.first) + vec4(0u, 1u, 2u, 3u);
    let k = qkv_starts(group, KEY, tokens(own.first));
    let v = qkv_starts(group, VALUE, tokens(own.first));
    var d_k: Tokens;
    var d_v: Tokens;
    // A column of these matrices belongs to a query.
    for (var query = own.first; query < params.seq; query += COUNT) {
        let query_tokens = tokens(query);
        let row_lse = lse_quad(group, query_tokens);
        let row_dot = dot_quad(group, query_tokens);
        let q = qkv_starts(group, QUERY, query_tokens);
        let d_o = out_starts(group, query_tokens);
        var probabilities = qkv_products(k, q);
        var d_scores = transpose(d_out_products(d_o, v));
        for (var j = 0u; j < COUNT; j++) {
            let attended = (key <= vec4(query + j)) & vec4(query + j < params.seq);
            let probability = exp(params.scale * probabilities[j] - vec4(row_lse[j]));
            probabilities[j] = select(vec4(0.0), probability, attended);
            d_scores[j] = params.scale * probabilities[j] * (d_scores[j] - vec4(row_dot[j]));
        }
        add_d_out(&d_v, probabilities, d_o);
        add_qkv(&d_k, vec4(1.0), d_scores, q);
    }
    store_d_tokens(group, KEY, own.first, &d_k);
    store_d_tokens(group, VALUE, own.first, &d_v);
}
