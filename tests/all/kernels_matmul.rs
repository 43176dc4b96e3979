//! The products with frozen weights, `matmul`, and the low-rank ones, `lora`: specification, CPU engine and every variant against
//! each other and against a plain `f64` computation, over shape classes, formats, orientations, strides and epilogues, and the
//! gradients against finite differences.

use crate::engines::{agree, assert_close, exact, finite_differences, floats, numbers, poisoned};
use crate::weights::{FORMATS, Matrix};
use sflllm::compute::{Engine, Recording};
use sflllm::kernels::lora::{self, BackwardAParams, BackwardBParams, DownParams, UpParams};
use sflllm::kernels::matmul::{self, Epilogue, Lora};
use sflllm::kernels::scalar;
use sflllm::kernels::weight::Columns;
use sflllm::terms::format::Format;

/// (rows, outputs, inputs): one, primes, around a tile of 64 and around the register tile, groups that are whole and cut short,
/// the sizes of a width of 70 with 5 heads; and the few rows of generation.
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
    (1, 96, 64),
    (1, 301, 70),
    (2, 70, 133),
    (3, 33, 100),
    (4, 131, 77),
    (4, 64, 256),
];

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

const NOTHING: Fused = Fused {
    bias: false,
    residual: false,
    rank: 0,
    row_scale: false,
    accumulate: false,
    gelu: false,
};

const FUSED: &[Fused] = &[
    NOTHING,
    Fused {
        bias: true,
        residual: true,
        rank: 3,
        ..NOTHING
    },
    Fused {
        rank: 17,
        accumulate: true,
        ..NOTHING
    },
    Fused {
        bias: true,
        row_scale: true,
        ..NOTHING
    },
    Fused {
        bias: true,
        rank: 5,
        gelu: true,
        ..NOTHING
    },
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Forward,
    BackwardX,
}

/// What is multiplied, and how it lies in its buffers.
#[derive(Clone, Copy, Debug)]
struct Product {
    direction: Direction,
    format: Format,
    transposed: bool,
    /// (rows, outputs, inputs)
    shape: (usize, usize, usize),
    /// Rows of the stored matrix before the weight's.
    first_row: usize,
    /// First element of the activations, and how much longer than needed their rows are: operand, then result.
    windows: [(usize, usize); 2],
    fused: Fused,
}

/// Rows of `columns` values, `extra` more to the next one, from element `first` on; what lies between is `gap`.
fn window(values: &[f32], columns: usize, (first, extra): (usize, usize), gap: f32) -> Vec<f32> {
    let mut wide = vec![gap; first];
    for row in values.chunks(columns) {
        wide.extend(row);
        wide.extend(vec![gap; extra]);
    }
    wide
}

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
}

/// The largest difference must be below 1e-5 of the largest expected number.
fn assert_near(claim: &str, found: &[f32], expected: &[f64]) {
    assert_eq!(found.len(), expected.len(), "{claim}");
    let scale = expected.iter().fold(1e-30f64, |scale, value| scale.max(value.abs()));
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(found) - expected).abs();
        assert!(
            error <= 1e-5 * scale,
            "{claim}: element {i} is {found}, not {expected} (largest {scale})"
        );
    }
}

