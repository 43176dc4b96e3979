//! The products, `matmul` and `lora`: both engines and every tiling against a plain `f64` computation over shape classes, and the
//! gradients against finite differences.

use sflllm::compute::{Buffer, DeviceClass, Engine, Recording};
use sflllm::kernels::lora::{self, BackwardAParams, BackwardBParams, BackwardUpParams, ForwardDownParams};
use sflllm::kernels::matmul::{self, Epilogue, Lora, Shape};
use sflllm::kernels::scalar;

/// Words after the end of every operand, filled with NaN: a kernel must neither read nor write them.
const TAIL: usize = 37;

/// (m, n, k): one, primes, around a tile of 64 and around the register tile, and the sizes of a width of 70 with 5 heads.
const SHAPES: &[(usize, usize, usize)] = &[
    (1, 1, 1),
    (7, 5, 3),
    (9, 66, 13),
    (63, 65, 64),
    (65, 63, 17),
    (64, 64, 16),
    (45, 210, 70),
    (5, 301, 70),
    (70, 132, 36),
    (130, 4, 260),
];

/// Reproducible numbers in [-1, 1).
fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// Weights as they are stored, and the numbers they stand for.
fn stored(values: &[f32], f16: bool) -> (Vec<u32>, Vec<f64>) {
    if !f16 {
        let words = values.iter().map(|value| value.to_bits()).collect();
        return (words, values.iter().map(|&value| value.into()).collect());
    }
    let halves: Vec<half::f16> = values.iter().map(|&v| half::f16::from_f32(v)).collect();
    let words = halves
        .chunks(2)
        .map(|pair| {
            let high = pair.get(1).map_or(0x7e00, |half| half.to_bits());
            u32::from(pair[0].to_bits()) | u32::from(high) << 16
        })
        .collect();
    (words, halves.iter().map(|half| half.to_f64()).collect())
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| value.into()).collect()
}

fn buffer(engine: &Engine, name: &str, values: &[f32]) -> Buffer {
    words(engine, name, bytemuck::cast_slice(values))
}

fn words(engine: &Engine, name: &str, values: &[u32]) -> Buffer {
    let mut padded = values.to_vec();
    padded.resize(values.len() + TAIL, f32::NAN.to_bits());
    engine.buffer_from(name, &padded).expect("a small buffer")
}

/// A buffer of NaN: what reads it before it is written shows.
fn poisoned(engine: &Engine, name: &str, count: usize) -> Buffer {
    buffer(engine, name, &vec![f32::NAN; count])
}

/// The first `count` numbers of `buffer`, after checking that nothing was written behind them.
fn read(engine: &Engine, buffer: &Buffer, count: usize) -> Vec<f32> {
    let all: Vec<f32> = pollster::block_on(engine.download(buffer, 0, buffer.words())).expect("download");
    assert!(
        all[count..].iter().all(|value| value.is_nan()),
        "{buffer:?} was written past its end"
    );
    all[..count].to_vec()
}

fn run(engine: &Engine, recording: Recording) {
    engine.run(&engine.prepare(recording)).expect("run");
}

/// The largest difference must be below `tolerance` of the largest expected number.
fn assert_close(found: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let scale = expected.iter().fold(1e-30f64, |scale, value| scale.max(value.abs()));
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(found) - expected).abs();
        assert!(
            error <= tolerance * scale,
            "{what}: element {i} is {found}, not {expected} (largest {scale})"
        );
    }
}

/// The CPU engine, and the GPU engine with every tiling.
fn targets() -> Vec<(Engine, DeviceClass)> {
    let mut targets = vec![(Engine::cpu(), DeviceClass::CpuEngine)];
    if let Some(gpu) = Engine::gpu_for_tests() {
        targets.push((gpu.clone(), DeviceClass::Gpu));
        targets.push((gpu, DeviceClass::CpuAdapter));
    }
    targets
}

