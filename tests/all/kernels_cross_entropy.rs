//! The fused head: specification, CPU engine and every variant against each other, loss and gradient against a plain `f64` softmax
//! with weights in every format, and that gradient against finite differences.

use crate::engines::{agree, assert_close, exact, finite_differences, floats, numbers, poisoned};
use crate::weights::{FORMATS, Matrix};
use sflllm::kernels::cross_entropy::{self, Chunk, Head, STATE_WORDS, Scratch};
use sflllm::kernels::scalar;
use sflllm::terms::format::Format;
use sflllm::terms::tensor::IGNORED_TARGET;

/// One head's numbers.
struct Case {
    rows: usize,
    width: usize,
    vocab: usize,
    hidden: Vec<f32>,
    /// (vocab, width), and two rows more before it that are no part of the vocabulary.
    head: Matrix,
    targets: Vec<i32>,
    factor: f32,
}

/// Rows of the head's matrix before the vocabulary's.
const BEFORE: usize = 2;

impl Case {
    /// Every third row has no target.
    fn new(format: Format, (rows, width, vocab): (usize, usize, usize), scale: f32) -> Self {
        let targets = (0..rows).map(|row| {
            if row % 3 == 1 {
                IGNORED_TARGET
            } else {
                (row * 7919 % vocab) as i32
            }
        });
        Self {
            rows,
            width,
            vocab,
            hidden: numbers(1, rows * width).iter().map(|x| x * scale).collect(),
            head: Matrix::random(2, format, BEFORE + vocab, width),
            targets: targets.collect(),
            factor: 0.125,
        }
    }

    fn logits(&self, hidden: &[f64]) -> Vec<f64> {
        let rows = self.head.values.chunks_exact(self.width).skip(BEFORE);
        rows.map(|row| row.iter().zip(hidden).map(|(w, h)| w * h).sum())
            .collect()
    }

    /// The largest logit, the sum of exponentials relative to it and the logits of each row.
    fn softmax<'a>(&'a self, hidden: &'a [f64]) -> impl Iterator<Item = (f64, f64, Vec<f64>)> + 'a {
        hidden.chunks_exact(self.width).map(|hidden| {
            let logits = self.logits(hidden);
            let max = logits.iter().fold(f64::MIN, |max, &logit| max.max(logit));
            let sum = logits.iter().map(|logit| (logit - max).exp()).sum();
            (max, sum, logits)
        })
    }

    /// The loss of every row.
    fn losses(&self, hidden: &[f64]) -> Vec<f64> {
        let rows = self.softmax(hidden).zip(&self.targets);
        rows.map(|((max, sum, logits), &target)| match usize::try_from(target) {
            Err(_) => 0.0,
            Ok(target) => sum.ln() + max - logits[target],
        })
        .collect()
    }

    /// The gradient of `factor · Σ losses`.
    fn gradient(&self, hidden: &[f64]) -> Vec<f64> {
        let mut gradient = vec![0.0; self.rows * self.width];
        let rows = gradient.chunks_exact_mut(self.width).zip(&self.targets);
        for ((gradient, &target), (max, sum, logits)) in rows.zip(self.softmax(hidden)) {
            let Ok(target) = usize::try_from(target) else {
                continue;
            };
            for (token, logit) in logits.iter().enumerate() {
                let d_logit = (logit - max).exp() / sum - f64::from(u8::from(token == target));
                for (i, gradient) in gradient.iter_mut().enumerate() {
                    *gradient += f64::from(self.factor) * d_logit * self.head.at(BEFORE + token, i);
                }
            }
        }
        gradient
    }

    /// Runs the head on every engine, with its matrix cut at `cuts`, and returns losses and, if wanted, the gradient.
    fn run(&self, claim: &str, cuts: &[usize], tile: usize, backward: bool) -> (Vec<f32>, Option<Vec<f32>>) {
        let (rows, width) = (self.rows, self.width);
        let mut scalars = vec![f32::NAN; scalar::COUNT];
        scalars[scalar::FACTOR] = self.factor;
        // A target past the end, which is not read.
        let targets = [&self.targets[..], &[i32::MAX]].concat();
        let slots = [
            floats(&self.hidden),
            exact(&self.head.words),
            exact(bytemuck::cast_slice(&targets)),
            exact(bytemuck::cast_slice(&scalars)),
            floats(&vec![0.0; rows * tile.min(self.vocab)]),
            poisoned(rows * STATE_WORDS),
            poisoned(rows),
            poisoned(rows),
            if backward {
                poisoned(rows * width)
            } else {
                floats(&vec![7.0; rows * width])
            },
        ];
        let found = agree(claim, &slots, |recording, buffers| {
            let [
                hidden,
                words,
                targets,
                scalars,
                logits,
                state,
                row_scale,
                loss,
                d_hidden,
            ] = buffers
            else {
                panic!("nine buffers")
            };
            let all = self.head.weight(words, true);
            let ends = cuts.iter().copied().chain([self.vocab]);
            let chunks: Vec<Chunk> = std::iter::once(0)
                .chain(cuts.iter().copied())
                .zip(ends)
                .map(|(start, end)| Chunk {
                    weight: all.row_range(BEFORE + start..BEFORE + end),
                    start,
                })
                .collect();
            let head = Head {
                rows,
                width,
                tile,
                hidden,
                chunks: &chunks,
                targets,
                scalars,
                scratch: Scratch {
                    logits,
                    state,
                    row_scale,
                },
                loss,
                d_hidden: backward.then_some(d_hidden),
            };
            cross_entropy::record(recording, &head);
        });
        let floats = |i: usize| bytemuck::cast_slice::<u32, f32>(&found[i]).to_vec();
        if !backward {
            assert!(
                floats(8).iter().all(|&d| d == 7.0),
                "{claim}: evaluation wrote a gradient"
            );
        }
        (floats(7), backward.then(|| floats(8)))
    }
}

