// The tall and thin products of LoRA. `forward_down` and `backward_up` reduce a row's many columns to `rank` values: a workgroup
// takes BLOCK rows and BLOCK ranks and splits the columns among its invocations; `_registers`, for adapters emulated on a CPU,
// gives each invocation a block. The gradients sum over all rows in two passes, without atomics: `backward_partial` over the rows
// of a split, `backward_b` and `backward_a` over the splits.

const WORKGROUP: u32 = 64u;
const BLOCK: u32 = 4u;

const SCALAR_WEIGHT: u32 = 0u;

struct ThinParams {
    rows: u32,
    columns: u32,
    rank: u32,
    first: u32,   // row i of the wide factor begins at element first + i * stride
    stride: u32,
    offset: u32,
}

@group(0) @binding(0) var<uniform> thin_params: ThinParams;
@group(0) @binding(1) var<storage, read> x: array<f32>;          // (rows, columns)
@group(0) @binding(2) var<storage, read> adapter: array<f32>;    // A (rank, columns) or B (columns, rank), at offset
@group(0) @binding(3) var<storage, read_write> u: array<f32>;    // (rows, rank)

@group(0) @binding(1) var<storage, read> d_y: array<f32>;        // (rows, columns)
@group(0) @binding(3) var<storage, read_write> v: array<f32>;    // (rows, rank)

var<workgroup> sh_sums: array<mat4x4<f32>, WORKGROUP>;

// Sums of a block, a column of the matrix for each row; every invocation of the workgroup gets all of them.
fn workgroup_sum(lane: u32, value: mat4x4<f32>) -> mat4x4<f32> {
    sh_sums[lane] = value;
    workgroupBarrier();
    for (var half = WORKGROUP / 2u; half > 0u; half = half / 2u) {
        if lane < half {
            sh_sums[lane] = sh_sums[lane] + sh_sums[lane + half];
        }
        workgroupBarrier();
    }
    return sh_sums[0];
}

// Rows and ranks past the end repeat the last one; they are not stored.
fn down_sums(row: u32, r: u32, first: u32, step: u32) -> mat4x4<f32> {
    let columns = thin_params.columns;
    let last_row = thin_params.rows - 1u;
    let last_rank = thin_params.rank - 1u;
    let x0 = thin_params.first + min(row, last_row) * thin_params.stride;
    let x1 = thin_params.first + min(row + 1u, last_row) * thin_params.stride;
    let x2 = thin_params.first + min(row + 2u, last_row) * thin_params.stride;
    let x3 = thin_params.first + min(row + 3u, last_row) * thin_params.stride;
    let a0 = thin_params.offset + min(r, last_rank) * columns;
    let a1 = thin_params.offset + min(r + 1u, last_rank) * columns;
    let a2 = thin_params.offset + min(r + 2u, last_rank) * columns;
    let a3 = thin_params.offset + min(r + 3u, last_rank) * columns;
    var sum0 = vec4(0.0);
    var sum1 = vec4(0.0);
    var sum2 = vec4(0.0);
    var sum3 = vec4(0.0);
    for (var i = first; i < columns; i += step) {
        let a = vec4(adapter[a0 + i], adapter[a1 + i], adapter[a2 + i], adapter[a3 + i]);
        sum0 = fma(vec4(x[x0 + i]), a, sum0);
        sum1 = fma(vec4(x[x1 + i]), a, sum1);
        sum2 = fma(vec4(x[x2 + i]), a, sum2);
        sum3 = fma(vec4(x[x3 + i]), a, sum3);
    }
    return mat4x4(sum0, sum1, sum2, sum3);
}

fn up_sums(row: u32, r: u32, first: u32, step: u32) -> mat4x4<f32> {
    let columns = thin_params.columns;
    let last_row = thin_params.rows - 1u;
    let last_rank = thin_params.rank - 1u;
    let y0 = thin_params.first + min(row, last_row) * thin_params.stride;
    let y1 = thin_params.first + min(row + 1u, last_row) * thin_params.stride;
    let y2 = thin_params.first + min(row + 2u, last_row) * thin_params.stride;
    let y3 = thin_params.first + min(row + 3u, last_row) * thin_params.stride;
    let b0 = thin_params.offset + min(r, last_rank);
    let b1 = thin_params.offset + min(r + 1u, last_rank);
    let b2 = thin_params.offset + min(r + 2u, last_rank);
    let b3 = thin_params.offset + min(r + 3u, last_rank);
    var sum0 = vec4(0.0);
    var sum1 = vec4(0.0);
    var sum2 = vec4(0.0);
    var sum3 = vec4(0.0);
    for (var i = first; i < columns; i += step) {
        let at = i * thin_params.rank;
        let b = vec4(adapter[b0 + at], adapter[b1 + at], adapter[b2 + at], adapter[b3 + at]);
        sum0 = fma(vec4(d_y[y0 + i]), b, sum0);
        sum1 = fma(vec4(d_y[y1 + i]), b, sum1);
        sum2 = fma(vec4(d_y[y2 + i]), b, sum2);
        sum3 = fma(vec4(d_y[y3 + i]), b, sum3);
    }
    return mat4x4(sum0, sum1, sum2, sum3);
}

fn store_u(row: u32, r: u32, sums: vec4<f32>) {
    let rank = thin_params.rank;
    if row >= thin_params.rows {
        return;
    }
    let at = row * rank + r;
    u[at] = sums.x;
    if r + 1u < rank { u[at + 1u] = sums.y; }
    if r + 2u < rank { u[at + 2u] = sums.z; }
    if r + 3u < rank { u[at + 3u] = sums.w; }
}

