"""Holds what `sflllm export` writes against transformers, peft and llama.cpp.

    cargo build --release --bins --example logits
    python export_check.py SFLLLM LOGITS [--smollm2 SmolLM2-135M-Instruct.Q4_1.gguf]

`SFLLLM` and `LOGITS` are the two programs, `target/release/sflllm` and `target/release/examples/logits`. For a small random model
of every family, with a random adapter on every projection whose effect is as large as the logits themselves, it prints the
largest differences of logits, relative to the largest logit of the truth (transformers + peft in float32):

* `ours`: this program with the adapter;
* `peft`: peft with the exported adapter; `merged`: transformers with the exported directory;
* `lora`: llama.cpp on the exported base with the exported GGUF LoRA; `gguf`: llama.cpp on the exported merged file, f32;
* `q8_0`: the same in 8 bits, as the least cosine of a row.

`change` is the least cosine over rows between llama.cpp's change of logits by the LoRA and the truth's.

With `--smollm2` a LoRA is given to llama.cpp on that model in f32, and on the file's own 4-bit weights, where llama.cpp rounds
activations to 8 bits as well: there the figures are cosines of all logits with this program's, `base_q4` without the adapter,
`lora_q4` with it, and `change_q4` of the difference, in which llama.cpp's rounding of both weighs most.
It ends with 1 if a bound in `BOUNDS` is missed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import torch
from llama_cpp import GGML_TYPE_F32, Llama
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.utils.logging import disable_progress_bar

BOUNDS = dict(ours=2e-5, peft=2e-5, merged=2e-5, lora=1e-3, gguf=1e-3, q8_0=0.995, change=0.9999, lora_q4=0.999, gguf_f16=0.9999, gguf_q8_0=0.995)
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2 = ["c_attn", "c_proj", "c_fc"]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEXT = "Name three fruits: apples, 12 pears and 345 plums. It's a naïve question, isn't it?\n\n  Yes, it is."
VOCAB = 512

rotary = dict(max_position_embeddings=256, vocab_size=VOCAB, num_hidden_layers=3, rms_norm_eps=1e-5)
CASES = {
    "gpt2": (GPT2Config(n_layer=3, n_embd=96, n_head=4, n_inner=160, n_positions=256, vocab_size=VOCAB), "gpt-2", GPT2),
    "llama": (
        LlamaConfig(
            **rotary, hidden_size=96, intermediate_size=160, num_attention_heads=6, num_key_value_heads=2, head_dim=32,
            tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e5),
        ),
        "smollm",
        SEVEN,
    ),
    "llama3": (
        LlamaConfig(
            **rotary, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
            tie_word_embeddings=False,
            rope_parameters=dict(
                rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        ),
        "llama-bpe",
        SEVEN,
    ),
    "qwen2": (
        Qwen2Config(
            **rotary, hidden_size=96, intermediate_size=128, num_attention_heads=3, num_key_value_heads=1,
            tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e6),
        ),
        "qwen2",
        SEVEN,
    ),
    "qwen3": (
        Qwen3Config(
            **rotary, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
            tie_word_embeddings=False, rope_parameters=dict(rope_type="default", rope_theta=1e6),
        ),
        "qwen2",
        SEVEN,
    ),
}


def tokenizer(rule):
    """A small byte-level BPE tokenizer that splits by a rule of llama.cpp's."""
    made = Tokenizer(models.BPE(ignore_merges=rule == "llama-bpe"))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    after = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if rule == "gpt-2":
        made.pre_tokenizer = whole
    elif rule == "smollm":
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    else:
        split = pre_tokenizers.Split(Regex(LLAMA3 if rule == "llama-bpe" else QWEN2), behavior="isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, after])
    if rule == "qwen2":
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT, "the quick brown fox jumps over the lazy dog"] * 2,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False),
    )
    made.add_special_tokens([AddedToken("<|im_start|>", normalized=False), AddedToken("<|im_end|>", normalized=False)])
    made.add_tokens([AddedToken("<think>", normalized=False)])
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=template
    )


