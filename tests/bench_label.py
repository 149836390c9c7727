"""What labelling costs: next to generating the judge's answer, and next to plain forward passes over the same tokens.

    python tests/bench_label.py                                              # the miniature, under a minute
    python tests/bench_label.py --memory                                     # 1 GB of text against 10 MB of it
    python tests/bench_label.py --judge openchat/openchat-3.5-0106 --pile 00.jsonl.zst       # a real judge

The prompt is label_pile.py's own, question and turn (the miniature knows few of its words, which costs no time).
Labelling reads yes and no at the first position of the answer, the question's cache shared by all chunks. Generating is
model.generate of 8 tokens, greedy, padded on the left, as a script without label_pile.py's ways would have it. Plain
passes process the token tensors that labelling gave the model: the question once, then every batch of the rest of the
rows, padding included. They have no cache, so their tokens attend only to their own row, and one position of a row gets
logits. All are timed in turn, and medians of the ratios are printed. Exit status 1 if generating takes less than 5
times as long as labelling, or labelling more than 1.1 times as long as the plain passes.

--memory reads 10 MB and 1 GB of text, the documents repeated in a .jsonl.zst, in a process each as label_pile.py does
(a thousandth of the documents is cut into chunks), and prints the peaks of resident memory. Exit status 1 if the second
is over 1.1 times the first.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path


def parse_args(argv=None):
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=form)
    add = parser.add_argument
    add("--judge", default=None, help="hub name or directory; None: the miniature's base")
    add("--pile", default=None, help="documents; None: the miniature's")
    add("--chunks", type=int, default=256, help="chunks to judge")
    add("--batch", type=int, default=16, help="chunks per batch")
    add("--rounds", type=int, default=3, help="times that all are timed in turn")
    add("--memory", action="store_true", help="compare the memory of reading 1 GB with that of 10 MB instead")
    add("--read", default=None, metavar="FILE", help="only read FILE and print the peak bytes")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()  # before torch is imported

import torch
from transformers import AutoTokenizer

from timing import DEVICE, in_turn, median_ratio
from common import bos, load_model, logits, peak_bytes, read_rows
from label_pile import QUESTION, TINY, frame, judge, plain, read_chunks


def generate(model, tokenizer, texts, head, tail, batch):
    """8 tokens after each prompt, `batch` at a time, padded on the left."""
    before = bos(tokenizer) + tokenizer(head, add_special_tokens=False).input_ids
    after = tokenizer(tail, add_special_tokens=False).input_ids
    for i in range(0, len(texts), batch):
        rows = [before + ids + after for ids in plain(tokenizer, texts[i : i + batch]).input_ids]
        T = max(map(len, rows))
        ids = torch.tensor([[0] * (T - len(r)) + r for r in rows], device=model.device)
        mask = torch.tensor([[0] * (T - len(r)) + [1] * len(r) for r in rows], device=model.device)
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False)


def batches_of(model, work, *args):
    """The token ids (B, T) of every forward pass that work(*args) makes."""
    found = []
    hook = model.base_model.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    work(*args)
    hook.remove()
    return found


@torch.inference_mode()
def plain_forward(model, batches):
    """Forward passes over whole batches, logits at the last position of each row."""
    for ids in batches:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits(model, hidden[:, -1])


def memory(source):
    """Peak bytes of reading 10 MB and 1 GB of text, as a ratio; printed."""
    import zstandard

    lines = [json.dumps(row) for row in read_rows(source, "--pile", ("text",), streaming=True)]
    block = ("\n".join(lines) + "\n").encode()
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        for size in (10_000_000, 1_000_000_000):
            path = Path(folder) / f"{size}.jsonl.zst"
            with open(path, "wb") as f, zstandard.ZstdCompressor(level=1).stream_writer(f) as z:
                for _ in range(size // len(block) + 1):
                    z.write(block)
            start, command = time.perf_counter(), [sys.executable, __file__, "--read", path]
            peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]))
            spent = time.perf_counter() - start
            print(f"{size / 1e6:.0f} MB of text: peak {peaks[-1] / 1e6:.0f} MB, {spent:.0f} s", flush=True)
    print(f"1 GB over 10 MB: {peaks[1] / peaks[0]:.3f} (limit 1.1)")
    return peaks[1] / peaks[0]


def main(args):
    rows = read_rows(args.read or args.pile or TINY["pile"], "--pile", ("text",), streaming=True)
    if args.read:
        tokenizer = AutoTokenizer.from_pretrained(args.judge or TINY["judge"])
        n = sum(1 for _ in read_chunks(rows, tokenizer, 207, (0, 1000), 1e12, None))
        print(n, "chunks", peak_bytes())
        return 0
    if args.memory:
        return int(memory(args.pile or TINY["pile"]) > 1.1)
    model, tokenizer = load_model(args.judge or TINY["judge"])
    head, tail = frame(tokenizer, QUESTION, "biology", chat=True)
    texts = [c[1] for c, _ in zip(read_chunks(rows, tokenizer, 207, (0, 1), 1e12, None), range(args.chunks))]
    budget = args.batch * max(len(i) for i in tokenizer([head + t + tail for t in texts]).input_ids)
    label = (judge, model, tokenizer, texts, head, tail, budget)
    batches, times = batches_of(model, *label), []
    works = label, (generate, model, tokenizer, texts, head, tail, args.batch), (plain_forward, model, batches)
    for ours, generated, passed in in_turn(args.rounds, *(partial(*work) for work in works)):
        times.append((ours, generated, passed))
        pace = [f"{what} {len(texts) / s:.0f}" for what, s in zip(("labelling", "generating", "plain passes"), times[-1])]
        print(f"{' | '.join(pace)} chunks/s | {generated / ours:.1f} x | {ours / passed:.3f} x", flush=True)
    faster, over = median_ratio((g, o) for o, g, _ in times), median_ratio((o, p) for o, _, p in times)
    where = f"{DEVICE}, batch {args.batch}, {sum(ids.numel() for ids in batches)} tokens"
    print(f"generating takes {faster:.1f} times as long as labelling (at least 5) | {where}")
    print(f"labelling takes {over:.3f} times as long as plain passes over its tokens (limit 1.1) | {where}")
    return int(faster < 5 or over > 1.1)


if __name__ == "__main__":
    sys.exit(main(args))
