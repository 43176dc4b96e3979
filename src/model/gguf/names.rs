//! Tensor names and row orders, between GGUF and Hugging Face.
//!
//! Two things differ beside the names. GPT-2's projections are In×Out in Hugging Face's files and Out×In in GGUF. And
//! llama.cpp rotates neighbouring rows of Llama's queries and keys where Hugging Face rotates the two halves of a head,
//! so GGUF holds these rows interleaved; rows are whole in every format, so they move without loss.

use crate::model::architecture::Family;

impl Family {
    /// Names outside the blocks, of GGUF and of Hugging Face, without `.weight` and `.bias`.
    fn outer(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Family::Gpt2 => &[
                ("token_embd", "wte"),
                ("position_embd", "wpe"),
                ("output_norm", "ln_f"),
                ("output", "lm_head"),
            ],
            Family::Llama | Family::Qwen2 | Family::Qwen3 => &[
                ("token_embd", "model.embed_tokens"),
                ("output_norm", "model.norm"),
                ("output", "lm_head"),
            ],
        }
    }

    /// What comes before the block's index in Hugging Face's names; it is `blk.` in GGUF's.
    fn block_prefix(self) -> &'static str {
        match self {
            Family::Gpt2 => "h.",
            Family::Llama | Family::Qwen2 | Family::Qwen3 => "model.layers.",
        }
    }

    /// Names inside a block, of GGUF and of Hugging Face.
    fn inner(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Family::Gpt2 => &[
                ("attn_norm", "ln_1"),
                ("attn_qkv", "attn.c_attn"),
                ("attn_output", "attn.c_proj"),
                ("ffn_norm", "ln_2"),
                ("ffn_up", "mlp.c_fc"),
                ("ffn_down", "mlp.c_proj"),
            ],
            Family::Llama | Family::Qwen2 | Family::Qwen3 => &[
                ("attn_norm", "input_layernorm"),
                ("attn_q", "self_attn.q_proj"),
                ("attn_k", "self_attn.k_proj"),
                ("attn_v", "self_attn.v_proj"),
                ("attn_output", "self_attn.o_proj"),
                ("attn_q_norm", "self_attn.q_norm"),
                ("attn_k_norm", "self_attn.k_norm"),
                ("ffn_norm", "post_attention_layernorm"),
                ("ffn_gate", "mlp.gate_proj"),
                ("ffn_up", "mlp.up_proj"),
                ("ffn_down", "mlp.down_proj"),
            ],
        }
    }

    /// The Hugging Face name of a GGUF tensor: `blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`.
    /// GPT-2's come without the optional `transformer.` before them.
    pub fn hugging_face_name(self, gguf: &str) -> Option<String> {
        let (stem, kind) = split_kind(gguf)?;
        if let Some((block, part)) = split_block(stem, "blk.") {
            let (_, name) = self.inner().iter().find(|(name, _)| *name == part)?;
            return Some(format!("{}{block}.{name}.{kind}", self.block_prefix()));
        }
        let (_, name) = self.outer().iter().find(|(name, _)| *name == stem)?;
        Some(format!("{name}.{kind}"))
    }

    /// The GGUF name of a Hugging Face tensor, the inverse of [`Family::hugging_face_name`].
    pub fn gguf_name(self, hugging_face: &str) -> Option<String> {
        let (stem, kind) = split_kind(hugging_face)?;
        let stem = match self {
            Family::Gpt2 => stem.strip_prefix("transformer.").unwrap_or(stem),
            _ => stem,
        };
        if let Some((block, part)) = split_block(stem, self.block_prefix()) {
            let (name, _) = self.inner().iter().find(|(_, name)| *name == part)?;
            return Some(format!("blk.{block}.{name}.{kind}"));
        }
        let (name, _) = self.outer().iter().find(|(_, name)| *name == stem)?;
        Some(format!("{name}.{kind}"))
    }

    /// Whether a matrix is Out×In in GGUF and In×Out in Hugging Face's files.
    pub fn is_transposed(self, gguf: &str) -> bool {
        let projection = [
            "attn_qkv.weight",
            "attn_output.weight",
            "ffn_up.weight",
            "ffn_down.weight",
        ];
        self == Family::Gpt2 && gguf.starts_with("blk.") && projection.iter().any(|name| gguf.ends_with(name))
    }

    /// Whether the rows of a matrix, or the values of a bias, stand in llama.cpp's rotary order: [`half_split_rows`]
    /// undoes it.
    pub(crate) fn is_interleaved(self, gguf: &str) -> bool {
        self == Family::Llama
            && split_kind(gguf)
                .and_then(|(stem, _)| split_block(stem, "blk."))
                .is_some_and(|(_, part)| part == "attn_q" || part == "attn_k")
    }
}

/// A name without its `.weight` or `.bias`, and which of them it was.
fn split_kind(name: &str) -> Option<(&str, &str)> {
    let (stem, kind) = name.rsplit_once('.')?;
    matches!(kind, "weight" | "bias").then_some((stem, kind))
}

/// The index of a block and the name inside it.
fn split_block<'a>(stem: &'a str, prefix: &str) -> Option<(usize, &'a str)> {
    let (index, part) = stem.strip_prefix(prefix)?.split_once('.')?;
    let block: usize = index.parse().ok()?;
    // Only the canonical spelling: `blk.01` is no second name of block 1.
    (block.to_string() == index).then_some((block, part))
}

/// For every row of a query or key projection in Hugging Face's order, its row in llama.cpp's. `heads` are those of the
/// tensor: query heads or key heads.
pub fn half_split_rows(heads: usize, head_size: usize) -> Vec<usize> {
    let half = head_size / 2;
    (0..heads * head_size)
        .map(|row| {
            let (head, lane) = (row / head_size, row % head_size);
            head * head_size + 2 * (lane % half) + lane / half
        })
        .collect()
}

/// For every row of a query or key projection in llama.cpp's order, its row in Hugging Face's.
pub fn interleaved_rows(heads: usize, head_size: usize) -> Vec<usize> {
    let half = head_size / 2;
    (0..heads * head_size)
        .map(|row| {
            let (head, lane) = (row / head_size, row % head_size);
            head * head_size + lane % 2 * half + lane / 2
        })
        .collect()
}
