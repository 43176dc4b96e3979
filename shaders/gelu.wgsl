// The gradient of GELU in the tanh form of GPT-2.

const WORKGROUP: u32 = 64u;
const ROOT: f32 = 0.7978846; // sqrt(2 / pi)
const CUBIC: f32 = 0.044715;

struct Params {
    n: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;          // (n)
// Some drivers make tanh from exp and overflow; beyond 10 it is 1 in f32.
fn inner_tanh(value: f32) -> f32 {
    return tanh(clamp(ROOT * (value + CUBIC * value * value * value), -10.0, 10.0));
}

@group(0) @binding(2) var<storage, read> d_out: array<f32>;      // (n)
@group(0) @binding(3) var<storage, read_write> d_x: array<f32>;  // (n)

@compute @workgroup_size(WORKGROUP)
fn backward_x(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let i = id.x + id.y * groups.x * WORKGROUP;
    if i >= params.n {
        return;
    }
    let value = x[i];
    let t = inner_tanh(value);
    let d_inner = ROOT * (1.0 + 3.0 * CUBIC * value * value);
    d_x[i] = d_out[i] * (0.5 * (1.0 + t) + 0.5 * value * (1.0 - t * t) * d_inner);
}
