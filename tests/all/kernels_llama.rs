//! Kernels of Llama-like models: rotary positions, root-mean-square norms and the gated activation. Engines and variants equal
//! the specifications, which equal the published formulas, numbers that Hugging Face's Transformers gives, and finite
//! differences in f64.

use crate::engines::{agree, assert_close, exact, finite_differences, floats, numbers, poisoned};
use sflllm::kernels::rotary::Scaling;
use sflllm::kernels::weight::Columns;
use sflllm::kernels::{rmsnorm, rotary, swiglu};

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| x.into()).collect()
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&x| x as f32).collect()
}

fn rows_of(words: &[u32]) -> &[f32] {
    bytemuck::cast_slice(words)
}

/// `Σ a · b`: the loss whose gradient with respect to `a` is `b`.
fn inner_product(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

// ---- Rotary positions ----

fn rotary_params(
    rows: usize,
    seq: usize,
    heads: usize,
    head_size: usize,
    (stride, first): (usize, usize),
) -> rotary::Params {
    rotary::Params {
        rows: rows as u32,
        seq: seq as u32,
        heads: heads as u32,
        head_size: head_size as u32,
        stride: stride as u32,
        first: first as u32,
    }
}

#[test]
fn heads_are_turned_and_turned_back_the_same_on_every_engine() {
    for (rows, seq, heads, size, (stride, first), position) in [
        (1, 1, 1, 2, (2, 0), 0),
        (6, 3, 2, 6, (17, 3), 5),
        (7, 7, 5, 14, (70, 0), 1),
        (128, 64, 12, 64, (960, 0), 0),
        (1, 1, 3, 128, (640, 256), 99),
    ] {
        let params = rotary_params(rows, seq, heads, size, (stride, first));
        let table = rotary::table(position + seq, size, 10_000.0, Scaling::None);
        let x = numbers(1, rows * stride);
        for launch in [rotary::forward, rotary::backward] {
            let found = agree(
                &format!("{params:?} at {position}"),
                &[floats(&table), exact(&[position as u32]), floats(&x)],
                |recording, buffers| launch(recording, params, &buffers[0], &buffers[1], &buffers[2]),
            );
            for (i, (after, before)) in rows_of(&found[2]).iter().zip(&x).enumerate() {
                let outside = !(first..first + heads * size).contains(&(i % stride));
                assert!(!outside || after == before, "element {i} belongs to no head");
            }
        }
    }
}

#[test]
fn rotation_equals_transformers() {
    // apply_rotary_pos_emb of a head of 8 at position 5, base 10,000.
    let x: Vec<f32> = (0..16).map(|i| i as f32 * 0.25 - 1.75).collect();
    let expected = [
        -1.215602,
        -1.076_661_1,
        -1.235_943_1,
        -0.999_987_5,
        1.465_370_9,
        -1.157_929_7,
        -0.312_161_54,
        -0.004_999_979,
        1.269_571,
        -0.280_347_05,
        0.661_599_16,
        0.989_987_55,
        0.114_846_68,
        1.556_086_5,
        1.785_297_4,
        2.004_974_8,
    ];
    let params = rotary_params(1, 1, 2, 8, (16, 0));
    let table = wide(&rotary::table(6, 8, 10_000.0, Scaling::None));
    let mut found = wide(&x);
    rotary::spec::forward(&params, &table, &[5], &mut found);
    assert_close("position 5", &narrow(&found), &expected, 1e-6);
}

#[test]
fn products_of_turned_heads_depend_on_their_distance_only() {
    let (size, table) = (16, wide(&rotary::table(200, 16, 10_000.0, Scaling::None)));
    let params = rotary_params(1, 1, 1, size, (size, 0));
    let (q, k) = (wide(&numbers(2, size)), wide(&numbers(3, size)));
    let turned = |x: &[f64], position: u32| {
        let mut x = x.to_vec();
        rotary::spec::forward(&params, &table, &[position], &mut x);
        x
    };
    let product = |i, j| inner_product(&turned(&q, i), &turned(&k, j));
    assert!((product(7, 3) - product(190, 186)).abs() < 1e-6);
    assert!((product(7, 3) - product(8, 3)).abs() > 1e-3);
}

#[test]
fn rotary_gradient_equals_finite_differences() {
    let params = rotary_params(4, 2, 3, 6, (20, 1));
    let table = wide(&rotary::table(9, 6, 100.0, Scaling::None));
    let x = wide(&numbers(4, 80));
    let d_out = wide(&numbers(5, 80));
    let mut d_x = d_out.clone();
    rotary::spec::backward_x(&params, &table, &[7], &mut d_x);
    let expected = finite_differences(&x, |x| {
        let mut out = x.to_vec();
        rotary::spec::forward(&params, &table, &[7], &mut out);
        inner_product(&out, &d_out)
    });
    assert_close("d_x", &narrow(&d_x), &expected, 1e-6);
}

#[test]
fn frequencies_equal_transformers() {
    // ROPE_INIT_FUNCTIONS of Transformers 5, in f32.
    /// Whose; the head's size, that every how many-th pair is listed, and the base; the scaling; the frequencies.
    type Case<'a> = (&'a str, (usize, usize, f64), Scaling, &'a [f32]);
    let cases: [Case<'_>; 3] = [
        (
            "Llama 3.2 1B",
            (64, 1, 500_000.0),
            Scaling::Llama3 {
                factor: 32.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_positions: 8192,
            },
            &[
                1.0,
                0.663_601_3,
                0.440_366_63,
                0.292_227_83,
                0.193_922_76,
                0.128_687_38,
                0.085_397_1,
                0.056_669_62,
                0.037_606_03,
                0.024_955_409,
                0.016_560_44,
                0.010_989_529,
                0.007_292_665,
                0.004_839_421_3,
                0.003_211_446,
                0.001_290_548,
                4.295_567e-4,
                9.708_286e-5,
                1.946_163_9e-5,
                1.291_476_8e-5,
                8.570_256e-6,
                5.687_232_3e-6,
                3.774_054_5e-6,
                2.504_467_2e-6,
                1.661_967_4e-6,
                1.102_883_6e-6,
                7.318_749e-7,
                4.856_731e-7,
                3.222_933e-7,
                2.138_742_3e-7,
                1.419_272e-7,
                9.418_306_5e-8,
            ],
        ),
        (
            "Llama 3.1 8B, every fourth pair",
            (128, 4, 500_000.0),
            Scaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_positions: 8192,
            },
            &[
                1.0,
                0.440_366_63,
                0.193_922_76,
                0.085_397_1,
                0.037_606_03,
                0.016_560_44,
                0.007_292_665,
                0.003_211_446,
                5.248_46e-4,
                7.784_655e-5,
                3.428_102_4e-5,
                1.509_621_8e-5,
                6.647_87e-6,
                2.927_499_7e-6,
                1.289_173_2e-6,
                5.677_088e-7,
            ],
        ),
        (
            "linear",
            (8, 1, 10_000.0),
            Scaling::Linear { factor: 4.0 },
            &[0.25, 0.025, 0.0025, 0.00025],
        ),
    ];
    for (name, (head_size, step, base), scaling, expected) in cases {
        let found: Vec<f64> = rotary::frequencies(head_size, base, scaling)
            .into_iter()
            .step_by(step)
            .collect();
        assert_eq!(found.len(), expected.len(), "{name}");
        for (i, (found, &expected)) in found.iter().zip(expected).enumerate() {
            let error = (found - f64::from(expected)).abs() / f64::from(expected);
            assert!(error < 1e-6, "{name}: frequency {i} is {found}, not {expected}");
        }
    }
}

