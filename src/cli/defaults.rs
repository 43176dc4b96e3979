//! What a run trains with where its options say nothing: settings from which a person's first run learns.
//!
//! The learning rate goes with the model's width, the warm-up with the run's steps; all projections are adapted. Where that comes
//! from: validation perplexity after AdamW steps on the demo's data at rank 8 and alpha 16, a linear schedule with 5 % warm-up
//! (`train --device cpu --clip 1`; SmolLM2-135M from its Q4_1 file, the data as chat). Of rates that do as well the
//! lower one is taken: longer runs and plainer data than these ask for less.
//!
//! | model, width, steps | targets | 3e-4 | 1e-3 | 2e-3 | 3e-3 | 4e-3 | 8e-3 | 1e-2 | 2e-2 |
//! |---|---|---|---|---|---|---|---|---|---|
//! | demo, 128, 100 × 4 examples | all | | 8.17 | | 3.00 | | | 2.05 | 2.13 |
//! | | c_attn | | 38.6 | | 12.0 | | | 3.79 | 3.17 |
//! | SmolLM2-135M, 576, 30 × 2 examples | all | 5.10 | 1.87 | 1.54 | | 1.50 | 1.54 | | |
//! | | q_proj, v_proj | 9.16 | 4.56 | 2.71 | | 1.91 | 1.73 | | |
//!
//! Past the widths measured here the rate falls with 1/width, which meets the 2e-4 that QLoRA (arXiv 2305.14314) uses for width 4,096
//! with all projections adapted. The rank, that paper finds, matters little where they all are.

use crate::model::adapter::{LoraSpec, Target};
use crate::model::architecture::Architecture;
use crate::terms::optimizer::{OptimizerSettings, Schedule};

use super::human::plain;
use super::options::{LoraOptions, OptimizerOptions};

/// What suits models up to a width.
struct Row {
    /// The last row is for all that are wider.
    width: usize,
    rank: usize,
    lr: f32,
}

const ROWS: [Row; 6] = [
    row(192, 8, 1e-2),
    row(384, 8, 5e-3),
    row(1024, 8, 2e-3),
    row(1536, 16, 1e-3),
    row(3072, 16, 5e-4),
    row(usize::MAX, 16, 2e-4),
];

const fn row(width: usize, rank: usize, lr: f32) -> Row {
    Row { width, rank, lr }
}

fn row_of(model: &Architecture) -> &'static Row {
    let last = &ROWS[ROWS.len() - 1];
    ROWS.iter().find(|row| model.width <= row.width).unwrap_or(last)
}

/// A part of the steps, over which the learning rate rises: 5 %.
const WARMUP_DIVISOR: u64 = 20;
/// More steps of warm-up gain nothing.
const LONGEST_WARMUP: u64 = 100;

/// The rank of an adapter.
pub fn rank(model: &Architecture) -> usize {
    row_of(model).rank
}

/// Alpha of an adapter of `rank`: its product is scaled by two, whatever the rank.
pub fn alpha(rank: usize) -> f32 {
    2.0 * rank as f32
}

/// The projections that are adapted: all.
pub fn targets(model: &Architecture) -> Vec<Target> {
    model.targets().to_vec()
}

/// The learning rate of a model of which `targets` are adapted. Where that is less than half of a block (by rows and columns), twice
/// the rate suits it.
pub fn learning_rate(model: &Architecture, targets: &[Target]) -> f32 {
    let size = |targets: &[Target]| -> usize {
        let of = |&target: &Target| {
            let (inputs, outputs) = model.dimensions(target);
            inputs + outputs
        };
        targets.iter().map(of).sum()
    };
    let few = 2 * size(targets) < size(model.targets());
    row_of(model).lr * if few { 2.0 } else { 1.0 }
}

/// What the learning rate does after the warm-up: it falls to zero. A `given` rate is one for every step.
pub fn schedule(given: Option<f32>) -> Schedule {
    match given {
        Some(_) => Schedule::Constant,
        None => Schedule::Linear,
    }
}