fn check(product: Product) {
    let Product {
        direction,
        format,
        transposed,
        shape: (rows, outputs, inputs),
        first_row,
        windows,
        fused,
    } = product;
    let claim = format!("{product:?}");
    let forward = direction == Direction::Forward;
    let (columns, inner) = if forward { (outputs, inputs) } else { (inputs, outputs) };
    let (w_rows, w_columns) = if transposed {
        (outputs, inputs)
    } else {
        (inputs, outputs)
    };
    let w = Matrix::random(2, format, first_row + w_rows + 2, w_columns);
    // The weight that multiplies inner element `i` into `column`.
    let weight_at = |i: usize, column: usize| {
        let (input, output) = if forward { (i, column) } else { (column, i) };
        let (row, column) = if transposed { (output, input) } else { (input, output) };
        w.at(first_row + row, column)
    };
    let x = numbers(1, rows * inner);
    let bias = numbers(3, columns);
    let residual = numbers(4, rows * columns);
    let rank = fused.rank;
    let u = numbers(5, rows * rank);
    let (lora_offset, lora_scale) = (11, 1.75);
    let adapter = numbers(6, lora_offset + rank * columns);
    let row_scale = numbers(7, rows);
    let keeps = fused.row_scale || fused.accumulate;
    let old = if keeps {
        numbers(8, rows * columns)
    } else {
        vec![f32::NAN; rows * columns]
    };

    let mut expected = vec![0.0; rows * columns];
    for (at, expected) in expected.iter_mut().enumerate() {
        let (row, column) = (at / columns, at % columns);
        for i in 0..inner {
            *expected += f64::from(x[row * inner + i]) * weight_at(i, column);
        }
        for r in 0..rank {
            // B (outputs, rank) forward, A (rank, inputs) backward.
            let place = if forward {
                column * rank + r
            } else {
                r * columns + column
            };
            *expected += lora_scale * f64::from(u[row * rank + r]) * f64::from(adapter[lora_offset + place]);
        }
        if fused.bias {
            *expected += f64::from(bias[column]);
        }
        if fused.residual {
            *expected += f64::from(residual[at]);
        }
        if fused.row_scale {
            *expected += f64::from(row_scale[row]) * f64::from(old[at]);
        } else if fused.accumulate {
            *expected += f64::from(old[at]);
        }
    }

    let slots = [
        exact(bytemuck::cast_slice(&window(&x, inner, windows[0], f32::NAN))),
        exact(&w.words),
        floats(&bias),
        floats(&residual),
        floats(&[u, vec![0.0]].concat()),
        floats(&adapter),
        floats(&row_scale),
        floats(&window(&old, columns, windows[1], 7.0)),
        if fused.gelu {
            floats(&vec![f32::NAN; rows * columns])
        } else {
            floats(&[0.0])
        },
    ];
    let found = agree(&claim, &slots, |recording, buffers| {
        let [x, w_words, bias, residual, u, adapter, row_scale, out, pre] = buffers else {
            panic!("nine buffers")
        };
        let all = w.weight(w_words, transposed);
        let weight = all.row_range(first_row..first_row + w_rows);
        let epilogue = Epilogue {
            bias: fused.bias.then_some(bias),
            residual: fused.residual.then_some(residual),
            lora: (rank > 0).then_some(Lora {
                u,
                adapter,
                offset: lora_offset,
                rank: rank as u32,
                scale: lora_scale as f32,
            }),
            gelu_pre: fused.gelu.then_some(pre),
            row_scale: fused.row_scale.then_some(row_scale),
            accumulate: fused.accumulate,
        };
        let place = |buffer, columns: usize, (first, extra): (usize, usize)| Columns {
            buffer,
            first,
            stride: columns + extra,
        };
        let (x, out) = (place(x, inner, windows[0]), place(out, columns, windows[1]));
        match direction {
            Direction::Forward => matmul::forward(recording, rows, &weight, x, out, epilogue),
            Direction::BackwardX => matmul::backward_x(recording, rows, &weight, x, out, epilogue),
        }
    });

    if fused.gelu {
        assert_near(&claim, bytemuck::cast_slice(&found[8]), &expected);
        expected.iter_mut().for_each(|value| *value = gelu(*value));
    }
    let (first, extra) = windows[1];
    let out: &[f32] = bytemuck::cast_slice(&found[7]);
    let mut result = Vec::new();
    for row in out[first..].chunks(columns + extra) {
        result.extend(&row[..columns]);
    }
    assert_near(&claim, &result, &expected);
}

/// Every shape in every format and orientation, with epilogues and windows in turn.
fn check_all(direction: Direction) {
    let fused: Vec<Fused> = FUSED
        .iter()
        .filter(|fused| direction == Direction::Forward || !fused.gelu)
        .copied()
        .collect();
    let windows = [[(0, 0), (0, 0)], [(4, 8), (0, 3)], [(3, 5), (6, 1)]];
    let mut turn = 0;
    for &shape in SHAPES {
        for format in FORMATS {
            for transposed in [false, true] {
                check(Product {
                    direction,
                    format,
                    transposed,
                    shape,
                    first_row: [0, 3, 8][turn % 3],
                    windows: windows[turn / 2 % 3],
                    fused: fused[turn % fused.len()],
                });
                turn += 1;
            }
        }
    }
}

#[test]
fn forward_is_the_product_at_every_shape_format_and_orientation() {
    check_all(Direction::Forward);
}

#[test]
fn backward_x_is_the_product_with_the_transpose_at_every_shape_format_and_orientation() {
    check_all(Direction::BackwardX);
}

#[test]
fn every_epilogue_follows_few_rows_and_many() {
    for rows in [1, 2, 3, 4, 5, 70] {
        for &fused in FUSED {
            for (direction, transposed) in [
                (Direction::Forward, false),
                (Direction::Forward, true),
                (Direction::BackwardX, false),
                (Direction::BackwardX, true),
            ] {
                if direction == Direction::BackwardX && fused.gelu {
                    continue;
                }
                check(Product {
                    direction,
                    format: Format::Q4,
                    transposed,
                    shape: (rows, 45, 38),
                    first_row: 1,
                    windows: [(0, 0), (1, 2)],
                    fused,
                });
            }
        }
    }
}

