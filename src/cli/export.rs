//! `export`: an adapter, or a model with it, in the form that another program loads.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use serde_json::{Map, Value, json};

use crate::data::Tokenize;
use crate::disk::NewDirectory;
use crate::model::adapter::Adapter;
use crate::model::export::Storage;
use crate::model::export::card::{CARD_FILE, card};
use crate::model::export::checkpoint::{self, SHARD, write_checkpoint};
use crate::model::export::gguf::{Description, write_model};
use crate::model::export::lora::write_lora;
use crate::model::export::merged::Merged;
use crate::model::gguf::blocks::BlockType;
use crate::model::gguf::container::Gguf;
use crate::model::gguf::tokenizer::GgufTokenizer;
use crate::model::peft;
use crate::model::weights::Holding;

use super::console::{self, Bar, Console};
use super::human::shell_word;
use super::interrupt::{self, Interrupt};
use super::modelfile::{Chat, Modelfile, ollama_name};
use super::options::OutputOptions;
use super::source::{DEMO_CONFIG, DEMO_TOKENIZER, ModelName, ModelSource, Source};

const MODEL_FILE: &str = "model.gguf";
const BASE_FILE: &str = "base.gguf";
const ADAPTER_FILE: &str = "adapter.gguf";
const CONFIG_FILE: &str = "config.json";
/// What a directory of transformers holds beside configuration and weights, and what belongs to whoever made them.
const BESIDE: [&str; 13] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
];

/// Write an adapter, or a model with it, in the form that another program loads.
///
/// peft: the adapter for Python's peft, with a model card. gguf: the adapter for llama.cpp's --lora. gguf-merged: the model with the
/// adapter in its weights for llama.cpp. merged: the same for transformers. ollama: a directory for `ollama create`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  sflllm export runs/mine --format ollama --out mine-ollama     # then: cd mine-ollama && ollama create mine
  sflllm export runs/mine --format gguf-merged --type q8_0 --out mine-gguf
  sflllm export path/to/adapter --model hf:HuggingFaceTB/SmolLM2-135M-Instruct --format merged --out mine-merged")]
pub struct Options {
    /// A run directory, or a PEFT adapter directory
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// What it becomes
    #[arg(long, value_enum)]
    pub format: ExportForm,
    /// The directory to write, which must not exist yet
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// The model that the adapter belongs to; the one that the run or the adapter names if not given
    #[arg(long, value_name = "DIR|FILE.gguf|hf:ORG/NAME[@REVISION]|demo")]
    pub model: Option<ModelName>,
    /// How the weights of a merged model are stored: f32, f16, bf16, or q8_0 (in GGUF files). f16 in GGUF files and as the base has
    /// them in others if not given
    #[arg(long = "type", value_name = "f32|f16|bf16|q8_0")]
    pub storage: Option<Storage>,
    /// With --format ollama: the base model as it is, and the adapter beside it
    #[arg(long)]
    pub adapter_only: bool,
    #[command(flatten)]
    pub output: OutputOptions,
}

/// A form that another program loads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ExportForm {
    Peft,
    Gguf,
    GgufMerged,
    Merged,
    Ollama,
}

impl ExportForm {
    fn name(self) -> &'static str {
        match self {
            ExportForm::Peft => "peft",
            ExportForm::Gguf => "gguf",
            ExportForm::GgufMerged => "gguf-merged",
            ExportForm::Merged => "merged",
            ExportForm::Ollama => "ollama",
        }
    }
}

/// An adapter on disk, and what is known of it.
struct Found {
    adapter: PathBuf,
    /// `adapter_config.json`.
    description: Value,
    /// `run.json` of the run that it comes from.
    run: Option<Value>,
}

impl Found {
    /// The adapter of a run, or the one in a directory.
    fn at(path: &Path) -> anyhow::Result<Self> {
        let has = |path: &Path, name: &str| path.join(name).is_file();
        let (adapter, run) = if has(path, "run.json") {
            (path.join("adapter"), Some(path.join("run.json")))
        } else {
            let parent = path
                .parent()
                .filter(|parent| path.file_name().is_some_and(|name| name == "adapter") && has(parent, "run.json"));
            (path.to_owned(), parent.map(|parent| parent.join("run.json")))
        };
        if !has(&adapter, peft::CONFIG_FILE) {
            match &run {
                Some(_) => bail!("the run in {} has saved no adapter yet", path.display()),
                None => bail!(
                    "{} is neither a run directory (run.json) nor a PEFT adapter ({}): give one of them",
                    path.display(),
                    peft::CONFIG_FILE
                ),
            }
        }
        let read = |path: &Path| -> anyhow::Result<Value> {
            let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
            serde_json::from_str(text.trim_start_matches('\u{feff}'))
                .with_context(|| format!("{} is not valid JSON", path.display()))
        };
        Ok(Self {
            description: read(&adapter.join(peft::CONFIG_FILE))?,
            run: run.map(|run| read(&run)).transpose()?,
            adapter,
        })
    }

