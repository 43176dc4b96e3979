//! `sflllm demo`: the whole thing on one machine. Two clients in this process and any tab that joins fine-tune the demo model;
//! texts before and after show what it learned.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::json;

use super::console;
use super::defaults;
use super::generate::{Sampling, Writer, prompt_ids};
use super::human::shell_word;
use super::options::{DeviceOptions, OutputOptions, ReadingOptions};
use super::serve::{Hosting, conclude, host, model, token};
use super::source::{DEMO_TRAIN, DEMO_VALID, ModelName, Source};
use crate::compute::Engine;
use crate::data::{Conversation, Dataset, Message, Sharding, Tokenizer};
use crate::model::adapter::{Adapter, LoraSpec};
use crate::model::weights::Holding;
use crate::protocol::Deadline;
use crate::runs::directory::RunDirectory;
use crate::server::{self, Ending, Listen, Role, Run};
use crate::split::Training;
use crate::terms::aggregation::Aggregation;
use crate::terms::optimizer::{OptimizerSettings, Schedule};
use crate::terms::tensor::WireForm;

const CLIENTS: usize = 2;
const ALPHA_OF_RANK: f32 = 2.0;
const SEED: u64 = 0;
/// Validation examples looked at after every round.
const VALIDATED: usize = 64;
/// Texts written before and after.
const SAMPLES: usize = 3;
const SAMPLE_TOKENS: usize = 60;
/// What a model that talks is asked, before a restaurant's description.
const QUESTION: &str = "Describe this restaurant in one sentence. ";

/// How much a model is taught, and how.
struct Lesson {
    rounds: u32,
    local_steps: u32,
    cut: usize,
    rank: usize,
    batch: usize,
    lr: f32,
    /// The restaurants as questions and answers by the model's chat template, and not as lines of text.
    chat: bool,
    /// How texts are drawn before training.
    untrained: Sampling,
}

impl Lesson {
    /// The embedded model's: chosen so that its texts follow the meanings in twenty seconds on two cores.
    const EMBEDDED: Self = Self {
        rounds: 16,
        local_steps: 15,
        cut: 1,
        rank: 8,
        batch: 4,
        lr: 1e-2,
        chat: false,
        // The likeliest text of the untrained model is one phrase again and again; a draw shows what it knows.
        untrained: Sampling {
            max_tokens: SAMPLE_TOKENS,
            temperature: 0.8,
            top_k: 40,
            top_p: 1.0,
            repetition_penalty: 1.0,
            seed: 1,
        },
    };

    /// A pretrained model's: it can write, and learns the tone in a hundred and twenty-eight examples.
    fn pretrained(source: &Source) -> Self {
        let model = &source.architecture;
        let talks = source
            .tokenizer
            .as_ref()
            .and_then(|tokenizer| tokenizer.chat_template());
        Self {
            rounds: 6,
            local_steps: 8,
            cut: 4.min(model.blocks - 1),
            rank: defaults::rank(model),
            batch: 2,
            lr: defaults::learning_rate(model, model.targets()),
            chat: talks.is_some(),
            untrained: Sampling::greedy(SAMPLE_TOKENS),
        }
    }

    /// Lines `meaning||reference` as this model is given them.
    fn data(&self, lines: &'static [u8]) -> Vec<u8> {
        if !self.chat {
            return lines.to_vec();
        }
        let text = String::from_utf8_lossy(lines);
        let pairs = text.lines().filter_map(|line| line.split_once("||"));
        let talks = pairs.map(|(meaning, reference)| {
            let question = format!("{QUESTION}{}", meaning.trim());
            let talk = [("user", question.as_str()), ("assistant", reference.trim())]
                .map(|(role, content)| json!({ "role": role, "content": content }));
            format!("{}\n", json!({ "messages": talk }))
        });
        talks.collect::<String>().into_bytes()
    }

    /// Ids that ask for a meaning's text, and those that end it.
    fn prompt(&self, tokenizer: &Tokenizer, meaning: &str) -> anyhow::Result<(Vec<u32>, Vec<u32>)> {
        if !self.chat {
            let ids = prompt_ids(tokenizer, &format!("{meaning}||"))?;
            return Ok((ids, tokenizer.stop_ids().to_vec()));
        }
        let conversation = Conversation {
            messages: vec![Message::new("user", format!("{QUESTION}{meaning}"))],
            tools: None,
        };
        Ok(tokenizer.chat_prompt(&conversation)?)
    }