#[test]
fn gelu_epilogue_stays_finite_far_from_zero() {
    let many = [-1e4f32, -300.0, -20.0, 0.0, 20.0, 300.0, 1e4];
    let few = [-1e4f32, -300.0, 20.0, 300.0];
    for values in [&many[..], &few] {
        let rows = values.len();
        let slots = [floats(values), exact(&[1f32.to_bits()]), poisoned(rows), poisoned(rows)];
        let found = agree("gelu far from zero", &slots, |recording, buffers| {
            let [x, w, out, pre] = buffers else {
                panic!("four buffers")
            };
            let weight = Matrix::random(1, Format::F32, 1, 1).weight(w, false);
            let epilogue = Epilogue {
                gelu_pre: Some(pre),
                ..Epilogue::default()
            };
            matmul::forward(
                recording,
                rows,
                &weight,
                Columns::all(x, 1),
                Columns::all(out, 1),
                epilogue,
            );
        });
        assert_eq!(bytemuck::cast_slice::<u32, f32>(&found[3]), values);
        for (&x, found) in values.iter().zip(bytemuck::cast_slice::<u32, f32>(&found[2])) {
            assert!((found - x.max(0.0)).abs() < 1e-6, "gelu({x}) = {found}");
        }
    }
}

#[test]
fn products_do_not_depend_on_the_number_of_threads() {
    let engine = Engine::cpu();
    for (rows, outputs, inputs) in [(131, 77, 300), (512, 200, 300), (3, 700, 300), (1, 130, 2000)] {
        for transposed in [false, true] {
            let (w_rows, w_columns) = if transposed {
                (outputs, inputs)
            } else {
                (inputs, outputs)
            };
            let matrix = Matrix::random(2, Format::Q8, w_rows, w_columns);
            let x = engine
                .buffer_from("x", &numbers(1, rows * inputs))
                .expect("a small buffer");
            let w = engine.buffer_from("w", &matrix.words).expect("a small buffer");
            let run_with = |threads| {
                let pool = rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .build()
                    .expect("a pool");
                let out = engine.buffer("out", rows * outputs).expect("a small buffer");
                pool.install(|| {
                    let mut recording: Recording = engine.recording();
                    let (x, out) = (Columns::all(&x, inputs), Columns::all(&out, outputs));
                    let weight = matrix.weight(&w, transposed);
                    matmul::forward(&mut recording, rows, &weight, x, out, Epilogue::default());
                    engine.run(&engine.prepare(recording)).expect("run");
                });
                pollster::block_on(engine.download::<u32>(&out, 0, rows * outputs)).expect("download")
            };
            let one = run_with(1);
            for threads in [2, 3, 7] {
                assert_eq!(run_with(threads), one, "{threads} threads, {rows}x{outputs}x{inputs}");
            }
        }
    }
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| value.into()).collect()
}

/// `left (rows, inner) · right`, where `right(i, column)` reads the second factor.
fn product(
    left: &[f64],
    (rows, columns, inner): (usize, usize, usize),
    right: impl Fn(usize, usize) -> f64,
) -> Vec<f64> {
    let mut out = vec![0.0; rows * columns];
    for (at, out) in out.iter_mut().enumerate() {
        let (row, column) = (at / columns, at % columns);
        *out = (0..inner).map(|i| left[row * inner + i] * right(i, column)).sum();
    }
    out
}

/// (rows, columns, rank)
const THIN: &[(usize, usize, usize)] = &[
    (1, 1, 1),
    (1, 576, 8),
    (3, 70, 5),
    (45, 70, 3),
    (63, 210, 4),
    (65, 64, 5),
    (129, 301, 8),
    (300, 65, 17),
];

/// First element and extra stride of the wide operand, in turn.
const PLACES: [(usize, usize); 3] = [(0, 0), (5, 3), (64, 128)];

