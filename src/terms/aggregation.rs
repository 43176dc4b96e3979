//! How clients' adapters become one, by name. The ways themselves are in `federated`.

use super::adapter::Trained;
use super::moments::MomentPolicy;
use super::words;

/// How clients' adapters become one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Aggregation {
    #[default]
    Mean,
    Trimmed,
    Median,
    Flora,
    Fedex,
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
