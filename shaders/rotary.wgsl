// Rotary positions: turns the pairs (x[i], x[i + head_size / 2]) of every head by the angle of the token's position, in place.

const WORKGROUP: u32 = 64u;
const INVERSE: bool = false; // turn back: the gradient

struct Params {
    rows: u32,
    seq: u32,
    heads: u32,
    head_size: u32,
    stride: u32,
    first: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> table: array<f32>;    // (positions, head_size / 2, 2): cosine, sine
@group(0) @binding(2) var<storage, read> position: array<u32>; // (1): of the first token of every sequence
@group(0) @binding(3) var<storage, read_write> x: array<f32>;  // (rows, stride), the heads from element `first` of a row on

@compute @workgroup_size(WORKGROUP)
fn rotate(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let index = id.x + id.y * groups.x * WORKGROUP;
    let half = params.head_size / 2u;
    if index >= params.rows * params.heads * half {
        return;
    }
    let i = index % half;
    let head = index / half % params.heads;
    let row = index / half / params.heads;
    let angle = 2u * ((position[0] + row % params.seq) * half + i);
    let cosine = table[angle];
    let sine = select(table[angle + 1u], -table[angle + 1u], INVERSE);
    let at = row * params.stride + params.first + head * params.head_size + i;
    let x1 = x[at];
    let x2 = x[at + half];
    x[at] = x1 * cosine - x2 * sine;
    x[at + half] = x2 * cosine + x1 * sine;
}
