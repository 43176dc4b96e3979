//! Kernels without a reduction over large dimensions (GELU, AdamW, quantisation) and layer normalisation: every variant and the CPU
//! engine equal the specification, and the specification equals the mathematics.

use crate::engines::{agree, assert_close, exact, finite_differences, floats, numbers, poisoned};
use sflllm::kernels::{adamw, gelu, gradient, layernorm, quantize, scalar};

/// One, primes, one below, at and above a workgroup of 64 and a CPU block of 4096.
const LENGTHS: &[usize] = &[1, 2, 7, 63, 64, 65, 301, 4095, 4096, 4097, 20_011];

/// (rows, width)
const MATRICES: &[(usize, usize)] = &[
    (1, 1),
    (3, 1),
    (1, 7),
    (5, 63),
    (2, 64),
    (7, 65),
    (45, 70),
    (67, 6),
    (130, 301),
];

fn as_floats(words: &[u32]) -> &[f32] {
    bytemuck::cast_slice(words)
}

fn as_words(values: &[f32]) -> &[u32] {
    bytemuck::cast_slice(values)
}

fn gelu_f64(x: f64) -> f64 {
    let root = (2.0 / std::f64::consts::PI).sqrt();
    0.5 * x * (1.0 + (root * (x + 0.044715 * x * x * x)).tanh())
}

/// Numbers in [-6, 6) and, in the first places, extremes.
fn pre_activations(n: usize) -> Vec<f32> {
    let mut x: Vec<f32> = numbers(3, n).iter().map(|x| 6.0 * x).collect();
    for (x, extreme) in x.iter_mut().zip([0.0, -0.0, 1e-20, 30.0, -30.0, 1e4, -1e4]) {
        *x = extreme;
    }
    x
}

#[test]
fn gelu_backward_equals_finite_differences() {
    for &n in LENGTHS {
        let x = pre_activations(n);
        let d_out = numbers(4, n);
        let found = agree(
            &format!("gelu.backward_x {n}"),
            &[floats(&x), floats(&d_out), poisoned(n)],
            |recording, buffers| gelu::backward_x(recording, n, &buffers[0], &buffers[1], &buffers[2]),
        );
        for i in 0..n {
            let slope = finite_differences(&[x[i].into()], |x| gelu_f64(x[0]))[0];
            let (d_x, expected) = (as_floats(&found[2])[i], slope * d_out[i]);
            assert!(
                (d_x - expected).abs() <= 1e-5,
                "x = {}: d_x = {d_x}, not {expected}",
                x[i]
            );
        }
    }
}

#[test]
fn layernorm_forward_equals_its_formula() {
    for &(rows, width) in MATRICES {
        let x: Vec<f32> = numbers(5, rows * width).iter().map(|x| 2.0 * x + 0.7).collect();
        let (gamma, beta) = (numbers(6, width), numbers(7, width));
        let params = layernorm::ForwardParams {
            rows: rows as u32,
            width: width as u32,
            epsilon: 1e-5,
        };
        let claim = format!("layernorm.forward {rows}x{width}");
        let found = agree(
            &claim,
            &[
                floats(&x),
                floats(&gamma),
                floats(&beta),
                poisoned(rows * width),
                poisoned(rows * 2),
            ],
            |recording, buffers| {
                let [x, gamma, beta, out, stats] = buffers else {
                    unreachable!("five slots")
                };
                layernorm::forward(recording, params, x, (gamma, beta), out, stats)
            },
        );
        let expected: Vec<f32> = layernorm_f64(&x.iter().map(|&x| x.into()).collect::<Vec<_>>(), &gamma, &beta)
            .iter()
            .map(|&x| x as f32)
            .collect();
        assert_close(&claim, as_floats(&found[3]), &expected, 1e-4);
    }
}

