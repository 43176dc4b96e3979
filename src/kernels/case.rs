//! Every kernel family at GPT-2-small shapes, on seeded inputs: what `bench` and the criterion benches check against the CPU
//! references and then time.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::compute::{Buffer, Engine, Error, Recording};

use super::{
    adamw, aggregate, attention, cross_entropy, embedding, gelu, layernorm, lora, matmul, quantize, residual, scalar,
};

/// The shapes that cases have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    pub batch: usize,
    pub seq: usize,
    pub width: usize,
    pub heads: usize,
    pub vocab: usize,
    pub rank: usize,
    /// Adapted blocks of the optimiser's and the aggregation's vectors.
    pub blocks: usize,
    /// Clients of the aggregation.
    pub clients: usize,
}

impl Sizes {
    /// GPT-2 small, batch 4, 128 tokens, rank 8.
    pub const GPT2_SMALL: Self = Self {
        batch: 4,
        seq: 128,
        width: 768,
        heads: 12,
        vocab: 50_257,
        rank: 8,
        blocks: 12,
        clients: 8,
    };

    fn rows(&self) -> usize {
        self.batch * self.seq
    }

    fn adapter_length(&self) -> usize {
        self.blocks * self.rank * 4 * self.width
    }
}

/// One thing to check and time on an engine: its buffers are filled, [`Case::record`] adds the launches.
pub struct Case {
    record: Box<dyn Fn(&mut Recording)>,
    /// What the launches write, in words that are compared; integers when `exact`.
    outputs: Vec<(Buffer, usize)>,
    exact: bool,
}

impl Case {
    pub fn record(&self, recording: &mut Recording) {
        (self.record)(recording);
    }

    /// What the launches wrote.
    pub async fn download(&self, engine: &Engine) -> Result<Vec<u32>, Error> {
        let mut words = Vec::new();
        for (buffer, length) in &self.outputs {
            words.extend(engine.download::<u32>(buffer, 0, *length).await?);
        }
        Ok(words)
    }

    /// The largest difference of two downloads, over the largest expected magnitude. Packed integers differ by how many of
    /// their words differ, over the number of words.
    pub fn difference(&self, found: &[u32], expected: &[u32]) -> f64 {
        if self.exact {
            let differing = found.iter().zip(expected).filter(|(a, b)| a != b).count();
            return differing as f64 / expected.len().max(1) as f64;
        }
        let value = |word: &u32| f64::from(f32::from_bits(*word));
        let scale = expected.iter().map(|w| value(w).abs()).fold(1e-30, f64::max);
        found
            .iter()
            .zip(expected)
            .map(|(a, b)| {
                let difference = (value(a) - value(b)).abs();
                if difference.is_nan() { f64::INFINITY } else { difference }
            })
            .fold(0.0, f64::max)
            / scale
    }
}

struct Builder<'a> {
    engine: &'a Engine,
    rng: ChaCha8Rng,
}

impl Builder<'_> {
    fn values(&mut self, words: usize, scale: f32) -> Vec<f32> {
        (0..words)
            .map(|_| scale * (2.0 * self.rng.random::<f32>() - 1.0))
            .collect()
    }

    fn random(&mut self, name: &str, words: usize) -> Result<Buffer, Error> {
        let values = self.values(words, 1.0);
        self.engine.buffer_from(name, &values)
    }

    /// f16 weights of `elements` values, small as in a network.
    fn weights(&mut self, name: &str, elements: usize) -> Result<Buffer, Error> {
        let mut half = || u32::from(half::f16::from_f32(0.1 * (2.0 * self.rng.random::<f32>() - 1.0)).to_bits());
        let words: Vec<u32> = (0..elements.div_ceil(2)).map(|_| half() | half() << 16).collect();
        self.engine.buffer_from(name, &words)
    }

    fn zeros(&mut self, name: &str, words: usize) -> Result<Buffer, Error> {
        self.engine.buffer(name, words)
    }

    fn below(&mut self, name: &str, count: usize, end: usize) -> Result<Buffer, Error> {
        let values: Vec<u32> = (0..count).map(|_| self.rng.random_range(0..end as u32)).collect();
        self.engine.buffer_from(name, &values)
    }

    fn scalars(&mut self) -> Result<Buffer, Error> {
        let mut values = [0.0f32; scalar::COUNT];
        values[scalar::WEIGHT] = 1.0;
        values[scalar::FACTOR] = 1.0 / 512.0;
        for (index, value) in [
            (scalar::LR, 1e-3),
            (scalar::BIAS1, 0.1),
            (scalar::BIAS2, 1e-3),
            (scalar::WEIGHT_DECAY, 0.01),
            (scalar::CLIP, 1.0),
            (scalar::GRAD_SCALE, 1.0),
            (scalar::BETA1, 0.9),
            (scalar::BETA2, 0.999),
            (scalar::EPSILON, 1e-8),
        ] {
            values[index] = value;
        }
        self.engine.buffer_from("scalars", &values)
    }
}

