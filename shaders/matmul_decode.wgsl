// Products of the few rows of a generated token. weight.wgsl reads the weight, matmul.wgsl has the operands, another part the store.
//
// The weight is read once, in its own order: an octet is unpacked and multiplied with DECODE_ROWS rows of x. `_decode`, for GPUs:
// the invocations of a workgroup share the inner elements of a few columns. `_decode_registers`, for adapters emulated on a CPU,
// gives each invocation a column, or an octet of columns, of its own.

const DECODE_ROWS: u32 = 1u;        // rows there are, at most 4
const DECODE_WORKGROUP: u32 = 64u;
const DECODE_COLUMNS: u32 = 4u;     // transposed: columns of a workgroup
const DECODE_OCTETS: u32 = 4u;      // not transposed: octets of columns of a workgroup
const DECODE_LANES: u32 = 8u;       // _decode_registers: invocations of a workgroup
const DECODE_PARTS: u32 = DECODE_WORKGROUP / DECODE_COLUMNS;
const DECODE_SLICES: u32 = DECODE_WORKGROUP / DECODE_OCTETS;

var<workgroup> sh_sums: array<vec4<f32>, DECODE_WORKGROUP>;
var<workgroup> sh_low: array<vec4<f32>, DECODE_WORKGROUP>;
var<workgroup> sh_high: array<vec4<f32>, DECODE_WORKGROUP>;

fn x_octet(row: u32, k: u32) -> Octet {
    let at = params.x_first + row * params.x_stride + k;
    if k + 8u <= params.inner {
        return Octet(vec4(x[at], x[at + 1u], x[at + 2u], x[at + 3u]), vec4(x[at + 4u], x[at + 5u], x[at + 6u], x[at + 7u]));
    }
    return Octet(
        vec4(x_or_zero(row, k), x_or_zero(row, k + 1u), x_or_zero(row, k + 2u), x_or_zero(row, k + 3u)),
        vec4(x_or_zero(row, k + 4u), x_or_zero(row, k + 5u), x_or_zero(row, k + 6u), x_or_zero(row, k + 7u)),
    );
}

fn dot_octets(left: Octet, right: Octet) -> f32 {
    return dot(left.low, right.low) + dot(left.high, right.high);
}

// Dot products of a column of a transposed weight with each row of x, over every `step`th octet of inner elements from `first`
// on.
fn column_sums(column: u32, first: u32, step: u32) -> vec4<f32> {
    var sums = vec4(0.0);
    for (var k = first * 8u; k < params.inner; k += step * 8u) {
        let weights = weight_octet(column, k);
        sums.x += dot_octets(weights, x_octet(0u, k));
        if DECODE_ROWS > 1u { sums.y += dot_octets(weights, x_octet(1u, k)); }
        if DECODE_ROWS > 2u { sums.z += dot_octets(weights, x_octet(2u, k)); }
        if DECODE_ROWS > 3u { sums.w += dot_octets(weights, x_octet(3u, k)); }
    }
    return sums;
}

fn lora_at(row: u32, column: u32) -> f32 {
    var sum = 0.0;
    for (var r = 0u; r < params.rank; r += 1u) {
        let at = params.lora_offset + column * params.lora_column + r * params.lora_rank;
        sum = fma(u[row * params.rank + r], adapter[at], sum);
    }
    return params.lora_scale * sum;
}

// Sums over the invocations that share a column: a value for each row, in the first one's slot.
fn column_reduce(lane: u32, value: vec4<f32>) {
    sh_sums[lane] = value;
    workgroupBarrier();
    for (var half = DECODE_PARTS / 2u; half > 0u; half = half / 2u) {
        if lane % DECODE_PARTS < half {
            sh_sums[lane] = sh_sums[lane] + sh_sums[lane + half];
        }
        workgroupBarrier();
    }
}

// Sums over the invocations that share an octet of columns, in the slots of the first DECODE_OCTETS.
fn octet_reduce(lane: u32, value: Octet) {
    workgroupBarrier();
    sh_low[lane] = value.low;
    sh_high[lane] = value.high;
    workgroupBarrier();
    for (var half = DECODE_WORKGROUP / 2u; half >= DECODE_OCTETS; half = half / 2u) {
        if lane < half {
            sh_low[lane] = sh_low[lane] + sh_low[lane + half];
            sh_high[lane] = sh_high[lane] + sh_high[lane + half];
        }
        workgroupBarrier();
    }
}

