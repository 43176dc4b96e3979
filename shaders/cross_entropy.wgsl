// Softmax cross entropy over vocabulary tiles. `forward` folds one tile of logits into each row's running maximum and sum, a
// workgroup a row; `forward_rows`, for adapters emulated on a CPU, gives each invocation a row.

const WORKGROUP: u32 = 64u;
const ROWS: u32 = 8u;

// Below every logit, with a finite difference to it.
const LOWEST: f32 = -3e38;

struct ResetParams {
    rows: u32,
}

@group(0) @binding(0) var<uniform> reset_params: ResetParams;
@group(0) @binding(1) var<storage, read_write> reset_state: array<f32>;  // (rows, 3)

@compute @workgroup_size(WORKGROUP)
fn reset(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let row = id.x + id.y * groups.x * WORKGROUP;
    if row >= reset_params.rows {
        return;
    }
    reset_state[row * 3u] = LOWEST;
    reset_state[row * 3u + 1u] = 0.0;
    reset_state[row * 3u + 2u] = 0.0;
}

struct ForwardParams {
    rows: u32,
    columns: u32,
    vocab_start: u32,
    keep: u32,
}

@group(0) @binding(0) var<uniform> forward_params: ForwardParams;
@group(0) @binding(1) var<storage, read> targets: array<i32>;              // (rows)
@group(0) @binding(2) var<storage, read_write> logits: array<f32>;         // (rows, columns)
@group(0) @binding(3) var<storage, read_write> state: array<f32>;          // (rows, 3): maximum, sum, target's logit
@group(0) @binding(4) var<storage, read_write> row_scale: array<f32>;      // (rows)

var<workgroup> sh_values: array<f32, WORKGROUP>;

fn workgroup_max(lane: u32, value: f32) -> f32 {
    workgroupBarrier();
    sh_values[lane] = value;
    workgroupBarrier();
    for (var half = WORKGROUP / 2u; half > 0u; half = half / 2u) {
        if lane < half {
            sh_values[lane] = max(sh_values[lane], sh_values[lane + half]);
        }
        workgroupBarrier();
    }
    return sh_values[0];
}

fn workgroup_sum(lane: u32, value: f32) -> f32 {
    workgroupBarrier();
    sh_values[lane] = value;
    workgroupBarrier();
    for (var half = WORKGROUP / 2u; half > 0u; half = half / 2u) {
        if lane < half {
            sh_values[lane] = sh_values[lane] + sh_values[lane + half];
        }
        workgroupBarrier();
    }
    return sh_values[0];
}

fn row_max(row: u32, first: u32, step: u32) -> f32 {
    var value = LOWEST;
    for (var i = first; i < forward_params.columns; i += step) {
        value = max(value, logits[row * forward_params.columns + i]);
    }
    return value;
}

// The clamp keeps the argument where every device's exp is defined; e^-87 is the smallest normal number.
fn exp_below(x: f32) -> f32 {
    return exp(max(x, -87.0));
}

fn row_sum(row: u32, maximum: f32, first: u32, step: u32) -> f32 {
    var sum = 0.0;
    for (var i = first; i < forward_params.columns; i += step) {
        let at = row * forward_params.columns + i;
        let value = exp_below(logits[at] - maximum);
        if forward_params.keep != 0u {
            logits[at] = value;
        }
        sum += value;
    }
    return sum;
}

// The target's place in this tile, or `columns` if it lies elsewhere.
fn target_column(row: u32) -> u32 {
    let start = i32(forward_params.vocab_start);
    let token = targets[row];
    if token < start || token - start >= i32(forward_params.columns) {
        return forward_params.columns;
    }
    return u32(token - start);
}

fn store_state(row: u32, old_max: f32, new_max: f32, sum: f32) {
    let scale = exp_below(old_max - new_max);
    state[row * 3u] = new_max;
    state[row * 3u + 1u] = state[row * 3u + 1u] * scale + sum;
    row_scale[row] = scale;
}

@compute @workgroup_size(WORKGROUP)
fn forward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group.x + group.y * groups.x;
    if row >= forward_params.rows {
        return;
    }
    let old_max = state[row * 3u];
    let new_max = max(old_max, workgroup_max(lane, row_max(row, lane, WORKGROUP)));
    // The invocation that is about to replace the target's logit saves it first.
    let column = target_column(row);
    if column < forward_params.columns && column % WORKGROUP == lane {
        state[row * 3u + 2u] = logits[row * forward_params.columns + column];
    }
    let sum = workgroup_sum(lane, row_sum(row, new_max, lane, WORKGROUP));
    if lane == 0u {
        store_state(row, old_max, new_max, sum);
    }
}

@compute @workgroup_size(ROWS)
fn forward_rows(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let row = id.x + id.y * groups.x * ROWS;
    if row >= forward_params.rows {
        return;
    }
    let old_max = state[row * 3u];
    let new_max = max(old_max, row_max(row, 0u, 1u));
    let column = target_column(row);
    if column < forward_params.columns {
        state[row * 3u + 2u] = logits[row * forward_params.columns + column];
    }
    store_state(row, old_max, new_max, row_sum(row, new_max, 0u, 1u));
}

struct LossParams {
    rows: u32,
}

@group(0) @binding(0) var<uniform> loss_params: LossParams;
@group(0) @binding(2) var<storage, read> final_state: array<f32>;        // (rows, 3)
@group(0) @binding(3) var<storage, read_write> row_loss: array<f32>;     // (rows)

@compute @workgroup_size(WORKGROUP)
fn loss(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let row = id.x + id.y * groups.x * WORKGROUP;
    if row >= loss_params.rows {
        return;
    }
    if targets[row] < 0 {
        row_loss[row] = 0.0;
        return;
    }
    row_loss[row] = log(final_state[row * 3u + 1u]) + final_state[row * 3u] - final_state[row * 3u + 2u];
}
