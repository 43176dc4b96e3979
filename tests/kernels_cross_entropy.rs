//! The fused head: loss and gradient of both engines and every tiling against a plain `f64` softmax, and that gradient against
//! finite differences.

use half::f16;
use sflllm::compute::{Buffer, DeviceClass, Engine, Recording};
use sflllm::kernels::cross_entropy::{self, Head, STATE_WORDS, Scratch};
use sflllm::kernels::scalar;

/// Words after the end of every operand, filled with NaN: a kernel must neither read nor write them.
const TAIL: usize = 37;

/// What Hugging Face puts where there is no target.
const IGNORED: i32 = -100;

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

/// One head's numbers. `wte` holds values that halves represent exactly.
struct Case {
    rows: usize,
    width: usize,
    vocab: usize,
    hidden: Vec<f32>,
    wte: Vec<f32>,
    targets: Vec<i32>,
    factor: f32,
}

impl Case {
    /// Every third row has no target.
    fn new(rows: usize, width: usize, vocab: usize, scale: f32) -> Self {
        let hidden = numbers(1, rows * width).iter().map(|x| x * scale).collect();
        let wte = numbers(2, vocab * width)
            .iter()
            .map(|&x| f16::from_f32(x).to_f32())
            .collect();
        let targets = (0..rows)
            .map(|row| {
                if row % 3 == 1 {
                    IGNORED
                } else {
                    (row * 7919 % vocab) as i32
                }
            })
            .collect();
        Self {
            rows,
            width,
            vocab,
            hidden,
            wte,
            targets,
            factor: 0.125,
        }
    }

    /// The loss of every row.
    fn losses(&self, hidden: &[f64]) -> Vec<f64> {
        (0..self.rows)
            .map(|row| match usize::try_from(self.targets[row]) {
                Err(_) => 0.0,
                Ok(target) => {
                    let logits = self.logits(&hidden[row * self.width..][..self.width]);
                    let max = logits.iter().fold(f64::MIN, |max, &logit| max.max(logit));
                    let sum: f64 = logits.iter().map(|logit| (logit - max).exp()).sum();
                    sum.ln() + max - logits[target]
                }
            })
            .collect()
    }

    fn logits(&self, hidden: &[f64]) -> Vec<f64> {
        self.wte
            .chunks_exact(self.width)
            .map(|embedding| embedding.iter().zip(hidden).map(|(&e, h)| f64::from(e) * h).sum())
            .collect()
    }

    /// The gradient of `factor · Σ losses`.
    fn gradient(&self, hidden: &[f64]) -> Vec<f64> {
        let mut gradient = vec![0.0; self.rows * self.width];
        for (row, gradient) in gradient.chunks_exact_mut(self.width).enumerate() {
            let Ok(target) = usize::try_from(self.targets[row]) else {
                continue;
            };
            let logits = self.logits(&hidden[row * self.width..][..self.width]);
            let max = logits.iter().fold(f64::MIN, |max, &logit| max.max(logit));
            let sum: f64 = logits.iter().map(|logit| (logit - max).exp()).sum();
            for (token, embedding) in self.wte.chunks_exact(self.width).enumerate() {
                let probability = (logits[token] - max).exp() / sum;
                let d_logit = probability - f64::from(u8::from(token == target));
                for (gradient, &embedding) in gradient.iter_mut().zip(embedding) {
                    *gradient += f64::from(self.factor) * d_logit * f64::from(embedding);
                }
            }
        }
        gradient
    }

    /// Runs the head with `wte` cut at `cuts` and returns losses and, if wanted, the gradient.
    fn run(
        &self,
        (engine, class): &(Engine, DeviceClass),
        cuts: &[usize],
        tile: usize,
        halves: bool,
        backward: bool,
    ) -> (Vec<f32>, Option<Vec<f32>>) {
        let (rows, width) = (self.rows, self.width);
        let ends = cuts.iter().copied().chain([self.vocab]);
        let starts = [0].into_iter().chain(cuts.iter().copied());
        let chunks: Vec<(Buffer, u32, u32)> = starts
            .zip(ends)
            .map(|(start, end)| {
                let values = &self.wte[start * width..end * width];
                let words: Vec<u32> = if halves {
                    let bits = |value: &f32| u32::from(f16::from_f32(*value).to_bits());
                    values
                        .chunks(2)
                        .map(|pair| bits(&pair[0]) | pair.get(1).map_or(0x7e00, bits) << 16)
                        .collect()
                } else {
                    values.iter().map(|value| value.to_bits()).collect()
                };
                (padded(engine, "wte", &words), start as u32, end as u32)
            })
            .collect();
        let mut scalars = vec![f32::NAN; scalar::COUNT];
        scalars[scalar::FACTOR] = self.factor;
        let poison = |name: &str, count: usize| padded(engine, name, &vec![f32::NAN; count]);
        let hidden = padded(engine, "hidden", &self.hidden);
        let mut targets = self.targets.clone();
        targets.resize(rows + TAIL, i32::MAX);
        let targets = engine.buffer_from("targets", &targets).expect("a small buffer");
        let scalars = padded(engine, "scalars", &scalars);
        let logits = poison("logits", rows * tile);
        let state = poison("state", rows * STATE_WORDS);
        let row_scale = poison("row_scale", rows);
        let loss = poison("loss", rows);
        let d_hidden = poison("d_hidden", rows * width);
        let mut recording = Recording::new(*class);
        let head = Head {
            rows,
            width,
            tile,
            f16: halves,
            hidden: &hidden,
            chunks: &chunks,
            targets: &targets,
            scalars: &scalars,
            scratch: Scratch {
                logits: &logits,
                state: &state,
                row_scale: &row_scale,
            },
            loss: &loss,
            d_hidden: backward.then_some(&d_hidden),
        };
        cross_entropy::record(&mut recording, &head);
        engine.run(&engine.prepare(recording)).expect("run");
        for (buffer, count) in [(&logits, rows * tile), (&state, rows * STATE_WORDS), (&row_scale, rows)] {
            read(engine, buffer, count);
        }
        let d_hidden = read(engine, &d_hidden, rows * width);
        if !backward {
            assert!(d_hidden.iter().all(|d| d.is_nan()), "evaluation wrote a gradient");
        }
        (read(engine, &loss, rows), backward.then_some(d_hidden))
    }
}

