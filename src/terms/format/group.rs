//! One group of columns in codes: the scale, and for 4 bits the minimum, that fit its values best.
//!
//! Separate from the layout because this is a search, and the only part of a format that another encoder may do otherwise.

use half::f16;

use super::{GROUP, Q4_CODE_WORDS, Q8_CODE_WORDS};

/// 1.5 · 2²³: added to a small number, its low bits become the number rounded to the nearest integer, ties to even.
const ROUND: f32 = 12_582_912.0;
/// Parts of a group's range cut off below and above in the search for 4-bit codes.
const NARROWINGS: [(f32, f32); 4] = [(0.0, 0.0), (0.03, 0.03), (0.06, 0.0), (0.0, 0.06)];

/// A group in 8-bit codes; `None` when its scale is beyond f16.
pub(super) fn encode_q8(values: &[f32; GROUP]) -> Option<(f16, [u32; Q8_CODE_WORDS])> {
    let largest = values.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    let mut scale = f16::from_f32(largest / 127.0);
    // Among subnormal halves rounding down may be by much more than half a code.
    if largest > 127.5 * scale.to_f32() {
        scale = f16::from_bits(scale.to_bits() + 1);
    }
    if scale.is_infinite() {
        return None;
    }
    let inverse = inverse(scale);
    let mut words = [0; Q8_CODE_WORDS];
    for (word, values) in words.iter_mut().zip(values.as_chunks::<4>().0) {
        *word =
            u32::from_le_bytes(values.map(|value| ((value * inverse).clamp(-127.0, 127.0) + ROUND).to_bits() as u8));
    }
    Some((scale, words))
}

/// A group in 4-bit codes, with the scale and minimum that leave the least squared error among those searched; `None`
/// when they are beyond f16. Values from `length` on are overwritten.
///
/// The search narrows the range from both ends in steps, because one clipped outlier costs less than coarser codes for
/// all the others, and fits scale and minimum to the codes by least squares.
pub(super) fn encode_q4(values: &mut [f32; GROUP], length: usize) -> Option<(f16, f16, [u32; Q4_CODE_WORDS])> {
    for i in length..GROUP {
        values[i] = values[i - length];
    }
    let (low, high) = values
        .iter()
        .fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), &value| {
            (low.min(value), high.max(value))
        });
    let range = high - low;
    let round = |scale: f32, minimum: f32| (f16::from_f32(scale), f16::from_f32(minimum));
    let (mut scale, mut minimum) = round(range / 15.0, low);
    if !scale.is_finite() || !minimum.is_finite() {
        return None;
    }
    if range > 0.0 {
        let mut least = q4_error(values, scale, minimum);
        for (below, above) in NARROWINGS {
            let narrowed = round(range * (1.0 - below - above) / 15.0, low + range * below);
            let fitted = fit_q4(values, narrowed.0, narrowed.1);
            for candidate in [Some(narrowed), fitted].into_iter().flatten() {
                let error = q4_error(values, candidate.0, candidate.1);
                if error < least {
                    least = error;
                    (scale, minimum) = candidate;
                }
            }
        }
    }
    let (inverse, low) = (inverse(scale), minimum.to_f32());
    let mut words = [0; Q4_CODE_WORDS];
    for (i, &value) in values[..length].iter().enumerate() {
        let code = q4_code(value, inverse, low) as u32;
        words[i / 8] |= code << (4 * (i % 8));
    }
    Some((scale, minimum, words))
}

/// The code of a value, still as a number: a whole one from 0 to 15.
fn q4_code(value: f32, inverse: f32, minimum: f32) -> f32 {
    ((value - minimum) * inverse).clamp(0.0, 15.0) + ROUND - ROUND
}

/// Squared error of a whole group under a scale and minimum, summed in eight lanes so that it is the same on every
/// machine.
fn q4_error(values: &[f32; GROUP], scale: f16, minimum: f16) -> f32 {
    let (inverse, scale, minimum) = (inverse(scale), scale.to_f32(), minimum.to_f32());
    let mut lanes = [0.0; 8];
    for values in values.as_chunks::<8>().0 {
        for (lane, &value) in lanes.iter_mut().zip(values) {
            let error = scale * q4_code(value, inverse, minimum) + minimum - value;
            *lane += error * error;
        }
    }
    lanes.iter().sum()
}

/// The scale and minimum of least squared error for the codes that the given ones lead to; `None` when all codes are
/// equal or the fit is beyond f16.
fn fit_q4(values: &[f32; GROUP], scale: f16, minimum: f16) -> Option<(f16, f16)> {
    let (inverse, minimum) = (inverse(scale), minimum.to_f32());
    let (mut codes, mut squares, mut sums, mut products) = ([0.0f32; 8], [0.0f32; 8], [0.0f32; 8], [0.0f32; 8]);
    for values in values.as_chunks::<8>().0 {
        for (i, &value) in values.iter().enumerate() {
            let code = q4_code(value, inverse, minimum);
            codes[i] += code;
            squares[i] += code * code;
            // Relative to the minimum: a group far from zero must not lose its spread to cancellation.
            sums[i] += value - minimum;
            products[i] += code * (value - minimum);
        }
    }
    let [codes, squares, sums, products] = [codes, squares, sums, products].map(|lanes| lanes.iter().sum::<f32>());
    let n = GROUP as f32;
    let determinant = n * squares - codes * codes;
    let scale = (n * products - codes * sums) / determinant;
    let fitted = (
        f16::from_f32(scale),
        f16::from_f32(minimum + (sums - scale * codes) / n),
    );
    (determinant > 0.0 && fitted.0.is_finite() && fitted.1.is_finite()).then_some(fitted)
}

/// 1 / scale, and zero for a group that is all one value.
fn inverse(scale: f16) -> f32 {
    if scale == f16::ZERO { 0.0 } else { 1.0 / scale.to_f32() }
}