/// Steps over which the learning rate rises, of `total_steps`. A `given` rate is one for every step.
pub fn warmup(given: Option<f32>, total_steps: u64) -> u64 {
    match given {
        Some(_) => 0,
        None => (total_steps / WARMUP_DIVISOR).min(LONGEST_WARMUP),
    }
}

/// What a run trains with, in a sentence that says of each setting where it comes from.
pub fn said(
    model: &Architecture,
    lora: &LoraOptions,
    spec: &LoraSpec,
    optimizer: &OptimizerOptions,
    settings: &OptimizerSettings,
) -> String {
    let mut chosen = Vec::new();
    let mut given = Vec::new();
    let mut brought = Vec::new();
    let mut add = |is_given: bool, text: String| match is_given {
        true => given.push(text),
        false => chosen.push(text),
    };
    add(
        optimizer.lr.is_some(),
        format!("learning rate {}", plain(settings.lr.into())),
    );
    let steps = settings.warmup;
    let plural = if steps == 1 { "" } else { "s" };
    let warmup = match steps {
        0 => "no warm-up".to_owned(),
        _ => format!("warm-up over {steps} step{plural}"),
    };
    add(optimizer.warmup.is_some(), warmup);
    let schedule = match settings.schedule {
        Schedule::Constant => "a constant rate".to_owned(),
        Schedule::Linear => format!("falling to 0 at step {}", settings.total_steps),
    };
    add(optimizer.schedule.is_some(), schedule);
    let names = match spec.targets == model.targets() {
        true => "all targets".to_owned(),
        false => format!("targets {}", spec.target_names()),
    };
    let rank = format!("rank {}", spec.rank);
    let alpha = format!("alpha {}", plain(spec.alpha.into()));
    match lora.init_adapter {
        Some(_) => brought = vec![rank, alpha, names],
        None => {
            add(lora.rank.value().is_some(), rank);
            add(lora.alpha.is_some(), alpha);
            add(lora.targets.is_some(), names);
        }
    }
    let parts = [
        (
            format!("for width {} and {} steps", model.width, settings.total_steps),
            chosen,
        ),
        ("as given".to_owned(), given),
        ("of the initial adapter".to_owned(), brought),
    ];
    let parts: Vec<String> = (parts.into_iter().filter(|(_, settings)| !settings.is_empty()))
        .map(|(whence, settings)| format!("{whence}: {}", settings.join(", ")))
        .collect();
    format!("settings {}", parts.join("; "))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Options {
        #[command(flatten)]
        lora: LoraOptions,
        #[command(flatten)]
        optimizer: OptimizerOptions,
    }

    fn options(words: &str) -> Options {
        Options::parse_from(std::iter::once("test").chain(words.split_whitespace()))
    }

    fn gpt2(width: usize) -> Architecture {
        Architecture::from_json(&format!(
            r#"{{"model_type": "gpt2", "n_embd": {width}, "n_head": 4, "n_layer": 4, "n_positions": 256, "vocab_size": 512}}"#
        ))
        .unwrap()
    }

    fn llama(width: usize, ffn: usize) -> Architecture {
        Architecture::from_json(&format!(
            r#"{{"model_type": "llama", "hidden_size": {width}, "intermediate_size": {ffn}, "num_hidden_layers": 4,
                "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 256,
                "rms_norm_eps": 1e-5, "tie_word_embeddings": true, "hidden_act": "silu"}}"#
        ))
        .unwrap()
    }

    /// What a run of 100 steps trains with.
    fn chosen(model: &Architecture, words: &str) -> (LoraSpec, OptimizerSettings, String) {
        let options = options(words);
        let spec = options.lora.spec(model).unwrap();
        let settings = options.optimizer.settings(model, &spec.targets, 100).unwrap();
        let said = said(model, &options.lora, &spec, &options.optimizer, &settings);
        (spec, settings, said)
    }

    #[test]
    fn known_models_have_the_rank_and_rate_of_their_width() {
        for (name, model, rank, lr) in [
            ("the demo", gpt2(128), 8, 1e-2),
            ("GPT-2", gpt2(768), 8, 2e-3),
            ("SmolLM2-135M", llama(576, 1536), 8, 2e-3),
            ("SmolLM2-360M", llama(960, 2560), 8, 2e-3),
            ("Llama-3.2-1B", llama(2048, 8192), 16, 5e-4),
            ("Llama-3.1-8B", llama(4096, 14336), 16, 2e-4),
        ] {
            let (spec, settings, _) = chosen(&model, "");
            assert_eq!((spec.rank, spec.alpha), (rank, 2.0 * rank as f32), "{name}");
            assert_eq!(spec.targets, model.targets(), "{name}");
            assert_eq!(settings.lr, lr, "{name}");
            assert_eq!((settings.schedule, settings.warmup), (Schedule::Linear, 5), "{name}");
        }
    }

    #[test]
    fn wider_models_never_get_a_larger_rate_or_a_smaller_rank() {
        assert!(ROWS.is_sorted_by(|a, b| a.width < b.width && a.rank <= b.rank && a.lr > b.lr));
        assert_eq!(ROWS.last().map(|row| row.width), Some(usize::MAX));
    }

    #[test]
    fn few_targets_get_twice_the_rate() {
        let model = llama(576, 1536);
        assert_eq!(chosen(&model, "--targets q_proj,v_proj").1.lr, 4e-3);
        assert_eq!(chosen(&model, "--targets gate_proj,up_proj,down_proj").1.lr, 2e-3);
    }

    #[test]
    fn warm_up_is_a_twentieth_of_the_run_and_has_an_end() {
        for (steps, expected) in [(0, 0), (10, 0), (20, 1), (240, 12), (1_000_000, LONGEST_WARMUP)] {
            assert_eq!(warmup(None, steps), expected);
        }
    }

    #[test]
    fn given_options_win_and_a_given_rate_is_one_for_every_step() {
        let model = gpt2(128);
        let (_, settings, _) = chosen(&model, "--lr 0.5");
        let rates: Vec<f32> = (0..100).map(|step| settings.lr_at(step)).collect();
        assert!(rates.iter().all(|&rate| rate == 0.5), "{rates:?}");
        let (spec, settings, _) = chosen(
            &model,
            "--lr 0.5 --schedule linear --warmup 7 --rank 3 --alpha 5 --targets c_attn",
        );
        assert_eq!((settings.schedule, settings.warmup), (Schedule::Linear, 7));
        assert_eq!((spec.rank, spec.alpha, spec.targets), (3, 5.0, vec![Target::AttnQkv]));
        let (_, settings, _) = chosen(&model, "--schedule constant --warmup 0");
        assert_eq!(
            (settings.schedule, settings.warmup, settings.lr),
            (Schedule::Constant, 0, 1e-2)
        );
    }

    #[test]
    fn the_sentence_says_of_each_setting_whence_it_comes() {
        let model = gpt2(128);
        assert_eq!(
            chosen(&model, "").2,
            "settings for width 128 and 100 steps: learning rate 0.01, warm-up over 5 steps, falling to 0 at step 100, rank 8, \
             alpha 16, all targets"
        );
        assert_eq!(
            chosen(&model, "--lr 3e-4 --rank 4 --targets c_attn").2,
            "settings for width 128 and 100 steps: no warm-up, a constant rate, alpha 8; as given: learning rate 0.0003, \
             rank 4, targets c_attn"
        );
        let options = options("--init-adapter x");
        let spec = LoraSpec::new(2, 4.0, [Target::MlpFc]).unwrap();
        let settings = options.optimizer.settings(&model, &spec.targets, 20).unwrap();
        assert_eq!(
            said(&model, &options.lora, &spec, &options.optimizer, &settings),
            "settings for width 128 and 20 steps: learning rate 0.02, warm-up over 1 step, falling to 0 at step 20; \
             of the initial adapter: rank 2, alpha 4, targets c_fc"
        );
    }
}
