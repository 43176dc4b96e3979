// Token and position embedding, one chunk of the vocabulary a dispatch: rows whose token is elsewhere are left alone.

const WORKGROUP: u32 = 64u;
const F16: bool = true; // the tables hold f16 pairs, otherwise f32 bits

struct ForwardParams {
    rows: u32,
    seq: u32,
    width: u32,
    vocab_start: u32,
    vocab_end: u32,
    f16: u32, // as F16
}

@group(0) @binding(0) var<uniform> params: ForwardParams;
@group(0) @binding(1) var<storage, read> tokens: array<u32>;     // (rows)
@group(0) @binding(2) var<storage, read> wte: array<u32>;        // (vocab_end - vocab_start, width)
@group(0) @binding(3) var<storage, read> wpe: array<u32>;        // (positions, width)
@group(0) @binding(4) var<storage, read_write> out: array<f32>;  // (rows, width)

fn decode(word: u32, i: u32) -> f32 {
    if F16 {
        let pair = unpack2x16float(word);
        return select(pair.x, pair.y, (i & 1u) == 1u);
    }
    return bitcast<f32>(word);
}

@compute @workgroup_size(WORKGROUP)
fn forward(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let i = id.x + id.y * groups.x * WORKGROUP;
    if i >= params.rows * params.width {
        return;
    }
    let row = i / params.width;
    let token = tokens[row];
    if token < params.vocab_start || token >= params.vocab_end {
        return;
    }
    let column = i % params.width;
    let wte_at = (token - params.vocab_start) * params.width + column;
    let wpe_at = (row % params.seq) * params.width + column;
    let shift = select(0u, 1u, F16);
    out[i] = decode(wte[wte_at >> shift], wte_at) + decode(wpe[wpe_at >> shift], wpe_at);
}