/// `left (rows, inner) · right`, where `right(i, column)` reads the second factor.
fn product(
    left: &[f64],
    (rows, columns, inner): (usize, usize, usize),
    right: impl Fn(usize, usize) -> f64,
) -> Vec<f64> {
    let mut out = vec![0.0; rows * columns];
    for row in 0..rows {
        for column in 0..columns {
            out[row * columns + column] = (0..inner).map(|i| left[row * inner + i] * right(i, column)).sum();
        }
    }
    out
}

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
}

/// Which of the things that may follow a product follow it.
#[derive(Clone, Copy, Debug, Default)]
struct Fused {
    bias: bool,
    residual: bool,
    rank: usize,
    row_scale: bool,
    accumulate: bool,
    gelu: bool,
}

const FUSED: &[Fused] = &[
    Fused {
        bias: false,
        residual: false,
        rank: 0,
        row_scale: false,
        accumulate: false,
        gelu: false,
    },
    Fused {
        bias: true,
        residual: true,
        rank: 3,
        row_scale: false,
        accumulate: false,
        gelu: false,
    },
    Fused {
        bias: false,
        residual: false,
        rank: 17,
        row_scale: false,
        accumulate: true,
        gelu: false,
    },
    Fused {
        bias: true,
        residual: false,
        rank: 0,
        row_scale: true,
        accumulate: false,
        gelu: false,
    },
    Fused {
        bias: true,
        residual: false,
        rank: 5,
        row_scale: false,
        accumulate: false,
        gelu: true,
    },
];

fn check_product(
    (engine, class): &(Engine, DeviceClass),
    transposed: bool,
    (m, n, k): (usize, usize, usize),
    (f16, w_offset): (bool, usize),
    fused: Fused,
) {
    let what = format!("{class:?}, transposed {transposed}, {m}x{n}x{k}, f16 {f16}, w_offset {w_offset}, {fused:?}");
    // In terms of the product: out (m, columns) from x (m, inner).
    let (columns, inner) = if transposed { (k, n) } else { (n, k) };
    let x = numbers(1, m * inner);
    let (w, w_values) = stored(&numbers(2, w_offset + n * k), f16);
    let bias = numbers(3, columns);
    let residual = numbers(4, m * columns);
    let u = numbers(5, m * fused.rank);
    let (lora_offset, scale) = (11, 1.75);
    let adapter = numbers(6, lora_offset + fused.rank * columns);
    let row_scale = numbers(7, m);
    let old = numbers(8, m * columns);

    let mut expected = product(&wide(&x), (m, columns, inner), |i, column| {
        w_values[w_offset
            + if transposed {
                column * inner + i
            } else {
                i * columns + column
            }]
    });
    let low_rank = product(&wide(&u), (m, columns, fused.rank), |r, column| {
        let at = if transposed {
            r * columns + column
        } else {
            column * fused.rank + r
        };
        adapter[lora_offset + at].into()
    });
    for (i, expected) in expected.iter_mut().enumerate() {
        *expected += scale * low_rank[i];
        if fused.bias {
            *expected += f64::from(bias[i % columns]);
        }
        if fused.residual {
            *expected += f64::from(residual[i]);
        }
        if fused.row_scale {
            *expected += f64::from(row_scale[i / columns]) * f64::from(old[i]);
        } else if fused.accumulate {
            *expected += f64::from(old[i]);
        }
    }

    let x = buffer(engine, "x", &x);
    let w = words(engine, "w", &w);
    let bias = buffer(engine, "bias", &bias);
    let residual = buffer(engine, "residual", &residual);
    let u = buffer(engine, "u", &u);
    let adapter = buffer(engine, "adapter", &adapter);
    let row_scale = buffer(engine, "row_scale", &row_scale);
    let out = if fused.row_scale || fused.accumulate {
        buffer(engine, "out", &old)
    } else {
        poisoned(engine, "out", m * columns)
    };
    let pre = poisoned(engine, "pre", m * columns);
    let epilogue = Epilogue {
        bias: fused.bias.then_some(&bias),
        residual: fused.residual.then_some(&residual),
        lora: (fused.rank > 0).then_some(Lora {
            u: &u,
            adapter: &adapter,
            offset: lora_offset,
            rank: fused.rank as u32,
            scale: scale as f32,
        }),
        gelu_pre: fused.gelu.then_some(&pre),
        row_scale: fused.row_scale.then_some(&row_scale),
        accumulate: fused.accumulate,
    };
    let shape = Shape { m, n, k, w_offset };
    let mut recording = Recording::new(*class);
    if transposed {
        matmul::backward_x(&mut recording, shape, f16, &x, &w, &out, epilogue);
    } else {
        matmul::forward(&mut recording, shape, f16, &x, &w, &out, epilogue);
    }
    run(engine, recording);
    if fused.gelu {
        assert_close(&read(engine, &pre, m * columns), &expected, 1e-5, &what);
        expected.iter_mut().for_each(|value| *value = gelu(*value));
    }
    assert_close(&read(engine, &out, m * columns), &expected, 1e-5, &what);
}