fn padded<T: bytemuck::NoUninit>(engine: &Engine, name: &str, values: &[T]) -> Buffer {
    let mut words: Vec<u32> = bytemuck::cast_slice(values).to_vec();
    words.resize(words.len() + TAIL, f32::NAN.to_bits());
    engine.buffer_from(name, &words).expect("a small buffer")
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

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| value.into()).collect()
}

#[test]
fn loss_and_gradient_equal_f64_for_every_tile_and_chunk() {
    let shapes = [(1, 1, 1), (7, 5, 2), (45, 70, 301), (65, 64, 257), (9, 33, 130)];
    for target in &targets() {
        for (rows, width, vocab) in shapes {
            let case = Case::new(rows, width, vocab, 2.0);
            let losses = case.losses(&wide(&case.hidden));
            let gradient = case.gradient(&wide(&case.hidden));
            let chunkings: [&[usize]; 3] = [&[], &[vocab / 2], &[vocab / 3, vocab - 1]];
            for cuts in chunkings.into_iter().filter(|cuts| vocab > 3 || cuts.is_empty()) {
                for tile in [64, 63, 1000, 130] {
                    for halves in [true, false] {
                        let what = format!(
                            "{:?}, {rows}x{width}, vocab {vocab}, cuts {cuts:?}, tile {tile}, f16 {halves}",
                            target.1
                        );
                        let (loss, d_hidden) = case.run(target, cuts, tile, halves, true);
                        assert_close(&loss, &losses, 1e-5, &what);
                        assert_close(&d_hidden.expect("a gradient"), &gradient, 1e-5, &what);
                    }
                }
            }
        }
    }
}

#[test]
fn evaluation_gives_the_same_loss_and_no_gradient() {
    for target in &targets() {
        let case = Case::new(45, 70, 301, 2.0);
        let (loss, _) = case.run(target, &[100], 64, true, false);
        assert_close(
            &loss,
            &case.losses(&wide(&case.hidden)),
            1e-5,
            &format!("{:?}", target.1),
        );
    }
}

#[test]
fn rows_without_a_target_are_exactly_zero() {
    for target in &targets() {
        let mut case = Case::new(12, 70, 301, 2.0);
        let (loss, d_hidden) = case.run(target, &[100], 64, true, true);
        let d_hidden = d_hidden.expect("a gradient");
        for row in (0..case.rows).filter(|&row| case.targets[row] == IGNORED) {
            assert_eq!(loss[row].to_bits(), 0);
            assert!(d_hidden[row * 70..][..70].iter().all(|d| *d == 0.0));
        }
        case.targets.fill(IGNORED);
        let (loss, d_hidden) = case.run(target, &[100], 64, true, true);
        assert!(
            loss.iter()
                .chain(&d_hidden.expect("a gradient"))
                .all(|value| *value == 0.0)
        );
    }
}

#[test]
fn logits_in_the_thousands_do_not_overflow() {
    for target in &targets() {
        let case = Case::new(9, 70, 301, 500.0);
        let expected = case.losses(&wide(&case.hidden));
        assert!(expected.iter().any(|loss| *loss > 1000.0), "the case must be extreme");
        let (loss, d_hidden) = case.run(target, &[100], 64, true, true);
        let what = format!("{:?}", target.1);
        assert_close(&loss, &expected, 1e-5, &what);
        let gradient = case.gradient(&wide(&case.hidden));
        assert_close(&d_hidden.expect("a gradient"), &gradient, 1e-3, &what);
    }
}

#[test]
fn gradient_equals_finite_differences() {
    let case = Case::new(5, 6, 23, 1.5);
    let hidden = wide(&case.hidden);
    let step = 1e-4;
    let total = |hidden: &[f64]| f64::from(case.factor) * case.losses(hidden).iter().sum::<f64>();
    let expected: Vec<f64> = (0..hidden.len())
        .map(|i| {
            let mut moved = hidden.clone();
            moved[i] += step;
            let above = total(&moved);
            moved[i] -= 2.0 * step;
            (above - total(&moved)) / (2.0 * step)
        })
        .collect();
    for target in &targets() {
        let (_, d_hidden) = case.run(target, &[9], 4, false, true);
        assert_close(
            &d_hidden.expect("a gradient"),
            &expected,
            1e-5,
            &format!("{:?}", target.1),
        );
    }
}
