// AdamW with decoupled decay on a flat adapter, and the global norm of the gradient in two passes. A workgroup takes a chunk of
// the sum; the `_rows` entry points, for adapters emulated on a CPU, give each invocation a chunk.

const WORKGROUP: u32 = 64u;
const CLIP_EPSILON: f32 = 1e-6;

const SCALAR_LR: u32 = 2u;
const SCALAR_BIAS1: u32 = 3u;
const SCALAR_BIAS2: u32 = 4u;
const SCALAR_WEIGHT_DECAY: u32 = 5u;
const SCALAR_CLIP: u32 = 6u;
const SCALAR_GRAD_SCALE: u32 = 7u;
const SCALAR_BETA1: u32 = 8u;
const SCALAR_BETA2: u32 = 9u;
const SCALAR_EPSILON: u32 = 10u;
const SCALAR_NORM: u32 = 11u;

struct NormParams {
    n: u32,
    chunk: u32, // elements of one partial sum
}

@group(0) @binding(0) var<uniform> norm_params: NormParams;
@group(0) @binding(1) var<storage, read> gradient: array<f32>;           // (n)
@group(0) @binding(2) var<storage, read_write> partial: array<f32>;      // (ceil(n / chunk))
@group(0) @binding(1) var<storage, read> partial_sums: array<f32>;       // (ceil(n / chunk))
@group(0) @binding(2) var<storage, read_write> norm_scalars: array<f32>; // the scalars of a step

var<workgroup> sh_sum: array<f32, WORKGROUP>;

fn workgroup_sum(lane: u32, value: f32) -> f32 {
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

fn chunks() -> u32 {
    return max((norm_params.n + norm_params.chunk - 1u) / norm_params.chunk, 1u);
}

fn chunk_squares(chunk: u32, first: u32, step: u32) -> f32 {
    let end = min((chunk + 1u) * norm_params.chunk, norm_params.n);
    var sum = 0.0;
    for (var i = chunk * norm_params.chunk + first; i < end; i += step) {
        sum += gradient[i] * gradient[i];
    }
    return sum;
}

@compute @workgroup_size(WORKGROUP)
fn norm_partial(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let chunk = group.x + group.y * groups.x;
    if chunk >= chunks() {
        return;
    }
    let sum = workgroup_sum(lane, chunk_squares(chunk, lane, WORKGROUP));
    if lane == 0u {
        partial[chunk] = sum;
    }
}

@compute @workgroup_size(WORKGROUP)
fn norm_partial_rows(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let chunk = id.x + id.y * groups.x * WORKGROUP;
    if chunk >= chunks() {
        return;
    }
    // A sum of short sums loses fewer digits than one long sum.
    var sum = 0.0;
    for (var first = 0u; first < WORKGROUP; first++) {
        sum += chunk_squares(chunk, first, WORKGROUP);
    }
    partial[chunk] = sum;
}

fn partial_total(first: u32, step: u32) -> f32 {
    var sum = 0.0;
    for (var i = first; i < chunks(); i += step) {
        sum += partial_sums[i];
    }
    return sum;
}

fn store_norm(squares: f32) {
    norm_scalars[SCALAR_NORM] = abs(norm_scalars[SCALAR_GRAD_SCALE]) * sqrt(squares);
}

@compute @workgroup_size(WORKGROUP)
fn norm_total(@builtin(local_invocation_index) lane: u32) {
    let squares = workgroup_sum(lane, partial_total(lane, WORKGROUP));
    if lane == 0u {
        store_norm(squares);
    }
}

@compute @workgroup_size(1)
fn norm_total_rows() {
    store_norm(partial_total(0u, 1u));
}

struct UpdateParams {
    n: u32,
}

@group(0) @binding(0) var<uniform> update_params: UpdateParams;
@group(0) @binding(2) var<storage, read> scalars: array<f32>;        // the scalars of a step
@group(0) @binding(3) var<storage, read_write> adapter: array<f32>;  // (n)
@group(0) @binding(4) var<storage, read_write> moment1: array<f32>;  // (n)
@group(0) @binding(5) var<storage, read_write> moment2: array<f32>;  // (n)

@compute @workgroup_size(WORKGROUP)
fn update(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let i = id.x + id.y * groups.x * WORKGROUP;
    if i >= update_params.n {
        return;
    }
    var factor = 1.0;
    if scalars[SCALAR_CLIP] > 0.0 {
        factor = min(scalars[SCALAR_CLIP] / (scalars[SCALAR_NORM] + CLIP_EPSILON), 1.0);
    }
    let g = gradient[i] * (scalars[SCALAR_GRAD_SCALE] * factor);
    let beta1 = scalars[SCALAR_BETA1];
    let beta2 = scalars[SCALAR_BETA2];
    let m = beta1 * moment1[i] + (1.0 - beta1) * g;
    let v = beta2 * moment2[i] + (1.0 - beta2) * g * g;
    let lr = scalars[SCALAR_LR];
    let p = adapter[i] - lr * scalars[SCALAR_WEIGHT_DECAY] * adapter[i];
    adapter[i] = p - lr * (m / scalars[SCALAR_BIAS1]) / (sqrt(v / scalars[SCALAR_BIAS2]) + scalars[SCALAR_EPSILON]);
    moment1[i] = m;
    moment2[i] = v;
}
