//! Smaller forms of the tensors that cross the cut: half precision, and 8-bit integers with a scale per row.
//!
//! Half precision is converted in integer arithmetic on both sides, so every engine gives the same bits: round to nearest even,
//! magnitudes above 65504 (infinity too) saturate, NaN stays NaN. An 8-bit row is `round(x / scale)` with
//! `scale = max|x| / 127`; a row of zeros has scale 0, a row that holds a NaN or an infinity has scale NaN and reads back as NaN.
//!
//! | version | idea | measured |
//! |---|---|---|
//! | 1 | a word an invocation; 8-bit rows a workgroup a row for the maximum | not measured on a GPU yet |

use super::case::{Example, Sizes, case, rows_width};
use crate::compute::cpu::for_each_row;
use crate::compute::kernel::Contract;
use crate::compute::{Buffer, Cost, DeviceClass, Recording, linear_workgroups};
use crate::{contract, params, variant};

/// Invocations in a workgroup, the default of `WORKGROUP` in the shader.
const WORKGROUP: u32 = 64;

params! {
    /// Sizes for quantize's kernels.
    pub struct Params {
        pub rows: u32,
        pub width: u32,
    }
}

contract! {
    /// f32 to f16 pairs.
    pub(crate) static FORWARD_F16 = "quantize.forward_f16", Params,
    [x: Read f32, packed: Write u32],
    spec: spec::forward_f16, host: forward_f16_host, variants: [FORWARD_F16_WORD]
}

variant! {
    /// An invocation a pair.
    static FORWARD_F16_WORD = FORWARD_F16, "word", ["quantize"], "forward_f16", Params,
    grid: |params| linear_workgroups(f16_words(params.rows as usize, params.width as usize), WORKGROUP),
}

contract! {
    /// f16 pairs to f32.
    pub(crate) static INVERSE_F16 = "quantize.inverse_f16", Params,
    [packed: Read u32, out: Write f32],
    spec: spec::inverse_f16, host: inverse_f16_host, variants: [INVERSE_F16_ELEMENT]
}

variant! {
    /// An invocation a value.
    static INVERSE_F16_ELEMENT = INVERSE_F16, "element", ["quantize"], "inverse_f16", Params,
    grid: |params| linear_workgroups(params.rows as usize * params.width as usize, WORKGROUP),
}

contract! {
    /// f32 rows to 8-bit rows and scales.
    pub(crate) static FORWARD_INT8 = "quantize.forward_int8", Params,
    [x: Read f32, packed: Write u32, scales: Write f32],
    spec: spec::forward_int8, host: forward_int8_host, variants: [FORWARD_INT8_ROWS, FORWARD_INT8_WORKGROUP]
}

variant! {
    /// An invocation a row, for adapters emulated on a CPU.
    static FORWARD_INT8_ROWS = FORWARD_INT8, "rows", ["quantize"], "forward_int8_rows", Params,
    fits: |profile, _| profile.class == DeviceClass::CpuAdapter,
    grid: |params| linear_workgroups(params.rows as usize, WORKGROUP),
}

variant! {
    /// A workgroup a row.
    static FORWARD_INT8_WORKGROUP = FORWARD_INT8, "workgroup", ["quantize"], "forward_int8", Params,
    grid: |params| linear_workgroups(params.rows as usize, 1),
}

contract! {
    /// 8-bit rows and scales to f32.
    pub(crate) static INVERSE_INT8 = "quantize.inverse_int8", Params,
    [packed: Read u32, scales: Read f32, out: Write f32],
    spec: spec::inverse_int8, host: inverse_int8_host, variants: [INVERSE_INT8_ELEMENT]
}

variant! {
    /// An invocation a value.
    static INVERSE_INT8_ELEMENT = INVERSE_INT8, "element", ["quantize"], "inverse_int8", Params,
    grid: |params| linear_workgroups(params.rows as usize * params.width as usize, WORKGROUP),
}

/// The contracts of this family.
pub static ALL: &[&Contract] = &[&FORWARD_F16, &INVERSE_F16, &FORWARD_INT8, &INVERSE_INT8];

/// Words of a (rows, width) tensor as f16 pairs: pairs run over the whole tensor, an odd one ends with a zero half.
pub fn f16_words(rows: usize, width: usize) -> usize {
    (rows * width).div_ceil(2)
}