    /// The model that it says it belongs to.
    fn model(&self) -> anyhow::Result<ModelName> {
        let run = self.run.as_ref();
        let text = |place: &str| run.and_then(|run| run.pointer(place)?.as_str());
        if let Some(source) = text("/model_source") {
            return Ok(source.parse()?);
        }
        let named = text("/model/name")
            .or(text("/model"))
            .or(self.description["base_model_name_or_path"].as_str())
            .filter(|name| !name.is_empty());
        let unknown = || {
            let of = named.map_or(String::new(), |name| format!(", which calls it {name:?},"));
            let adapter = self.adapter.display();
            format!("which model {adapter} belongs to is not known from it{of}: give --model")
        };
        match named {
            Some(name) if name == "demo" || Path::new(name).exists() => Ok(name.parse()?),
            Some(name) if name.split('/').filter(|part| !part.is_empty()).count() == 2 => {
                format!("{}{name}", crate::hub::name::PREFIX)
                    .parse()
                    .with_context(unknown)
            }
            _ => bail!(unknown()),
        }
    }
}

/// A file that shows how far it is, and fails when the command was asked to end.
struct Watched<'a, W> {
    inner: W,
    bar: &'a Bar,
    interrupt: &'a Interrupt,
}

impl<W: Write> Write for Watched<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.interrupt.is_set() {
            return Err(io::Error::other("it was stopped"));
        }
        let written = self.inner.write(bytes)?;
        self.bar.inc(written as u64);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// One export, from what is read to where it is written.
struct Export<'a> {
    source: &'a Source,
    adapter: &'a Adapter,
    found: &'a Found,
    directory: &'a NewDirectory,
    console: Console,
    bar: Bar,
    interrupt: Interrupt,
}

