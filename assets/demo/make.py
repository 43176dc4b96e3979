"""Makes the demo's model, tokenizer and data from nothing but the word lists in demo_text.py.

    python make.py           # writes config.json, model.safetensors, tokenizer.json, train/valid/test.txt beside it
    python make.py check     # fine-tunes the result with peft as the demo does, and prints what that gains

See README.md for versions and times.
"""

import json
import math
import os
import random
import sys
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils.logging import disable_progress_bar

import demo_text

HERE = Path(__file__).resolve().parent
SEED = 2025
THREADS = 1
END = "<|endoftext|>"

VOCAB = 1536
WIDTH, HEADS, BLOCKS, POSITIONS = 128, 4, 4, 256
WINDOW, BATCH, STEPS = 128, 8, 1200
MATRIX_RATE, VECTOR_RATE, WARMUP = 0.02, 3e-3, 40
PARAGRAPHS = 32_000
LINES = dict(train=3000, valid=200, test=200)


def write_data():
    for part, lines in LINES.items():
        text = demo_text.restaurants(SEED, part, lines)
        (HERE / f"{part}.txt").write_text("\n".join(text) + "\n", encoding="utf-8")


def write_tokenizer(paragraphs):
    """Byte-level BPE. As in GPT-2's own file, the end-of-text token comes last and is listed in the vocabulary too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(paragraphs, trainer)
    tokenizer.add_special_tokens([END])
    layout = json.loads(tokenizer.to_str())
    layout["model"]["vocab"][END] = VOCAB - 1
    assert layout["added_tokens"][0]["id"] == VOCAB - 1, layout["added_tokens"]
    (HERE / "tokenizer.json").write_text(json.dumps(layout, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def windows(tokenizer, paragraphs):
    """Rows of WINDOW tokens, each beginning with the beginning of a paragraph; the last paragraph is cut.

    Every second row has the end-of-text token first, as before any other paragraph. One paragraph in ten stops early:
    whatever stood before an end of text, a new paragraph follows it.
    """
    end = tokenizer.token_to_id(END)
    draw = random.Random(SEED)
    rows, row = [], []
    for start in range(0, len(paragraphs), 10_000):
        for encoded in tokenizer.encode_batch(paragraphs[start : start + 10_000]):
            ids = encoded.ids
            if draw.random() < 0.1:
                ids = ids[: draw.randint(1, len(ids))]
            row += ids + [end]
            if len(row) >= WINDOW:
                rows.append(row[:WINDOW])
                row = [end] if len(rows) % 2 else []
    return torch.tensor(rows, dtype=torch.int16)


@torch.no_grad()
def start_copying(model, draw):
    """Sets three attention heads so that the untrained model can already copy; training then refines them.

    A model this small and shortly trained would hardly find copying by itself (it takes two heads in series: one that
    looks at the previous token, one that looks for the place where the present token came before), and following
    slots needs it. The residual stream is divided for this: 64 dimensions hold the token, 32 the token before it and
    32 the position, as sines and cosines, where going back by one is a rotation.
    """
    size = WIDTH // HEADS
    assert (WIDTH, size) == (128, 32)
    token, before, place = slice(0, 64), slice(64, 96), slice(96, 128)
    body = model.transformer

    body.wte.weight.normal_(0.0, 0.01, generator=draw)
    body.wte.weight[:, token].normal_(0.0, 0.05, generator=draw)
    frequency = 0.03 * 100.0 ** (torch.arange(size // 2) / (size // 2 - 1))
    angle = torch.arange(POSITIONS).unsqueeze(1) * frequency
    body.wpe.weight.normal_(0.0, 0.005, generator=draw)
    body.wpe.weight[:, place] = 0.07 * torch.cat([torch.sin(angle), torch.cos(angle)], dim=1)

    def place_head(attention, head, query, key, value, output):
        columns = slice(head * size, (head + 1) * size)
        for part, matrix in enumerate([query, key, value]):
            attention.c_attn.weight[:, part * WIDTH : (part + 1) * WIDTH][:, columns] = matrix
        attention.c_proj.weight[columns] = output

    def matrix(rows, values):
        whole = torch.zeros(WIDTH, size)
        whole[rows] = values
        return whole

    # Random orthogonal axes: the first half of them is the signature by which tokens are compared.
    axes = torch.linalg.qr(torch.randn(64, 64, generator=draw))[0]
    signature = axes[:, :size]
    sine, cosine = torch.diag(torch.sin(frequency)), torch.diag(torch.cos(frequency))
    back_by_one = torch.cat([torch.cat([cosine, sine], dim=1), torch.cat([-sine, cosine], dim=1)])
    place_head(
        body.h[0].attn,
        0,
        query=matrix(place, 1.6 * back_by_one),
        key=matrix(place, 1.6 * torch.eye(size)),
        value=matrix(token, signature),
        output=0.05 * matrix(before, torch.eye(size)).T,
    )
    for head in range(2):
        half = axes[:, head * size : (head + 1) * size]
        place_head(
            body.h[1].attn,
            head,
            query=matrix(token, 1.5 * signature),
            key=matrix(before, 1.5 * torch.eye(size)),
            value=matrix(token, half),
            output=0.15 * matrix(token, half).T,
        )


def config():
    return GPT2Config(
        vocab_size=VOCAB,
        n_embd=WIDTH,
        n_head=HEADS,
        n_layer=BLOCKS,
        n_positions=POSITIONS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=VOCAB - 1,
        eos_token_id=VOCAB - 1,
        architectures=["GPT2LMHeadModel"],
    )


class Muon:
    """Momentum whose update is made orthogonal by Newton-Schulz iterations (K. Jordan, 2024), for the matrices inside
    the blocks. All matrices of one shape go through the iterations together; q, k and v count as three."""

    def __init__(self, model, momentum=0.95):
        self.momentum = momentum
        square, wide = [], []
        for block in model.transformer.h:
            square += [(block.attn.c_attn.weight, part) for part in range(3)] + [(block.attn.c_proj.weight, 0)]
            wide += [(block.mlp.c_fc.weight, 0), (block.mlp.c_proj.weight, 0)]
        self.groups = [square, wide]
        self.weights = {id(weight) for group in self.groups for weight, _ in group}
        self.velocity = [None, None]

    @staticmethod
    def slice(tensor, part):
        rows, columns = tensor.shape
        if columns == 3 * rows:
            return tensor[:, part * rows : (part + 1) * rows]
        return tensor.T if rows > columns else tensor

    @torch.no_grad()
    def step(self, rate):
        for index, group in enumerate(self.groups):
            gradient = torch.stack([self.slice(weight.grad, part) for weight, part in group])
            if self.velocity[index] is None:
                self.velocity[index] = torch.zeros_like(gradient)
            velocity = self.velocity[index].lerp_(gradient, 1 - self.momentum)
            x = gradient.lerp(velocity, self.momentum)
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):
                square = x @ x.mT
                x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
            for (weight, part), update in zip(group, x):
                self.slice(weight, part).mul_(1 - 0.01 * rate).sub_(update, alpha=rate)


def pretrain(rows, steps):
    torch.manual_seed(SEED)
    model = GPT2LMHeadModel(config()).train()
    start_copying(model, torch.Generator().manual_seed(SEED))
    for block in model.transformer.h:
        block.mlp.act = torch.nn.GELU(approximate="tanh")  # the same function as gelu_new, in one pass
    print("parameters", sum(p.numel() for p in model.parameters()), "windows", len(rows), flush=True)
    muon = Muon(model)
    others = [p for p in model.parameters() if id(p) not in muon.weights]
    adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    draw = torch.Generator().manual_seed(SEED)
    order = torch.randperm(len(rows), generator=draw)
    started, shown = time.time(), []
    for step in range(steps):
        rate = max(0.0, min((step + 1) / WARMUP, 0.02 + 0.98 * (steps - step) / max(1, steps - WARMUP)))
        chosen = torch.stack([order[(step * BATCH + i) % len(rows)] for i in range(BATCH)])
        batch = rows[chosen].long()
        # Half of the batches start later than position 0, so that every position is trained by short windows.
        offset = int(torch.randint(0, POSITIONS - WINDOW + 1, (1,), generator=draw)) if step % 2 else 0
        positions = torch.arange(offset, offset + WINDOW).unsqueeze(0)
        logits = model(input_ids=batch, position_ids=positions, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), batch[:, 1:].reshape(-1))
        model.zero_grad(set_to_none=True)
        loss.backward()
        muon.step(MATRIX_RATE * rate)
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        adam.param_groups[0]["lr"] = VECTOR_RATE * rate
        adam.step()
        shown.append(float(loss.detach()))
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} loss {sum(shown) / len(shown):.4f} {time.time() - started:.0f} s", flush=True)
            shown = []
            if (step + 1) % 250 == 0:
                save(model)
    return model.eval()


def save(model):
    model.config.save_pretrained(HERE)
    state = {k: v.detach().half().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(state, HERE / "model.safetensors", metadata={"format": "pt"})
    (HERE / "model.safetensors").chmod(0o644)


def load():
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    return tokenizer, GPT2LMHeadModel.from_pretrained(HERE, dtype=torch.float32).eval()


# ---------------------------------------------------------------------------------------------- check


def encode(tokenizer, line):
    """`meaning`, end of text, a space and the reference, end of text; the loss is on the reference and its end."""
    end = tokenizer.token_to_id(END)
    meaning, reference = line.split("||")
    prompt = tokenizer.encode(meaning).ids + [end]
    completion = tokenizer.encode(" " + reference).ids + [end]
    return prompt, completion


def collate(pairs):
    longest = max(len(p) + len(c) for p, c in pairs)
    ids = torch.zeros(len(pairs), longest, dtype=torch.long)
    labels = torch.full((len(pairs), longest), -100, dtype=torch.long)
    for row, (p, c) in enumerate(pairs):
        ids[row, : len(p) + len(c)] = torch.tensor(p + c)
        labels[row, len(p) : len(p) + len(c)] = torch.tensor(c)
    return ids, labels


def summed_loss(model, pairs):
    ids, labels = collate(pairs)
    logits = model(input_ids=ids, use_cache=False).logits
    flat = logits[:, :-1].reshape(-1, logits.shape[-1])
    loss = F.cross_entropy(flat, labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum")
    return loss, sum(len(c) for _, c in pairs)


@torch.no_grad()
def perplexity(model, pairs):
    total, tokens = 0.0, 0
    for start in range(0, len(pairs), 20):
        loss, count = summed_loss(model, pairs[start : start + 20])
        total, tokens = total + float(loss), tokens + count
    return math.exp(total / tokens)


@torch.no_grad()
def continue_text(model, tokenizer, prompt, limit=60):
    """Greedy continuation up to the end of text."""
    ids = list(prompt)
    end = tokenizer.token_to_id(END)
    for _ in range(limit):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == end:
            break
    return tokenizer.decode(ids[len(prompt) :]).strip()


def check(rank=8, alpha=16, targets=("c_attn", "c_proj", "c_fc"), rate=1e-2, batch=8, steps=150, samples=6):
    """Two clients' batches of four as one batch of eight; the learning rate falls linearly to zero."""
    from peft import LoraConfig, get_peft_model

    tokenizer, model = load()
    parts = {}
    for part in LINES:
        lines = (HERE / f"{part}.txt").read_text(encoding="utf-8").splitlines()
        parts[part] = [encode(tokenizer, line) for line in lines]
        lengths = [len(p) + len(c) for p, c in parts[part]]
        print(part, len(lines), "lines, tokens mean", round(sum(lengths) / len(lengths), 1), "longest", max(lengths))
    before = perplexity(model, parts["valid"])
    prompts = [p for p, _ in parts["test"][:samples]]
    plain = [continue_text(model, tokenizer, p) for p in prompts]

    torch.manual_seed(SEED)
    model = get_peft_model(
        model,
        LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules=list(targets), fan_in_fan_out=True),
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    pairs = list(parts["train"])
    random.Random(SEED).shuffle(pairs)
    for step in range(steps):
        chosen = [pairs[(step * batch + i) % len(pairs)] for i in range(batch)]
        loss, count = summed_loss(model, chosen)
        optimiser.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimiser.zero_grad()
        (loss / count).backward()
        optimiser.step()
        if (step + 1) % 50 == 0 and step + 1 < steps:
            print("step", step + 1, "validation perplexity", round(perplexity(model, parts["valid"]), 3), flush=True)
    after = perplexity(model, parts["valid"])
    print("test perplexity", round(perplexity(model, parts["test"]), 3))
    print(f"validation perplexity {before:.2f} -> {after:.2f}, {before / after:.1f} times lower")
    for prompt, old in zip(prompts, plain):
        print("\n ", tokenizer.decode(prompt))
        print("  before:", old)
        print("  after: ", continue_text(model, tokenizer, prompt))


def make(steps):
    started = time.time()
    write_data()
    paragraphs = demo_text.pretraining(SEED, PARAGRAPHS)
    write_tokenizer(paragraphs[:20_000])
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    rows = windows(tokenizer, paragraphs)
    print(f"text and tokenizer {time.time() - started:.0f} s", flush=True)
    save(pretrain(rows, steps))
    print(f"total {time.time() - started:.0f} s")


if __name__ == "__main__":
    disable_progress_bar()
    torch.set_num_threads(THREADS)
    if sys.argv[1:] == ["check"]:
        check()
    else:
        make(STEPS)