/// Layer normalisation of the rows of `x`, in f64.
fn layernorm_f64(x: &[f64], gamma: &[f32], beta: &[f32]) -> Vec<f64> {
    let width = gamma.len();
    x.chunks(width)
        .flat_map(|row| {
            let mean = row.iter().sum::<f64>() / width as f64;
            let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
            row.iter().zip(gamma).zip(beta).map(move |((x, &gamma), &beta)| {
                (x - mean) / (variance + 1e-5).sqrt() * f64::from(gamma) + f64::from(beta)
            })
        })
        .collect()
}

#[test]
fn layernorm_backward_equals_finite_differences() {
    for &(rows, width) in MATRICES {
        for accumulate in [0, 1] {
            let x = numbers(8, rows * width);
            let gamma = numbers(9, width);
            let d_out = numbers(10, rows * width);
            let forward = layernorm::ForwardParams {
                rows: rows as u32,
                width: width as u32,
                epsilon: 1e-5,
            };
            let beta = vec![0.0; width];
            let mut out = vec![0.0; rows * width];
            let mut stats = vec![0.0; rows * 2];
            layernorm::spec::forward(&forward, &x, &gamma, &beta, &mut out, &mut stats);
            let params = layernorm::BackwardParams {
                rows: rows as u32,
                width: width as u32,
                accumulate,
            };
            let old = numbers(11, rows * width);
            let d_x = if accumulate == 1 {
                floats(&old)
            } else {
                poisoned(rows * width)
            };
            let claim = format!("layernorm.backward_x {rows}x{width} {accumulate}");
            let found = agree(
                &claim,
                &[floats(&d_out), floats(&x), floats(&gamma), floats(&stats), d_x],
                |recording, buffers| {
                    let [d_out, x, gamma, stats, d_x] = buffers else {
                        unreachable!("five slots")
                    };
                    layernorm::backward_x(recording, params, d_out, (x, gamma, stats), d_x)
                },
            );
            // A row's gradient depends on that row alone.
            let expected: Vec<f32> = (0..rows)
                .flat_map(|row| {
                    let range = row * width..(row + 1) * width;
                    let x: Vec<f64> = x[range.clone()].iter().map(|&x| x.into()).collect();
                    finite_differences(&x, |x| {
                        layernorm_f64(x, &gamma, &beta)
                            .iter()
                            .zip(&d_out[range.clone()])
                            .map(|(out, &d_out)| out * f64::from(d_out))
                            .sum()
                    })
                })
                .zip(&old)
                .map(|(d_x, old)| d_x + accumulate as f32 * old)
                .collect();
            if width > 2 {
                assert_close(&claim, as_floats(&found[4]), &expected, 1e-4);
            }
        }
    }
}

#[test]
fn gradient_add_is_a_weighted_sum() {
    for &n in LENGTHS {
        let (lane, sum) = (numbers(19, n + 3), numbers(20, n + 3));
        let mut scalars = vec![0.25f32; scalar::COUNT];
        scalars[scalar::WEIGHT] = -0.375;
        let claim = format!("gradient.add {n}");
        let found = agree(
            &claim,
            &[floats(&lane), floats(&scalars), floats(&sum)],
            |recording, buffers| gradient::add(recording, n, &buffers[0], &buffers[1], &buffers[2]),
        );
        let expected: Vec<f32> = (0..n + 3)
            .map(|i| match i < n {
                true => (f64::from(sum[i]) - 0.375 * f64::from(lane[i])) as f32,
                false => sum[i],
            })
            .collect();
        assert_close(&claim, as_floats(&found[2]), &expected, 1e-6);
    }
}

