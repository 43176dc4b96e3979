// Adapter gradients of several contributions into one.

const WORKGROUP: u32 = 64u;

const SCALAR_WEIGHT: u32 = 0u;

struct Params {
    n: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> lane: array<f32>;       // (n)
@group(0) @binding(2) var<storage, read> scalars: array<f32>;    // the scalars of a step
@group(0) @binding(3) var<storage, read_write> sum: array<f32>;  // (n)

@compute @workgroup_size(WORKGROUP)
fn add(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let i = id.x + id.y * groups.x * WORKGROUP;
    if i >= params.n {
        return;
    }
    sum[i] += scalars[SCALAR_WEIGHT] * lane[i];
}
