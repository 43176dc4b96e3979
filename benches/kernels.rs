//! Every kernel at GPT-2-small shapes on the CPU engine and, where there is one, on a GPU adapter.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use sflllm::compute::Engine;
use sflllm::kernels::{self, case::Sizes};

fn kernels(criterion: &mut Criterion) {
    let sizes = Sizes::GPT2_SMALL;
    for engine in std::iter::once(Engine::cpu()).chain(Engine::gpu_for_tests()) {
        let mut group = criterion.benchmark_group(engine.name().to_owned());
        group.sample_size(10);
        for example in kernels::examples() {
            let case = example.build(&engine, sizes).expect("the case fits the device");
            let mut recording = engine.recording();
            case.record(&mut recording);
            group.throughput(Throughput::Elements(recording.cost().flops.max(1.0) as u64));
            let prepared = engine.prepare(recording);
            group.bench_function(example.id(sizes), |bencher| {
                bencher.iter(|| {
                    engine.run(&prepared).expect("the device works");
                    pollster::block_on(engine.wait()).expect("the device works");
                })
            });
        }
        group.finish();
    }
}

criterion_group!(benches, kernels);
criterion_main!(benches);
