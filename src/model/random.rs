//! Weights of no training: a model's shape to try things on.
//!
//! Separate because they come from no file.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use safetensors::tensor::{Dtype, TensorView};

use super::architecture::Architecture;
use super::unit::Unit;
use super::weights::{Weights, WeightsError};

impl Weights {
    /// Matrices uniform in ±√(3/width), whose variance is 1/width; norms of one, biases of zero. They are held in memory in f32. Each
    /// tensor draws from a stream of its own, so a model with more blocks begins with the same ones.
    ///
    /// # Errors
    /// [`WeightsError`], as for a file.
    pub fn random(model: &Architecture, seed: u64) -> Result<Self, WeightsError> {
        let bound = (3.0 / model.width as f32).sqrt();
        let mut tensors = Vec::new();
        for unit in Unit::all(model) {
            for (tensor, shape) in unit.tensors(model) {
                let mut rng = ChaCha8Rng::seed_from_u64(seed);
                rng.set_stream(tensors.len() as u64);
                let mut value = || match shape.len() {
                    1 if tensor.ends_with("bias") => 0.0,
                    1 => 1.0,
                    _ => {
                        let unit = (rng.next_u32() >> 8) as f32 / (1 << 24) as f32; // [0, 1)
                        (2.0 * unit - 1.0) * bound
                    }
                };
                let bytes: Vec<u8> = (0..shape.iter().product())
                    .flat_map(|_: usize| value().to_le_bytes())
                    .collect();
                tensors.push((unit.file_name(model, tensor), shape, bytes));
            }
        }
        let views = (tensors.iter()).map(|(name, shape, bytes)| {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes).expect("four bytes for each number");
            (name, view)
        });
        let file = safetensors::serialize(views, None).expect("names and shapes are plain");
        Self::from_bytes(file, model)
    }
}