#[test]
fn low_rank_products_equal_f64_at_every_shape_and_stride() {
    for (turn, &(rows, columns, rank)) in THIN.iter().enumerate() {
        let (first, extra) = PLACES[turn % PLACES.len()];
        let claim = format!("{rows}x{columns}, rank {rank}, first {first}, {extra} between rows");
        let x = numbers(1, rows * columns);
        let offset = 5;
        let adapter = numbers(2, offset + columns * rank);
        let slots = [
            exact(bytemuck::cast_slice(&window(&x, columns, (first, extra), f32::NAN))),
            floats(&adapter),
            poisoned(rows * rank),
            poisoned(rows * rank),
        ];
        let found = agree(&claim, &slots, |recording, buffers| {
            let x = Columns {
                buffer: &buffers[0],
                first,
                stride: columns + extra,
            };
            let down = DownParams {
                rows,
                inputs: columns,
                rank,
                offset,
            };
            lora::forward_down(recording, down, x, &buffers[1], &buffers[2]);
            let up = UpParams {
                rows,
                outputs: columns,
                rank,
                offset,
            };
            lora::backward_up(recording, up, x, &buffers[1], &buffers[3]);
        });
        let u = product(&wide(&x), (rows, rank, columns), |i, r| {
            adapter[offset + r * columns + i].into()
        });
        let v = product(&wide(&x), (rows, rank, columns), |i, r| {
            adapter[offset + i * rank + r].into()
        });
        assert_near(&claim, bytemuck::cast_slice(&found[2]), &u);
        assert_near(&claim, bytemuck::cast_slice(&found[3]), &v);
    }
}

#[test]
fn low_rank_gradients_equal_f64_at_every_shape_and_stride() {
    for (turn, &(rows, columns, rank)) in THIN.iter().chain(&[(2500, 10, 2)]).enumerate() {
        let place = PLACES[turn % PLACES.len()];
        let claim = format!("{rows}x{columns}, rank {rank}, place {place:?}");
        let thin = numbers(1, rows * rank);
        let wide_operand = numbers(2, rows * columns);
        let (offset, scale, weight) = (3, 1.5, 0.25);
        let old = numbers(3, offset + columns * rank);
        let mut scalars = vec![f32::NAN; scalar::COUNT];
        scalars[scalar::WEIGHT] = weight as f32;
        let slots = [
            floats(&thin),
            exact(bytemuck::cast_slice(&window(&wide_operand, columns, place, f32::NAN))),
            exact(bytemuck::cast_slice(&scalars)),
            poisoned(lora::partial_words(rows, columns, rank)),
            floats(&old),
            floats(&old),
        ];
        let found = agree(&claim, &slots, |recording, buffers| {
            let [thin, wide_operand, scalars, partial, a, b] = buffers else {
                panic!("six buffers")
            };
            let wide_operand = Columns {
                buffer: wide_operand,
                first: place.0,
                stride: columns + place.1,
            };
            let params = BackwardAParams {
                rows,
                inputs: columns,
                rank,
                offset,
                scale: scale as f32,
            };
            lora::backward_a(recording, params, thin, wide_operand, scalars, partial, a);
            let params = BackwardBParams {
                rows,
                outputs: columns,
                rank,
                offset,
                scale: scale as f32,
            };
            lora::backward_b(recording, params, wide_operand, thin, scalars, partial, b);
        });
        let mut a = wide(&old);
        let mut b = wide(&old);
        for column in 0..columns {
            for r in 0..rank {
                let sum: f64 = (0..rows)
                    .map(|row| f64::from(wide_operand[row * columns + column]) * f64::from(thin[row * rank + r]))
                    .sum();
                a[offset + r * columns + column] += weight * scale * sum;
                b[offset + column * rank + r] += weight * scale * sum;
            }
        }
        assert_near(&claim, bytemuck::cast_slice(&found[4]), &a);
        assert_near(&claim, bytemuck::cast_slice(&found[5]), &b);
    }
}

#[test]
fn more_row_blocks_than_one_dimension_holds_are_all_computed() {
    let rows = 4 * 65_535 + 9;
    let x = numbers(1, rows);
    let slots = [floats(&x), floats(&[2.0]), poisoned(rows)];
    let found = agree("blocks in two dimensions", &slots, |recording, buffers| {
        let params = DownParams {
            rows,
            inputs: 1,
            rank: 1,
            offset: 0,
        };
        lora::forward_down(
            recording,
            params,
            Columns::all(&buffers[0], 1),
            &buffers[1],
            &buffers[2],
        );
    });
    let expected: Vec<f32> = x.iter().map(|x| 2.0 * x).collect();
    assert_eq!(bytemuck::cast_slice::<u32, f32>(&found[2]), expected);
}

#[test]
fn more_columns_than_one_dimension_holds_are_all_computed_for_one_row() {
    // Four columns a workgroup of the decode kernel, eight of the one for adapters emulated on a CPU.
    let outputs = 8 * 65_535 + 9;
    let w = Matrix::random(1, Format::F32, outputs, 1);
    let slots = [floats(&[2.0]), exact(&w.words), poisoned(outputs)];
    let found = agree("columns in two dimensions", &slots, |recording, buffers| {
        let weight = w.weight(&buffers[1], true);
        let (x, out) = (Columns::all(&buffers[0], 1), Columns::all(&buffers[2], outputs));
        matmul::forward(recording, 1, &weight, x, out, Epilogue::default());
    });
    let expected: Vec<f64> = w.values.iter().map(|w| 2.0 * w).collect();
    assert_near("columns in two dimensions", bytemuck::cast_slice(&found[2]), &expected);
}

