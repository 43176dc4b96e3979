//! Whole training steps of the demo model: centralised, and split between a client part and a server part.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use pollster::block_on;
use sflllm::cli::source::{DEMO_TRAIN, Source};
use sflllm::compute::Engine;
use sflllm::data::{Batch, Dataset, pass};
use sflllm::model::adapter::{Adapter, LoraSpec, Target};
use sflllm::model::central::Central;
use sflllm::model::unit::Unit;
use sflllm::model::weights::Holding;
use sflllm::model::workspace::Extent;
use sflllm::split::{ClientPart, Contribution, ServerPart, Training};
use sflllm::terms::format::Format;
use sflllm::terms::optimizer::OptimizerSettings;
use sflllm::terms::tensor::WireForm;

const BATCH: usize = 4;
const CUT: usize = 1;

fn first_batch(source: &Source) -> Batch {
    let options = source.data_options(
        source.architecture.positions,
        &sflllm::cli::options::ReadingOptions::default(),
    );
    let data = Dataset::read(DEMO_TRAIN, "demo", source.tokenize(), &options).unwrap();
    pass(&data.examples, BATCH, source.architecture.positions)
        .unwrap()
        .next()
        .unwrap()
}

fn steps(criterion: &mut Criterion) {
    for engine in std::iter::once(Engine::cpu()).chain(Engine::gpu_for_tests()) {
        let holding = Holding::As(Format::F16);
        let source = Source::demo(holding).unwrap();
        let batch = first_batch(&source);
        let config = source.architecture.clone();
        let spec = LoraSpec::new(8, 16.0, [Target::AttnQkv]).unwrap();
        let adapter = Adapter::init(&config, &spec, 0..config.blocks, 0).unwrap();
        let training = Training {
            spec,
            optimizer: OptimizerSettings::default(),
            batch: BATCH,
            seq: batch.seq,
            wire: WireForm::F16,
        };
        let mut group = criterion.benchmark_group(format!("step/{}", engine.name()));
        group.sample_size(10);
        group.throughput(Throughput::Elements((BATCH * batch.seq) as u64));

        let weights = source.load(&engine).unwrap();
        let extent = Extent {
            batch: BATCH,
            seq: batch.seq,
        };
        let mut central = Central::new(
            &engine,
            &config,
            weights,
            Some(&adapter),
            extent,
            Some(training.optimizer),
        )
        .unwrap();
        group.bench_function("central", |bencher| {
            bencher.iter(|| block_on(central.step(&batch.tokens, &batch.targets, batch.seq)).unwrap())
        });

        let blocks = [source.weights.unit(Unit::Block(0), holding).unwrap()];
        let embedding = source.weights.embedding(holding).unwrap();
        let side = |range| adapter.slice(&config, range).unwrap().values;
        let mut client = ClientPart::new(&engine, &config, embedding, &blocks, &training, &side(0..CUT)).unwrap();
        let above = side(CUT..config.blocks);
        let mut server = ServerPart::new(&engine, &config, &mut source.units(), CUT, &training, &above).unwrap();
        group.bench_function("split", |bencher| {
            bencher.iter(|| {
                let activations = block_on(client.forward(&batch.tokens, batch.seq)).unwrap();
                let contribution = Contribution {
                    cut: CUT,
                    activations: &activations,
                    targets: &batch.targets,
                };
                let (_, replies) = block_on(server.step(&[contribution])).unwrap();
                block_on(client.backward(&replies[0].gradient)).unwrap();
            })
        });
        group.finish();
    }
}

criterion_group!(benches, steps);
criterion_main!(benches);
