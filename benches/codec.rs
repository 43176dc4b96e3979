//! Frames to bytes and back at the sizes of GPT-2 small, the digest that pairs a gradient with its activations, and the
//! average of adapters.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use sflllm::federated::weighted_mean;
use sflllm::protocol::codec::{Frame, decode_frame, decode_message, encode_message_frame};
use sflllm::protocol::message::{Activations, Digest, Message};
use sflllm::terms::ids::{RoundKey, StepKey};
use sflllm::terms::tensor::{IGNORED_TARGET, WireForm, WireLayout, WireTensor};

const WIDTH: usize = 768;

fn activations(batch: usize, seq: usize, form: WireForm) -> Message {
    let rows = batch * seq;
    let layout = WireLayout {
        form,
        batch: batch as u32,
        seq: seq as u32,
        width: WIDTH as u32,
    };
    let bytes = layout.bytes().expect("small sizes");
    let bytes = (0..bytes).map(|index| (index % 251) as u8).collect();
    Message::Activations(Activations {
        key: StepKey {
            round: RoundKey { round: 3, attempt: 0 },
            step: 7,
        },
        split: 3,
        examples: batch as u32,
        forward: Duration::from_millis(30),
        targets: (0..rows as i32)
            .map(|row| if row % 3 == 0 { IGNORED_TARGET } else { row })
            .collect(),
        tensor: WireTensor::new(layout, bytes).expect("as many bytes as the layout has"),
    })
}

fn codec(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("codec");
    for (batch, seq, form) in [(4, 512, WireForm::F32), (4, 54, WireForm::F16), (4, 54, WireForm::Int8)] {
        let message = activations(batch, seq, form);
        let bytes = encode_message_frame(1, 1, &message);
        let id = format!("{batch}x{seq}x{WIDTH}/{form}");
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        group.bench_function(BenchmarkId::new("encode", &id), |bencher| {
            bencher.iter(|| encode_message_frame(1, 1, black_box(&message)));
        });
        group.bench_function(BenchmarkId::new("decode", &id), |bencher| {
            bencher.iter(|| match decode_frame(black_box(&bytes)) {
                Ok(Frame::Message { kind, body, .. }) => decode_message(kind, body).is_ok(),
                _ => false,
            });
        });
        group.bench_function(BenchmarkId::new("digest", &id), |bencher| {
            bencher.iter(|| Digest::of(black_box(&bytes)));
        });
    }
    group.finish();
}

fn aggregation(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("aggregation");
    // Three blocks of GPT-2 small, c_attn adapted at rank 4: 3 · 4 · (768 + 2304) values.
    const VALUES: usize = 3 * 4 * (768 + 2304);
    for clients in [3_usize, 16, 64] {
        let adapters: Vec<Vec<f32>> = (0..clients)
            .map(|client| {
                (0..VALUES)
                    .map(|index| ((index * 31 + client) % 97) as f32 * 1e-3)
                    .collect()
            })
            .collect();
        let weighted: Vec<(u64, &[f32])> = adapters
            .iter()
            .enumerate()
            .map(|(client, values)| (client as u64 + 1, values.as_slice()))
            .collect();
        group.throughput(Throughput::Bytes((clients * VALUES * 4) as u64));
        group.bench_function(
            BenchmarkId::new("weighted_mean", format!("{clients}x{VALUES}")),
            |bencher| {
                bencher.iter(|| weighted_mean(black_box(&weighted)));
            },
        );
    }
    group.finish();
}

criterion_group!(benches, codec, aggregation);
criterion_main!(benches);
