pub mod compute;
pub mod kernels;
