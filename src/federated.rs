//! The average of clients' adapters, `Δ = Σ_k (D_k / D) Δ_k` with `D = Σ_k D_k` (FedAvg, McMahan et al. 2017, eq. 3 on
//! adapters as in SflLLM, arXiv 2504.14667).
//!
//! Clients whose cut is deeper have more blocks, and so longer adapters: flat adapters are in block order, and one is the
//! beginning of another. Each value is averaged over those who trained it: the clients that have it, and the main server's copy
//! for the clients that do not.
//!
//! Pure and by itself, so that the server, the simulator and the tests average with the same few lines.

/// Why adapters cannot be averaged. `index` is the place in the list given.
#[expect(missing_docs, reason = "the messages say it")]
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
    #[error("adapter {index} has {length} values, which is not between {least} and {most}")]
    OutOfRange {
        index: usize,
        length: usize,
        least: usize,
        most: usize,
    },
    #[error("the server's copy has {length} values, more than the {whole} of the whole")]
    LongCopy { length: usize, whole: usize },
    #[error("value {position} of adapter {index} is not finite")]
    NotFinite { index: usize, position: usize },
    #[error("value {position} of the server's copy is not finite")]
    CopyNotFinite { position: usize },
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
    if let Some((index, (_, values))) = (adapters.iter().enumerate()).find(|(_, (_, values))| values.len() != expected)
    {
        return Err(AverageError::WrongLength {
            index,
            length: values.len(),
            expected,
        });
    }
    mean_of_prefixes(adapters, expected, &[])
}

/// The same for adapters of which each is the beginning of `whole` values. `copy` is what the main server has of the last of
/// them; for a value it weighs as much as the adapters that end before it, nothing where there is none.
///
/// # Errors
/// As [`weighted_mean`]; an adapter may be shorter by what `copy` has, and no longer than `whole`.
pub fn mean_of_prefixes(adapters: &[(u64, &[f32])], whole: usize, copy: &[f32]) -> Result<Vec<f32>, AverageError> {
    if adapters.is_empty() {
        return Err(AverageError::Empty);
    }
    let Some(least) = whole.checked_sub(copy.len()) else {
        return Err(AverageError::LongCopy {
            length: copy.len(),
            whole,
        });
    };
    if let Some(position) = copy.iter().position(|value| !value.is_finite()) {
        return Err(AverageError::CopyNotFinite { position });
    }
    let mut total = 0_u64;
    for (index, (weight, values)) in adapters.iter().enumerate() {
        if !(least..=whole).contains(&values.len()) {
            return Err(AverageError::OutOfRange {
                index,
                length: values.len(),
                least,
                most: whole,
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
    let mut sums = vec![0.0_f64; whole];
    for (weight, values) in adapters {
        for (sum, value) in sums.iter_mut().zip(*values) {
            *sum += *weight as f64 * f64::from(*value);
        }
    }
    let mut ends: Vec<(usize, u64)> = adapters
        .iter()
        .map(|(weight, values)| (values.len(), *weight))
        .collect();
    ends.sort_unstable();
    let mut ends = ends.into_iter().peekable();
    let mut ended = 0_u64;
    for (position, (sum, value)) in sums[least..].iter_mut().zip(copy).enumerate() {
        while let Some((_, weight)) = ends.next_if(|(end, _)| *end <= least + position) {
            ended += weight;
        }
        if ended > 0 {
            *sum += ended as f64 * f64::from(*value);
        }
    }
    Ok(sums.into_iter().map(|sum| (sum / total as f64) as f32).collect())
}