#[test]
fn forward_equals_f64_at_every_shape_epilogue_and_tiling() {
    for target in &targets() {
        for &shape in SHAPES {
            for weights in [(true, 0), (true, 7), (false, 0), (false, 8)] {
                for &fused in FUSED {
                    check_product(target, false, shape, weights, fused);
                }
            }
        }
    }
}

#[test]
fn backward_x_equals_f64_at_every_shape_epilogue_and_tiling() {
    for target in &targets() {
        for &shape in SHAPES {
            for weights in [(true, 0), (true, 8), (true, 7), (false, 4)] {
                for &fused in FUSED.iter().filter(|fused| !fused.gelu) {
                    check_product(target, true, shape, weights, fused);
                }
            }
        }
    }
}

#[test]
fn backward_w_equals_f64_at_every_shape_and_tiling() {
    for (engine, class) in &targets() {
        for &(m, n, k) in SHAPES {
            let x = numbers(1, m * k);
            let d_y = numbers(2, m * n);
            let transposed: Vec<f64> = (0..k * m).map(|i| x[i % m * k + i / m].into()).collect();
            let expected: Vec<f64> = product(&transposed, (k, n, m), |row, output| d_y[row * n + output].into())
                .iter()
                .map(|value| value * 0.5)
                .collect();
            let x = buffer(engine, "x", &x);
            let d_y = buffer(engine, "d_y", &d_y);
            let d_w = poisoned(engine, "d_w", k * n);
            let mut recording = Recording::new(*class);
            matmul::backward_w(&mut recording, Shape::new(m, n, k), &x, &d_y, &d_w, 0.5);
            run(engine, recording);
            let found = read(engine, &d_w, k * n);
            assert_close(&found, &expected, 1e-5, &format!("{class:?}, {m}x{n}x{k}"));
        }
    }
}

#[test]
fn gelu_epilogue_stays_finite_far_from_zero() {
    for (engine, class) in &targets() {
        let values = [-1e4f32, -300.0, -20.0, 0.0, 20.0, 300.0, 1e4];
        let x = buffer(engine, "x", &values);
        let w = words(engine, "w", &[1f32.to_bits()]);
        let out = poisoned(engine, "out", values.len());
        let pre = poisoned(engine, "pre", values.len());
        let mut recording = Recording::new(*class);
        let epilogue = Epilogue {
            gelu_pre: Some(&pre),
            ..Epilogue::default()
        };
        matmul::forward(
            &mut recording,
            Shape::new(values.len(), 1, 1),
            false,
            &x,
            &w,
            &out,
            epilogue,
        );
        run(engine, recording);
        assert_eq!(read(engine, &pre, values.len()), values);
        for (&x, found) in values.iter().zip(read(engine, &out, values.len())) {
            assert!((found - x.max(0.0)).abs() < 1e-6, "{class:?}: gelu({x}) = {found}");
        }
    }
}