impl Export<'_> {
    fn create(&self, name: &str) -> io::Result<Watched<'_, BufWriter<File>>> {
        Ok(Watched {
            inner: BufWriter::with_capacity(1 << 20, self.directory.file(name)?),
            bar: &self.bar,
            interrupt: &self.interrupt,
        })
    }

    fn put(&self, name: &str, contents: &[u8]) -> anyhow::Result<()> {
        let write = || {
            let mut file = self.create(name)?;
            file.write_all(contents)?;
            file.flush()
        };
        write().with_context(|| format!("cannot write {name}"))
    }

    /// Copies a file in pieces, so that a long one can be stopped.
    fn copy(&self, from: &Path, name: &str) -> anyhow::Result<()> {
        let reading = || format!("cannot read {}", from.display());
        let mut input = File::open(from).with_context(reading)?;
        let mut output = self.create(name).with_context(|| format!("cannot write {name}"))?;
        let mut piece = vec![0; 1 << 20];
        loop {
            match input.read(&mut piece).with_context(reading)? {
                0 => break,
                read => output
                    .write_all(&piece[..read])
                    .with_context(|| format!("cannot write {name}"))?,
            }
        }
        output.flush().with_context(|| format!("cannot write {name}"))
    }

    fn gguf_of_base(&self) -> anyhow::Result<Option<Gguf>> {
        Ok(match &self.source.origin {
            ModelSource::Gguf(file) => Some(Gguf::open_path(file)?),
            ModelSource::Demo | ModelSource::Directory(_) => None,
        })
    }

    fn peft(&self) -> anyhow::Result<()> {
        for (name, bytes) in self.adapter.to_peft(&self.source.architecture, &self.source.name)? {
            self.put(name, &bytes)?;
            if name == peft::CONFIG_FILE {
                let description = serde_json::from_slice(&bytes)?;
                let card = card(&description, self.found.run.as_ref());
                self.put(CARD_FILE, card.as_bytes())?;
            }
        }
        Ok(())
    }

    fn lora(&self) -> anyhow::Result<()> {
        let failed = || format!("cannot write {ADAPTER_FILE}");
        let output = self.create(ADAPTER_FILE).with_context(failed)?;
        let (architecture, name) = (&self.source.architecture, &self.source.name);
        Ok(write_lora(self.adapter, architecture, name, ADAPTER_FILE, output)?)
    }

    /// The model with the adapter, or without one, as GGUF.
    fn gguf(&self, file: &str, adapter: Option<&Adapter>, storage: Storage) -> anyhow::Result<()> {
        let merged = self.merged(adapter, storage);
        let description = match self.gguf_of_base()? {
            Some(mut gguf) => Description::of_file(&mut gguf)?,
            None => Description::new(&self.source.architecture, &self.source.name, &self.tokenizer()?)?,
        };
        let output = self.create(file).with_context(|| format!("cannot write {file}"))?;
        let written = write_model(&merged, &description, storage, file, output)?;
        if let Some(first) = written.not_quantised.first() {
            let count = written.not_quantised.len();
            self.console.line(format!(
                "{count} matrices, {first} among them, have rows that are no multiple of 32: they are f16"
            ));
        }
        Ok(())
    }

    fn merged<'a>(&'a self, adapter: Option<&'a Adapter>, storage: Storage) -> Merged<'a> {
        let merged = Merged {
            weights: &self.source.weights,
            adapter,
        };
        let values: usize = merged
            .parts()
            .iter()
            .map(|part| part.shape.iter().product::<usize>())
            .sum();
        self.bar.set_length(storage.bytes_of(values as u64));
        merged
    }

    fn tokenizer(&self) -> anyhow::Result<GgufTokenizer> {
        let tokenizer = self.source.tokenizer()?;
        Ok(GgufTokenizer {
            json: String::from_utf8(tokenizer.json().to_vec()).context("tokenizer.json is not UTF-8")?,
            vocab: tokenizer.vocab_size(),
            bos: tokenizer.bos(),
            eos: tokenizer.eos().ok(),
            add_bos: !tokenizer.begin().is_empty(),
            stop: tokenizer.stop_ids().to_vec(),
            chat_template: tokenizer.chat_template().map(str::to_owned),
            notices: Vec::new(),
        })
    }

    /// The directory that transformers loads.
    fn checkpoint(&self, storage: Storage) -> anyhow::Result<()> {
        let config = |text: &str| -> anyhow::Result<String> {
            let fields: Map<String, Value> = serde_json::from_str(text.trim_start_matches('\u{feff}'))?;
            Ok(checkpoint::config(fields, storage))
        };
        match &self.source.origin {
            ModelSource::Demo => {
                self.put(CONFIG_FILE, config(DEMO_CONFIG)?.as_bytes())?;
                self.put("tokenizer.json", DEMO_TOKENIZER)?;
            }
            ModelSource::Directory(directory) => {
                let path = directory.join(CONFIG_FILE);
                let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
                self.put(CONFIG_FILE, config(&text)?.as_bytes())?;
                for name in BESIDE {
                    let path = directory.join(name);
                    if path.is_file() {
                        self.copy(&path, name)?;
                    }
                }
            }
            ModelSource::Gguf(file) => {
                for (name, contents) in checkpoint::files_beside(&mut Gguf::open_path(file)?, storage)? {
                    self.put(name, contents.as_bytes())?;
                }
            }
        }
        let merged = self.merged(Some(self.adapter), storage);
        Ok(write_checkpoint(&merged, storage, SHARD, |name| self.create(name))?)
    }

    fn ollama(&self, storage: Storage, adapter_only: bool) -> anyhow::Result<()> {
        let (from, adapter) = match (adapter_only, &self.source.origin) {
            (false, _) => {
                self.gguf(MODEL_FILE, Some(self.adapter), storage)?;
                (MODEL_FILE, None)
            }
            (true, ModelSource::Gguf(file)) => {
                let bytes = std::fs::metadata(file).map_or(0, |found| found.len());
                self.bar.set_length(bytes);
                self.copy(file, BASE_FILE)?;
                (BASE_FILE, Some(ADAPTER_FILE))
            }
            (true, _) => {
                self.gguf(BASE_FILE, None, storage)?;
                (BASE_FILE, Some(ADAPTER_FILE))
            }
        };
        if adapter.is_some() {
            self.lora()?;
        }
        let tokenizer = self.source.tokenizer()?;
        let chat = tokenizer.template().and_then(Chat::of);
        if chat.is_none() && tokenizer.chat_template().is_some() {
            self.console
                .line("The model's chat template is not one that is known here: the Modelfile has no TEMPLATE");
        }
        if chat.as_ref().is_some_and(|chat| !chat.plain) {
            self.console
                .line("The model's chat template adds to what a system says; the TEMPLATE of the Modelfile does not");
        }
        let stop: Vec<String> = tokenizer
            .stop_ids()
            .iter()
            .filter_map(|&id| tokenizer.token(id))
            .collect();
        let about = format!(
            "{} with a LoRA adapter. In this directory: ollama create {}",
            self.source.name,
            ollama_name(&self.source.name)
        );
        let modelfile = Modelfile {
            about: &about,
            from,
            adapter,
            chat: chat.as_ref(),
            stop: &stop,
            positions: self.source.architecture.positions,
        };
        self.put("Modelfile", modelfile.to_string().as_bytes())
    }
}

/// How weights are stored where nobody says how.
fn usual(form: ExportForm, source: &Source) -> Storage {
    match (form, source.weights.stored()) {
        (ExportForm::Merged, BlockType::F32) => Storage::F32,
        (ExportForm::Merged, BlockType::Bf16) => Storage::Bf16,
        _ => Storage::F16,
    }
}