fn add_scaled(sum: Octet, row: u32, k: u32, weights: Octet) -> Octet {
    let value = vec4(x[params.x_first + row * params.x_stride + k]);
    return Octet(fma(value, weights.low, sum.low), fma(value, weights.high, sum.high));
}

// An octet of columns of each row: rows of the weight, each times a value of x, every `step`th from `first` on.
fn octet_sums(column: u32, first: u32, step: u32) -> array<Octet, 4> {
    var sum0: Octet;
    var sum1: Octet;
    var sum2: Octet;
    var sum3: Octet;
    for (var k = first; k < params.inner; k += step) {
        let weights = weight_octet(k, column);
        sum0 = add_scaled(sum0, 0u, k, weights);
        if DECODE_ROWS > 1u { sum1 = add_scaled(sum1, 1u, k, weights); }
        if DECODE_ROWS > 2u { sum2 = add_scaled(sum2, 2u, k, weights); }
        if DECODE_ROWS > 3u { sum3 = add_scaled(sum3, 3u, k, weights); }
    }
    return array<Octet, 4>(sum0, sum1, sum2, sum3);
}

fn store_column(row: u32, column: u32, sum: f32) {
    if column < params.columns {
        store(row, column, sum + lora_at(row, column));
    }
}

// One row of the octets that octet_reduce has summed, a column an invocation.
fn store_octets(row: u32, first_column: u32, lane: u32) {
    if lane < 8u * DECODE_OCTETS {
        let sums = select(sh_low[lane / 8u], sh_high[lane / 8u], lane % 8u >= 4u);
        store_column(row, first_column + lane, sums[lane % 4u]);
    }
}

@compute @workgroup_size(DECODE_WORKGROUP)
fn product_decode(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = group.x + group.y * groups.x;
    if W_TRANSPOSED {
        let column = index * DECODE_COLUMNS + lane / DECODE_PARTS;
        var sums = vec4(0.0);
        if column < params.columns {
            sums = column_sums(column, lane % DECODE_PARTS, DECODE_PARTS);
        }
        column_reduce(lane, sums);
        let row = lane % DECODE_PARTS;
        if row < DECODE_ROWS {
            store_column(row, column, sh_sums[lane - row][row]);
        }
    } else {
        let first_column = index * DECODE_OCTETS * 8u;
        let column = first_column + lane % DECODE_OCTETS * 8u;
        var sums: array<Octet, 4>;
        if column < params.columns {
            sums = octet_sums(column, lane / DECODE_OCTETS, DECODE_SLICES);
        }
        octet_reduce(lane, sums[0]);
        store_octets(0u, first_column, lane);
        if DECODE_ROWS > 1u {
            octet_reduce(lane, sums[1]);
            store_octets(1u, first_column, lane);
        }
        if DECODE_ROWS > 2u {
            octet_reduce(lane, sums[2]);
            store_octets(2u, first_column, lane);
        }
        if DECODE_ROWS > 3u {
            octet_reduce(lane, sums[3]);
            store_octets(3u, first_column, lane);
        }
    }
}

@compute @workgroup_size(DECODE_LANES)
fn product_decode_registers(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = (group.x + group.y * groups.x) * DECODE_LANES + lane;
    if W_TRANSPOSED {
        if index < params.columns {
            var sums = column_sums(index, 0u, 1u);
            for (var row = 0u; row < DECODE_ROWS; row += 1u) {
                store_column(row, index, sums[row]);
            }
        }
    } else {
        let column = index * 8u;
        if column < params.columns {
            var sums = octet_sums(column, 0u, 1u);
            let columns = min(8u, params.columns - column);
            for (var i = 0u; i < columns * DECODE_ROWS; i += 1u) {
                let row = i / columns;
                let j = i % columns;
                let octet = sums[row];
                store_column(row, column + j, select(octet.low, octet.high, j >= 4u)[j % 4u]);
            }
        }
    }
}