#[test]
fn products_do_not_depend_on_the_number_of_threads() {
    let engine = Engine::cpu();
    let (m, n, k) = (131, 77, 300);
    let x = buffer(&engine, "x", &numbers(1, m * k));
    let (w, _) = stored(&numbers(2, n * k), true);
    let w = words(&engine, "w", &w);
    let run_with = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .expect("a pool");
        let out = poisoned(&engine, "out", m * n);
        pool.install(|| {
            let mut recording = engine.recording();
            matmul::forward(
                &mut recording,
                Shape::new(m, n, k),
                true,
                &x,
                &w,
                &out,
                Epilogue::default(),
            );
            run(&engine, recording);
        });
        read(&engine, &out, m * n)
            .iter()
            .map(|value| value.to_bits())
            .collect::<Vec<_>>()
    };
    let one = run_with(1);
    for threads in [2, 3, 7] {
        assert_eq!(run_with(threads), one, "{threads} threads");
    }
}

/// (rows, columns, rank)
const THIN: &[(usize, usize, usize)] = &[
    (1, 1, 1),
    (45, 70, 3),
    (63, 210, 4),
    (65, 64, 5),
    (129, 301, 8),
    (300, 65, 17),
];

#[test]
fn low_rank_products_equal_f64_at_every_shape_and_tiling() {
    for (engine, class) in &targets() {
        for &(rows, columns, rank) in THIN {
            let what = format!("{class:?}, {rows}x{columns}, rank {rank}");
            let x = numbers(1, rows * columns);
            let offset = 5;
            let adapter = numbers(2, offset + columns * rank);
            let u_expected = product(&wide(&x), (rows, rank, columns), |i, r| {
                adapter[offset + r * columns + i].into()
            });
            let v_expected = product(&wide(&x), (rows, rank, columns), |i, r| {
                adapter[offset + i * rank + r].into()
            });
            let x = buffer(engine, "x", &x);
            let adapter = buffer(engine, "adapter", &adapter);
            let u = poisoned(engine, "u", rows * rank);
            let v = poisoned(engine, "v", rows * rank);
            let mut recording = Recording::new(*class);
            let (rows_, columns_, rank_, offset_) = (rows as u32, columns as u32, rank as u32, offset as u32);
            let down = ForwardDownParams {
                rows: rows_,
                inputs: columns_,
                rank: rank_,
                offset: offset_,
            };
            lora::forward_down(&mut recording, down, &x, &adapter, &u);
            let up = BackwardUpParams {
                rows: rows_,
                outputs: columns_,
                rank: rank_,
                offset: offset_,
            };
            lora::backward_up(&mut recording, up, &x, &adapter, &v);
            run(engine, recording);
            assert_close(&read(engine, &u, rows * rank), &u_expected, 1e-5, &what);
            assert_close(&read(engine, &v, rows * rank), &v_expected, 1e-5, &what);
        }
    }
}

