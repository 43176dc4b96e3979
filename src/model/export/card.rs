//! The model card of an adapter: a `README.md` whose head the Hugging Face Hub reads, and which says how to load it.
//!
//! It is made of the adapter's own `adapter_config.json` and of a run's `run.json`, so that whoever has the files can make it
//! again. Of the run it says how it was trained, and nothing of where its data was.

use std::fmt::Write;

use serde_json::Value;

/// The name of the file.
pub const CARD_FILE: &str = "README.md";

/// What the card says of a run: a label, and where `run.json` has it, the first that is there.
const FACTS: [(&str, &[&str]); 15] = [
    ("steps", &["/totals/steps"]),
    ("rounds", &["/totals/rounds"]),
    ("local steps of a round", &["/configuration/local_steps"]),
    ("clients waited for", &["/configuration/clients"]),
    ("tokens", &["/totals/tokens"]),
    ("last training loss", &["/totals/loss"]),
    (
        "validation perplexity before",
        &["/valid_before/perplexity", "/totals/first_valid_perplexity"],
    ),
    (
        "validation perplexity after",
        &["/valid_after/perplexity", "/totals/last_valid_perplexity"],
    ),
    ("batch", &["/configuration/batch"]),
    ("longest window, tokens", &["/configuration/seq"]),
    ("learning rate", &["/configuration/optimizer/lr"]),
    ("weight decay", &["/configuration/optimizer/weight_decay"]),
    ("seed", &["/configuration/seed"]),
    ("frozen weights held as", &["/configuration/weights"]),
    ("sflllm", &["/version"]),
];

/// The card of an adapter with this `adapter_config.json`, and the `run.json` of the run it comes from if that is known.
pub fn card(description: &Value, run: Option<&Value>) -> String {
    let base = description["base_model_name_or_path"]
        .as_str()
        .filter(|base| !base.is_empty());
    // A JSON string is a YAML string.
    let quoted = |text: &str| Value::from(text).to_string();
    let mut text = String::from("---\nlibrary_name: peft\n");
    let mut line = |line: String| {
        text.push_str(&line);
        text.push('\n');
    };
    if let Some(base) = base {
        line(format!("base_model: {}", quoted(base)));
    }
    line("pipeline_tag: text-generation".to_owned());
    line("tags:".to_owned());
    if let Some(base) = base {
        line(format!("- {}", quoted(&format!("base_model:adapter:{base}"))));
    }
    line("- lora\n- sflllm\n---\n".to_owned());
    line(format!(
        "# LoRA adapter{}\n",
        base.map_or(String::new(), |base| format!(" for {base}"))
    ));
    let targets: Vec<&str> = match &description["target_modules"] {
        Value::Array(names) => names.iter().filter_map(Value::as_str).collect(),
        name => name.as_str().into_iter().collect(),
    };
    // Where every adapted module has a name of its own, the list says nothing.
    let on = match targets.len() {
        1..=11 => format!(" on {}", targets.join(", ")),
        _ => String::new(),
    };
    line(format!(
        "Rank {}, alpha {}{on}. Trained with sflllm: split federated LoRA fine-tuning.\n",
        description["r"], description["lora_alpha"]
    ));
    line(format!(
        "## Load\n\n```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n\
         base = AutoModelForCausalLM.from_pretrained({})\n\
         model = PeftModel.from_pretrained(base, \"path/to/this/directory\")\n```",
        quoted(base.unwrap_or("path/to/the/base/model"))
    ));
    if let Some(base) = base.filter(|base| !base.contains('/')) {
        line(format!(
            "\n`{base}` is what the base model's directory or file was called, if it is no name on the Hub: give the place of yours."
        ));
    }
    let facts = run.map_or(String::new(), facts);
    if !facts.is_empty() {
        line(format!("\n## Training\n\n| | |\n|---|---|\n{}", facts.trim_end()));
    }
    text
}

fn facts(run: &Value) -> String {
    let mut rows = String::new();
    for (label, places) in FACTS {
        let found = places.iter().find_map(|place| run.pointer(place));
        let shown = match found {
            Some(Value::Number(number)) => rounded(number),
            Some(Value::String(text)) => text.replace(['|', '\n'], " "),
            _ => continue,
        };
        // Writing to a string does not fail.
        let _ = writeln!(rows, "| {label} | {shown} |");
    }
    rows
}

/// A number with the digits that say something.
fn rounded(number: &serde_json::Number) -> String {
    match (number.as_u64(), number.as_f64()) {
        (Some(whole), _) => whole.to_string(),
        (None, Some(value)) => {
            let rounded: f64 = format!("{value:.3e}").parse().unwrap_or(value);
            rounded.to_string()
        }
        (None, None) => number.to_string(),
    }
}