#[test]
fn adamw_norm_is_the_norm_of_the_scaled_gradient() {
    for &n in LENGTHS {
        let gradient = numbers(15, n + 5);
        let mut scalars = vec![0.25f32; scalar::COUNT];
        scalars[scalar::GRAD_SCALE] = -0.5;
        let claim = format!("adamw.norm {n}");
        let found = agree(
            &claim,
            &[floats(&gradient), poisoned(adamw::partial_words(n)), floats(&scalars)],
            |recording, buffers| adamw::norm(recording, n, &buffers[0], &buffers[1], &buffers[2]),
        );
        let squares: f64 = gradient[..n].iter().map(|&g| f64::from(g).powi(2)).sum();
        scalars[scalar::NORM] = (0.5 * squares.sqrt()) as f32;
        assert_close(&claim, as_floats(&found[2]), &scalars, 1e-5);
    }
}

/// β₁ and β₂ as the device has them: the bias corrections must be of these.
const BETAS: (f32, f32) = (0.9, 0.999);

/// One parameter of AdamW and its moments after `steps` equal gradients, in f64.
fn adamw_f64(mut p: f64, g: f64, steps: i32, lr: f64, decay: f64) -> (f64, f64, f64) {
    let (beta1, beta2) = (f64::from(BETAS.0), f64::from(BETAS.1));
    let (mut m, mut v) = (0.0, 0.0);
    for t in 1..=steps {
        m = beta1 * m + (1.0 - beta1) * g;
        v = beta2 * v + (1.0 - beta2) * g * g;
        p -= lr * decay * p;
        let (m_hat, v_hat) = (m / (1.0 - beta1.powi(t)), v / (1.0 - beta2.powi(t)));
        p -= lr * m_hat / (v_hat.sqrt() + 1e-8);
    }
    (p, m, v)
}

#[test]
fn adamw_updates_follow_the_published_algorithm_with_decay_and_clipping() {
    for (n, clip) in [(1, 0.0), (65, 0.0), (65, 0.4), (4097, 3.0), (301, 1e9)] {
        let gradient = numbers(16, n);
        let start = numbers(17, n);
        let (scale, lr, decay) = (0.5f32, 0.02f32, 0.1f32);
        let steps = 3;
        let norm = gradient
            .iter()
            .map(|&g| f64::from(g * scale).powi(2))
            .sum::<f64>()
            .sqrt();
        let factor = if clip > 0.0 {
            (f64::from(clip) / (norm + 1e-6)).min(1.0)
        } else {
            1.0
        };
        // A replayed recording reads new scalars every step; here each step has its own buffer.
        let mut slots = vec![
            floats(&gradient),
            floats(&start),
            floats(&vec![0.0; n]),
            floats(&vec![0.0; n]),
            poisoned(adamw::partial_words(n)),
        ];
        for t in 1..=steps {
            let mut scalars = vec![0.0f32; scalar::COUNT];
            scalars[scalar::LR] = lr;
            scalars[scalar::BIAS1] = (1.0 - f64::from(BETAS.0).powi(t)) as f32;
            scalars[scalar::BIAS2] = (1.0 - f64::from(BETAS.1).powi(t)) as f32;
            scalars[scalar::WEIGHT_DECAY] = decay;
            scalars[scalar::CLIP] = clip;
            scalars[scalar::GRAD_SCALE] = scale;
            scalars[scalar::BETA1] = BETAS.0;
            scalars[scalar::BETA2] = BETAS.1;
            scalars[scalar::EPSILON] = 1e-8;
            slots.push(floats(&scalars));
        }
        let claim = format!("adamw {n} clip {clip}");
        let found = agree(&claim, &slots, |recording, buffers| {
            for scalars in &buffers[5..] {
                adamw::norm(recording, n, &buffers[0], &buffers[4], scalars);
                let state = (&buffers[1], &buffers[2], &buffers[3]);
                adamw::update(recording, n, &buffers[0], scalars, state);
            }
        });
        for i in 0..n {
            let g = f64::from(gradient[i]) * f64::from(scale) * factor;
            let (p, m, v) = adamw_f64(start[i].into(), g, steps, lr.into(), decay.into());
            for (found, expected) in [(&found[1], p), (&found[2], m), (&found[3], v)] {
                let found = as_floats(found)[i];
                let error = (f64::from(found) - expected).abs();
                assert!(
                    error <= 1e-5 * expected.abs() + 2e-7,
                    "{claim}: {found}, not {expected}"
                );
            }
        }
    }
}

