//! Runs one launch by its specifications, on the CPU engine and, in every variant of every contract that it takes, on the GPU
//! engine, and compares all buffers.

use std::sync::OnceLock;

use sflllm::compute::{Buffer, Command, DeviceClass, Engine, Profile, Recording};

/// A buffer before a launch, and how close the engines' versions of it must be afterwards.
pub struct Slot {
    words: Vec<u32>,
    /// Relative error allowed between engines; `None` compares bits.
    tolerance: Option<f32>,
}

/// Floats that a launch reads or updates.
pub fn floats(values: &[f32]) -> Slot {
    Slot {
        words: bytemuck::cast_slice(values).to_vec(),
        tolerance: Some(1e-4),
    }
}

/// An output of `n` floats, filled with NaN: a launch that leaves one out fails.
pub fn poisoned(n: usize) -> Slot {
    floats(&vec![f32::NAN; n])
}

/// Integers, or floats that must agree bit by bit.
pub fn exact(words: &[u32]) -> Slot {
    Slot {
        words: words.to_vec(),
        tolerance: None,
    }
}

fn gpu() -> Option<&'static Engine> {
    static GPU: OnceLock<Option<Engine>> = OnceLock::new();
    GPU.get_or_init(Engine::gpu_for_tests).as_ref()
}

fn run(engine: &Engine, profile: Profile, slots: &[Slot], launch: &dyn Fn(&mut Recording, &[Buffer])) -> Vec<Vec<u32>> {
    let buffers: Vec<Buffer> = slots
        .iter()
        .enumerate()
        .map(|(i, slot)| {
            engine
                .buffer_from(format!("buffer {i}"), &slot.words)
                .expect("a small buffer")
        })
        .collect();
    let mut recording = Recording::new(profile);
    launch(&mut recording, &buffers);
    let prepared = engine.prepare(recording);
    engine.run(&prepared).expect("the launch runs");
    buffers
        .iter()
        .zip(slots)
        .map(|(buffer, slot)| {
            pollster::block_on(engine.download(buffer, 0, slot.words.len())).expect("the device is well")
        })
        .collect()
}

/// Asserts that the numbers are within `tolerance` of each other, relative to the expected number or the mean magnitude.
pub fn assert_close(claim: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{claim}");
    let mean = expected.iter().map(|x| x.abs() as f64).sum::<f64>() as f32 / expected.len().max(1) as f32;
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let error = (found - expected).abs();
        assert!(
            error <= tolerance * (expected.abs() + mean),
            "{claim}: element {i} is {found}, not {expected} (mean magnitude {mean})"
        );
    }
}

/// The profiles under which `launch` takes each variant of the contracts it names that the GPU engine's device can run.
fn profiles(gpu: &Engine, slots: &[Slot], launch: &dyn Fn(&mut Recording, &[Buffer])) -> Vec<Profile> {
    let paper = Engine::paper();
    let buffers: Vec<Buffer> = slots
        .iter()
        .map(|slot| paper.buffer("buffer", slot.words.len()).expect("no memory is taken"))
        .collect();
    let launched = |profile: Profile| -> Vec<String> {
        let mut recording = Recording::new(profile);
        launch(&mut recording, &buffers);
        recording
            .commands()
            .iter()
            .filter_map(|command| match command {
                Command::Dispatch(dispatch) => Some(format!("{:?}", dispatch.launch)),
                _ => None,
            })
            .collect()
    };
    let mut recording = Recording::new(gpu.profile());
    launch(&mut recording, &buffers);
    let names = recording.commands().iter().flat_map(|command| match command {
        Command::Dispatch(dispatch) => dispatch.contract.variants.iter().map(|variant| variant.name).collect(),
        _ => Vec::new(),
    });
    let names: std::collections::BTreeSet<&'static str> = names.collect();
    let mut seen = Vec::new();
    let mut profiles = Vec::new();
    for class in [DeviceClass::Gpu, DeviceClass::CpuAdapter] {
        for preferred in std::iter::once(None).chain(names.iter().map(|&name| Some(name))) {
            let profile = Profile {
                class,
                preferred,
                ..gpu.profile()
            };
            let launches = launched(profile);
            if !seen.contains(&launches) {
                seen.push(launches);
                profiles.push(profile);
            }
        }
    }
    profiles
}

/// Runs `launch` everywhere, asserts that every engine and variant leaves the numbers of the specification in every buffer and no
/// NaN among floats, and returns what the specification left.
pub fn agree(claim: &str, slots: &[Slot], launch: impl Fn(&mut Recording, &[Buffer])) -> Vec<Vec<u32>> {
    let specification = Engine::specification();
    let expected = run(&specification, specification.profile(), slots, &launch);
    for (i, (slot, words)) in slots.iter().zip(&expected).enumerate() {
        let written = slot.tolerance.is_none() || bytemuck::cast_slice::<u32, f32>(words).iter().all(|x| !x.is_nan());
        assert!(written, "{claim}: the specification leaves NaN in buffer {i}");
    }
    let compare = |found: &[Vec<u32>], by: &str| {
        for (i, slot) in slots.iter().enumerate() {
            let claim = format!("{claim}: buffer {i}, {by}");
            match slot.tolerance {
                None => assert_eq!(found[i], expected[i], "{claim}"),
                Some(tolerance) => assert_close(
                    &claim,
                    bytemuck::cast_slice(&found[i]),
                    bytemuck::cast_slice(&expected[i]),
                    tolerance,
                ),
            }
        }
    };
    let cpu = Engine::cpu();
    compare(&run(&cpu, cpu.profile(), slots, &launch), "CPU engine");
    if let Some(gpu) = gpu() {
        for profile in profiles(gpu, slots, &launch) {
            let by = format!("{:?}, preferring {:?}", profile.class, profile.preferred);
            compare(&run(gpu, profile, slots, &launch), &by);
        }
    }
    expected
}

/// `n` numbers in [-1, 1), always the same for a seed (splitmix64).
pub fn numbers(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x2545_f491_4f6c_dd1d);
    (0..n)
        .map(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (z ^ (z >> 31)) as i64 as f32 / i64::MAX as f32
        })
        .collect()
}

/// The gradient of `loss` at `x` by central differences in f64.
pub fn finite_differences(x: &[f64], loss: impl Fn(&[f64]) -> f64) -> Vec<f32> {
    const STEP: f64 = 1e-5;
    let mut x = x.to_vec();
    (0..x.len())
        .map(|i| {
            let middle = x[i];
            x[i] = middle + STEP;
            let above = loss(&x);
            x[i] = middle - STEP;
            let below = loss(&x);
            x[i] = middle;
            ((above - below) / (2.0 * STEP)) as f32
        })
        .collect()
}