#[test]
fn a_table_holds_cosine_and_sine_of_every_position_and_pair() {
    let scaling = Scaling::Linear { factor: 2.0 };
    let (table, frequencies) = (
        rotary::table(5000, 6, 500.0, scaling),
        rotary::frequencies(6, 500.0, scaling),
    );
    assert_eq!(table.len(), 5000 * 6);
    for (position, pair) in [(0, 0), (0, 2), (1, 1), (4999, 0), (4999, 2)] {
        let angle = position as f64 * frequencies[pair];
        let at = 2 * (position * 3 + pair);
        assert_eq!(table[at..at + 2], [angle.cos() as f32, angle.sin() as f32]);
    }
}

// ---- Root-mean-square norms ----

/// Sizes of ones, primes, around a workgroup of 64, and of real models: (rows, groups, width).
const NORMS: &[(usize, usize, usize)] = &[
    (1, 1, 1),
    (3, 1, 7),
    (5, 2, 64),
    (2, 3, 63),
    (67, 1, 65),
    (4, 1, 576),
    (2, 16, 128),
];

#[test]
fn norms_agree_on_every_engine_and_leave_other_columns_alone() {
    for &(rows, groups, width) in NORMS {
        // Columns in the midst of wider tensors.
        let (x_stride, out_stride) = (groups * width + 5, groups * width + 3);
        let params = rmsnorm::Params {
            rows: rows as u32,
            groups: groups as u32,
            width: width as u32,
            epsilon: 1e-5,
        };
        let found = agree(
            &format!("{params:?}"),
            &[
                floats(&numbers(10, rows * x_stride)),
                floats(&numbers(11, width)),
                floats(&vec![9.0; rows * out_stride]),
                poisoned(rows * groups),
            ],
            |recording, buffers| {
                let columns = |i: usize, first: usize, stride: usize| Columns {
                    buffer: &buffers[i],
                    first,
                    stride,
                };
                let (x, out) = (columns(0, 4, x_stride), columns(2, 1, out_stride));
                rmsnorm::forward(recording, params, x, &buffers[1], out, &buffers[3])
            },
        );
        for (i, &value) in rows_of(&found[2]).iter().enumerate() {
            let inside = (1..1 + groups * width).contains(&(i % out_stride));
            assert_eq!(value != 9.0, inside, "element {i} of {params:?}");
        }
    }
}

