//! GPT-2 with LoRA adapters: configuration, files, and the recording of its passes as kernels.
//!
//! `config`, `weights` (over `archive`) and `adapter` read and write Hugging Face and PEFT files; `block` and `ends` record the
//! parts, `stack` joins them into one side of the cut or the whole model with its workspace, `optimizer` sets AdamW's numbers, and
//! `central` is the unsplit model that trains, evaluates and generates. `cost` says what a split step takes before it runs, `rounds` holds how many rounds
//! a rank was measured to need.

pub mod adapter;
pub mod archive;
pub mod block;
pub mod central;
pub mod config;
pub mod cost;
pub mod ends;
pub mod optimizer;
pub mod rounds;
pub mod stack;
pub mod weights;
