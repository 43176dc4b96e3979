//! Every kernel on this machine's GPU, or on the CPU engine where there is none, against its specification.
//!
//! `cargo run --release --no-default-features --example kernels`

#![allow(clippy::print_stdout)]

use pollster::block_on;
use sflllm::compute::{Engine, Error, Selection};
use sflllm::kernels::{self, case::Sizes};

pub fn main() -> Result<(), Error> {
    let device = block_on(Engine::open(&Selection::Auto))?;
    let truth = Engine::specification();
    // No size that a tile divides, so that every edge is met.
    let sizes = Sizes {
        batch: 2,
        seq: 19,
        width: 72,
        heads: 6,
        kv_heads: 2,
        head_size: 12,
        ffn: 136,
        vocab: 301,
        rank: 4,
        blocks: 2,
        clients: 3,
    };
    println!("{}", device.name());
    for example in kernels::examples() {
        // The same seeded inputs on both; a recording is replayed as often as one likes.
        let run = |engine: &Engine| -> Result<Vec<u32>, Error> {
            let case = example.build(engine, sizes)?;
            let mut recording = engine.recording();
            case.record(&mut recording);
            engine.run(&engine.prepare(recording))?;
            block_on(case.download(engine))
        };
        let difference = example.build(&truth, sizes)?.difference(&run(&device)?, &run(&truth)?);
        println!("{:<60} {difference:.1e}", example.id(sizes));
        assert!(difference < 1e-3, "{} is wrong on this device", example.id(sizes));
    }
    Ok(())
}
