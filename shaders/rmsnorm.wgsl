// Root-mean-square normalisation of groups of `width` values: a whole row, or each head of it. A workgroup takes a group; the
// `_rows` entry points, for adapters emulated on a CPU, give each invocation a group and need no workgroup memory.
// Row r of a tensor begins at element first + r * stride of its buffer.
// stats (rows, groups): reciprocal root mean square of each group, kept for the backward pass.

const WORKGROUP: u32 = 64u;

struct ForwardLayout {
    rows: u32,
    groups: u32,
    width: u32,
    epsilon: f32,
    x_first: u32,
    x_stride: u32,
    out_first: u32,
    out_stride: u32,
}

@group(0) @binding(0) var<uniform> forward_params: ForwardLayout;
@group(0) @binding(1) var<storage, read> x: array<f32>;            // (rows, groups * width)
@group(0) @binding(2) var<storage, read> gamma: array<f32>;        // (width)
@group(0) @binding(3) var<storage, read_write> out: array<f32>;    // (rows, groups * width)
@group(0) @binding(4) var<storage, read_write> stats: array<f32>;  // (rows, groups)

var<workgroup> sh_sum: array<f32, WORKGROUP>;

fn workgroup_sum(lane: u32, value: f32) -> f32 {
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

// Index of the first value of group i of all groups of all rows.
fn start_of(i: u32, groups: u32, width: u32, first: u32, stride: u32) -> u32 {
    return first + i / groups * stride + i % groups * width;
}

fn x_start(i: u32) -> u32 {
    return start_of(i, forward_params.groups, forward_params.width, forward_params.x_first, forward_params.x_stride);
}

fn group_squares(i: u32, first: u32, step: u32) -> f32 {
    let start = x_start(i);
    var sum = 0.0;
    for (var d = first; d < forward_params.width; d += step) {
        sum += x[start + d] * x[start + d];
    }
    return sum;
}

fn store_group(i: u32, squares: f32, first: u32, step: u32) {
    let width = forward_params.width;
    let rstd = 1.0 / sqrt(squares / f32(width) + forward_params.epsilon);
    let start = x_start(i);
    let out_start = start_of(i, forward_params.groups, width, forward_params.out_first, forward_params.out_stride);
    for (var d = first; d < width; d += step) {
        out[out_start + d] = x[start + d] * rstd * gamma[d];
    }
    if first == 0u {
        stats[i] = rstd;
    }
}

@compute @workgroup_size(WORKGROUP)
fn forward(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = id.x + id.y * groups.x;
    if i >= forward_params.rows * forward_params.groups {
        return;
    }
    store_group(i, workgroup_sum(lane, group_squares(i, lane, WORKGROUP)), lane, WORKGROUP);
}

@compute @workgroup_size(WORKGROUP)
fn forward_rows(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let i = id.x + id.y * groups.x * WORKGROUP;
    if i >= forward_params.rows * forward_params.groups {
        return;
    }
    store_group(i, group_squares(i, 0u, 1u), 0u, 1u);
}

struct BackwardLayout {
    rows: u32,
    groups: u32,
    width: u32,
    accumulate: u32,
    d_out_first: u32,
    d_out_stride: u32,
    x_first: u32,
    x_stride: u32,
    d_x_first: u32,
    d_x_stride: u32,
}

@group(0) @binding(0) var<uniform> backward_params: BackwardLayout;
@group(0) @binding(1) var<storage, read> d_out: array<f32>;        // (rows, groups * width)
@group(0) @binding(2) var<storage, read> saved_x: array<f32>;      // (rows, groups * width)
@group(0) @binding(3) var<storage, read> saved_gamma: array<f32>;  // (width)
@group(0) @binding(4) var<storage, read> saved_stats: array<f32>;  // (rows, groups)
@group(0) @binding(5) var<storage, read_write> d_x: array<f32>;    // (rows, groups * width)

fn d_out_start(i: u32) -> u32 {
    let p = backward_params;
    return start_of(i, p.groups, p.width, p.d_out_first, p.d_out_stride);
}

fn saved_x_start(i: u32) -> u32 {
    let p = backward_params;
    return start_of(i, p.groups, p.width, p.x_first, p.x_stride);
}

// The sum of d_norm * norm, where norm = x * rstd and d_norm = d_out * gamma.
fn backward_sum(i: u32, first: u32, step: u32) -> f32 {
    let rstd = saved_stats[i];
    let start = d_out_start(i);
    let x_start = saved_x_start(i);
    var sum = 0.0;
    for (var d = first; d < backward_params.width; d += step) {
        sum += d_out[start + d] * saved_gamma[d] * (saved_x[x_start + d] * rstd);
    }
    return sum;
}

fn store_d_x(i: u32, sum: f32, first: u32, step: u32) {
    let width = backward_params.width;
    let rstd = saved_stats[i];
    let mean = sum / f32(width);
    let start = d_out_start(i);
    let x_start = saved_x_start(i);
    let d_x_start = start_of(i, backward_params.groups, width, backward_params.d_x_first, backward_params.d_x_stride);
    for (var d = first; d < width; d += step) {
        let value = rstd * (d_out[start + d] * saved_gamma[d] - saved_x[x_start + d] * rstd * mean);
        if backward_params.accumulate != 0u {
            d_x[d_x_start + d] += value;
        } else {
            d_x[d_x_start + d] = value;
        }
    }
}

@compute @workgroup_size(WORKGROUP)
fn backward_x(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = id.x + id.y * groups.x;
    if i >= backward_params.rows * backward_params.groups {
        return;
    }
    store_d_x(i, workgroup_sum(lane, backward_sum(i, lane, WORKGROUP)), lane, WORKGROUP);
}

@compute @workgroup_size(WORKGROUP)
fn backward_x_rows(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let i = id.x + id.y * groups.x * WORKGROUP;
    if i >= backward_params.rows * backward_params.groups {
        return;
    }
    store_d_x(i, backward_sum(i, 0u, 1u), 0u, 1u);
}
