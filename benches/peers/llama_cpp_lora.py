"""Logits of llama.cpp for given token ids, with or without a LoRA adapter, as a .npy file.

    python llama_cpp_lora.py BASE.gguf OUT.npy --ids 1,2,3 [--lora ADAPTER.gguf] [--scale 1.0]
    python llama_cpp_lora.py BASE.gguf OUT.npy --ids-file IDS.json
    python llama_cpp_lora.py BASE.gguf OUT.npy --text "Name three fruits."
    python llama_cpp_lora.py --compare A.npy B.npy

The file is float32 `(tokens, vocab)`: row i has the logits for what follows token i. `--compare` prints the largest
difference, that relative to the largest logit, and the least cosine of two such files' rows.
"""

import argparse
import json
import os
from pathlib import Path

import numpy


def compare(first, second):
    a, b = (numpy.load(file).astype(numpy.float64) for file in (first, second))
    assert a.shape == b.shape, (a.shape, b.shape)
    difference = float(numpy.abs(a - b).max())
    cosine = (a * b).sum(axis=1) / numpy.linalg.norm(a, axis=1) / numpy.linalg.norm(b, axis=1)
    relative = difference / float(numpy.abs(a).max())
    print(json.dumps(dict(rows=a.shape[0], largest=difference, relative=relative, cosine=float(cosine.min()))))


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("files", nargs=2, type=Path)
    arguments.add_argument("--compare", action="store_true")
    arguments.add_argument("--ids")
    arguments.add_argument("--ids-file", type=Path, help="a JSON list of ids")
    arguments.add_argument("--text")
    arguments.add_argument("--lora", type=Path)
    arguments.add_argument("--scale", type=float, default=1.0)
    arguments.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = arguments.parse_args()
    if arguments.compare:
        return compare(*arguments.files)

    from llama_cpp import Llama

    base, out = arguments.files
    if arguments.text is None:
        given = arguments.ids_file.read_text() if arguments.ids_file else f"[{arguments.ids}]"
        ids = json.loads(given)
    else:
        with_vocabulary = Llama(str(base), vocab_only=True, verbose=False)
        ids = with_vocabulary.tokenize(arguments.text.encode(), add_bos=False, special=True)
        print("ids", ids)
    model = Llama(
        str(base),
        lora_path=str(arguments.lora) if arguments.lora else None,
        lora_scale=arguments.scale,
        n_ctx=max(len(ids), 32),
        n_batch=max(len(ids), 32),
        n_threads=arguments.threads,
        n_threads_batch=arguments.threads,
        logits_all=True,
        verbose=False,
    )
    model.eval(ids)
    logits = numpy.array(model.scores[: len(ids)], dtype=numpy.float32)
    numpy.save(out, logits)
    print(f"{out}: {logits.shape}, best next after the last: {int(logits[-1].argmax())}")


if __name__ == "__main__":
    main()
