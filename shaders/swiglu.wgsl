// The gated activation silu(gate) * up, silu(g) = g / (1 + exp(-g)), forward and its gradient.

const WORKGROUP: u32 = 64u;

struct Params {
    rows: u32,
    ffn: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> gate_up: array<f32>;    // (rows, 2 * ffn): gate, then up
@group(0) @binding(2) var<storage, read_write> out: array<f32>;  // (rows, ffn)

// Shaders may assume that no value is infinite: exp(80) is finite and large enough to leave nothing of the quotient.
fn sigmoid(value: f32) -> f32 {
    return 1.0 / (1.0 + exp(min(-value, 80.0)));
}

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let i = id.x + id.y * groups.x * WORKGROUP;
    if i >= params.rows * params.ffn {
        return;
    }
    let at = i / params.ffn * 2u * params.ffn + i % params.ffn;
    let gate = gate_up[at];
    out[i] = gate * sigmoid(gate) * gate_up[at + params.ffn];
}

@group(0) @binding(2) var<storage, read> d_out: array<f32>;            // (rows, ffn)
@group(0) @binding(3) var<storage, read_write> d_gate_up: array<f32>;  // (rows, 2 * ffn)

@compute @workgroup_size(WORKGROUP)
fn backward_x(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let i = id.x + id.y * groups.x * WORKGROUP;
    if i >= params.rows * params.ffn {
        return;
    }
    let at = i / params.ffn * 2u * params.ffn + i % params.ffn;
    let gate = gate_up[at];
    let up = gate_up[at + params.ffn];
    let s = sigmoid(gate);
    d_gate_up[at] = d_out[i] * up * s * (1.0 + gate * (1.0 - s));
    d_gate_up[at + params.ffn] = d_out[i] * gate * s;
}
