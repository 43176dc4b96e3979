// The weighted mean of clients' adapters.

const WORKGROUP: u32 = 64u;

struct Params {
    n: u32,
    clients: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> stacked: array<f32>;    // (clients, n)
@group(0) @binding(2) var<storage, read> weights: array<f32>;    // (clients)
@group(0) @binding(3) var<storage, read_write> out: array<f32>;  // (n)

@compute @workgroup_size(WORKGROUP)
fn mean(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let i = id.x + id.y * groups.x * WORKGROUP;
    if i >= params.n {
        return;
    }
    var total = 0.0;
    for (var client = 0u; client < params.clients; client++) {
        total += weights[client];
    }
    var sum = 0.0;
    for (var client = 0u; client < params.clients; client++) {
        sum += weights[client] / total * stacked[client * params.n + i];
    }
    out[i] = sum;
}
