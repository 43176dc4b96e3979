//! Ollama's `Modelfile`: which files a model is made of, and how it writes a conversation.
//!
//! Ollama's templates are Go's and a model's own are Jinja, so a model's is run on a conversation, and where it writes what
//! a known manner writes, the Go template of that manner stands in the file. It is separate from the export because nothing here
//! reads or writes weights.

use std::fmt::Write;

use crate::data::chat::{Conversation, Message, Render};

/// Ollama reads this many tokens unless a file says otherwise.
const DEFAULT_CONTEXT: usize = 4096;

/// A known way to write conversations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// SmolLM2's, Qwen's and many others'.
    ChatMl,
    /// Llama's from 3 on.
    Llama3,
}

impl Manner {
    const ALL: [Manner; 2] = [Manner::ChatMl, Manner::Llama3];

    /// What stands before and after what a role says.
    fn around(self, role: &str) -> (String, &'static str) {
        match self {
            Manner::ChatMl => (format!("<|im_start|>{role}\n"), "<|im_end|>\n"),
            Manner::Llama3 => (format!("<|start_header_id|>{role}<|end_header_id|>\n\n"), "<|eot_id|>"),
        }
    }

    fn turn(self, role: &str, content: &str) -> String {
        let (before, after) = self.around(role);
        format!("{before}{content}{after}")
    }

    /// As Ollama has it: `.Messages` are all turns, the system's among them.
    fn go_template(self) -> String {
        let turn = self.turn("{{ .Role }}", "{{ .Content }}");
        let (answer, _) = self.around("assistant");
        format!("{{{{ range .Messages }}}}{turn}{{{{ end }}}}{answer}")
    }
}

/// How a model writes conversations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chat {
    pub manner: Manner,
    /// What the system says where nobody says what.
    pub system: Option<String>,
    /// Whether a system's message is written as it is, without additions of the template's own.
    pub plain: bool,
}

impl Chat {
    /// That of a chat template; `None` where it is not known.
    pub fn of(template: &dyn Render) -> Option<Self> {
        const SYSTEM: &str = "Answer in one word.";
        let turns = [("user", "Is it?"), ("assistant", "It is."), ("user", "And now?")];
        let render = |turns: &[(&str, &str)]| {
            let message = |&(role, content): &(&str, &str)| Message::new(role, content);
            let conversation = Conversation {
                messages: turns.iter().map(message).collect(),
                tools: None,
            };
            template.render(&conversation, true).ok()
        };
        let alone = render(&turns)?;
        let with_system = render(&[&[("system", SYSTEM)], &turns[..]].concat())?;
        Manner::ALL.into_iter().find_map(|manner| {
            let (answer, _) = manner.around("assistant");
            let written: String = turns.iter().map(|(role, content)| manner.turn(role, content)).collect();
            let written = written + &answer;
            // What is put before a text is put there by the tokenizer.
            let head = |text: &str| {
                let head = text.strip_suffix(&written)?;
                let begin = template.special_tokens().iter().find_map(|token| {
                    let rest = head.strip_prefix(token.as_str())?;
                    let begins_turn = manner.around("system").0.starts_with(token.as_str());
                    (!begins_turn).then_some(rest)
                });
                Some(begin.unwrap_or(head).to_owned())
            };
            let (alone, with_system) = (head(&alone)?, head(&with_system)?);
            let plain = with_system == manner.turn("system", SYSTEM);
            let (before, after) = manner.around("system");
            let system = alone
                .strip_prefix(before.as_str())
                .and_then(|rest| rest.strip_suffix(after))
                .filter(|_| plain)
                .map(str::to_owned);
            Some(Self { manner, system, plain })
        })
    }
}

/// What a `Modelfile` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Modelfile<'a> {
    /// A first line for whoever reads it.
    pub about: &'a str,
    /// The file with the model, beside the `Modelfile`.
    pub from: &'a str,
    /// The file with an adapter.
    pub adapter: Option<&'a str>,
    pub chat: Option<&'a Chat>,
    /// Texts of the tokens that end an answer.
    pub stop: &'a [String],
    /// The longest text of the model, in tokens.
    pub positions: usize,
}

