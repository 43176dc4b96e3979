// Products on adapters emulated on a CPU, with matmul.wgsl's operands and without workgroup memory: an invocation computes 8 rows
// by 8 columns, and all invocations of a workgroup the same rows, so that what they read of x is uniform.

const REGISTER_ROWS: u32 = 8u;
const REGISTER_LANES: u32 = 8u;

// Two vectors a row.
fn add_registers(sums: ptr<function, array<vec4<f32>, 16>>, left: array<f32, 8>, low: vec4<f32>, high: vec4<f32>) {
    (*sums)[0] = fma(vec4(left[0]), low, (*sums)[0]);
    (*sums)[1] = fma(vec4(left[0]), high, (*sums)[1]);
    (*sums)[2] = fma(vec4(left[1]), low, (*sums)[2]);
    (*sums)[3] = fma(vec4(left[1]), high, (*sums)[3]);
    (*sums)[4] = fma(vec4(left[2]), low, (*sums)[4]);
    (*sums)[5] = fma(vec4(left[2]), high, (*sums)[5]);
    (*sums)[6] = fma(vec4(left[3]), low, (*sums)[6]);
    (*sums)[7] = fma(vec4(left[3]), high, (*sums)[7]);
    (*sums)[8] = fma(vec4(left[4]), low, (*sums)[8]);
    (*sums)[9] = fma(vec4(left[4]), high, (*sums)[9]);
    (*sums)[10] = fma(vec4(left[5]), low, (*sums)[10]);
    (*sums)[11] = fma(vec4(left[5]), high, (*sums)[11]);
    (*sums)[12] = fma(vec4(left[6]), low, (*sums)[12]);
    (*sums)[13] = fma(vec4(left[6]), high, (*sums)[13]);
    (*sums)[14] = fma(vec4(left[7]), low, (*sums)[14]);
    (*sums)[15] = fma(vec4(left[7]), high, (*sums)[15]);
}

// Rows past the end repeat the last one; they are not stored.
fn x_rows(row: u32, k: u32) -> array<f32, 8> {
    let last = params.rows - 1u;
    let stride = params.x_stride;
    let at = params.x_first + k;
    return array<f32, 8>(
        x[at + min(row, last) * stride], x[at + min(row + 1u, last) * stride],
        x[at + min(row + 2u, last) * stride], x[at + min(row + 3u, last) * stride],
        x[at + min(row + 4u, last) * stride], x[at + min(row + 5u, last) * stride],
        x[at + min(row + 6u, last) * stride], x[at + min(row + 7u, last) * stride],
    );
}

fn u_rows(row: u32, r: u32) -> array<f32, 8> {
    let last = params.rows - 1u;
    let rank = params.rank;
    let scale = params.lora_scale;
    return array<f32, 8>(
        scale * u[min(row, last) * rank + r], scale * u[min(row + 1u, last) * rank + r],
        scale * u[min(row + 2u, last) * rank + r], scale * u[min(row + 3u, last) * rank + r],
        scale * u[min(row + 4u, last) * rank + r], scale * u[min(row + 5u, last) * rank + r],
        scale * u[min(row + 6u, last) * rank + r], scale * u[min(row + 7u, last) * rank + r],
    );
}

fn adapter_columns(r: u32, column: u32) -> vec4<f32> {
    return vec4(
        adapter_or_zero(r, column), adapter_or_zero(r, column + 1u),
        adapter_or_zero(r, column + 2u), adapter_or_zero(r, column + 3u),
    );
}

// An inner element of four columns of a transposed weight; columns past the end repeat the last one.
fn w_columns(k: u32, column: u32) -> vec4<f32> {
    let last = params.columns - 1u;
    return vec4(
        weight_at(min(column, last), k), weight_at(min(column + 1u, last), k),
        weight_at(min(column + 2u, last), k), weight_at(min(column + 3u, last), k),
    );
}

// Four inner elements likewise.
fn w_block(k: u32, column: u32) -> mat4x4<f32> {
    let last = params.columns - 1u;
    return transpose(mat4x4(
        weight_quad(min(column, last), k), weight_quad(min(column + 1u, last), k),
        weight_quad(min(column + 2u, last), k), weight_quad(min(column + 3u, last), k),
    ));
}

fn multiply_registers(sums: ptr<function, array<vec4<f32>, 16>>, row: u32, column: u32) {
    let inner = params.inner;
    if W_TRANSPOSED {
        var k = 0u;
        if W_ALIGNED || W_FORMAT >= 2u {
            for (; k + 4u <= inner; k += 4u) {
                let low = w_block(k, column);
                let high = w_block(k, column + 4u);
                add_registers(sums, x_rows(row, k), low[0], high[0]);
                add_registers(sums, x_rows(row, k + 1u), low[1], high[1]);
                add_registers(sums, x_rows(row, k + 2u), low[2], high[2]);
                add_registers(sums, x_rows(row, k + 3u), low[3], high[3]);
            }
        }
        if !W_ALIGNED {
            for (; k < inner; k += 1u) {
                add_registers(sums, x_rows(row, k), w_columns(k, column), w_columns(k, column + 4u));
            }
        }
    } else {
        let last = (params.columns - 1u) / 4u * 4u;
        let low = min(column, last);
        let high = min(column + 4u, last);
        for (var k = 0u; k < inner; k += 1u) {
            add_registers(sums, x_rows(row, k), weight_quad(k, low), weight_quad(k, high));
        }
    }
    for (var r = 0u; r < params.rank; r += 1u) {
        add_registers(sums, u_rows(row, r), adapter_columns(r, column), adapter_columns(r, column + 4u));
    }
}

// Loops that a compiler cannot unroll, over a copy: unrolled, the stores would take most of the time to compile a kernel, and
// indexing `sums` itself would keep it out of registers.

fn store_registers(sums: ptr<function, array<vec4<f32>, 16>>, row: u32, column: u32) {
    var kept = *sums;
    let rows = min(REGISTER_ROWS, params.rows - row);
    let columns = min(8u, params.columns - min(column, params.columns));
    for (var i = 0u; i < rows; i += 1u) {
        for (var j = 0u; j < columns; j += 1u) {
            store(row + i, column + j, kept[2u * i + j / 4u][j % 4u]);
        }
    }
}

@compute @workgroup_size(REGISTER_LANES)
fn product_registers(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.y * REGISTER_ROWS;
    let column = (group.x * REGISTER_LANES + lane) * 8u;
    var sums = array<vec4<f32>, 16>();
    multiply_registers(&sums, row, column);
    store_registers(&sums, row, column);
}
