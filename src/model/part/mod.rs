//! The two residual parts of a block, and the norm that stands before each.

pub mod attention;
pub mod mlp;
pub mod norm;