#[test]
fn norm_equals_transformers() {
    // LlamaRMSNorm with epsilon 1e-5.
    let params = rmsnorm::ForwardLayout {
        rows: 1,
        groups: 1,
        width: 4,
        epsilon: 1e-5,
        x_first: 0,
        x_stride: 4,
        out_first: 0,
        out_stride: 4,
    };
    let (x, gamma) = ([0.5, -1.0, 2.0, 0.0], [1.0, 2.0, -0.5, 0.25]);
    let (mut out, mut stats) = ([0.0f64; 4], [0.0]);
    rmsnorm::spec::forward(&params, &x, &gamma, &mut out, &mut stats);
    assert_close(
        "out",
        &narrow(&out),
        &[0.436_434_15, -1.745_736_6, -0.872_868_3, 0.0],
        1e-6,
    );
    assert!((stats[0] - 1.0 / (1.3125f64 + 1e-5).sqrt()).abs() < 1e-8);
}

#[test]
fn norm_gradients_agree_on_every_engine_replacing_and_accumulating() {
    for &(rows, groups, width) in NORMS {
        for accumulate in [0, 1] {
            let (d_out_stride, x_stride, d_x_stride) = (groups * width + 1, groups * width + 2, groups * width + 3);
            let params = rmsnorm::BackwardParams {
                rows: rows as u32,
                groups: groups as u32,
                width: width as u32,
                accumulate,
            };
            let before = numbers(12, rows * d_x_stride);
            let found = agree(
                &format!("{params:?}"),
                &[
                    floats(&numbers(13, rows * d_out_stride)),
                    floats(&numbers(14, rows * x_stride)),
                    floats(&numbers(15, width)),
                    floats(&numbers(16, rows * groups)),
                    floats(&before),
                ],
                |recording, buffers| {
                    let columns = |i: usize, first: usize, stride: usize| Columns {
                        buffer: &buffers[i],
                        first,
                        stride,
                    };
                    let x = columns(1, 2, x_stride);
                    rmsnorm::backward_x(
                        recording,
                        params,
                        columns(0, 1, d_out_stride),
                        (x, &buffers[2], &buffers[3]),
                        columns(4, 0, d_x_stride),
                    )
                },
            );
            for (i, (after, before)) in rows_of(&found[4]).iter().zip(&before).enumerate() {
                assert!(
                    i % d_x_stride < groups * width || after == before,
                    "element {i} of {params:?}"
                );
            }
        }
    }
}