/// Floats whose conversion to f16 is delicate: ties, subnormals, the largest, infinities, NaN.
fn delicate() -> Vec<u32> {
    let mut words: Vec<u32> = (0..0x2_0000u32).map(|i| (i << 15) | (i % 3)).collect();
    words.extend((0..0x1_0000u32).map(|i| {
        let exact = half::f16::from_bits(i as u16).to_f32().to_bits();
        exact.wrapping_add(1 << 12)
    }));
    words.extend((0..0x1_0000u32).map(|i| half::f16::from_bits(i as u16).to_f32().to_bits()));
    words.extend(numbers(18, 1001).iter().map(|x| x.to_bits()));
    words
}

#[test]
fn f16_rounds_to_nearest_even_and_saturates_bit_for_bit() {
    let x = delicate();
    let n = x.len();
    let params = quantize::Params {
        rows: 1,
        width: n as u32,
    };
    let found = agree(
        "quantize.forward_f16",
        &[exact(&x), exact(&vec![!0; quantize::f16_words(1, n)])],
        |recording, buffers| quantize::forward_f16(recording, params, &buffers[0], &buffers[1]),
    );
    for (i, &bits) in x.iter().enumerate() {
        let value = f32::from_bits(bits);
        let found = half::f16::from_bits((found[1][i / 2] >> (i % 2 * 16)) as u16);
        if value.is_nan() {
            assert!(found.is_nan());
        } else {
            let expected = half::f16::from_f32(value.clamp(-65504.0, 65504.0));
            assert_eq!(found.to_bits(), expected.to_bits(), "{value:e}");
        }
    }
}

#[test]
fn every_f16_expands_exactly() {
    let packed: Vec<u32> = (0..0x8000u32).map(|i| (2 * i) | ((2 * i + 1) << 16)).collect();
    let params = quantize::Params { rows: 256, width: 256 };
    let found = agree(
        "quantize.inverse_f16",
        &[exact(&packed), exact(&[!0; 0x1_0000])],
        |recording, buffers| quantize::inverse_f16(recording, params, &buffers[0], &buffers[1]),
    );
    for (bits, &found) in (0..=u16::MAX).zip(&found[1]) {
        let expected = half::f16::from_bits(bits).to_f32();
        let found = f32::from_bits(found);
        assert!(
            found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan(),
            "{bits:#06x}"
        );
    }
}

#[test]
fn f16_round_trip_keeps_odd_shapes_apart() {
    for &(rows, width) in MATRICES {
        let x = numbers(19, rows * width);
        let params = quantize::Params {
            rows: rows as u32,
            width: width as u32,
        };
        let found = agree(
            &format!("f16 round trip {rows}x{width}"),
            &[
                floats(&x),
                exact(&vec![!0; quantize::f16_words(rows, width)]),
                poisoned(rows * width),
            ],
            |recording, buffers| {
                quantize::forward_f16(recording, params, &buffers[0], &buffers[1]);
                quantize::inverse_f16(recording, params, &buffers[1], &buffers[2]);
            },
        );
        for (&x, &out) in x.iter().zip(as_floats(&found[2])) {
            assert_eq!(half::f16::from_f32(x).to_f32(), out);
        }
        if rows * width % 2 == 1 {
            assert_eq!(found[1].last().map(|word| word >> 16), Some(0));
        }
    }
}

