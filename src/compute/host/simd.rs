//! The vector instructions a machine has, and the one place where code for them is entered and where `unsafe` is needed.
//!
//! Most loops are written plainly, in functions that are always inlined, and compiled once for each instruction set. Weights are
//! unpacked by intrinsics, because compilers turn the plain loops over nibbles into scalar code.

use half::f16;

use crate::terms::format::{GROUP, Q4_CODE_WORDS, Q8_CODE_WORDS};

/// The vector instructions the machine has.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Simd {
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// An instruction set at compile time.
pub(crate) trait Instructions {
    /// A multiply-add is one instruction.
    const FUSED: bool;

    /// `out = scale · code`.
    fn decode_q8(codes: &[u32; Q8_CODE_WORDS], scale: f16, out: &mut [f32; GROUP]);

    /// `out = scale · code + minimum`.
    fn decode_q4(codes: &[u32; Q4_CODE_WORDS], scale: f16, minimum: f16, out: &mut [f32; GROUP]);

    /// The sum of lanes, of which there are 8 or a multiple: every eighth first, then halves of the eight sums. Compilers turn
    /// that loop into scalar code.
    fn sum<const LANES: usize>(lanes: [f32; LANES]) -> f32;

    /// `left · right + sum`, rounded once if [`FUSED`](Self::FUSED).
    #[inline(always)]
    fn multiply_add(left: f32, right: f32, sum: f32) -> f32 {
        if Self::FUSED {
            left.mul_add(right, sum)
        } else {
            sum + left * right
        }
    }
}

/// Work that is compiled once for each instruction set.
pub(crate) trait Vectorised {
    /// Does the work, with tiles of sums of `ROWS` by `COLUMNS` that fit the vector registers. Implementations are
    /// `#[inline(always)]`, as are all functions that they call in inner loops; closures there are not inlined.
    fn run<I: Instructions, const ROWS: usize, const COLUMNS: usize>(self);
}

impl Simd {
    pub(crate) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
                return if is_x86_feature_detected!("avx512f") {
                    Simd::Avx512
                } else {
                    Simd::Avx2
                };
            }
        }
        Simd::Baseline
    }

    /// All that this machine has.
    #[cfg(test)]
    pub(crate) fn available() -> Vec<Self> {
        match Self::detect() {
            Simd::Baseline => vec![Simd::Baseline],
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2 => vec![Simd::Baseline, Simd::Avx2],
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 => vec![Simd::Baseline, Simd::Avx2, Simd::Avx512],
        }
    }

    /// The `ROWS` and `COLUMNS` that [`Vectorised::run`] is called with.
    pub(crate) fn tile(self) -> (usize, usize) {
        match self {
            Simd::Baseline => (4, 8),
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2 => (6, 16),
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 => (12, 32),
        }
    }

    pub(crate) fn run(self, work: impl Vectorised) {
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2(work: impl Vectorised) {
                work.run::<x86::Avx2, 6, 16>();
            }
            #[target_feature(enable = "avx512f,avx2,fma,f16c")]
            fn avx512(work: impl Vectorised) {
                work.run::<x86::Avx512, 12, 32>();
            }
            match self {
                // SAFETY: `detect` found these instructions.
                Simd::Avx512 => return unsafe { avx512(work) },
                // SAFETY: `detect` found these instructions.
                Simd::Avx2 => return unsafe { avx2(work) },
                Simd::Baseline => {}
            }
        }
        work.run::<Baseline, 4, 8>();
    }
}

/// What every machine of the target has.
struct Baseline;

impl Instructions for Baseline {
    const FUSED: bool = cfg!(any(target_arch = "aarch64", target_feature = "fma"));

    #[inline(always)]
    fn decode_q8(codes: &[u32; Q8_CODE_WORDS], scale: f16, out: &mut [f32; GROUP]) {
        let scale = scale.to_f32();
        let codes: &[i8] = bytemuck::cast_slice(codes);
        for (out, &code) in out.iter_mut().zip(codes) {
            *out = scale * f32::from(code);
        }
    }

    #[inline(always)]
    fn sum<const LANES: usize>(lanes: [f32; LANES]) -> f32 {
        let mut sums = [0.0f32; 8];
        for block in lanes.as_chunks::<8>().0 {
            for (sum, lane) in sums.iter_mut().zip(block) {
                *sum += lane;
            }
        }
        let [a, b, c, d, e, f, g, h] = sums;
        ((a + e) + (c + g)) + ((b + f) + (d + h))
    }

