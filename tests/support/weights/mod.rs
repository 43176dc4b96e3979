//! Frozen matrices of random codes in every format, and the numbers they stand for by a reading of the layout of its own.

use half::f16;
use sflllm::compute::Buffer;
use sflllm::kernels::weight::Weight;
use sflllm::terms::format::Format;

pub const FORMATS: [Format; 4] = [Format::F32, Format::F16, Format::Q8, Format::Q4];

/// A matrix as it is stored and as it is meant.
pub struct Matrix {
    format: Format,
    rows: usize,
    columns: usize,
    pub words: Vec<u32>,
    /// (rows, columns)
    pub values: Vec<f64>,
}

/// Random bits (splitmix64).
struct Bits(u64);

impl Bits {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z >> 32) as u32
    }

    /// A number in [-1, 1).
    fn number(&mut self) -> f32 {
        self.next() as f32 / (1u32 << 31) as f32 - 1.0
    }

    fn half(&mut self, scale: f32) -> f16 {
        f16::from_f32(scale * self.number())
    }
}

fn pairs(halves: &[f16], padding: f16) -> Vec<u32> {
    let word = |pair: &[f16]| {
        let high = pair.get(1).unwrap_or(&padding);
        u32::from(pair[0].to_bits()) | u32::from(high.to_bits()) << 16
    };
    halves.chunks(2).map(word).collect()
}

impl Matrix {
    /// Values in about [-1, 1].
    pub fn random(seed: u64, format: Format, rows: usize, columns: usize) -> Self {
        let mut bits = Bits(seed);
        let mut words = Vec::new();
        let mut values = Vec::new();
        match format {
            Format::F32 => {
                for _ in 0..rows * columns {
                    let value = bits.number();
                    words.push(value.to_bits());
                    values.push(f64::from(value));
                }
            }
            Format::F16 => {
                let halves: Vec<f16> = (0..rows * columns).map(|_| bits.half(1.0)).collect();
                // A kernel that reads the padding shows.
                words = pairs(&halves, f16::NAN);
                values = halves.iter().map(|half| half.to_f64()).collect();
            }
            Format::Q8 => {
                let mut scales = Vec::new();
                for _ in 0..rows {
                    for first in (0..columns).step_by(32) {
                        let scale = bits.half(1.0 / 127.0);
                        scales.push(scale);
                        let mut codes = [0i8; 32];
                        for code in &mut codes[..32.min(columns - first)] {
                            *code = bits.next() as i8;
                            values.push(scale.to_f64() * f64::from(*code));
                        }
                        words.extend(
                            codes
                                .chunks(4)
                                .map(|c| u32::from_le_bytes([0, 1, 2, 3].map(|i| c[i] as u8))),
                        );
                    }
                }
                words.extend(pairs(&scales, f16::NAN));
            }
            Format::Q4 => {
                let mut scales = Vec::new();
                for _ in 0..rows {
                    for first in (0..columns).step_by(32) {
                        let (scale, minimum) = (bits.half(1.0 / 15.0), bits.half(1.0));
                        scales.extend([scale, minimum]);
                        let mut group = [0u32; 4];
                        for i in 0..32.min(columns - first) {
                            let code = bits.next() % 16;
                            group[i / 8] |= code << (4 * (i % 8));
                            let value = scale.to_f64() * f64::from(code) + minimum.to_f64();
                            // What is held is the nearest f32.
                            values.push(f64::from(value as f32));
                        }
                        words.extend(group);
                    }
                }
                words.extend(pairs(&scales, f16::NAN));
            }
        }
        Self {
            format,
            rows,
            columns,
            words,
            values,
        }
    }

    pub fn at(&self, row: usize, column: usize) -> f64 {
        self.values[row * self.columns + column]
    }

    /// All of it as a weight in `buffer`, which holds its words.
    pub fn weight(&self, buffer: &Buffer, transposed: bool) -> Weight {
        Weight {
            buffer: buffer.clone(),
            format: self.format,
            stored_rows: self.rows,
            first_row: 0,
            rows: self.rows,
            columns: self.columns,
            transposed,
        }
    }
}
