//! Frozen weights as the CPU engine reads them: runs of a row of a matrix in any format, decoded to f32. The twin of
//! `shaders/weight.wgsl`; here and not beside the kernels because packed products read through it.

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use super::simd::Instructions;
use crate::terms::format::{Format, GROUP, Q4_CODE_WORDS, Q8_CODE_WORDS};

/// A row-major matrix as it is stored.
#[derive(Clone, Copy)]
pub(crate) struct Stored<'a> {
    pub(crate) words: &'a [u32],
    pub(crate) format: Format,
    /// Values of a row.
    pub(crate) columns: usize,
    /// The word at which the scales of a quantised format begin.
    pub(crate) scales_at: usize,
}

impl Stored<'_> {
    /// One value: the plain reading that specifications use.
    pub(crate) fn at(&self, row: usize, column: usize) -> f32 {
        let half = |bits: u32| f16::from_bits(bits as u16).to_f32();
        let element = row * self.columns + column;
        let index = row * self.columns.div_ceil(GROUP) + column / GROUP;
        let place = column % GROUP;
        match self.format {
            Format::F32 => f32::from_bits(self.words[element]),
            Format::F16 => half(self.words[element / 2] >> (16 * (element % 2))),
            Format::Q8 => {
                let code = (self.words[index * Q8_CODE_WORDS + place / 4] >> (8 * (place % 4))) as u8 as i8;
                half(self.words[self.scales_at + index / 2] >> (16 * (index % 2))) * f32::from(code)
            }
            Format::Q4 => {
                let code = self.words[index * Q4_CODE_WORDS + place / 8] >> (4 * (place % 8)) & 15;
                let scales = self.words[self.scales_at + index];
                half(scales) * code as f32 + half(scales >> 16)
            }
        }
    }

    /// The values of `row` from column `first` on, as many as `out` takes.
    #[inline(always)]
    pub(crate) fn read<I: Instructions>(&self, row: usize, first: usize, out: &mut [f32]) {
        let start = row * self.columns + first;
        match self.format {
            Format::F32 => {
                let values: &[f32] = bytemuck::cast_slice(self.words);
                out.copy_from_slice(&values[start..start + out.len()]);
            }
            Format::F16 => {
                let halves: &[f16] = bytemuck::cast_slice::<u32, u16>(self.words).reinterpret_cast();
                halves[start..start + out.len()].convert_to_f32_slice(out);
            }
            Format::Q8 => self.read_groups::<I, 8>(row, first, out),
            Format::Q4 => self.read_groups::<I, 4>(row, first, out),
        }
    }

    /// The values of a row of a format with codes of `BITS` bits.
    #[inline(always)]
    fn read_groups<I: Instructions, const BITS: usize>(&self, row: usize, first: usize, out: &mut [f32]) {
        let mut index = row * self.columns.div_ceil(GROUP) + first / GROUP;
        let mut rest = out;
        let skipped = first % GROUP;
        if skipped != 0 {
            let (part, after) = rest.split_at_mut(rest.len().min(GROUP - skipped));
            let mut group = [0.0; GROUP];
            self.read_group::<I, BITS>(index, &mut group);
            part.copy_from_slice(&group[skipped..][..part.len()]);
            index += 1;
            rest = after;
        }
        let (whole, part) = rest.as_chunks_mut::<GROUP>();
        for group in whole {
            self.read_group::<I, BITS>(index, group);
            index += 1;
        }
        if !part.is_empty() {
            let mut group = [0.0; GROUP];
            self.read_group::<I, BITS>(index, &mut group);
            part.copy_from_slice(&group[..part.len()]);
        }
    }

    #[inline(always)]
    fn read_group<I: Instructions, const BITS: usize>(&self, index: usize, out: &mut [f32; GROUP]) {
        if BITS == 8 {
            let codes = self.words[index * Q8_CODE_WORDS..].first_chunk().expect("whole groups");
            I::decode_q8(
                codes,
                half(self.words[self.scales_at + index / 2] >> (16 * (index % 2))),
                out,
            );
        } else {
            let codes = self.words[index * Q4_CODE_WORDS..].first_chunk().expect("whole groups");
            let scales = self.words[self.scales_at + index];
            I::decode_q4(codes, half(scales), half(scales >> 16), out);
        }
    }
}

/// The half in the low 16 bits of a word.
#[inline(always)]
fn half(bits: u32) -> f16 {
    f16::from_bits(bits as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compute::host::simd::{Simd, Vectorised};

    struct Run<'a> {
        stored: &'a Stored<'a>,
        row: usize,
        first: usize,
        out: &'a mut [f32],
    }

    impl Vectorised for Run<'_> {
        #[inline(always)]
        fn run<I: Instructions, const ROWS: usize, const COLUMNS: usize>(self) {
            self.stored.read::<I>(self.row, self.first, self.out);
        }
    }

    #[test]
    fn single_values_are_what_the_format_decodes() {
        let (rows, columns) = (3, 77);
        let values: Vec<f32> = (0..rows * columns)
            .map(|i| ((i * 37 % 101) as f32 - 50.0) / 64.0)
            .collect();
        for format in Format::ALL {
            let words = format.encode(&values, rows, columns).expect("moderate values");
            let stored = Stored {
                words: &words,
                format,
                columns,
                scales_at: format.layout(rows, columns).scales_at(),
            };
            let found: Vec<f32> = (0..rows * columns)
                .map(|i| stored.at(i / columns, i % columns))
                .collect();
            assert_eq!(found, format.decode(&words, rows, columns), "{format}");
        }
    }

    #[test]
    fn runs_are_what_single_values_are_at_any_start_and_length() {
        let (rows, columns) = (3, 77);
        for format in Format::ALL {
            let scales_at = if format.is_quantised() {
                format.layout(rows, columns).scales_at()
            } else {
                0
            };
            // Halves and scales that are finite: the exponent's highest bit is zero.
            let words: Vec<u32> = (0..1024u32)
                .map(|i| {
                    let bits = i.wrapping_mul(0x9e37_79b9) ^ i << 7;
                    if i as usize >= scales_at {
                        bits & 0xbfff_bfff
                    } else {
                        bits
                    }
                })
                .collect();
            let stored = Stored {
                words: &words,
                format,
                columns,
                scales_at,
            };
            for first in [0, 1, 31, 32, 40, 64, 70] {
                for count in [0, 1, 5, 7].into_iter().chain([columns - first]) {
                    let mut run = vec![f32::NAN; count];
                    Simd::detect().run(Run {
                        stored: &stored,
                        row: 2,
                        first,
                        out: &mut run,
                    });
                    let expected: Vec<f32> = (0..count).map(|i| stored.at(2, first + i)).collect();
                    assert_eq!(run, expected, "{format:?}, {count} from {first}");
                }
            }
        }
    }
}