/// Words of a (rows, width) tensor as 8-bit integers: four to a word, every row begins a new one, padded with zeros.
pub fn int8_words(rows: usize, width: usize) -> usize {
    rows * width.div_ceil(4)
}

/// Records `packed = f16(x)`; `x` is (rows, width), `packed` has [`f16_words`].
pub fn forward_f16(recording: &mut Recording, params: Params, x: &Buffer, packed: &Buffer) {
    let (rows, width) = (params.rows as usize, params.width as usize);
    recording.dispatch(
        &FORWARD_F16,
        params,
        &[x, packed],
        Cost {
            flops: 0.0,
            bytes: 6.0 * (rows * width) as f64,
        },
    );
}

/// Records `out = f32(packed)`, the inverse of [`forward_f16`].
pub fn inverse_f16(recording: &mut Recording, params: Params, packed: &Buffer, out: &Buffer) {
    let elements = params.rows as usize * params.width as usize;
    recording.dispatch(
        &INVERSE_F16,
        params,
        &[packed, out],
        Cost {
            flops: 0.0,
            bytes: 6.0 * elements as f64,
        },
    );
}

/// Records the 8-bit form of `x` (rows, width): `packed` has [`int8_words`], `scales` is (rows).
pub fn forward_int8(recording: &mut Recording, params: Params, x: &Buffer, packed: &Buffer, scales: &Buffer) {
    let elements = params.rows as f64 * params.width as f64;
    recording.dispatch(
        &FORWARD_INT8,
        params,
        &[x, packed, scales],
        Cost {
            flops: 2.0 * elements,
            bytes: 5.0 * elements,
        },
    );
}

/// Records `out = scales · packed`, the inverse of [`forward_int8`].
pub fn inverse_int8(recording: &mut Recording, params: Params, packed: &Buffer, scales: &Buffer, out: &Buffer) {
    let elements = params.rows as usize * params.width as usize;
    recording.dispatch(
        &INVERSE_INT8,
        params,
        &[packed, scales, out],
        Cost {
            flops: elements as f64,
            bytes: 5.0 * elements as f64,
        },
    );
}

const SIGN: u32 = 0x8000_0000;
const INFINITY: u32 = 0x7f80_0000;
const NAN: u32 = 0x7fc0_0000;
/// 65504, the largest f16.
const F16_LARGEST: u32 = 0x477f_e000;
/// 2⁻¹⁴, the smallest normal f16.
const F16_NORMAL: u32 = 0x3880_0000;

/// Shifts right by `shift` in 1..=31, rounding to nearest even.
fn shift_right_even(value: u32, shift: u32) -> u32 {
    let half = (1 << (shift - 1)) - 1;
    let odd = (value >> shift) & 1;
    (value + half + odd) >> shift
}

/// The f16 nearest to the f32 with these bits.
fn f16_bits(bits: u32) -> u32 {
    let sign = (bits & SIGN) >> 16;
    let magnitude = bits & !SIGN;
    if magnitude > INFINITY {
        return sign | 0x7e00;
    }
    let magnitude = magnitude.min(F16_LARGEST);
    if magnitude >= F16_NORMAL {
        // Moves the exponent's bias from 127 to 15 and the mantissa from 23 bits to 10.
        return sign | shift_right_even(magnitude - (112 << 23), 13);
    }
    // A subnormal counts units of 2⁻²⁴; at 25 places and more below that everything is 0.
    let shift = 126 - (magnitude >> 23);
    if shift > 25 {
        return sign;
    }
    sign | shift_right_even(magnitude & 0x7f_ffff | 0x80_0000, shift)
}

/// The f32 bits of an f16.
fn f32_bits(half: u32) -> u32 {
    let sign = (half & 0x8000) << 16;
    let exponent = (half >> 10) & 31;
    let mantissa = half & 0x3ff;
    if exponent == 31 {
        return sign | INFINITY | mantissa << 13;
    }
    if exponent != 0 {
        return sign | (exponent + 112) << 23 | mantissa << 13;
    }
    if mantissa == 0 {
        return sign;
    }
    let zeros = mantissa.leading_zeros();
    // The leading bit of the mantissa becomes the implicit one.
    sign | (134 - zeros) << 23 | (mantissa << (zeros - 8)) & 0x7f_ffff
}

fn params_of(sizes: Sizes) -> Params {
    Params {
        rows: sizes.rows() as u32,
        width: sizes.width as u32,
    }
}