#[test]
fn norm_gradient_equals_finite_differences() {
    for (rows, groups, width) in [(2, 1, 7), (3, 4, 5), (2, 2, 1)] {
        let n = rows * groups * width;
        let stride = (groups * width) as u32;
        let layout = rmsnorm::ForwardLayout {
            rows: rows as u32,
            groups: groups as u32,
            width: width as u32,
            epsilon: 1e-5,
            x_first: 0,
            x_stride: stride,
            out_first: 0,
            out_stride: stride,
        };
        let gamma = wide(&numbers(17, width));
        let forward = |x: &[f64]| {
            let (mut out, mut stats) = (vec![0.0; n], vec![0.0; rows * groups]);
            rmsnorm::spec::forward(&layout, x, &gamma, &mut out, &mut stats);
            (out, stats)
        };
        let x = wide(&numbers(18, n));
        let d_out = wide(&numbers(19, n));
        let before = wide(&numbers(20, n));
        let (_, stats) = forward(&x);
        let mut d_x = before.clone();
        let backward = rmsnorm::BackwardLayout {
            rows: layout.rows,
            groups: layout.groups,
            width: layout.width,
            accumulate: 1,
            d_out_first: 0,
            d_out_stride: stride,
            x_first: 0,
            x_stride: stride,
            d_x_first: 0,
            d_x_stride: stride,
        };
        rmsnorm::spec::backward_x(&backward, &d_out, &x, &gamma, &stats, &mut d_x);
        let added: Vec<f32> = d_x
            .iter()
            .zip(&before)
            .map(|(after, before)| (after - before) as f32)
            .collect();
        let expected = finite_differences(&x, |x| inner_product(&forward(x).0, &d_out));
        assert_close(&format!("{rows}x{groups}x{width}"), &added, &expected, 1e-5);
    }
}

// ---- The gated activation ----

#[test]
fn gated_activation_and_its_gradient_agree_on_every_engine() {
    for (rows, ffn) in [(1, 1), (3, 7), (5, 64), (65, 63), (2, 1536)] {
        let params = swiglu::Params {
            rows: rows as u32,
            ffn: ffn as u32,
        };
        let mut gate_up: Vec<f32> = numbers(30, 2 * rows * ffn).iter().map(|x| 4.0 * x).collect();
        // Gates whose exponentials leave f32.
        gate_up[0] = -200.0;
        gate_up[(2 * rows - 1) * ffn - 1] = 150.0;
        agree(
            &format!("{params:?}"),
            &[
                floats(&gate_up),
                floats(&numbers(31, rows * ffn)),
                poisoned(rows * ffn),
                poisoned(2 * rows * ffn),
            ],
            |recording, buffers| {
                swiglu::forward(recording, params, &buffers[0], &buffers[2]);
                swiglu::backward_x(recording, params, &buffers[0], &buffers[1], &buffers[3]);
            },
        );
    }
}

#[test]
fn gated_activation_equals_silu_times_up_of_torch() {
    let gate_up = [-3.0, -0.5, 0.0, 1.5, 2.0, -1.0, 3.0, 0.5];
    let mut out = [0.0f64; 4];
    swiglu::spec::forward(&swiglu::Params { rows: 1, ffn: 4 }, &gate_up, &mut out);
    let expected = [-0.284_555_23, 0.188_770_34, 0.0, 0.613_180_8];
    assert_close("silu(gate) · up", &narrow(&out), &expected, 1e-6);
}

#[test]
fn gated_activation_gradient_equals_finite_differences() {
    let params = swiglu::Params { rows: 3, ffn: 5 };
    let gate_up: Vec<f64> = numbers(32, 30).iter().map(|&x| 4.0 * f64::from(x)).collect();
    let d_out = wide(&numbers(33, 15));
    let mut d_gate_up = vec![f64::NAN; 30];
    swiglu::spec::backward_x(&params, &gate_up, &d_out, &mut d_gate_up);
    let expected = finite_differences(&gate_up, |gate_up| {
        let mut out = vec![0.0; 15];
        swiglu::spec::forward(&params, gate_up, &mut out);
        inner_product(&out, &d_out)
    });
    assert_close("d_gate_up", &narrow(&d_gate_up), &expected, 1e-6);
}
