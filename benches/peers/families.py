"""Random models of every family with random adapters: sflllm's command line against transformers and peft.

    python families.py PATH/TO/sflllm [--seeds 8] [--first 0] [--devices cpu gpu]

A seed draws a family (GPT-2, Llama, Llama with llama3 scaling, Qwen2, Qwen3), sizes that nothing divides, weights, a subset of the
targets with rank and alpha, and eight examples. Then, on each device with `--weights f32`:

- `eval` with the adapter against transformers + peft in float64;
- ten losses of `train` (AdamW, one batch of eight) against torch.optim.AdamW;
- the same ten losses of `serve` and `join` on loopback at every cut;
- the adapter that `train` wrote, read by peft, against `eval` of it.

Prints a line for each and last the largest relative difference of each kind; ends with 1 where one is above its bound.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "fixtures"))
from peft_truth import examples, forward, open_model, settle, shrink_b, train, write_examples  # noqa: E402

BOUNDS = dict(eval=2e-5, train=2e-4, split=2e-4, export=2e-5)
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def draw_config(draw, family):
    blocks, vocab = draw.choice([2, 3, 4]), draw.randrange(40, 300)
    if family == "gpt2":
        heads = draw.choice([1, 3, 5])
        width = heads * draw.randrange(3, 14)
        return GPT2Config(
            n_embd=width, n_head=heads, n_layer=blocks, vocab_size=vocab, n_positions=64, bos_token_id=1, eos_token_id=1,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    kv_heads = draw.choice([1, 2, 3])
    heads = kv_heads * draw.choice([1, 2, 3, 5])
    head_size = 2 * draw.randrange(2, 10)
    width = heads * (head_size if family == "qwen2" else draw.randrange(4, 20))
    rope = dict(rope_type="default", rope_theta=draw.choice([500.0, 10000.0, 1e6]))
    if family == "llama3":
        rope.update(
            rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
        )
    common = dict(
        hidden_size=width, intermediate_size=draw.randrange(20, 120), num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocab, max_position_embeddings=64, rope_parameters=rope,
        tie_word_embeddings=draw.random() < 0.5, bos_token_id=1, eos_token_id=2,
    )
    if family == "qwen2":
        return Qwen2Config(**common)
    if family == "qwen3":
        return Qwen3Config(head_dim=head_size, **common)
    return LlamaConfig(head_dim=head_size, **common)


def make(folder, seed):
    """Model, adapter and data; gives back a line that says what they are."""
    draw = random.Random(seed)
    family = ["gpt2", "llama", "llama3", "qwen2", "qwen3"][seed % 5]
    config = draw_config(draw, family)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape)
            if ("norm" in name or "ln_" in name) and name.endswith("weight"):
                tensor.copy_(1.0 + 0.2 * noise)
            else:
                tensor.copy_((0.3 if name.endswith("bias") else 0.14) * noise)
    (folder / "model").mkdir(parents=True)
    config.save_pretrained(folder / "model")
    state = {k: v.detach().contiguous().clone() for k, v in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file(state, folder / "model" / "model.safetensors", metadata={"format": "pt"})

    names = ["c_attn", "c_proj", "c_fc"] if family == "gpt2" else SEVEN
    targets = sorted(draw.sample(names, draw.randrange(1, len(names) + 1)))
    rank, alpha = draw.randrange(1, 7), draw.randrange(1, 20)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, bias="none",
        init_lora_weights=False, fan_in_fan_out=family == "gpt2",
    )
    adapted = get_peft_model(model, lora)
    shrink_b(adapted)
    adapted.save_pretrained(folder / "adapter")
    lines = examples([draw.randrange(2, 65) for _ in range(8)], config.vocab_size, seed + 1000)
    write_examples(folder / "data.jsonl", lines)
    return config, lines, f"{family}, {config.num_hidden_layers} blocks, rank {rank}, alpha {alpha}, {' '.join(targets)}"


def step_losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]


def run(*arguments):
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True)
    assert done.returncode == 0, (arguments, done.stderr)
    return done.stdout


def split(program, common, folder, cut, device):
    """Ten losses of a server and one client."""
    out = folder / f"split-{device}-{cut}"
    serve = [program, "serve", *common, "--device", device, "--split", cut, "--clients", 1, "--rounds", 1]
    serve += ["--local-steps", 10, "--wire", "f32", "--listen", "http://127.0.0.1:0", "--token", "t", "--out", out]
    server = subprocess.Popen([str(a) for a in serve], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    said = []
    for line in server.stderr:
        said.append(line)
        if "listening on " in line:
            origin = line.split("listening on ")[1].strip().rstrip("/")
            break
    else:
        raise AssertionError("".join(said))
    joined = subprocess.run(
        [str(program), "join", f"{origin}/#t=t", "--data", str(folder / "data.jsonl"), "--device", device],
        capture_output=True, text=True,
    )
    rest = server.stderr.read()
    codes = joined.returncode, server.wait()
    assert codes == (0, 0), (codes, joined.stderr, "".join(said) + rest)
    return step_losses(out)


def worst(found, expected):
    assert len(found) == len(expected), (found, expected)
    return max(abs(a / b - 1.0) for a, b in zip(found, expected))


def check(program, folder, seed, devices, largest):
    config, lines, what = make(folder, seed)
    print(f"seed {seed}: {what}", flush=True)
    case = dict(batch=8, lr=1e-3, weight_decay=0.01, clip=None)
    with torch.no_grad():
        expected = float(forward(open_model(folder, torch.float64, trainable=False), lines)[1])
    losses, _, _, _ = train(folder, lines, case, torch.float64)
    model = ["--model", folder / "model", "--weights", "f32"]
    common = [*model, "--init-adapter", folder / "adapter", "--batch", 8, "--seq", 64, "--no-shuffle"]
    common += ["--lr", case["lr"], "--schedule", "constant", "--warmup", 0]
    for device in devices:
        found = dict()
        data = ["--data", folder / "data.jsonl", "--device", device]
        value = json.loads(run(program, "eval", *model, *data, "--adapter", folder / "adapter", "--json"))
        found["eval"] = worst([value["loss"]], [expected])
        out = folder / f"train-{device}"
        run(program, "train", *common, *data, "--steps", 10, "--out", out)
        found["train"] = worst(step_losses(out), losses)
        value = json.loads(run(program, "eval", *model, *data, "--adapter", out / "adapter", "--json"))
        shutil.copytree(out / "adapter", folder / f"exported-{device}")
        with torch.no_grad():
            theirs = open_model(folder, torch.float64, trainable=False, adapter=f"exported-{device}")
            found["export"] = worst([value["loss"]], [float(forward(theirs, lines)[1])])
        found["split"] = max(
            worst(split(program, common, folder, cut, device), losses) for cut in range(1, config.num_hidden_layers)
        )
        for kind, value in found.items():
            largest[kind] = max(largest.get(kind, 0.0), value)
        print(f"  {device}: " + ", ".join(f"{kind} {value:.1e}" for kind, value in found.items()), flush=True)


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("program", type=Path)
    arguments.add_argument("--seeds", type=int, default=8)
    arguments.add_argument("--first", type=int, default=0)
    arguments.add_argument("--devices", nargs="+", default=["cpu", "gpu"])
    arguments = arguments.parse_args()
    disable_progress_bar()
    settle()
    largest = {}
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            check(arguments.program.resolve(), Path(folder), seed, arguments.devices, largest)
    print(json.dumps(dict(seeds=arguments.seeds, largest=largest, bounds=BOUNDS)))
    sys.exit(any(largest[kind] > bound for kind, bound in BOUNDS.items()))


if __name__ == "__main__":
    main()