/// What benches time.
pub(crate) static EXAMPLES: &[Example] = &[
    Example {
        name: "quantize.forward_f16",
        shape: rows_width,
        build: |b, s| {
            let x = b.random("x", s.rows() * s.width)?;
            let words = f16_words(s.rows(), s.width);
            let packed = b.zeros("packed", words)?;
            Ok(case(&[(&packed.clone(), words)], true, move |recording| {
                forward_f16(recording, params_of(s), &x, &packed);
            }))
        },
    },
    Example {
        name: "quantize.inverse_f16",
        shape: rows_width,
        build: |b, s| {
            let packed = b.weights("packed", s.rows() * s.width)?;
            let out = b.zeros("out", s.rows() * s.width)?;
            Ok(case(&[(&out.clone(), s.rows() * s.width)], false, move |recording| {
                inverse_f16(recording, params_of(s), &packed, &out);
            }))
        },
    },
    Example {
        name: "quantize.forward_int8",
        shape: rows_width,
        build: |b, s| {
            let x = b.random("x", s.rows() * s.width)?;
            let words = int8_words(s.rows(), s.width);
            let packed = b.zeros("packed", words)?;
            let scales = b.zeros("scales", s.rows())?;
            Ok(case(&[(&packed.clone(), words)], true, move |recording| {
                forward_int8(recording, params_of(s), &x, &packed, &scales);
            }))
        },
    },
    Example {
        name: "quantize.inverse_int8",
        shape: rows_width,
        build: |b, s| {
            let packed = b.below("packed", int8_words(s.rows(), s.width), 1 << 30)?;
            let scales = b.random("scales", s.rows())?;
            let out = b.zeros("out", s.rows() * s.width)?;
            Ok(case(&[(&out.clone(), s.rows() * s.width)], false, move |recording| {
                inverse_int8(recording, params_of(s), &packed, &scales, &out);
            }))
        },
    },
];

/// The mathematics in plain loops. It is on bits, so there is one precision of it.
pub mod spec {
    use super::{INFINITY, NAN, Params, SIGN, f16_bits, f32_bits};

    /// Two halves to a word.
    pub fn forward_f16(
        params: &Params,
        x: &[f32],          // (rows, width)
        packed: &mut [u32], // (ceil(rows * width / 2))
    ) {
        let n = params.rows as usize * params.width as usize;
        for i in 0..n.div_ceil(2) {
            let mut word = f16_bits(x[2 * i].to_bits());
            if 2 * i + 1 < n {
                word |= f16_bits(x[2 * i + 1].to_bits()) << 16;
            }
            packed[i] = word;
        }
    }

    /// The numbers of halves.
    pub fn inverse_f16(
        params: &Params,
        packed: &[u32],  // (ceil(rows * width / 2))
        out: &mut [f32], // (rows, width)
    ) {
        for i in 0..params.rows as usize * params.width as usize {
            out[i] = f32::from_bits(f32_bits((packed[i / 2] >> (i % 2 * 16)) & 0xffff));
        }
    }

    /// Codes of a row with its scale, which is its largest absolute value over 127.
    pub fn forward_int8(
        params: &Params,
        x: &[f32],          // (rows, width)
        packed: &mut [u32], // (rows, ceil(width / 4))
        scales: &mut [f32], // (rows)
    ) {
        let (rows, width) = (params.rows as usize, params.width as usize);
        let words = width.div_ceil(4);
        for row in 0..rows {
            let mut largest = 0;
            for i in 0..width {
                largest = largest.max(x[row * width + i].to_bits() & !SIGN);
            }
            let mut scale = f32::from_bits(largest) * (1.0 / 127.0);
            if largest >= INFINITY {
                scale = f32::from_bits(NAN);
            } else if scale < f32::MIN_POSITIVE {
                scale = 0.0;
            }
            scales[row] = scale;
            packed[row * words..][..words].fill(0);
            if scale.is_nan() || scale == 0.0 {
                continue;
            }
            for i in 0..width {
                let code = (x[row * width + i] / scale).clamp(-127.0, 127.0).round_ties_even();
                packed[row * words + i / 4] |= (code as i32 as u32 & 0xff) << (8 * (i % 4));
            }
        }
    }