def randomise(model, seed, adapter):
    """Weights that do something: norms around 1, and a B as large as A, so that the adapter changes every logit."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ("lora_" in name) != adapter:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if adapter:
                parameter.copy_(noise * (0.08 if "lora_B" in name else parameter.shape[1] ** -0.5))
            elif parameter.ndim == 1:
                parameter.copy_(noise * 0.1 + ("bias" not in name))
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)


def run(*words):
    subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def of_transformers(model, ids):
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].float().numpy()


def of_llama_cpp(file, ids, lora=None):
    # Keys and values are f16 unless asked otherwise, which alone is 1e-3 of the largest logit here.
    model = Llama(
        str(file), lora_path=lora and str(lora), n_ctx=256, n_batch=256, n_threads=2, logits_all=True, verbose=False,
        type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32,
    )
    model.eval(ids)
    return numpy.array(model.scores[: len(ids)], dtype=numpy.float32)


def tokens_of_llama_cpp(file):
    return Llama(str(file), vocab_only=True, verbose=False).tokenize(TEXT.encode(), add_bos=False, special=True)


def relative(found, expected):
    return float(numpy.abs(found - expected).max() / numpy.abs(expected).max())


def cosine(found, expected):
    a, b = found.astype(numpy.float64), expected.astype(numpy.float64)
    return float(((a * b).sum(1) / numpy.linalg.norm(a, axis=1) / numpy.linalg.norm(b, axis=1)).min())


def of_all(found, expected):
    """The cosine of all rows as one."""
    return cosine(found.reshape(1, -1), expected.reshape(1, -1))


class Exports:
    """The exports of one adapter, made when they are asked for."""

    def __init__(self, programs, folder, base, adapter):
        self.sflllm, self.program = programs
        self.folder, self.base, self.adapter = folder, base, adapter

    def __call__(self, form, *options):
        out = self.folder / "-".join([form, *(option.strip("-") for option in options)])
        if not out.exists():
            run(self.sflllm, "export", self.adapter, "--model", self.base, "--format", form, "--out", out, *options)
        return out

    def logits(self, ids, adapter=True):
        (self.folder / "ids.json").write_text(json.dumps(ids))
        out = self.folder / "logits.npy"
        run(self.program, self.base, self.folder / "ids.json", out, *([self.adapter] if adapter else []))
        return numpy.load(out)


def family(name, programs, folder):
    config, rule, targets = CASES[name]
    tokens = tokenizer(rule)
    config.bos_token_id, config.eos_token_id = tokens.bos_token_id, tokens.eos_token_id
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(base, 1, adapter=False)
    base.save_pretrained(folder / "base")
    tokens.save_pretrained(folder / "base")
    ids = tokens(TEXT, add_special_tokens=False).input_ids
    without = of_transformers(base, ids)
    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=name == "gpt2", task_type="CAUSAL_LM",
        # One alpha and one rank of their own, which a GGUF LoRA can hold only in its B.
        rank_pattern={targets[0]: 6}, alpha_pattern={targets[1]: 3},
    )
    adapted = get_peft_model(base, lora)
    randomise(adapted, 2, adapter=True)
    adapted.save_pretrained(folder / "adapter")
    truth = of_transformers(adapted, ids)

    exports = Exports(programs, folder, folder / "base", folder / "adapter")
    again = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    both = exports("ollama", "--adapter-only", "--type", "f32")
    merged = exports("gguf-merged", "--type", "f32") / "model.gguf"
    plain, with_lora = (of_llama_cpp(both / "base.gguf", ids, lora) for lora in (None, both / "adapter.gguf"))
    same_ids = tokens_of_llama_cpp(merged) == ids
    reloaded = AutoTokenizer.from_pretrained(exports("merged"))(TEXT, add_special_tokens=False).input_ids == ids
    # A base that is a GGUF file gives the same directory.
    of_gguf = Exports(programs, folder / "of-gguf", both / "base.gguf", folder / "adapter")
    (folder / "of-gguf").mkdir()
    from_gguf = AutoModelForCausalLM.from_pretrained(of_gguf("merged", "--type", "f32"), dtype=torch.float32)
    return dict(
        effect=relative(truth, without),
        ours=relative(exports.logits(ids), truth),
        peft=relative(of_transformers(PeftModel.from_pretrained(again, exports("peft")), ids), truth),
        merged=max(
            relative(of_transformers(model, ids), truth)
            for model in (AutoModelForCausalLM.from_pretrained(exports("merged"), dtype=torch.float32), from_gguf)
        ),
        lora=relative(with_lora, truth),
        gguf=relative(of_llama_cpp(merged, ids), truth),
        q8_0=cosine(of_llama_cpp(exports("gguf-merged", "--type", "q8_0") / "model.gguf", ids), truth),
        change=cosine(with_lora - plain, truth - without),
        ids=bool(same_ids and reloaded),
    )


def smollm2(file, programs, folder):
    """The file's own 4-bit weights: both programs read the same, and llama.cpp rounds activations to 8 bits."""
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    adapted = get_peft_model(read, LoraConfig(r=8, lora_alpha=16, target_modules=SEVEN, task_type="CAUSAL_LM"))
    # B is zero as yet: the model itself in f32, as llama.cpp reads it.
    adapted.save_pretrained(folder / "nothing")
    run(programs[0], "export", folder / "nothing", "--model", file, "--format", "gguf-merged", "--type", "f32",
        "--out", folder / "f32")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.12)
    adapted.save_pretrained(folder / "adapter")
    exports = Exports(programs, folder, file, folder / "adapter")
    ids = tokens_of_llama_cpp(file)
    truth = of_transformers(adapted, ids)
    with adapted.disable_adapter():
        without = of_transformers(adapted, ids)
    lora = exports("gguf") / "adapter.gguf"
    plain, with_lora = of_llama_cpp(file, ids), of_llama_cpp(file, ids, lora)
    in_f32, in_f32_with_lora = (of_llama_cpp(folder / "f32" / "model.gguf", ids, lora) for lora in (None, lora))
    ours, ours_plain = exports.logits(ids), exports.logits(ids, adapter=False)
    merged = AutoModelForCausalLM.from_pretrained(exports("merged", "--type", "f32"), dtype=torch.float32)
    gguf = lambda *options: of_llama_cpp(exports("gguf-merged", *options) / "model.gguf", ids)
    return dict(
        effect=relative(truth, without),
        ours=relative(ours, truth),
        merged=relative(of_transformers(merged, ids), truth),
        lora=relative(in_f32_with_lora, truth),
        gguf=relative(gguf("--type", "f32"), truth),
        change=cosine(in_f32_with_lora - in_f32, truth - without),
        gguf_f16=of_all(gguf("--type", "f16"), truth),
        gguf_q8_0=of_all(gguf("--type", "q8_0"), truth),
        base_q4=of_all(plain, ours_plain),
        lora_q4=of_all(with_lora, ours),
        change_q4=of_all(with_lora - plain, ours - ours_plain),
    )


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("programs", nargs=2, type=lambda path: Path(path).resolve())
    arguments.add_argument("--smollm2", type=Path)
    arguments.add_argument("--family", choices=list(CASES))
    arguments = arguments.parse_args()
    disable_progress_bar()
    torch.manual_seed(0)
    missed = []
    names = [arguments.family] if arguments.family else list(CASES)
    with tempfile.TemporaryDirectory() as folder:
        results = {}
        for name in names:
            (Path(folder) / name).mkdir()
            results[name] = family(name, arguments.programs, Path(folder) / name)
        if arguments.smollm2:
            (Path(folder) / "smollm2").mkdir()
            results["smollm2"] = smollm2(arguments.smollm2, arguments.programs, Path(folder) / "smollm2")
    for name, figures in results.items():
        shown = {key: value if isinstance(value, bool) else float(f"{value:.6g}") for key, value in figures.items()}
        print(name, json.dumps(shown))
        if figures.get("ids") is False:
            missed.append(f"{name}: token ids")
        if figures["effect"] < 0.2:
            missed.append(f"{name}: the adapter changes too little to be seen")
        for key, bound in BOUNDS.items():
            found = figures.get(key)
            if found is not None and (found < bound if bound > 0.5 else found > bound):
                missed.append(f"{name}: {key} {found}")
    print("all within bounds" if not missed else f"missed: {missed}")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
