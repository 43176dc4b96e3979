//! What is true of the crate without another process: one binary, a claim a test. What starts processes or browsers is in `real/`; the
//! allocator's claims, which take the longest, are in `allocation/`.

#[path = "../support/engines/mod.rs"]
mod engines;
#[path = "../support/weights/mod.rs"]
mod weights;

mod aggregation;
mod calibrate;
mod codec;
mod cost;
mod data;
mod examples;
mod federated;
mod gguf;
mod kernel_contract;
mod kernels_attention;
mod kernels_cross_entropy;
mod kernels_elementwise;
mod kernels_llama;
mod kernels_matmul;
mod lanes;
mod layering;
mod local;
mod model_files;
mod planned_run;
mod protocol;
mod reference;
