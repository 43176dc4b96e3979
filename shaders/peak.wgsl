// The device's own rate of multiply-adds: chains in registers, long enough that launch and store cost nothing beside them.

const WORKGROUP: u32 = 64u;

struct Params {
    lanes: u32,
    rounds: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> out: array<f32>; // (lanes)

@compute @workgroup_size(WORKGROUP)
fn multiply_add(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let lane = id.x + id.y * groups.x * WORKGROUP;
    if lane >= params.lanes {
        return;
    }
    let start = f32(lane) / f32(params.lanes);
    let factor = vec4(0.5 + 0.25 * start);
    let step = vec4(0.125, 0.25, 0.375, 0.5);
    var a = vec4(start);
    var b = a + step;
    var c = b + step;
    var d = c + step;
    for (var i = 0u; i < params.rounds; i += 1u) {
        a = fma(a, factor, step);
        b = fma(b, factor, step);
        c = fma(c, factor, step);
        d = fma(d, factor, step);
    }
    let sum = a + b + c + d;
    out[lane] = sum.x + sum.y + sum.z + sum.w;
}