/// The largest difference must be below `tolerance` of the largest expected number.
fn assert_near(claim: &str, found: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{claim}");
    let scale = expected.iter().fold(1e-30f64, |scale, value| scale.max(value.abs()));
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(found) - expected).abs();
        assert!(
            error <= tolerance * scale,
            "{claim}: element {i} is {found}, not {expected} (largest {scale})"
        );
    }
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| value.into()).collect()
}

#[test]
fn loss_and_gradient_equal_f64_for_every_format_tile_and_chunk() {
    for shape in [
        (1, 1, 1),
        (7, 5, 2),
        (45, 70, 301),
        (65, 64, 257),
        (9, 33, 130),
        (3, 96, 70),
    ] {
        let vocab = shape.2;
        for format in FORMATS {
            let case = Case::new(format, shape, 2.0);
            let losses = case.losses(&wide(&case.hidden));
            let gradient = case.gradient(&wide(&case.hidden));
            let runs: [(&[usize], usize); 4] = [
                (&[], 64),
                (&[vocab / 2], 63),
                (&[vocab / 3, vocab - 1], 130),
                (&[vocab / 2], 1000),
            ];
            for (cuts, tile) in runs.into_iter().filter(|(cuts, _)| vocab > 3 || cuts.is_empty()) {
                let claim = format!("{shape:?} in {format}, cuts {cuts:?}, tile {tile}");
                let (loss, d_hidden) = case.run(&claim, cuts, tile, true);
                assert_near(&claim, &loss, &losses, 1e-5);
                assert_near(&claim, &d_hidden.expect("a gradient"), &gradient, 1e-5);
            }
        }
    }
}

#[test]
fn evaluation_gives_the_same_loss_and_no_gradient() {
    let case = Case::new(Format::Q4, (45, 70, 301), 2.0);
    let (loss, _) = case.run("evaluation", &[100], 64, false);
    assert_near("evaluation", &loss, &case.losses(&wide(&case.hidden)), 1e-5);
}

#[test]
fn rows_without_a_target_are_exactly_zero() {
    let mut case = Case::new(Format::F16, (12, 70, 301), 2.0);
    let (loss, d_hidden) = case.run("some targets", &[100], 64, true);
    let d_hidden = d_hidden.expect("a gradient");
    for row in (0..case.rows).filter(|&row| case.targets[row] == IGNORED_TARGET) {
        assert_eq!(loss[row].to_bits(), 0);
        assert!(d_hidden[row * 70..][..70].iter().all(|d| *d == 0.0));
    }
    case.targets.fill(IGNORED_TARGET);
    let (loss, d_hidden) = case.run("no target", &[100], 64, true);
    let mut values = loss.iter().chain(d_hidden.iter().flatten());
    assert!(values.all(|value| *value == 0.0));
}

#[test]
fn logits_in_the_thousands_do_not_overflow() {
    let case = Case::new(Format::F16, (9, 70, 301), 500.0);
    let expected = case.losses(&wide(&case.hidden));
    assert!(expected.iter().any(|loss| *loss > 1000.0), "the case must be extreme");
    let (loss, d_hidden) = case.run("large logits", &[100], 64, true);
    assert_near("large logits", &loss, &expected, 1e-5);
    let gradient = case.gradient(&wide(&case.hidden));
    assert_near("large logits", &d_hidden.expect("a gradient"), &gradient, 1e-3);
}

#[test]
fn gradient_equals_finite_differences() {
    let case = Case::new(Format::Q8, (5, 6, 23), 1.5);
    let (_, d_hidden) = case.run("gradient", &[9], 4, true);
    let expected = finite_differences(&wide(&case.hidden), |hidden| {
        f64::from(case.factor) * case.losses(hidden).iter().sum::<f64>()
    });
    assert_close("gradient", &d_hidden.expect("a gradient"), &expected, 1e-5);
}
