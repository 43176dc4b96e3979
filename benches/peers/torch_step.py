"""Seconds for one LoRA step of SmolLM2-135M-Instruct by PyTorch and peft on the processor, in float32.

    python torch_step.py PATH/TO/SmolLM2-135M-Instruct.Q4_1.gguf [--steps 7] [--threads N]

Prints each step's seconds and the median, and last one line of JSON.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("gguf", type=Path)
    arguments.add_argument("--batch", type=int, default=4)
    arguments.add_argument("--seq", type=int, default=128)
    arguments.add_argument("--rank", type=int, default=8)
    arguments.add_argument("--targets", nargs="+", default=["q_proj", "v_proj"])
    arguments.add_argument("--steps", type=int, default=7, help="timed steps, after two that are not")
    arguments.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = arguments.parse_args()
    disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    gguf = arguments.gguf.resolve()
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.config.use_cache = False
    adapted = get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=arguments.rank,
            lora_alpha=2 * arguments.rank,
            lora_dropout=0.0,
            target_modules=arguments.targets,
        ),
    )
    adapted.train()
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.01)
    ids = torch.randint(0, model.config.vocab_size, (arguments.batch, arguments.seq))

    seconds, losses = [], []
    for step in range(arguments.steps + 2):
        start = time.perf_counter()
        loss = adapted(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        taken = time.perf_counter() - start
        losses.append(float(loss.detach()))
        print(f"step {step}: {taken:.3f} s, loss {losses[-1]:.4f}{'' if step > 1 else ' (not counted)'}", flush=True)
        if step > 1:
            seconds.append(taken)
    median = statistics.median(seconds)
    print(f"median {median:.3f} s, {arguments.batch * arguments.seq / median:.0f} tokens/s, {arguments.threads} threads")
    print(
        json.dumps(
            dict(
                peer="torch",
                torch=torch.__version__,
                threads=arguments.threads,
                batch=arguments.batch,
                seq=arguments.seq,
                rank=arguments.rank,
                targets=arguments.targets,
                median_s=median,
                least_s=min(seconds),
                seconds=seconds,
            )
        )
    )


if __name__ == "__main__":
    main()