/// What to type next.
fn next(form: ExportForm, out: &Path, source: &Source) -> String {
    let shown = shell_word(out);
    let name = &source.name;
    match form {
        ExportForm::Peft => {
            format!("model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({name:?}), {out:?})")
        }
        ExportForm::Gguf => {
            let base = match &source.origin {
                ModelSource::Gguf(file) => shell_word(file),
                ModelSource::Demo | ModelSource::Directory(_) => "BASE.gguf".to_owned(),
            };
            format!("llama-cli -m {base} --lora {}", shell_word(&out.join(ADAPTER_FILE)))
        }
        ExportForm::GgufMerged => format!("llama-cli -m {}", shell_word(&out.join(MODEL_FILE))),
        ExportForm::Merged => format!("model = AutoModelForCausalLM.from_pretrained({out:?})"),
        ExportForm::Ollama => format!("cd {shown} && ollama create {}", ollama_name(name)),
    }
}

fn check_usage(options: &Options) -> anyhow::Result<()> {
    let refuse = |message: &str| super::usage("export", message);
    let form = options.format;
    if options.adapter_only && form != ExportForm::Ollama {
        return Err(refuse(
            "--adapter-only belongs to --format ollama; --format gguf is the adapter alone",
        ));
    }
    match (form, options.storage) {
        (ExportForm::Peft | ExportForm::Gguf, Some(_)) => {
            Err(refuse("--type is that of merged weights; adapters are f32"))
        }
        (ExportForm::Merged, Some(Storage::Q8_0)) => Err(refuse(
            "--type q8_0 is for GGUF files; transformers loads f32, f16 and bf16",
        )),
        _ => Ok(()),
    }
}

pub fn run(options: Options) -> anyhow::Result<()> {
    check_usage(&options)?;
    let (quiet, form, out) = (options.output.quiet, options.format, &options.out);
    let found = Found::at(&options.run)?;
    // Before a model is fetched and read for nothing.
    let directory = NewDirectory::create(out, "--out", "something already")?;
    let model = match &options.model {
        Some(model) => model.clone(),
        None => found.model()?,
    };
    let console = Console::new(quiet);
    if options.model.is_none() {
        console.line(format!("The adapter belongs to {model}"));
    }
    let interrupt = interrupt::watch("stopping; nothing is kept")?;
    let source = Source::open(&model, Holding::Auto, quiet)?;
    let adapter = Adapter::load(&found.adapter, &source.architecture)
        .with_context(|| format!("{} does not fit the model {}", found.adapter.display(), source.name))?;
    let storage = options.storage.unwrap_or(usual(form, &source));
    let export = Export {
        source: &source,
        adapter: &adapter,
        found: &found,
        directory: &directory,
        console,
        bar: Bar::of_bytes(quiet),
        interrupt,
    };
    let written = match form {
        ExportForm::Peft => export.peft(),
        ExportForm::Gguf => export.lora(),
        ExportForm::GgufMerged => export.gguf(MODEL_FILE, Some(&adapter), storage),
        ExportForm::Merged => export.checkpoint(storage),
        ExportForm::Ollama => export.ollama(storage, options.adapter_only),
    };
    export.bar.finish_and_clear();
    ensure!(
        !export.interrupt.is_set(),
        "stopped: nothing was written to {}",
        out.display()
    );
    written?;
    drop(export);
    directory.finish()?;
    conclude(&options, &source, storage)
}

/// Says what was written, and what to do with it.
fn conclude(options: &Options, source: &Source, storage: Storage) -> anyhow::Result<()> {
    let (form, out) = (options.format, &options.out);
    let mut files: Vec<(String, u64)> = Vec::new();
    let entries = std::fs::read_dir(out).with_context(|| format!("cannot list {}", out.display()))?;
    for entry in entries.filter_map(Result::ok) {
        let bytes = entry.metadata().map_or(0, |found| found.len());
        files.push((entry.file_name().to_string_lossy().into_owned(), bytes));
    }
    files.sort();
    let next = next(form, out, source);
    if options.output.json {
        let merged = !matches!(form, ExportForm::Peft | ExportForm::Gguf);
        let files: Vec<Value> = files
            .iter()
            .map(|(name, bytes)| json!({"name": name, "bytes": bytes}))
            .collect();
        console::print_kept(json!({
            "format": form.name(), "out": out, "base_model": source.name,
            "type": merged.then_some(storage.name()), "files": files, "next": next,
        }))?;
    } else {
        let mut text = format!("{} is written:", out.display());
        for (name, bytes) in &files {
            text += &format!("\n  {name}  {}", indicatif::DecimalBytes(*bytes));
        }
        console::print_kept(format!("{text}\nNext:\n  {next}"))?;
    }
    Ok(())
}