#[test]
fn low_rank_gradients_equal_f64_at_every_shape_and_tiling() {
    for (engine, class) in &targets() {
        for &(rows, columns, rank) in THIN.iter().chain(&[(2500, 10, 2)]) {
            let what = format!("{class:?}, {rows}x{columns}, rank {rank}");
            let thin = numbers(1, rows * rank);
            let wide_operand = numbers(2, rows * columns);
            let (offset, scale, weight) = (3, 1.5, 0.25);
            let old = numbers(3, offset + columns * rank);
            let sum = |column: usize, r: usize| -> f64 {
                (0..rows)
                    .map(|row| f64::from(wide_operand[row * columns + column]) * f64::from(thin[row * rank + r]))
                    .sum()
            };
            let mut a_expected = wide(&old);
            let mut b_expected = wide(&old);
            for column in 0..columns {
                for r in 0..rank {
                    a_expected[offset + r * columns + column] += weight * scale * sum(column, r);
                    b_expected[offset + column * rank + r] += weight * scale * sum(column, r);
                }
            }
            let thin = buffer(engine, "thin", &thin);
            let wide_operand = buffer(engine, "wide", &wide_operand);
            let mut scalars = vec![f32::NAN; scalar::COUNT];
            scalars[scalar::WEIGHT] = weight as f32;
            let scalars = buffer(engine, "scalars", &scalars);
            let partial = poisoned(engine, "partial", lora::partial_words(rows, columns, rank));
            let a = buffer(engine, "a", &old);
            let b = buffer(engine, "b", &old);
            let mut recording = Recording::new(*class);
            let (rows, columns, rank, offset) = (rows as u32, columns as u32, rank as u32, offset as u32);
            let params = BackwardAParams {
                rows,
                inputs: columns,
                rank,
                offset,
                scale: scale as f32,
            };
            lora::backward_a(&mut recording, params, &thin, &wide_operand, &scalars, &partial, &a);
            let params = BackwardBParams {
                rows,
                outputs: columns,
                rank,
                offset,
                scale: scale as f32,
            };
            lora::backward_b(&mut recording, params, &wide_operand, &thin, &scalars, &partial, &b);
            run(engine, recording);
            assert_close(&read(engine, &a, old.len()), &a_expected, 1e-5, &what);
            assert_close(&read(engine, &b, old.len()), &b_expected, 1e-5, &what);
        }
    }
}

#[test]
fn more_row_blocks_than_one_dimension_holds_are_all_computed() {
    let rows = 4 * 65_535 + 9;
    for (engine, class) in &targets() {
        let x = numbers(1, rows);
        let x_buffer = buffer(engine, "x", &x);
        let adapter = buffer(engine, "adapter", &[2.0]);
        let u = poisoned(engine, "u", rows);
        let mut recording = Recording::new(*class);
        let params = ForwardDownParams {
            rows: rows as u32,
            inputs: 1,
            rank: 1,
            offset: 0,
        };
        lora::forward_down(&mut recording, params, &x_buffer, &adapter, &u);
        run(engine, recording);
        let expected: Vec<f64> = x.iter().map(|&x| 2.0 * f64::from(x)).collect();
        assert_close(&read(engine, &u, rows), &expected, 1e-6, &format!("{class:?}"));
    }
}

/// A linear layer with LoRA, and the sizes it is tested at.
struct Layer {
    rows: usize,
    inputs: usize,
    outputs: usize,
    rank: usize,
    scale: f64,
}

impl Layer {
    /// The loss `Σ c · y` with `y = x·W + scale · (x·Aᵀ)·Bᵀ`.
    fn loss(&self, x: &[f64], w: &[f64], a: &[f64], b: &[f64], c: &[f64]) -> f64 {
        let u = product(x, (self.rows, self.rank, self.inputs), |i, r| a[r * self.inputs + i]);
        let y = product(x, (self.rows, self.outputs, self.inputs), |i, o| {
            w[i * self.outputs + o]
        });
        let low = product(&u, (self.rows, self.outputs, self.rank), |r, o| b[o * self.rank + r]);
        y.iter()
            .zip(&low)
            .zip(c)
            .map(|((y, low), c)| c * (y + self.scale * low))
            .sum()
    }
}

/// The gradient of `loss` by central differences.
fn differences(values: &[f64], loss: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let step = 1e-3;
    (0..values.len())
        .map(|i| {
            let mut moved = values.to_vec();
            moved[i] += step;
            let above = loss(&moved);
            moved[i] -= 2.0 * step;
            (above - loss(&moved)) / (2.0 * step)
        })
        .collect()
}

