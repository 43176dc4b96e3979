//! The average of clients' adapters, `Δ = Σ_k (D_k / D) Δ_k` with `D = Σ_k D_k` (FedAvg, McMahan et al. 2017, eq. 3 on
//! adapters as in SflLLM, arXiv 2504.14667).
//!
//! Pure and by itself, so that the server, the simulator and the tests average with the same few lines.

/// Why adapters cannot be averaged. `index` is the place in the list given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AverageError {
    #[error("there is no adapter to average")]
    Empty,
    #[error("adapter {index} has {length} values where the first has {expected}")]
    WrongLength {
        index: usize,
        length: usize,
        expected: usize,
    },
    #[error("value {position} of adapter {index} is not finite")]
    NotFinite { index: usize, position: usize },
    #[error("the adapters' weights add up to zero; at least one needs an example")]
    ZeroWeight,
    #[error("the adapters' weights add up to more than 2^64")]
    WeightOverflow,
}

/// The mean of flat adapters, each weighted by its number of examples. Sums run in f64 in the order given, so the
/// result does not depend on anything but the arguments.
///
/// # Errors
/// When the list is empty, lengths differ, a value is not finite, or the weights add up to zero or past 2^64.
pub fn weighted_mean(adapters: &[(u64, &[f32])]) -> Result<Vec<f32>, AverageError> {
    let expected = adapters.first().ok_or(AverageError::Empty)?.1.len();
    let mut total = 0_u64;
    for (index, (weight, values)) in adapters.iter().enumerate() {
        if values.len() != expected {
            return Err(AverageError::WrongLength {
                index,
                length: values.len(),
                expected,
            });
        }
        if let Some(position) = values.iter().position(|value| !value.is_finite()) {
            return Err(AverageError::NotFinite { index, position });
        }
        total = total.checked_add(*weight).ok_or(AverageError::WeightOverflow)?;
    }
    if total == 0 {
        return Err(AverageError::ZeroWeight);
    }
    let mut sums = vec![0.0_f64; expected];
    for (weight, values) in adapters {
        for (sum, value) in sums.iter_mut().zip(*values) {
            *sum += *weight as f64 * f64::from(*value);
        }
    }
    Ok(sums.into_iter().map(|sum| (sum / total as f64) as f32).collect())
}
