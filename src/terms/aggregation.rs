//! How clients' adapters become one, by name. The ways themselves are in `federated`.

use super::adapter::Trained;
use super::moments::MomentPolicy;
use super::words;

/// How clients' adapters become one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Aggregation {
    /// The weighted mean of A and of B.
    #[default]
    Mean,
    /// The mean of each value without its extremes.
    Trimmed,
    /// The median of each value.
    Median,
    /// The mean of the products, by stacking (FLoRA, arXiv 2409.05976); clients go on with its nearest of their rank.
    Flora,
    /// The mean of the products, as means and what they miss (FedEx-LoRA, arXiv 2410.09432); clients go on with the means.
    Fedex,
    /// The mean of B, with A frozen (FFA-LoRA, arXiv 2403.12313).
    Ffa,
}

words!(Aggregation {
    Mean = "mean",
    Trimmed = "trimmed",
    Median = "median",
    Flora = "flora",
    Fedex = "fedex",
    Ffa = "ffa",
});

impl Aggregation {
    /// Which matrices are trained under it.
    pub fn trained(self) -> Trained {
        match self {
            Aggregation::Ffa => Trained::B,
            _ => Trained::Both,
        }
    }

    /// What becomes of a client's moments when the aggregate replaces its adapter: they are of no use in other coordinates.
    pub fn moments(self) -> MomentPolicy {
        match self {
            Aggregation::Flora => MomentPolicy::Reset,
            _ => MomentPolicy::Keep,
        }
    }
}