#[test]
fn int8_round_trip_is_within_half_a_step_of_each_row() {
    for &(rows, width) in MATRICES {
        let mut x = numbers(20, rows * width);
        for (row, x) in x.chunks_mut(width).enumerate() {
            let size = [1.0, 1e-30, 1e30, 0.0][row % 4];
            x.iter_mut().for_each(|x| *x *= size);
        }
        let params = quantize::Params {
            rows: rows as u32,
            width: width as u32,
        };
        // Division may differ in its last digit between devices, so a tie may fall to either side: bytes are compared through
        // what they read back as.
        let mut scales = vec![0.0f32; rows];
        let mut packed = vec![!0u32; quantize::int8_words(rows, width)];
        quantize::spec::forward_int8(&params, &x, &mut packed, &mut scales);
        let found = agree(
            &format!("quantize.inverse_int8 {rows}x{width}"),
            &[exact(&packed), floats(&scales), poisoned(rows * width)],
            |recording, buffers| quantize::inverse_int8(recording, params, &buffers[0], &buffers[1], &buffers[2]),
        );
        for row in 0..rows {
            let largest = x[row * width..][..width].iter().fold(0.0f32, |max, x| max.max(x.abs()));
            assert!((scales[row] - largest / 127.0).abs() <= 1e-6 * largest);
            let out = &as_floats(&found[2])[row * width..][..width];
            for (out, x) in out.iter().zip(&x[row * width..]) {
                let error = (out - x).abs();
                assert!(error <= 0.500_01 * scales[row], "{x} reads back as {out}");
            }
            let words = width.div_ceil(4);
            let padding = packed[(row + 1) * words - 1] >> (((width - 1) % 4 + 1) as u32 * 8 % 32);
            assert!(width % 4 == 0 || padding == 0, "row {row} is not padded with zeros");
        }
    }
}

#[test]
fn int8_agrees_in_every_tiling_away_from_ties() {
    for &(rows, width) in MATRICES {
        // Whole steps of a power of two, so that no device can round differently.
        let x: Vec<f32> = (0..rows * width)
            .map(|i| {
                let value = if i % width == 0 { 127 } else { i * 7919 % 255 };
                (value as f32 - if i % width == 0 { 0.0 } else { 127.0 }) * 0.25
            })
            .collect();
        let params = quantize::Params {
            rows: rows as u32,
            width: width as u32,
        };
        let found = agree(
            &format!("quantize.forward_int8 {rows}x{width}"),
            &[
                floats(&x),
                exact(&vec![!0; quantize::int8_words(rows, width)]),
                poisoned(rows),
                poisoned(rows * width),
            ],
            |recording, buffers| {
                let [x, packed, scales, out] = buffers else {
                    unreachable!("four slots")
                };
                quantize::forward_int8(recording, params, x, packed, scales);
                quantize::inverse_int8(recording, params, packed, scales, out);
            },
        );
        assert_close("round trip", as_floats(&found[3]), &x, 1e-6);
    }
}

#[test]
fn int8_rows_that_are_zero_tiny_or_not_finite() {
    let rows = [
        [0.0, -0.0, 0.0, 0.0, 0.0],
        [1e-42, -1e-43, 0.0, 0.0, 1e-40],
        [1.0, f32::NAN, 2.0, 3.0, 4.0],
        [1.0, 2.0, f32::NEG_INFINITY, 3.0, 4.0],
        [f32::MAX, -f32::MAX, 0.0, 0.0, 1.0],
    ];
    let params = quantize::Params { rows: 5, width: 5 };
    let found = agree(
        "delicate rows",
        &[
            exact(as_words(rows.as_flattened())),
            exact(&[!0; 10]),
            exact(&[!0; 5]),
            exact(&[!0; 25]),
        ],
        |recording, buffers| {
            let [x, packed, scales, out] = buffers else {
                unreachable!("four slots")
            };
            quantize::forward_int8(recording, params, x, packed, scales);
            quantize::inverse_int8(recording, params, packed, scales, out);
        },
    );
    let out = as_floats(&found[3]);
    assert!(out[..10].iter().all(|&x| x == 0.0));
    assert!(out[10..20].iter().all(|x| x.is_nan()));
    assert!(found[1][4..8].iter().all(|&word| word == 0));
    assert_close("largest", &out[20..], &rows[4], 1e-6);
}