#[test]
fn layer_gradients_equal_finite_differences() {
    let layer = Layer {
        rows: 5,
        inputs: 7,
        outputs: 6,
        rank: 3,
        scale: 2.0,
    };
    let Layer {
        rows,
        inputs,
        outputs,
        rank,
        scale,
    } = layer;
    let x = numbers(1, rows * inputs);
    let w = numbers(2, inputs * outputs);
    let a = numbers(3, rank * inputs);
    let b = numbers(4, outputs * rank);
    let c = numbers(5, rows * outputs);
    let (x_, w_, a_, b_, c_) = (wide(&x), wide(&w), wide(&a), wide(&b), wide(&c));
    let d_x_expected = differences(&x_, |x| layer.loss(x, &w_, &a_, &b_, &c_));
    let d_w_expected = differences(&w_, |w| layer.loss(&x_, w, &a_, &b_, &c_));
    let d_a_expected = differences(&a_, |a| layer.loss(&x_, &w_, a, &b_, &c_));
    let d_b_expected = differences(&b_, |b| layer.loss(&x_, &w_, &a_, b, &c_));

    for (engine, class) in &targets() {
        // A and B share one buffer, their gradients another: A first.
        let adapter = buffer(engine, "adapter", &[a.clone(), b.clone()].concat());
        let gradient = buffer(engine, "gradient", &vec![0.0; a.len() + b.len()]);
        let mut scalars = vec![0.0; scalar::COUNT];
        scalars[scalar::WEIGHT] = 1.0;
        let scalars = buffer(engine, "scalars", &scalars);
        let x = buffer(engine, "x", &x);
        let w = words(engine, "w", &stored(&w, false).0);
        let d_y = buffer(engine, "d_y", &c);
        let u = poisoned(engine, "u", rows * rank);
        let v = poisoned(engine, "v", rows * rank);
        let partial = poisoned(engine, "partial", lora::partial_words(rows, inputs.max(outputs), rank));
        let d_x = poisoned(engine, "d_x", rows * inputs);
        let d_w = poisoned(engine, "d_w", inputs * outputs);
        let mut recording = Recording::new(*class);
        let shape = Shape::new(rows, outputs, inputs);
        let (rows_, inputs_, outputs_, rank_) = (rows as u32, inputs as u32, outputs as u32, rank as u32);
        let (b_offset, scale) = (a.len() as u32, scale as f32);
        let params = ForwardDownParams {
            rows: rows_,
            inputs: inputs_,
            rank: rank_,
            offset: 0,
        };
        lora::forward_down(&mut recording, params, &x, &adapter, &u);
        let params = BackwardUpParams {
            rows: rows_,
            outputs: outputs_,
            rank: rank_,
            offset: b_offset,
        };
        lora::backward_up(&mut recording, params, &d_y, &adapter, &v);
        let params = BackwardBParams {
            rows: rows_,
            outputs: outputs_,
            rank: rank_,
            offset: b_offset,
            scale,
        };
        lora::backward_b(&mut recording, params, &d_y, &u, &scalars, &partial, &gradient);
        let params = BackwardAParams {
            rows: rows_,
            inputs: inputs_,
            rank: rank_,
            offset: 0,
            scale,
        };
        lora::backward_a(&mut recording, params, &v, &x, &scalars, &partial, &gradient);
        let epilogue = Epilogue {
            lora: Some(Lora {
                u: &v,
                adapter: &adapter,
                offset: 0,
                rank: rank_,
                scale,
            }),
            ..Epilogue::default()
        };
        matmul::backward_x(&mut recording, shape, false, &d_y, &w, &d_x, epilogue);
        matmul::backward_w(&mut recording, shape, &x, &d_y, &d_w, 1.0);
        run(engine, recording);

        let what = format!("{class:?}");
        assert_close(&read(engine, &d_x, rows * inputs), &d_x_expected, 1e-5, &what);
        assert_close(&read(engine, &d_w, inputs * outputs), &d_w_expected, 1e-5, &what);
        let found = read(engine, &gradient, a.len() + b.len());
        assert_close(&found[..a.len()], &d_a_expected, 1e-5, &what);
        assert_close(&found[a.len()..], &d_b_expected, 1e-5, &what);
    }
}
