// The last step of the head's gradient: the accumulated sums are normalised and the target's row of the head is taken from them.
// It stands apart from cross_entropy.wgsl because it alone reads the head's weights.

const WORKGROUP: u32 = 64u;

const SCALAR_FACTOR: u32 = 1u;

struct BackwardHiddenParams {
    rows: u32,
    width: u32,
    vocab_start: u32,
    vocab_end: u32,
    first: u32,      // non-zero for the first chunk
    format: u32,
    first_row: u32,  // the row of w that stands for vocab_start
    scales_at: u32,
}

@group(0) @binding(0) var<uniform> hidden_params: BackwardHiddenParams;
@group(0) @binding(1) var<storage, read> targets: array<i32>;            // (rows)
@group(0) @binding(2) var<storage, read> w: array<u32>;                  // (vocab_end - vocab_start, width) from first_row on
@group(0) @binding(3) var<storage, read> row_state: array<f32>;          // (rows, 3)
@group(0) @binding(4) var<storage, read> scalars: array<f32>;
@group(0) @binding(5) var<storage, read_write> d_hidden: array<f32>;     // (rows, width)

fn weight_layout() -> WeightLayout {
    return WeightLayout(hidden_params.first_row, hidden_params.width, hidden_params.scales_at);
}

@compute @workgroup_size(WORKGROUP)
fn backward_hidden(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let at = id.x + id.y * groups.x * WORKGROUP;
    if at >= hidden_params.rows * hidden_params.width {
        return;
    }
    let row = at / hidden_params.width;
    let token = targets[row];
    let inside = token >= i32(hidden_params.vocab_start) && token < i32(hidden_params.vocab_end);
    if hidden_params.first == 0u && !inside {
        return;
    }
    let factor = scalars[SCALAR_FACTOR];
    // Where there is no target the sum may be anything, so that it is not multiplied by zero.
    var value = 0.0;
    if token >= 0 {
        value = d_hidden[at];
        if hidden_params.first != 0u {
            value *= factor / row_state[row * 3u + 1u];
        }
        if inside {
            value -= factor * weight_at(u32(token) - hidden_params.vocab_start, at % hidden_params.width);
        }
    }
    d_hidden[at] = value;
}