    /// How the trained model is asked from a shell.
    fn command(&self, model: &str, adapter: &str, meaning: &str) -> String {
        let ask = match self.chat {
            true => format!("--chat --prompt '{QUESTION}{meaning}'"),
            false => format!("--prompt '{meaning}||'"),
        };
        format!("sflllm generate --model {model} --adapter {adapter} {ask}")
    }
}

/// Fine-tune a model on descriptions of restaurants with two clients in this process and any tab that joins.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Example:
  sflllm demo
      then open the link it prints in a browser tab, or scan its QR code with a phone, to take part
  sflllm demo --model hf:HuggingFaceTB/SmolLM2-135M-Instruct
      a pretrained model instead of the small one inside this program")]
pub struct Options {
    /// The model: `demo`, a Hugging Face directory, a .gguf file, or `hf:ORG/NAME`
    #[arg(long, default_value = "demo", value_name = "DIR|FILE.gguf|hf:ORG/NAME|demo")]
    pub model: ModelName,
    /// How frozen weights are held
    #[arg(long, default_value_t, value_name = "auto|f32|f16|q8|q4")]
    pub weights: Holding,
    /// Address to listen on; may be repeated [default: https://0.0.0.0:8443 and http://127.0.0.1:8080, or free ports]
    #[arg(long, value_name = "ADDR")]
    pub listen: Vec<Listen>,
    /// Rounds of local training and averaging [default: as many as the model needs to learn it]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: Option<u32>,
    /// Join token, or `generate` [default: generated where other machines can connect]
    #[arg(long, value_name = "TOKEN|generate")]
    pub token: Option<String>,
    /// Run directory [default: runs/TIME-demo]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Open the page in this machine's browser
    #[arg(long)]
    pub open: bool,
    #[command(flatten)]
    pub device: DeviceOptions,
    #[command(flatten)]
    pub output: OutputOptions,
}

/// # Errors
/// One sentence that says what to do.
pub fn run(options: Options) -> anyhow::Result<()> {
    let quiet = options.output.quiet;
    let mut directory = RunDirectory::create(options.out.as_deref(), "demo")?;
    let listen = match &options.listen[..] {
        [] => vec![free("https://0.0.0.0:8443")?, free("http://127.0.0.1:8080")?],
        given => given.to_vec(),
    };
    let token = token(options.token.as_deref(), &listen)?;
    let engine = options.device.engine()?;
    let source = Source::open(&options.model, options.weights, quiet)?;
    let architecture = source.architecture.clone();
    if architecture.blocks < 2 {
        bail!("{} has one block and cannot be cut; the demo needs two", options.model);
    }
    let lesson = match options.model {
        ModelName::Demo => Lesson::EMBEDDED,
        _ => Lesson::pretrained(&source),
    };
    let rounds = options.rounds.unwrap_or(lesson.rounds);
    let spec = LoraSpec::new(
        lesson.rank,
        ALPHA_OF_RANK * lesson.rank as f32,
        architecture.targets().iter().copied(),
    )?;
    let initial = Adapter::init(&architecture, &spec, 0..architecture.blocks, SEED)?;
    let training = Training {
        spec: initial.spec.clone(),
        optimizer: OptimizerSettings {
            lr: lesson.lr,
            weight_decay: 0.01,
            schedule: Schedule::Linear,
            warmup: 5,
            total_steps: u64::from(rounds) * u64::from(lesson.local_steps),
            clip: Some(1.0),
        },
        batch: lesson.batch,
        seq: architecture.positions.min(128),
        wire: WireForm::F16,
    };
    let read = |bytes: &[u8], name: &str| {
        Dataset::read(
            bytes,
            name,
            source.tokenize(),
            &source.data_options(training.seq, &ReadingOptions::default()),
        )
    };
    let demo_data = lesson.data(DEMO_TRAIN);
    let train = read(&demo_data, "the demo's training data")?;
    let mut valid = read(&lesson.data(DEMO_VALID), "the demo's validation data")?;
    valid.examples.truncate(VALIDATED);

    let meanings = meanings();
    if !quiet {
        console::say(match options.model {
            ModelName::Demo => {
                "Before training, the model writes plain English and takes no notice of what it is asked for:\n"
            }
            _ => "Before training, the model writes in its own manner:\n",
        });
    }
    let before = write(&source, &engine, None, &lesson, &meanings, lesson.untrained)?;
    if !quiet {
        show(&meanings, &before);
        console::say(format!(
            "Now {CLIENTS} clients fine-tune it, each on its half of {} examples.\n",
            train.examples.len()
        ));
    }

    directory.note(json!({
        "role": "both",
        "configuration": {
            "rounds": rounds, "local_steps": lesson.local_steps, "local_clients": CLIENTS, "split": lesson.cut,
            "spec": training.spec, "optimizer": training.optimizer, "batch": lesson.batch, "seq": training.seq,
            "wire": training.wire, "seed": SEED, "weights": options.weights.to_string(),
        },
        "data": [{ "file": "demo", "summary": train.summary }],
    }))?;
    let adapter_directory = directory.adapter();
    let local = Sharding::Strided.divide(train.examples, CLIENTS)?;
    let run = Run {
        model: model(source),
        engine: engine.clone(),
        training,
        cut: lesson.cut,
        initial,
        validation: Some(valid.examples),
        rounds,
        local_steps: lesson.local_steps,
        seed: SEED,
        shuffle: true,
        clients: CLIENTS as u32,
        wait: Duration::from_secs(10),
        deadline: Deadline::Auto,
        quorum: None,
        aggregation: Aggregation::Mean,
        ranks: Vec::new(),
        planner: None,
    };
    let hosting = Hosting {
        token,
        hosts: Vec::new(),
        listen,
        open: options.open,
        quiet,
        demo_data,
    };
    let summary = host(hosting, Role::Both, directory, Some(run), local, None)?;
    if summary.ending == Ending::Completed && !quiet {
        let adapter = Adapter::load(&adapter_directory, &architecture)?;
        console::say("\nAfter training, its texts follow the meanings:\n");
        let source = Source::open(&options.model, options.weights, true)?;
        let greedy = Sampling::greedy(SAMPLE_TOKENS);
        let after = write(&source, &engine, Some(&adapter), &lesson, &meanings, greedy)?;
        show(&meanings, &after);
        if let (Some(before), Some(after)) = (summary.baseline, summary.last) {
            console::say(format!(
                "Validation perplexity: {:.2} before, {:.2} after: {:.1} times lower.",
                before.perplexity,
                after.perplexity,
                before.perplexity / after.perplexity
            ));
        }
        let command = lesson.command(
            &shell_word(Path::new(&options.model.to_string())),
            &shell_word(&adapter_directory),
            &meanings[0],
        );
        console::say(format!("Try it: {command}"));
    }
    conclude(&summary, Some(&adapter_directory), &options.output)
}