    /// The numbers of codes and scales.
    pub fn inverse_int8(
        params: &Params,
        packed: &[u32],  // (rows, ceil(width / 4))
        scales: &[f32],  // (rows)
        out: &mut [f32], // (rows, width)
    ) {
        let (rows, width) = (params.rows as usize, params.width as usize);
        let words = width.div_ceil(4);
        for row in 0..rows {
            for i in 0..width {
                let byte = (packed[row * words + i / 4] >> (i % 4 * 8)) as u8;
                out[row * width + i] = f32::from(byte as i8) * scales[row];
            }
        }
    }
}

/// [`spec::forward_f16`] on all cores.
fn forward_f16_host(
    params: &Params,
    x: &[f32],          // (rows, width)
    packed: &mut [u32], // (ceil(rows * width / 2))
) {
    let n = params.rows as usize * params.width as usize;
    let x = &x[..n];
    for_each_row(&mut packed[..n.div_ceil(2)], 4096, |block, packed| {
        for (i, packed) in packed.iter_mut().enumerate() {
            let at = 2 * (block * 4096 + i);
            let high = x.get(at + 1).map_or(0, |x| f16_bits(x.to_bits()));
            *packed = f16_bits(x[at].to_bits()) | high << 16;
        }
    });
}

/// [`spec::inverse_f16`] on all cores.
fn inverse_f16_host(
    params: &Params,
    packed: &[u32],  // (ceil(rows * width / 2))
    out: &mut [f32], // (rows, width)
) {
    let n = params.rows as usize * params.width as usize;
    for_each_row(&mut out[..n], 4096, |block, out| {
        for (i, out) in out.iter_mut().enumerate() {
            let at = block * 4096 + i;
            *out = f32::from_bits(f32_bits((packed[at / 2] >> (at % 2 * 16)) & 0xffff));
        }
    });
}

/// The scale of a row whose largest magnitude has these bits.
fn row_scale(largest: u32) -> f32 {
    if largest >= INFINITY {
        return f32::from_bits(NAN);
    }
    let scale = f32::from_bits(largest) * (1.0 / 127.0);
    // Devices may take a subnormal scale as 0 and would divide by it.
    if scale < f32::MIN_POSITIVE { 0.0 } else { scale }
}

/// One value of a row as an 8-bit integer in the low byte. No branch and no library call, so that loops over it use vector
/// instructions.
#[inline(always)]
fn int8(x: f32, scale: f32) -> u32 {
    /// Adding 1.5 · 2²³ rounds to an integer, ties to even, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0;
    ((x / scale).clamp(-127.0, 127.0) + ROUND).to_bits() & 0xff
}

/// [`spec::forward_int8`] on all cores.
fn forward_int8_host(
    params: &Params,
    x: &[f32],          // (rows, width)
    packed: &mut [u32], // (rows, ceil(width / 4))
    scales: &mut [f32], // (rows)
) {
    let (rows, width) = (params.rows as usize, params.width as usize);
    let words = width.div_ceil(4);
    // On the bits, because a larger magnitude has larger bits and a NaN the largest.
    for_each_row(&mut scales[..rows], 1, |row, scale| {
        let largest = x[row * width..][..width].iter().map(|x| x.to_bits() & !SIGN).max();
        scale[0] = row_scale(largest.unwrap_or(0));
    });
    for_each_row(&mut packed[..rows * words], words, |row, packed| {
        let scale = scales[row];
        if scale.is_nan() || scale == 0.0 {
            packed.fill(0);
            return;
        }
        let (quads, rest) = x[row * width..][..width].as_chunks::<4>();
        for (packed, x) in packed.iter_mut().zip(quads) {
            let [a, b, c, d] = x.map(|x| int8(x, scale));
            *packed = a | b << 8 | c << 16 | d << 24;
        }
        if !rest.is_empty() {
            packed[words - 1] = (0..)
                .zip(rest)
                .fold(0, |word, (i, &x)| word | int8(x, scale) << (8 * i));
        }
    });
}

/// [`spec::inverse_int8`] on all cores.
fn inverse_int8_host(
    params: &Params,
    packed: &[u32],  // (rows, ceil(width / 4))
    scales: &[f32],  // (rows)
    out: &mut [f32], // (rows, width)
) {
    let (rows, width) = (params.rows as usize, params.width as usize);
    let words = width.div_ceil(4);
    for_each_row(&mut out[..rows * width], width, |row, out| {
        for (i, out) in out.iter_mut().enumerate() {
            let byte = (packed[row * words + i / 4] >> (i % 4 * 8)) as u8;
            *out = f32::from(byte as i8) * scales[row];
        }
    });
}
