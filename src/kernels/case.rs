//! What an example of a kernel family is: launches on seeded inputs at the sizes of a model, which `bench` and the criterion
//! benches check against the specification and then time. Each family has its own beside its contracts.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::compute::{Buffer, Engine, Error, Recording};
use crate::terms::format::Format;

use super::scalar;
use super::weight::Weight;

/// The shapes that cases have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    pub batch: usize,
    pub seq: usize,
    pub width: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_size: usize,
    pub ffn: usize,
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
        kv_heads: 12,
        head_size: 64,
        ffn: 3072,
        vocab: 50_257,
        rank: 8,
        blocks: 12,
        clients: 8,
    };

    pub(super) fn rows(&self) -> usize {
        self.batch * self.seq
    }

    pub(super) fn adapter_length(&self) -> usize {
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
    /// Adds the kernel, once, to a recording of the engine it was built on.
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

pub(super) struct Builder<'a> {
    pub(super) engine: &'a Engine,
    rng: ChaCha8Rng,
}

impl Builder<'_> {
    pub(super) fn values(&mut self, words: usize, scale: f32) -> Vec<f32> {
        (0..words)
            .map(|_| scale * (2.0 * self.rng.random::<f32>() - 1.0))
            .collect()
    }

    pub(super) fn random(&mut self, name: &str, words: usize) -> Result<Buffer, Error> {
        let values = self.values(words, 1.0);
        self.engine.buffer_from(name, &values)
    }

    /// f16 weights of `elements` values, small as in a network.
    pub(super) fn weights(&mut self, name: &str, elements: usize) -> Result<Buffer, Error> {
        let mut half = || u32::from(half::f16::from_f32(0.1 * (2.0 * self.rng.random::<f32>() - 1.0)).to_bits());
        let words: Vec<u32> = (0..elements.div_ceil(2)).map(|_| half() | half() << 16).collect();
        self.engine.buffer_from(name, &words)
    }

    /// An f16 matrix of `rows` rows.
    pub(super) fn weight(
        &mut self,
        name: &str,
        rows: usize,
        columns: usize,
        transposed: bool,
    ) -> Result<Weight, Error> {
        Ok(Weight {
            buffer: self.weights(name, rows * columns)?,
            format: Format::F16,
            stored_rows: rows,
            first_row: 0,
            rows,
            columns,
            transposed,
        })
    }

    /// A matrix of `rows` rows in any format, of random codes and small scales.
    pub(super) fn weight_in(
        &mut self,
        name: &str,
        format: Format,
        (rows, columns): (usize, usize),
        transposed: bool,
    ) -> Result<Weight, Error> {
        if format == Format::F16 {
            return self.weight(name, rows, columns, transposed);
        }
        let layout = format.layout(rows, columns);
        let codes = layout.scales_at();
        let small = |rng: &mut ChaCha8Rng| 0.1 * (2.0 * rng.random::<f32>() - 1.0);
        let words: Vec<u32> = (0..layout.words())
            .map(|i| match format {
                Format::F32 => small(&mut self.rng).to_bits(),
                _ if i < codes => self.rng.random(),
                _ => {
                    let mut half = || u32::from(half::f16::from_f32(0.1 * small(&mut self.rng)).to_bits());
                    half() | half() << 16
                }
            })
            .collect();
        Ok(Weight {
            buffer: self.engine.buffer_from(name, &words)?,
            format,
            stored_rows: rows,
            first_row: 0,
            rows,
            columns,
            transposed,
        })
    }

    pub(super) fn zeros(&mut self, name: &str, words: usize) -> Result<Buffer, Error> {
        self.engine.buffer(name, words)
    }

    pub(super) fn below(&mut self, name: &str, count: usize, end: usize) -> Result<Buffer, Error> {
        let values: Vec<u32> = (0..count).map(|_| self.rng.random_range(0..end as u32)).collect();
        self.engine.buffer_from(name, &values)
    }

    pub(super) fn scalars(&mut self) -> Result<Buffer, Error> {
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

pub(super) fn case(outputs: &[(&Buffer, usize)], exact: bool, record: impl Fn(&mut Recording) + 'static) -> Case {
    Case {
        record: Box::new(record),
        outputs: outputs.iter().map(|(b, n)| ((*b).clone(), *n)).collect(),
        exact,
    }
}

pub(super) type Build = fn(&mut Builder<'_>, Sizes) -> Result<Case, Error>;

/// A case by name; [`Example::build`] makes it on an engine, with the same inputs on every engine.
#[derive(Clone, Copy)]
pub struct Example {
    /// `<kernel>` and what distinguishes this use of it.
    pub name: &'static str,
    /// The sizes that matter, for the id.
    pub shape: fn(Sizes) -> String,
    pub(super) build: Build,
}

impl Example {
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

pub(super) fn rows_width(s: Sizes) -> String {
    format!("{}x{}", s.rows(), s.width)
}