/// A linear layer with LoRA, whose weights are stored (outputs, inputs), and the sizes it is tested at.
struct Layer {
    rows: usize,
    inputs: usize,
    outputs: usize,
    rank: usize,
    scale: f64,
}

impl Layer {
    /// The loss `Σ c · y` with `y = x·Wᵀ + scale · (x·Aᵀ)·Bᵀ`.
    fn loss(&self, x: &[f64], w: &[f64], a: &[f64], b: &[f64], c: &[f64]) -> f64 {
        let (inputs, rank) = (self.inputs, self.rank);
        let u = product(x, (self.rows, rank, inputs), |i, r| a[r * inputs + i]);
        let y = product(x, (self.rows, self.outputs, inputs), |i, o| w[o * inputs + i]);
        let low = product(&u, (self.rows, self.outputs, rank), |r, o| b[o * rank + r]);
        y.iter()
            .zip(&low)
            .zip(c)
            .map(|((y, low), c)| c * (y + self.scale * low))
            .sum()
    }
}

#[test]
fn layer_gradients_equal_finite_differences_in_every_format() {
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
    for format in FORMATS {
        let w = Matrix::random(2, format, outputs, inputs);
        let x = numbers(1, rows * inputs);
        let a = numbers(3, rank * inputs);
        let b = numbers(4, outputs * rank);
        let c = numbers(5, rows * outputs);
        let (x_, a_, b_, c_) = (wide(&x), wide(&a), wide(&b), wide(&c));
        // A and B share one buffer, their gradients another: A first.
        let mut scalars = vec![0.0; scalar::COUNT];
        scalars[scalar::WEIGHT] = 1.0;
        let slots = [
            floats(&x),
            exact(&w.words),
            floats(&c),
            floats(&[a.clone(), b.clone()].concat()),
            floats(&scalars),
            poisoned(rows * rank),
            poisoned(rows * rank),
            poisoned(lora::partial_words(rows, inputs.max(outputs), rank)),
            floats(&vec![0.0; a.len() + b.len()]),
            poisoned(rows * inputs),
        ];
        let found = agree(&format!("layer in {format}"), &slots, |recording, buffers| {
            let [x, w_words, d_y, adapter, scalars, u, v, partial, gradient, d_x] = buffers else {
                panic!("ten buffers")
            };
            let (x, d_y) = (Columns::all(x, inputs), Columns::all(d_y, outputs));
            let (b_offset, scale) = (a.len(), scale as f32);
            let down = DownParams {
                rows,
                inputs,
                rank,
                offset: 0,
            };
            lora::forward_down(recording, down, x, adapter, u);
            let up = UpParams {
                rows,
                outputs,
                rank,
                offset: b_offset,
            };
            lora::backward_up(recording, up, d_y, adapter, v);
            let of_b = BackwardBParams {
                rows,
                outputs,
                rank,
                offset: b_offset,
                scale,
            };
            lora::backward_b(recording, of_b, d_y, u, scalars, partial, gradient);
            let of_a = BackwardAParams {
                rows,
                inputs,
                rank,
                offset: 0,
                scale,
            };
            lora::backward_a(recording, of_a, v, x, scalars, partial, gradient);
            let epilogue = Epilogue {
                lora: Some(Lora {
                    u: v,
                    adapter,
                    offset: 0,
                    rank: rank as u32,
                    scale,
                }),
                ..Epilogue::default()
            };
            let weight = w.weight(w_words, true);
            matmul::backward_x(recording, rows, &weight, d_y, Columns::all(d_x, inputs), epilogue);
        });
        let gradient: &[f32] = bytemuck::cast_slice(&found[8]);
        let d_a = finite_differences(&a_, |a| layer.loss(&x_, &w.values, a, &b_, &c_));
        let d_b = finite_differences(&b_, |b| layer.loss(&x_, &w.values, &a_, b, &c_));
        let d_x = finite_differences(&x_, |x| layer.loss(x, &w.values, &a_, &b_, &c_));
        assert_close("d_a", &gradient[..a.len()], &d_a, 1e-5);
        assert_close("d_b", &gradient[a.len()..], &d_b, 1e-5);
        assert_close("d_x", bytemuck::cast_slice(&found[9]), &d_x, 1e-5);
    }
}
