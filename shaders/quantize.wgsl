// Half precision and 8-bit forms of a (rows, width) tensor. Floats are taken as bits wherever rounding, NaN or infinity matter:
// the built-in conversions may round and flush as the device likes.

const WORKGROUP: u32 = 64u;

const SIGN: u32 = 0x80000000u;
const INFINITY: u32 = 0x7f800000u;
const NAN: u32 = 0x7fc00000u;
const F16_LARGEST: u32 = 0x477fe000u;     // 65504
const F16_NORMAL: u32 = 0x38800000u;      // 2^-14
const F32_MIN_POSITIVE: f32 = 1.17549435e-38;

struct Params {
    rows: u32,
    width: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<u32>;                // (rows, width) f32 bits
@group(0) @binding(2) var<storage, read_write> f16_out: array<u32>;    // (ceil(rows * width / 2))

// Shifts right by 1..=31, rounding to nearest even.
fn shift_right_even(value: u32, shift: u32) -> u32 {
    let half = (1u << (shift - 1u)) - 1u;
    let odd = (value >> shift) & 1u;
    return (value + half + odd) >> shift;
}

fn f16_bits(bits: u32) -> u32 {
    let sign = (bits & SIGN) >> 16u;
    var magnitude = bits & ~SIGN;
    if magnitude > INFINITY {
        return sign | 0x7e00u;
    }
    magnitude = min(magnitude, F16_LARGEST);
    if magnitude >= F16_NORMAL {
        // Moves the exponent's bias from 127 to 15 and the mantissa from 23 bits to 10.
        return sign | shift_right_even(magnitude - (112u << 23u), 13u);
    }
    // A subnormal counts units of 2^-24; at 25 places and more below that everything is 0.
    let shift = 126u - (magnitude >> 23u);
    if shift > 25u {
        return sign;
    }
    return sign | shift_right_even((magnitude & 0x7fffffu) | 0x800000u, shift);
}

fn f32_bits(half: u32) -> u32 {
    let sign = (half & 0x8000u) << 16u;
    let exponent = (half >> 10u) & 31u;
    let mantissa = half & 0x3ffu;
    if exponent == 31u {
        return sign | INFINITY | (mantissa << 13u);
    }
    if exponent != 0u {
        return sign | ((exponent + 112u) << 23u) | (mantissa << 13u);
    }
    if mantissa == 0u {
        return sign;
    }
    // The leading bit of the mantissa becomes the implicit one.
    let zeros = countLeadingZeros(mantissa);
    return sign | ((134u - zeros) << 23u) | ((mantissa << (zeros - 8u)) & 0x7fffffu);
}

@compute @workgroup_size(WORKGROUP)
fn forward_f16(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let n = params.rows * params.width;
    let i = id.x + id.y * groups.x * WORKGROUP;
    if i >= (n + 1u) / 2u {
        return;
    }
    var word = f16_bits(x[2u * i]);
    if 2u * i + 1u < n {
        word |= f16_bits(x[2u * i + 1u]) << 16u;
    }
    f16_out[i] = word;
}

@group(0) @binding(1) var<storage, read> f16_in: array<u32>;        // (ceil(rows * width / 2))
@group(0) @binding(2) var<storage, read_write> out: array<u32>;     // (rows, width) f32 bits

@compute @workgroup_size(WORKGROUP)
fn inverse_f16(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let i = id.x + id.y * groups.x * WORKGROUP;
    if i >= params.rows * params.width {
        return;
    }
    out[i] = f32_bits((f16_in[i / 2u] >> (i % 2u * 16u)) & 0xffffu);
}

@group(0) @binding(2) var<storage, read_write> int8_out: array<u32>;    // (rows, ceil(width / 4))
@group(0) @binding(3) var<storage, read_write> scales_out: array<u32>;  // (rows) f32 bits

var<workgroup> sh_largest: array<u32, WORKGROUP>;

// The largest magnitude of a row, as bits: a larger magnitude has larger bits and a NaN the largest.
fn row_largest(row: u32, first: u32, step: u32) -> u32 {
    var largest = 0u;
    for (var i = first; i < params.width; i += step) {
        largest = max(largest, x[row * params.width + i] & ~SIGN);
    }
    return largest;
}

// The bits of a row's scale.
fn row_scale(largest: u32) -> u32 {
    if largest >= INFINITY {
        return NAN;
    }
    let scale = bitcast<f32>(largest) * (1.0 / 127.0);
    return select(bitcast<u32>(scale), 0u, scale < F32_MIN_POSITIVE);
}

fn store_int8(row: u32, scale_bits: u32, first: u32, step: u32) {
    let words = (params.width + 3u) / 4u;
    for (var i = first; i < words; i += step) {
        var word = 0u;
        if scale_bits != 0u && scale_bits < INFINITY {
            let scale = bitcast<f32>(scale_bits);
            for (var byte = 0u; byte < min(4u, params.width - 4u * i); byte++) {
                let value = bitcast<f32>(x[row * params.width + 4u * i + byte]);
                word |= (u32(i32(clamp(round(value / scale), -127.0, 127.0))) & 0xffu) << (8u * byte);
            }
        }
        int8_out[row * words + i] = word;
    }
    if first == 0u {
        scales_out[row] = scale_bits;
    }
}

@compute @workgroup_size(WORKGROUP)
fn forward_int8(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group.x + group.y * groups.x;
    if row >= params.rows {
        return;
    }
    sh_largest[lane] = row_largest(row, lane, WORKGROUP);
    workgroupBarrier();
    for (var half = WORKGROUP / 2u; half > 0u; half = half / 2u) {
        if lane < half {
            sh_largest[lane] = max(sh_largest[lane], sh_largest[lane + half]);
        }
        workgroupBarrier();
    }
    store_int8(row, row_scale(sh_largest[0]), lane, WORKGROUP);
}

@compute @workgroup_size(WORKGROUP)
fn forward_int8_rows(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let row = id.x + id.y * groups.x * WORKGROUP;
    if row >= params.rows {
        return;
    }
    store_int8(row, row_scale(row_largest(row, 0u, 1u)), 0u, 1u);
}

@group(0) @binding(1) var<storage, read> int8_in: array<u32>;    // (rows, ceil(width / 4))
@group(0) @binding(2) var<storage, read> scales_in: array<u32>;  // (rows) f32 bits
@group(0) @binding(3) var<storage, read_write> int8_f32_out: array<u32>; // (rows, width) f32 bits

@compute @workgroup_size(WORKGROUP)
fn inverse_int8(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let i = id.x + id.y * groups.x * WORKGROUP;
    if i >= params.rows * params.width {
        return;
    }
    let row = i / params.width;
    let column = i % params.width;
    let words = (params.width + 3u) / 4u;
    let byte = (int8_in[row * words + column / 4u] >> (column % 4u * 8u)) & 0xffu;
    let value = f32(i32(byte << 24u) >> 24u);
    let scale = scales_in[row];
    int8_f32_out[i] = select(bitcast<u32>(value * bitcast<f32>(scale)), NAN, (scale & ~SIGN) > INFINITY);
}