/// The address, on another port where that one is taken.
fn free(address: &str) -> anyhow::Result<Listen> {
    let mut listen: Listen = address.parse()?;
    match listen.bind() {
        Err(server::Error::Busy { .. }) => listen.port = 0,
        bound => drop(bound?),
    }
    Ok(listen)
}

/// Different meanings of the validation data.
fn meanings() -> Vec<String> {
    let text = String::from_utf8_lossy(DEMO_VALID);
    let mut meanings: Vec<String> = Vec::new();
    for meaning in text.lines().filter_map(|line| Some(line.split_once("||")?.0.trim())) {
        if meanings.len() < SAMPLES && meanings.iter().all(|known| known != meaning) {
            meanings.push(meaning.to_owned());
        }
    }
    meanings
}

/// What the model writes for each meaning.
fn write(
    source: &Source,
    engine: &Engine,
    adapter: Option<&Adapter>,
    lesson: &Lesson,
    meanings: &[String],
    sampling: Sampling,
) -> anyhow::Result<Vec<String>> {
    let tokenizer = source.tokenizer()?;
    let prompts = (meanings.iter())
        .map(|meaning| lesson.prompt(tokenizer, meaning))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let longest = prompts.iter().map(|(ids, _)| ids.len()).max().unwrap_or(0);
    let weights = source.load(engine)?;
    let room = longest + SAMPLE_TOKENS;
    let mut writer = Writer::new(engine, &source.architecture, weights, adapter, room, tokenizer)?;
    let mut texts = Vec::with_capacity(prompts.len());
    for (prompt, stop) in prompts {
        writer = writer.stop_at(stop);
        let ids = writer.write(&prompt, &sampling, |_| Ok(ControlFlow::Continue(())))?.ids;
        let text = tokenizer
            .decode(&ids)
            .context("the model wrote something its tokenizer cannot read")?;
        texts.push(text);
    }
    Ok(texts)
}

fn show(meanings: &[String], texts: &[String]) {
    for (meaning, text) in meanings.iter().zip(texts) {
        console::say(format!("  {meaning}\n    -> {}\n", text.trim()));
    }
}