fn store_v(row: u32, r: u32, sums: vec4<f32>) {
    let rank = thin_params.rank;
    if row >= thin_params.rows {
        return;
    }
    let at = row * rank + r;
    v[at] = sums.x;
    if r + 1u < rank { v[at + 1u] = sums.y; }
    if r + 2u < rank { v[at + 2u] = sums.z; }
    if r + 3u < rank { v[at + 3u] = sums.w; }
}

@compute @workgroup_size(WORKGROUP)
fn forward_down(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = (group.x + group.y * groups.x) * BLOCK;
    let r = group.z * BLOCK;
    if row >= thin_params.rows {
        return;
    }
    let sums = workgroup_sum(lane, down_sums(row, r, lane, WORKGROUP));
    if lane < BLOCK {
        store_u(row + lane, r, sums[lane]);
    }
}

@compute @workgroup_size(WORKGROUP)
fn forward_down_registers(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let row = (id.x + id.y * groups.x * WORKGROUP) * BLOCK;
    let r = id.z * BLOCK;
    if row >= thin_params.rows {
        return;
    }
    let sums = down_sums(row, r, 0u, 1u);
    store_u(row, r, sums[0]);
    store_u(row + 1u, r, sums[1]);
    store_u(row + 2u, r, sums[2]);
    store_u(row + 3u, r, sums[3]);
}

@compute @workgroup_size(WORKGROUP)
fn backward_up(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = (group.x + group.y * groups.x) * BLOCK;
    let r = group.z * BLOCK;
    if row >= thin_params.rows {
        return;
    }
    let sums = workgroup_sum(lane, up_sums(row, r, lane, WORKGROUP));
    if lane < BLOCK {
        store_v(row + lane, r, sums[lane]);
    }
}

@compute @workgroup_size(WORKGROUP)
fn backward_up_registers(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let row = (id.x + id.y * groups.x * WORKGROUP) * BLOCK;
    let r = id.z * BLOCK;
    if row >= thin_params.rows {
        return;
    }
    let sums = up_sums(row, r, 0u, 1u);
    store_v(row, r, sums[0]);
    store_v(row + 1u, r, sums[1]);
    store_v(row + 2u, r, sums[2]);
    store_v(row + 3u, r, sums[3]);
}

struct PartialParams {
    rows: u32,
    columns: u32,
    rank: u32,
    split_rows: u32,
    first: u32,   // row i of the wide factor begins at element first + i * stride
    stride: u32,
}

@group(0) @binding(0) var<uniform> partial_params: PartialParams;
@group(0) @binding(1) var<storage, read> thin: array<f32>;            // (rows, rank)
@group(0) @binding(2) var<storage, read> wide: array<f32>;            // (rows, columns)
@group(0) @binding(3) var<storage, read_write> partial: array<f32>;   // (splits, rank, columns)

// An invocation takes a column and BLOCK ranks of one split.
@compute @workgroup_size(WORKGROUP)
fn backward_partial(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let columns = partial_params.columns;
    let rank = partial_params.rank;
    let column = group.x * WORKGROUP + lane;
    let r = group.y * BLOCK;
    let r1 = min(r + 1u, rank - 1u);
    let r2 = min(r + 2u, rank - 1u);
    let r3 = min(r + 3u, rank - 1u);
    let first = group.z * partial_params.split_rows;
    let end = min(first + partial_params.split_rows, partial_params.rows);
    if column >= columns {
        return;
    }
    var sums = vec4(0.0);
    for (var row = first; row < end; row += 1u) {
        let at = row * rank;
        let value = wide[partial_params.first + row * partial_params.stride + column];
        sums = fma(vec4(value), vec4(thin[at + r], thin[at + r1], thin[at + r2], thin[at + r3]), sums);
    }
    let at = (group.z * rank + r) * columns + column;
    partial[at] = sums.x;
    if r + 1u < rank { partial[at + columns] = sums.y; }
    if r + 2u < rank { partial[at + 2u * columns] = sums.z; }
    if r + 3u < rank { partial[at + 3u * columns] = sums.w; }
}

struct SumParams {
    columns: u32,
    rank: u32,
    splits: u32,
    offset: u32,
    scale: f32,
}

@group(0) @binding(0) var<uniform> sum_params: SumParams;
@group(0) @binding(1) var<storage, read> partial_sums: array<f32>;    // (splits, rank, columns)
@group(0) @binding(2) var<storage, read> scalars: array<f32>;
@group(0) @binding(3) var<storage, read_write> gradient: array<f32>;  // (columns, rank) or (rank, columns), at offset

fn split_sum(element: u32) -> f32 {
    let elements = sum_params.columns * sum_params.rank;
    var sum = 0.0;
    for (var split = 0u; split < sum_params.splits; split += 1u) {
        sum += partial_sums[split * elements + element];
    }
    return scalars[SCALAR_WEIGHT] * sum_params.scale * sum;
}

@compute @workgroup_size(WORKGROUP)
fn backward_b(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let element = id.x + id.y * groups.x * WORKGROUP;
    if element >= sum_params.columns * sum_params.rank {
        return;
    }
    let column = element % sum_params.columns;
    let r = element / sum_params.columns;
    gradient[sum_params.offset + column * sum_params.rank + r] += split_sum(element);
}

@compute @workgroup_size(WORKGROUP)
fn backward_a(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let element = id.x + id.y * groups.x * WORKGROUP;
    if element >= sum_params.columns * sum_params.rank {
        return;
    }
    gradient[sum_params.offset + element] += split_sum(element);
}
