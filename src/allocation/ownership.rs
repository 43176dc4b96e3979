//! What a search for a link's owners has found so far.
//!
//! It is apart from the ways to search, all of which improve it.

use super::bound::EXACT;

/// An ownership, the time it takes, and the time that none can beat.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub owner: Vec<usize>,
    pub upper_s: f64,
    pub lower_s: f64,
}

impl Found {
    /// A deadline at this share of the way from the bound to the time.
    pub fn between(&self, share: f64) -> f64 {
        self.lower_s + share * (self.upper_s - self.lower_s)
    }

    /// Whether the bound leaves room for a better one.
    pub(crate) fn is_open(&self) -> bool {
        self.lower_s < self.upper_s * (1.0 - 2.0 * EXACT)
    }
}