fn case(outputs: &[(&Buffer, usize)], exact: bool, record: impl Fn(&mut Recording) + 'static) -> Case {
    Case {
        record: Box::new(record),
        outputs: outputs.iter().map(|(b, n)| ((*b).clone(), *n)).collect(),
        exact,
    }
}

type Build = fn(&mut Builder<'_>, Sizes) -> Result<Case, Error>;

/// A case by name; [`Spec::build`] makes it on an engine, with the same inputs on every engine.
#[derive(Clone, Copy)]
pub struct Spec {
    /// `<kernel>` and what distinguishes this use of it.
    pub name: &'static str,
    /// The sizes that matter, for the id.
    pub shape: fn(Sizes) -> String,
    build: Build,
}

impl Spec {
    /// `kernels/<name>/<shape>`.
    pub fn id(&self, sizes: Sizes) -> String {
        format!("kernels/{}/{}", self.name, (self.shape)(sizes))
    }

    /// Buffers and launches on `engine`.
    pub fn build(&self, engine: &Engine, sizes: Sizes) -> Result<Case, Error> {
        let mut builder = Builder {
            engine,
            rng: ChaCha8Rng::seed_from_u64(7),
        };
        (self.build)(&mut builder, sizes)
    }
}

fn rows_width(s: Sizes) -> String {
    format!("{}x{}", s.rows(), s.width)
}

fn product(b: &mut Builder<'_>, (m, k, n): (usize, usize, usize), options: Options) -> Result<Case, Error> {
    let x = b.random("x", m * k)?;
    let w = b.weights("w", k * n)?;
    let bias = b.random("bias", n)?;
    let residual = b.random("residual", m * n)?;
    let rank = options.rank;
    let u = b.random("u", (m * rank).max(1))?;
    let adapter = b.random("adapter", (n * rank).max(1))?;
    let pre = b.zeros("pre", m * n)?;
    let out = b.zeros("out", m * n)?;
    let outputs: &[(&Buffer, usize)] = if options.gelu {
        &[(&out, m * n), (&pre, m * n)]
    } else {
        &[(&out, m * n)]
    };
    Ok(case(outputs, false, {
        let (out, pre) = (out.clone(), pre.clone());
        move |recording| {
            matmul::forward(
                recording,
                matmul::Shape::new(m, n, k),
                true,
                &x,
                &w,
                &out,
                matmul::Epilogue {
                    bias: Some(&bias),
                    residual: options.residual.then_some(&residual),
                    gelu_pre: options.gelu.then_some(&pre),
                    lora: (rank > 0).then_some(matmul::Lora {
                        u: &u,
                        adapter: &adapter,
                        offset: 0,
                        rank: rank as u32,
                        scale: 0.5,
                    }),
                    ..Default::default()
                },
            );
        }
    }))
}

#[derive(Clone, Copy, Default)]
struct Options {
    gelu: bool,
    residual: bool,
    rank: usize,
}

fn product_back(b: &mut Builder<'_>, (m, n, k): (usize, usize, usize), rank: usize) -> Result<Case, Error> {
    let d_y = b.random("d_y", m * n)?;
    let w = b.weights("w", k * n)?;
    let v = b.random("v", (m * rank).max(1))?;
    let adapter = b.random("adapter", (k * rank).max(1))?;
    let d_x = b.zeros("d_x", m * k)?;
    Ok(case(&[(&d_x.clone(), m * k)], false, move |recording| {
        matmul::backward_x(
            recording,
            matmul::Shape::new(m, n, k),
            true,
            &d_y,
            &w,
            &d_x,
            matmul::Epilogue {
                lora: (rank > 0).then_some(matmul::Lora {
                    u: &v,
                    adapter: &adapter,
                    offset: 0,
                    rank: rank as u32,
                    scale: 0.5,
                }),
                ..Default::default()
            },
        );
    }))
}

fn attention_params(s: Sizes) -> attention::Params {
    let head_size = s.width / s.heads;
    attention::Params {
        batch: s.batch as u32,
        seq: s.seq as u32,
        heads: s.heads as u32,
        head_size: head_size as u32,
        scale: 1.0 / (head_size as f32).sqrt(),
    }
}

/// Every case.
pub fn all() -> &'static [Spec] {
    &[
        Spec {
            name: "embedding.forward",
            shape: rows_width,
            build: |b, s| {
                let tokens = b.below("tokens", s.rows(), s.vocab)?;
                let wte = b.weights("wte", s.vocab * s.width)?;
                let wpe = b.weights("wpe", s.seq * s.width)?;
                let out = b.zeros("out", s.rows() * s.width)?;
                Ok(case(&[(&out.clone(), s.rows() * s.width)], false, move |recording| {
                    embedding::forward(
                        recording,
                        embedding::ForwardParams {
                            rows: s.rows() as u32,
                            seq: s.seq as u32,
                            width: s.width as u32,
                            vocab_start: 0,
                            vocab_end: s.vocab as u32,
                            f16: 1,
                        },
                        &tokens,
                        &wte,
                        &wpe,
                        &out,
                    );
                }))
            },
        },
        Spec {
            name: "layernorm.forward",
            shape: rows_width,
            build: |b, s| {
                let x = b.random("x", s.rows() * s.width)?;
                let gamma = b.random("gamma", s.width)?;
                let beta = b.random("beta", s.width)?;
                let out = b.zeros("out", s.rows() * s.width)?;
                let stats = b.zeros("stats", s.rows() * 2)?;
                Ok(case(&[(&out.clone(), s.rows() * s.width)], false, move |recording| {
                    layernorm::forward(
                        recording,
                        layernorm::ForwardParams {
                            rows: s.rows() as u32,
                            width: s.width as u32,
                            epsilon: 1e-5,
                        },
                        &x,
                        (&gamma, &beta),
                        &out,
                        &stats,
                    );
                }))
            },
        },
        Spec {
            name: "layernorm.backward_x",
            shape: rows_width,
            build: |b, s| {
                let d_out = b.random("d_out", s.rows() * s.width)?;
                let x = b.random("x", s.rows() * s.width)?;
                let gamma = b.random("gamma", s.width)?;
                let stats = b.random("stats", s.rows() * 2)?;
                let d_x = b.zeros("d_x", s.rows() * s.width)?;
                Ok(case(&[(&d_x.clone(), s.rows() * s.width)], false, move |recording| {
                    layernorm::backward_x(
                        recording,
                        layernorm::BackwardParams {
                            rows: s.rows() as u32,
                            width: s.width as u32,
                            accumulate: 0,
                        },
                        &d_out,
                        (&x, &gamma, &stats),
                        &d_x,
                    );
                }))
            },
        },
        Spec {
            name: "matmul.forward",
            shape: |s| format!("{}x{}x{}", s.rows(), s.width, 3 * s.width),
            build: |b, s| product(b, (s.rows(), s.width, 3 * s.width), Options::default()),
        },
        Spec {
            name: "matmul.forward+lora",
            shape: |s| format!("{}x{}x{}r{}", s.rows(), s.width, 3 * s.width, s.rank),
            build: |b, s| {
                let options = Options {
                    rank: s.rank,
                    ..Default::default()
                };
                product(b, (s.rows(), s.width, 3 * s.width), options)
            },
        },
        Spec {
            name: "matmul.forward+gelu",
            shape: |s| format!("{}x{}x{}", s.rows(), s.width, 4 * s.width),
            build: |b, s| {
                let options = Options {
                    gelu: true,
                    ..Default::default()
                };
                product(b, (s.rows(), s.width, 4 * s.width), options)
            },
        },
        Spec {
            name: "matmul.forward+residual",
            shape: |s| format!("{}x{}x{}", s.rows(), 4 * s.width, s.width),
            build: |b, s| {
                let options = Options {
                    residual: true,
                    ..Default::default()
                };
                product(b, (s.rows(), 4 * s.width, s.width), options)
            },
        },
        Spec {
            name: "matmul.backward_x",
            shape: |s| format!("{}x{}x{}", s.rows(), 4 * s.width, s.width),
            build: |b, s| product_back(b, (s.rows(), 4 * s.width, s.width), 0),
        },
        Spec {
            name: "matmul.backward_x+lora",
            shape: |s| format!("{}x{}x{}r{}", s.rows(), 3 * s.width, s.width, s.rank),
            build: |b, s| product_back(b, (s.rows(), 3 * s.width, s.width), s.rank),
        },
        Spec {
            name: "matmul.backward_w",
            shape: |s| format!("{}x{}x{}", s.rows(), s.width, s.width),
            build: |b, s| {
                let x = b.random("x", s.rows() * s.width)?;
                let d_y = b.random("d_y", s.rows() * s.width)?;
                let d_w = b.zeros("d_w", s.width * s.width)?;
                Ok(case(&[(&d_w.clone(), s.width * s.width)], false, move |recording| {
                    let shape = matmul::Shape::new(s.rows(), s.width, s.width);
                    matmul::backward_w(recording, shape, &x, &d_y, &d_w, 1.0);
                }))
            },
        },
        Spec {
            name: "lora.forward_down",
            shape: |s| format!("{}x{}r{}", s.rows(), s.width, s.rank),
            build: |b, s| {
                let x = b.random("x", s.rows() * s.width)?;
                let adapter = b.random("adapter", s.rank * s.width)?;
                let u = b.zeros("u", s.rows() * s.rank)?;
                Ok(case(&[(&u.clone(), s.rows() * s.rank)], false, move |recording| {
                    lora::forward_down(
                        recording,
                        lora::ForwardDownParams {
                            rows: s.rows() as u32,
                            inputs: s.width as u32,
                            rank: s.rank as u32,
                            offset: 0,
                        },
                        &x,
                        &adapter,
                        &u,
                    );
                }))
            },
        },
        Spec {
            name: "lora.backward_up",
            shape: |s| format!("{}x{}r{}", s.rows(), 3 * s.width, s.rank),
            build: |b, s| {
                let d_y = b.random("d_y", s.rows() * 3 * s.width)?;
                let adapter = b.random("adapter", s.rank * 3 * s.width)?;
                let v = b.zeros("v", s.rows() * s.rank)?;
                Ok(case(&[(&v.clone(), s.rows() * s.rank)], false, move |recording| {
                    lora::backward_up(
                        recording,
                        lora::BackwardUpParams {
                            rows: s.rows() as u32,
                            outputs: 3 * s.width as u32,
                            rank: s.rank as u32,
                            offset: 0,
                        },
                        &d_y,
                        &adapter,
                        &v,
                    );
                }))
            },
        },
        Spec {
            name: "lora.backward_b",
            shape: |s| format!("{}x{}r{}", s.rows(), 3 * s.width, s.rank),
            build: |b, s| {
                let columns = 3 * s.width;
                let d_y = b.random("d_y", s.rows() * columns)?;
                let u = b.random("u", s.rows() * s.rank)?;
                let scalars = b.scalars()?;
                let partial = b.zeros("partial", lora::partial_words(s.rows(), columns, s.rank))?;
                let gradient = b.zeros("gradient", columns * s.rank)?;
                Ok(case(
                    &[(&gradient.clone(), columns * s.rank)],
                    false,
                    move |recording| {
                        recording.clear(&gradient);
                        lora::backward_b(
                            recording,
                            lora::BackwardBParams {
                                rows: s.rows() as u32,
                                outputs: columns as u32,
                                rank: s.rank as u32,
                                offset: 0,
                                scale: 2.0,
                            },
                            &d_y,
                            &u,
                            &scalars,
                            &partial,
                            &gradient,
                        );
                    },
                ))
            },
        },
        Spec {
            name: "lora.backward_a",
            shape: |s| format!("{}x{}r{}", s.rows(), s.width, s.rank),
            build: |b, s| {
                let x = b.random("x", s.rows() * s.width)?;
                let v = b.random("v", s.rows() * s.rank)?;
                let scalars = b.scalars()?;
                let partial = b.zeros("partial", lora::partial_words(s.rows(), s.width, s.rank))?;
                let gradient = b.zeros("gradient", s.width * s.rank)?;
                Ok(case(
                    &[(&gradient.clone(), s.width * s.rank)],
                    false,
                    move |recording| {
                        recording.clear(&gradient);
                        lora::backward_a(
                            recording,
                            lora::BackwardAParams {
                                rows: s.rows() as u32,
                                inputs: s.width as u32,
                                rank: s.rank as u32,
                                offset: 0,
                                scale: 2.0,
                            },
                            &v,
                            &x,
                            &scalars,
                            &partial,
                            &gradient,
                        );
                    },
                ))
            },
        },
        Spec {
            name: "attention.forward",
            shape: |s| format!("{}x{}x{}x{}", s.batch, s.seq, s.heads, s.width / s.heads),
            build: |b, s| {
                let qkv = b.random("qkv", s.rows() * 3 * s.width)?;
                let out = b.zeros("out", s.rows() * s.width)?;
                let lse = b.zeros("lse", s.rows() * s.heads)?;
                let outputs = [(&out.clone(), s.rows() * s.width)];
                Ok(case(&outputs, false, move |recording| {
                    attention::forward(recording, attention_params(s), &qkv, &out, &lse);
                }))
            },
        },
        Spec {
            name: "attention.backward",
            shape: |s| format!("{}x{}x{}x{}", s.batch, s.seq, s.heads, s.width / s.heads),
            build: |b, s| {
                let qkv = b.random("qkv", s.rows() * 3 * s.width)?;
                let d_out = b.random("d_out", s.rows() * s.width)?;
                let out = b.zeros("out", s.rows() * s.width)?;
                let lse = b.zeros("lse", s.rows() * s.heads)?;
                let dot = b.zeros("dot", s.rows() * s.heads)?;
                let d_qkv = b.zeros("d_qkv", s.rows() * 3 * s.width)?;
                let mut before = b.engine.recording();
                attention::forward(&mut before, attention_params(s), &qkv, &out, &lse);
                b.engine.run(&b.engine.prepare(before))?;
                let outputs = [(&d_qkv.clone(), s.rows() * 3 * s.width)];
                Ok(case(&outputs, false, move |recording| {
                    attention::backward(recording, attention_params(s), (&qkv, &out, &lse), &d_out, &dot, &d_qkv);
                }))
            },
        },
        Spec {
            name: "gelu.forward",
            shape: |s| format!("{}x{}", s.rows(), 4 * s.width),
            build: |b, s| {
                let n = s.rows() * 4 * s.width;
                let x = b.random("x", n)?;
                let out = b.zeros("out", n)?;
                Ok(case(&[(&out.clone(), n)], false, move |recording| {
                    gelu::forward(recording, n, &x, &out);
                }))
            },
        },
        Spec {
            name: "gelu.backward_x",
            shape: |s| format!("{}x{}", s.rows(), 4 * s.width),
            build: |b, s| {
                let n = s.rows() * 4 * s.width;
                let x = b.random("x", n)?;
                let d_out = b.random("d_out", n)?;
                let d_x = b.zeros("d_x", n)?;
                Ok(case(&[(&d_x.clone(), n)], false, move |recording| {
                    gelu::backward_x(recording, n, &x, &d_out, &d_x);
                }))
            },
        },
        Spec {
            name: "residual.accumulate",
            shape: rows_width,
            build: |b, s| {
                let n = s.rows() * s.width;
                let x = b.random("x", n)?;
                let out = b.random("out", n)?;
                Ok(case(&[(&out.clone(), n)], false, move |recording| {
                    residual::accumulate(recording, n, &x, &out);
                }))
            },
        },
        Spec {
            name: "cross_entropy",
            shape: |s| format!("{}x{}x{}", s.rows(), s.width, s.vocab),
            build: |b, s| {
                let tile = 2048.min(s.vocab);
                let hidden = b.random("hidden", s.rows() * s.width)?;
                let wte = b.weights("wte", s.vocab * s.width)?;
                let targets = b.below("targets", s.rows(), s.vocab)?;
                let scalars = b.scalars()?;
                let logits = b.zeros("logits", s.rows() * tile)?;
                let state = b.zeros("state", s.rows() * cross_entropy::STATE_WORDS)?;
                let row_scale = b.zeros("row_scale", s.rows())?;
                let loss = b.zeros("loss", s.rows())?;
                let d_hidden = b.zeros("d_hidden", s.rows() * s.width)?;
                let outputs = [(&d_hidden.clone(), s.rows() * s.width)];
                Ok(case(&outputs, false, move |recording| {
                    cross_entropy::record(
                        recording,
                        &cross_entropy::Head {
                            rows: s.rows(),
                            width: s.width,
                            tile,
                            f16: true,
                            hidden: &hidden,
                            chunks: &[(wte.clone(), 0, s.vocab as u32)],
                            targets: &targets,
                            scalars: &scalars,
                            scratch: cross_entropy::Scratch {
                                logits: &logits,
                                state: &state,
                                row_scale: &row_scale,
                            },
                            loss: &loss,
                            d_hidden: Some(&d_hidden),
                        },
                    );
                }))
            },
        },
        Spec {
            name: "adamw.update",
            shape: |s| s.adapter_length().to_string(),
            build: |b, s| {
                let n = s.adapter_length();
                let gradient = b.random("gradient", n)?;
                let scalars = b.scalars()?;
                let partial = b.zeros("partial", adamw::partial_words(n))?;
                let adapter = b.random("adapter", n)?;
                let first = b.zeros("moment1", n)?;
                let second = b.zeros("moment2", n)?;
                Ok(case(&[(&adapter.clone(), n)], false, move |recording| {
                    adamw::norm(recording, n, &gradient, &partial, &scalars);
                    let state = (&adapter, &first, &second);
                    adamw::update(recording, n, &gradient, &scalars, state);
                }))
            },
        },
        Spec {
            name: "aggregate.mean",
            shape: |s| format!("{}x{}", s.clients, s.adapter_length()),
            build: |b, s| {
                let n = s.adapter_length();
                let stacked = b.random("stacked", s.clients * n)?;
                let values: Vec<f32> = (0..s.clients).map(|k| 1.0 + k as f32).collect();
                let weights = b.engine.buffer_from("weights", &values)?;
                let out = b.zeros("out", n)?;
                Ok(case(&[(&out.clone(), n)], false, move |recording| {
                    let params = aggregate::Params {
                        n: n as u32,
                        clients: s.clients as u32,
                    };
                    aggregate::mean(recording, params, &stacked, &weights, &out);
                }))
            },
        },
        Spec {
            name: "quantize.forward_f16",
            shape: rows_width,
            build: |b, s| {
                let x = b.random("x", s.rows() * s.width)?;
                let words = quantize::f16_words(s.rows(), s.width);
                let packed = b.zeros("packed", words)?;
                Ok(case(&[(&packed.clone(), words)], true, move |recording| {
                    quantize::forward_f16(recording, quantize_params(s), &x, &packed);
                }))
            },
        },
        Spec {
            name: "quantize.inverse_f16",
            shape: rows_width,
            build: |b, s| {
                let packed = b.weights("packed", s.rows() * s.width)?;
                let out = b.zeros("out", s.rows() * s.width)?;
                Ok(case(&[(&out.clone(), s.rows() * s.width)], false, move |recording| {
                    quantize::inverse_f16(recording, quantize_params(s), &packed, &out);
                }))
            },
        },
        Spec {
            name: "quantize.forward_int8",
            shape: rows_width,
            build: |b, s| {
                let x = b.random("x", s.rows() * s.width)?;
                let words = quantize::int8_words(s.rows(), s.width);
                let packed = b.zeros("packed", words)?;
                let scales = b.zeros("scales", s.rows())?;
                Ok(case(&[(&packed.clone(), words)], true, move |recording| {
                    quantize::forward_int8(recording, quantize_params(s), &x, &packed, &scales);
                }))
            },
        },
        Spec {
            name: "quantize.inverse_int8",
            shape: rows_width,
            build: |b, s| {
                let packed = b.below("packed", quantize::int8_words(s.rows(), s.width), 1 << 30)?;
                let scales = b.random("scales", s.rows())?;
                let out = b.zeros("out", s.rows() * s.width)?;
                Ok(case(&[(&out.clone(), s.rows() * s.width)], false, move |recording| {
                    quantize::inverse_int8(recording, quantize_params(s), &packed, &scales, &out);
                }))
            },
        },
    ]
}

fn quantize_params(s: Sizes) -> quantize::Params {
    quantize::Params {
        rows: s.rows() as u32,
        width: s.width as u32,
    }
}