    #[inline(always)]
    fn decode_q4(codes: &[u32; Q4_CODE_WORDS], scale: f16, minimum: f16, out: &mut [f32; GROUP]) {
        let (scale, minimum) = (scale.to_f32(), minimum.to_f32());
        for (out, &word) in out.as_chunks_mut::<8>().0.iter_mut().zip(codes) {
            for (i, out) in out.iter_mut().enumerate() {
                *out = scale * (word >> (4 * i) & 15) as i32 as f32 + minimum;
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! Only [`Simd::run`](super::Simd::run) names these types, where the instructions have been found.

    use std::arch::x86_64::*;

    use super::{GROUP, Instructions, Q4_CODE_WORDS, Q8_CODE_WORDS};
    use half::f16;

    pub(super) struct Avx2;
    pub(super) struct Avx512;

    /// Two halves.
    #[inline(always)]
    fn singles(low: f16, high: f16) -> (f32, f32) {
        let bits = u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16;
        // SAFETY: only run where the instructions have been found.
        unsafe {
            let singles = _mm_cvtph_ps(_mm_cvtsi32_si128(bits as i32));
            (_mm_cvtss_f32(singles), _mm_cvtss_f32(_mm_movehdup_ps(singles)))
        }
    }

    #[inline(always)]
    fn sum<const LANES: usize>(lanes: [f32; LANES]) -> f32 {
        // SAFETY: only run where the instructions have been found; whole blocks of eight of the array are read.
        unsafe {
            let mut eight = _mm256_setzero_ps();
            for block in 0..LANES / 8 {
                eight = _mm256_add_ps(eight, _mm256_loadu_ps(lanes.as_ptr().add(8 * block)));
            }
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    impl Instructions for Avx2 {
        const FUSED: bool = true;

        #[inline(always)]
        fn sum<const LANES: usize>(lanes: [f32; LANES]) -> f32 {
            sum(lanes)
        }

        #[inline(always)]
        fn decode_q8(codes: &[u32; Q8_CODE_WORDS], scale: f16, out: &mut [f32; GROUP]) {
            let (scale, _) = singles(scale, f16::ZERO);
            // SAFETY: only run where the instructions have been found; codes and values are read and written as whole arrays.
            unsafe {
                let scale = _mm256_set1_ps(scale);
                for (out, codes) in out.as_chunks_mut::<8>().0.iter_mut().zip(codes.as_chunks::<2>().0) {
                    let codes = _mm256_cvtepi8_epi32(_mm_loadl_epi64(codes.as_ptr().cast()));
                    _mm256_storeu_ps(out.as_mut_ptr(), _mm256_mul_ps(scale, _mm256_cvtepi32_ps(codes)));
                }
            }
        }

        #[inline(always)]
        fn decode_q4(codes: &[u32; Q4_CODE_WORDS], scale: f16, minimum: f16, out: &mut [f32; GROUP]) {
            let (scale, minimum) = singles(scale, minimum);
            // SAFETY: only run where the instructions have been found; values are written as whole arrays.
            unsafe {
                let (scale, minimum) = (_mm256_set1_ps(scale), _mm256_set1_ps(minimum));
                let shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
                let mask = _mm256_set1_epi32(15);
                for (out, &word) in out.as_chunks_mut::<8>().0.iter_mut().zip(codes) {
                    let codes = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(word as i32), shifts), mask);
                    let values = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(codes), minimum);
                    _mm256_storeu_ps(out.as_mut_ptr(), values);
                }
            }
        }
    }

    impl Instructions for Avx512 {
        const FUSED: bool = true;

        #[inline(always)]
        fn sum<const LANES: usize>(lanes: [f32; LANES]) -> f32 {
            sum(lanes)
        }

        #[inline(always)]
        fn decode_q8(codes: &[u32; Q8_CODE_WORDS], scale: f16, out: &mut [f32; GROUP]) {
            let (scale, _) = singles(scale, f16::ZERO);
            // SAFETY: only run where the instructions have been found; codes and values are read and written as whole arrays.
            unsafe {
                let scale = _mm512_set1_ps(scale);
                for (out, codes) in out.as_chunks_mut::<16>().0.iter_mut().zip(codes.as_chunks::<4>().0) {
                    let codes = _mm512_cvtepi8_epi32(_mm_loadu_si128(codes.as_ptr().cast()));
                    _mm512_storeu_ps(out.as_mut_ptr(), _mm512_mul_ps(scale, _mm512_cvtepi32_ps(codes)));
                }
            }
        }

        #[inline(always)]
        fn decode_q4(codes: &[u32; Q4_CODE_WORDS], scale: f16, minimum: f16, out: &mut [f32; GROUP]) {
            let (scale, minimum) = singles(scale, minimum);
            // SAFETY: only run where the instructions have been found; codes and values are read and written as whole arrays.
            unsafe {
                // The sixteen values of the group; a code's low four bits choose one of them.
                let codes_in_order = _mm512_setr_ps(
                    0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0,
                );
                let table = _mm512_fmadd_ps(_mm512_set1_ps(scale), codes_in_order, _mm512_set1_ps(minimum));
                let shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
                let first = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
                let second = _mm512_setr_epi32(2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
                let words = _mm512_castsi128_si512(_mm_loadu_si128(codes.as_ptr().cast()));
                for (out, words_of) in out.as_chunks_mut::<16>().0.iter_mut().zip([first, second]) {
                    let codes = _mm512_srlv_epi32(_mm512_permutexvar_epi32(words_of, words), shifts);
                    _mm512_storeu_ps(out.as_mut_ptr(), _mm512_permutexvar_ps(codes, table));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Decode<'a> {
        codes: &'a [u32; 8],
        scales: (f16, f16),
        out: &'a mut [[f32; GROUP]; 2],
    }

    impl Vectorised for Decode<'_> {
        #[inline(always)]
        fn run<I: Instructions, const ROWS: usize, const COLUMNS: usize>(self) {
            let (scale, minimum) = self.scales;
            I::decode_q8(self.codes, scale, &mut self.out[0]);
            let codes = self.codes.first_chunk().expect("four of eight words");
            I::decode_q4(codes, scale, minimum, &mut self.out[1]);
        }
    }

    struct Sum<'a> {
        lanes: &'a [f32; 32],
        sum: &'a mut f32,
    }

    impl Vectorised for Sum<'_> {
        #[inline(always)]
        fn run<I: Instructions, const ROWS: usize, const COLUMNS: usize>(self) {
            *self.sum = I::sum(*self.lanes);
        }
    }

    #[test]
    fn every_instruction_set_sums_lanes_to_the_same_bits() {
        let lanes: [f32; 32] = std::array::from_fn(|i| (i as f32 + 0.3).powi(3) * if i % 3 == 0 { -1.0 } else { 1.0 });
        let exact: f64 = lanes.iter().map(|&lane| f64::from(lane)).sum();
        let sum = |simd: Simd| {
            let mut sum = f32::NAN;
            simd.run(Sum {
                lanes: &lanes,
                sum: &mut sum,
            });
            sum
        };
        let expected = sum(Simd::Baseline);
        assert!((f64::from(expected) - exact).abs() < 1e-6 * exact.abs());
        for simd in Simd::available() {
            assert_eq!(sum(simd).to_bits(), expected.to_bits(), "{simd:?}");
        }
    }

    #[test]
    fn every_instruction_set_decodes_the_same_bits() {
        // Every code, and halves of both signs, subnormal ones and the largest.
        let halves = [0x0000, 0x8000, 0x0001, 0x83ff, 0x0400, 0x3c00, 0xb555, 0x7bff, 0xfbff].map(f16::from_bits);
        for seed in 0..64u32 {
            let codes: [u32; 8] = std::array::from_fn(|i| (seed * 8 + i as u32).wrapping_mul(0x9e37_79b9) ^ seed << 24);
            for scale in halves {
                for minimum in halves {
                    let decode = |simd: Simd| {
                        let mut out = [[f32::NAN; GROUP]; 2];
                        simd.run(Decode {
                            codes: &codes,
                            scales: (scale, minimum),
                            out: &mut out,
                        });
                        out.map(|values| values.map(f32::to_bits))
                    };
                    let expected = decode(Simd::Baseline);
                    for simd in Simd::available() {
                        assert_eq!(decode(simd), expected, "{simd:?}, {codes:x?}, {scale}, {minimum}");
                    }
                }
            }
        }
    }
}