impl std::fmt::Display for Modelfile<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(formatter, "# {}", self.about.replace('\n', " "))?;
        writeln!(formatter, "FROM ./{}", self.from)?;
        if let Some(adapter) = self.adapter {
            writeln!(formatter, "ADAPTER ./{adapter}")?;
        }
        if let Some(chat) = self.chat {
            writeln!(formatter, "TEMPLATE \"\"\"{}\"\"\"", chat.manner.go_template())?;
            // Nothing can stand for three quotation marks in it.
            if let Some(system) = chat.system.as_deref().filter(|system| !system.contains("\"\"\"")) {
                writeln!(formatter, "SYSTEM \"\"\"{system}\"\"\"")?;
            }
        } else {
            writeln!(
                formatter,
                "# No TEMPLATE: the model has no chat template, or one that is not known here. Ollama may know the one in the\n\
                 # GGUF file; without one a prompt is continued as it is."
            )?;
        }
        for stop in self.stop {
            writeln!(formatter, "PARAMETER stop \"{stop}\"")?;
        }
        if self.positions < DEFAULT_CONTEXT {
            writeln!(formatter, "PARAMETER num_ctx {}", self.positions)?;
        }
        Ok(())
    }
}

/// A name for `ollama create`, of a model's.
pub fn ollama_name(model: &str) -> String {
    let last = model.rsplit('/').next().unwrap_or(model);
    let mut name = String::new();
    for letter in last.chars() {
        let fits = letter.is_ascii_alphanumeric() || matches!(letter, '-' | '_' | '.');
        // Writing to a string does not fail.
        let _ = name.write_char(if fits { letter.to_ascii_lowercase() } else { '-' });
    }
    format!("{}-tuned", name.trim_matches(['-', '_', '.']))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::template::Template;

    fn chat(jinja: &str, special: &[&str]) -> Option<Chat> {
        let special = special.iter().map(|token| (*token).to_owned()).collect();
        let named = [("bos_token".to_owned(), "<|begin_of_text|>".to_owned())];
        let template = Template::new(jinja, named.into_iter().collect(), special).unwrap();
        Chat::of(&template)
    }

    fn shipped(name: &str) -> String {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures/chat")
            .join(name);
        std::fs::read_to_string(path).unwrap()
    }

    #[test]
    fn templates_that_models_ship_are_recognised() {
        let chatml = ["<|im_start|>", "<|im_end|>"];
        let smollm2 = chat(&shipped("smollm2.jinja"), &chatml).unwrap();
        assert_eq!(smollm2.manner, Manner::ChatMl);
        assert!(smollm2.plain && smollm2.system.unwrap().contains("SmolLM"));
        let qwen2 = chat(&shipped("qwen2_5.jinja"), &chatml).unwrap();
        assert!(qwen2.plain && qwen2.system.unwrap().starts_with("You are Qwen"));
        let qwen3 = chat(&shipped("qwen3.jinja"), &chatml).unwrap();
        assert_eq!((qwen3.manner, qwen3.system, qwen3.plain), (Manner::ChatMl, None, true));
        let llama3 = chat(
            &shipped("llama3.jinja"),
            &[
                "<|begin_of_text|>",
                "<|start_header_id|>",
                "<|end_header_id|>",
                "<|eot_id|>",
            ],
        )
        .unwrap();
        assert_eq!(llama3.manner, Manner::Llama3);
        assert_eq!(
            chat(
                "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
                &[]
            ),
            None
        );
        assert_eq!(chat("{{ raise_exception('no') }}", &[]), None);
    }

    #[test]
    fn a_modelfile_says_what_ollama_needs() {
        let chat = Chat {
            manner: Manner::ChatMl,
            system: Some("You are small.".to_owned()),
            plain: true,
        };
        let stop = ["<|im_end|>".to_owned()];
        let file = Modelfile {
            about: "a model",
            from: "model.gguf",
            adapter: Some("adapter.gguf"),
            chat: Some(&chat),
            stop: &stop,
            positions: 1024,
        };
        assert_eq!(
            file.to_string(),
            "# a model\nFROM ./model.gguf\nADAPTER ./adapter.gguf\n\
             TEMPLATE \"\"\"{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n\"\"\"\n\
             SYSTEM \"\"\"You are small.\"\"\"\nPARAMETER stop \"<|im_end|>\"\nPARAMETER num_ctx 1024\n"
        );
        let bare = Modelfile {
            adapter: None,
            chat: None,
            positions: 8192,
            ..file
        }
        .to_string();
        assert!(!bare.contains("\nTEMPLATE") && !bare.contains("num_ctx") && !bare.contains("ADAPTER"));
        assert_eq!(ollama_name("HuggingFaceTB/SmolLM2-135M"), "smollm2-135m-tuned");
        assert_eq!(ollama_name("my model"), "my-model-tuned");
    }
}
