//! The products with frozen weights: specification, CPU engine and every variant against each other and against a plain `f64`
//! computation, over shape classes, formats, orientations, strides and epilogues.

mod engines;
mod weights;

use engines::{agree, exact, floats, numbers};
use sflllm::compute::{Engine, Recording};
use sflllm::kernels::matmul::{self, Epilogue, Lora};
use sflllm::kernels::weight::Columns;
use sflllm::terms::format::Format;
use weights::{FORMATS, Matrix};

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

    let nan = |values: &[f32]| exact(bytemuck::cast_slice(values));
    let slots = [
        nan(&window(&x, inner, windows[0], f32::NAN)),
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
        let slots = [
            floats(values),
            exact(&[1f32.to_bits()]),
            floats(&vec![f32::NAN; rows]),
            floats(&vec![f32::NAN; rows]),
        ];
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
