pub mod compute;
pub mod data;
pub mod kernels;
pub mod model;
pub mod split;
