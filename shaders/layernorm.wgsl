// Layer normalisation over rows of `width`. A workgroup takes a row; the `_rows` entry points, for adapters emulated on a CPU,
// give each invocation a row and need no workgroup memory.
// stats (rows, 2): mean and reciprocal standard deviation of each row, kept for the backward pass.

const WORKGROUP: u32 = 64u;

struct ForwardParams {
    rows: u32,
    width: u32,
    epsilon: f32,
}

@group(0) @binding(0) var<uniform> forward_params: ForwardParams;
@group(0) @binding(1) var<storage, read> x: array<f32>;            // (rows, width)
@group(0) @binding(2) var<storage, read> gamma: array<f32>;        // (width)
@group(0) @binding(3) var<storage, read> beta: array<f32>;         // (width)
@group(0) @binding(4) var<storage, read_write> out: array<f32>;    // (rows, width)
@group(0) @binding(5) var<storage, read_write> stats: array<f32>;  // (rows, 2)

var<workgroup> sh_sum: array<vec2<f32>, WORKGROUP>;

fn workgroup_sum(lane: u32, value: vec2<f32>) -> vec2<f32> {
    workgroupBarrier();
    sh_sum[lane] = value;
    workgroupBarrier();
    for (var half = WORKGROUP / 2u; half > 0u; half = half / 2u) {
        if lane < half {
            sh_sum[lane] = sh_sum[lane] + sh_sum[lane + half];
        }
        workgroupBarrier();
    }
    return sh_sum[0];
}

fn row_sum(row: u32, first: u32, step: u32) -> f32 {
    var sum = 0.0;
    for (var i = first; i < forward_params.width; i += step) {
        sum += x[row * forward_params.width + i];
    }
    return sum;
}

fn row_squares(row: u32, mean: f32, first: u32, step: u32) -> f32 {
    var sum = 0.0;
    for (var i = first; i < forward_params.width; i += step) {
        let centred = x[row * forward_params.width + i] - mean;
        sum += centred * centred;
    }
    return sum;
}

fn store_row(row: u32, mean: f32, squares: f32, first: u32, step: u32) {
    let width = forward_params.width;
    let rstd = 1.0 / sqrt(squares / f32(width) + forward_params.epsilon);
    for (var i = first; i < width; i += step) {
        out[row * width + i] = (x[row * width + i] - mean) * rstd * gamma[i] + beta[i];
    }
    if first == 0u {
        stats[row * 2u] = mean;
        stats[row * 2u + 1u] = rstd;
    }
}

@compute @workgroup_size(WORKGROUP)
fn forward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group.x + group.y * groups.x;
    if row >= forward_params.rows {
        return;
    }
    let mean = workgroup_sum(lane, vec2(row_sum(row, lane, WORKGROUP), 0.0)).x / f32(forward_params.width);
    let squares = workgroup_sum(lane, vec2(row_squares(row, mean, lane, WORKGROUP), 0.0)).x;
    store_row(row, mean, squares, lane, WORKGROUP);
}

@compute @workgroup_size(WORKGROUP)
fn forward_rows(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let row = id.x + id.y * groups.x * WORKGROUP;
    if row >= forward_params.rows {
        return;
    }
    let mean = row_sum(row, 0u, 1u) / f32(forward_params.width);
    store_row(row, mean, row_squares(row, mean, 0u, 1u), 0u, 1u);
}

struct BackwardParams {
    rows: u32,
    width: u32,
    accumulate: u32, // non-zero: add to d_x instead of replacing it
}

@group(0) @binding(0) var<uniform> backward_params: BackwardParams;
@group(0) @binding(1) var<storage, read> d_out: array<f32>;         // (rows, width)
@group(0) @binding(2) var<storage, read> saved_x: array<f32>;       // (rows, width)
@group(0) @binding(3) var<storage, read> saved_gamma: array<f32>;   // (width)
@group(0) @binding(4) var<storage, read> saved_stats: array<f32>;   // (rows, 2)
@group(0) @binding(5) var<storage, read_write> d_x: array<f32>;     // (rows, width)

// (norm, d_norm) of one element
fn normalised(row: u32, i: u32) -> vec2<f32> {
    let at = row * backward_params.width + i;
    return vec2((saved_x[at] - saved_stats[row * 2u]) * saved_stats[row * 2u + 1u], d_out[at] * saved_gamma[i]);
}

// (sum of d_norm, sum of d_norm * norm)
fn backward_sums(row: u32, first: u32, step: u32) -> vec2<f32> {
    var sums = vec2(0.0, 0.0);
    for (var i = first; i < backward_params.width; i += step) {
        let pair = normalised(row, i);
        sums += vec2(pair.y, pair.x * pair.y);
    }
    return sums;
}

fn store_d_row(row: u32, sums: vec2<f32>, first: u32, step: u32) {
    let width = backward_params.width;
    let means = sums / f32(width);
    let rstd = saved_stats[row * 2u + 1u];
    for (var i = first; i < width; i += step) {
        let pair = normalised(row, i);
        let value = rstd * (pair.y - means.x - pair.x * means.y);
        if backward_params.accumulate != 0u {
            d_x[row * width + i] += value;
        } else {
            d_x[row * width + i] = value;
        }
    }
}

@compute @workgroup_size(WORKGROUP)
fn backward_x(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group.x + group.y * groups.x;
    if row >= backward_params.rows {
        return;
    }
    store_d_row(row, workgroup_sum(lane, backward_sums(row, lane, WORKGROUP)), lane, WORKGROUP);
}

@compute @workgroup_size(WORKGROUP)
fn backward_x_rows(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let row = id.x + id.y * groups.x * WORKGROUP;
    if row >= backward_params.rows {
        return;
    }
    store_d_row(row, backward_sums(row, 0u, 1u), 0u, 1u);
}
